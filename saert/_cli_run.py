"""What the commands compute, as plain data: continuations, log-probabilities, features."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from saert.activations import JumpReLU, TopK
from saert.edits import Edit, LatentEdit
from saert.hub import bundled
from saert.hub.session import Loaded, Session, UserError
from saert.record import SAEReport
from saert.sparse import SparseCode


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the same seed gives every run of a command the same draws."""

    tokens: int = 40
    seed: int = 0
    sample: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class Token:
    """A generated token. `bare_logprob` is its log-probability under the model without edits."""

    id: int
    text: str
    logprob: float
    bare_logprob: float

    @property
    def change(self) -> float:
        """How much likelier the edits made it, in nats."""
        return self.logprob - self.bare_logprob


@dataclass(frozen=True)
class Continuation:
    """What the model said after the prompt."""

    text: str
    tokens: list[Token]
    milliseconds: float
    report: dict[str, SAEReport] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": [asdict(token) | {"change": token.change} for token in self.tokens],
            "milliseconds": self.milliseconds,
            "report": {where: asdict(one) for where, one in self.report.items()},
        }


@dataclass(frozen=True)
class Active:
    """A latent that fires at a token."""

    latent: int
    activation: float
    label: str | None


@dataclass(frozen=True)
class TokenFeatures:
    """A token of the prompt, how many latents fire there, and the strongest of them."""

    position: int
    id: int
    text: str
    l0: int
    latents: list[Active]


@dataclass(frozen=True)
class Features:
    """The active latents of one SAE at every token of a prompt."""

    source: str
    hookpoint: str
    tokens: list[TokenFeatures]
    traced: dict[int, list[float]]  # latent -> its activation at every token
    report: SAEReport
    code: SparseCode

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "hookpoint": self.hookpoint,
            "tokens": [asdict(token) for token in self.tokens],
            "traced": {str(latent): values for latent, values in self.traced.items()},
            "report": asdict(self.report),
        }


@dataclass(frozen=True)
class Overhead:
    """Generating with the SAEs attached and nothing edited, against the bare model."""

    bare_ms: float
    observed_ms: float
    identical: bool

    @property
    def ratio(self) -> float:
        return self.observed_ms / self.bare_ms

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def continue_prompt(
    session: Session,
    prompt: str,
    how: Sampling,
    edits: Sequence[Edit] | None = None,
    *,
    splice: bool = False,
) -> Continuation:
    """Generate with `edits` in force; with None the model is bare, and no SAE is attached."""
    inputs = session.encode(prompt, how.tokens)
    if edits is None:
        ids, scores, took = _generate(session, inputs, how)
        report = {}
    else:
        with session.attach(edits, splice=splice) as attachment:
            ids, scores, took = _generate(session, inputs, how)
            report = attachment.report()
    logprobs = _logprobs(scores, ids)
    bare = logprobs if edits is None else _bare_logprobs(session, inputs, ids)
    tokens = [
        Token(*parts)
        for parts in zip(ids.tolist(), session.text(ids.tolist()), logprobs, bare, strict=True)
    ]
    text = str(session.tokenizer.decode(ids, skip_special_tokens=True))
    return Continuation(text, tokens, took, report)


def read_features(
    session: Session, prompt: str, top: int, trace: Sequence[tuple[Loaded, int]] = ()
) -> list[Features]:
    """Per SAE, what fires at each token of the prompt."""
    inputs = session.encode(prompt)
    with session.attach() as attachment, torch.no_grad():
        session.model(**inputs)
        codes = [attachment.codes[one.sae][0].to("cpu") for one in session.saes]
        reports = attachment.report().values()
    ids = inputs["input_ids"][0].tolist()
    texts = session.text(ids)
    found = []
    for loaded, code, report in zip(session.saes, codes, reports, strict=True):
        tokens = [
            TokenFeatures(t, ids[t], texts[t], int(code.l0()[t]), strongest(loaded, code[t], top))
            for t in range(len(ids))
        ]
        latents = [latent for owner, latent in trace if owner is loaded]
        traced = code.at(torch.tensor(latents, dtype=torch.int64)).T.tolist() if latents else []
        found.append(
            Features(
                loaded.source,
                loaded.name,
                tokens,
                dict(zip(latents, traced, strict=True)),
                report,
                code,
            )
        )
    return found


def strongest(loaded: Loaded, code: SparseCode, top: int) -> list[Active]:
    """A token's active latents, strongest first: `top` of them, and all that have a label."""
    pairs = [
        (latent, value)
        for latent, value in zip(code.indices.tolist(), code.values.tolist(), strict=True)
        if value != 0
    ]
    pairs.sort(key=lambda pair: (-pair[1], pair[0]))
    found = [Active(latent, value, loaded.label(latent)) for latent, value in pairs]
    return found[:top] + [one for one in found[top:] if one.label]


def peaks(features: Features) -> list[tuple[int, float]]:
    """Latents of a prompt by their largest activation. The first token is left out if it is not
    the only one: models use it as a sink, and its latents say nothing about the prompt."""
    code = features.code[1:] if len(features.tokens) > 1 else features.code
    largest = code.to_dense().amax(0)
    values, latents = largest.topk(min(16, largest.numel()))
    pairs = zip(latents.tolist(), values.tolist(), strict=True)
    return [(latent, value) for latent, value in pairs if value > 0]


def measure_overhead(session: Session, prompt: str, how: Sampling, repeats: int = 3) -> Overhead:
    """Medians of alternating runs, and whether the tokens are the same (they must be)."""
    inputs = session.encode(prompt, how.tokens)
    times: tuple[list[float], list[float]] = ([], [])
    seen: list[tuple[list[int], Tensor]] = []
    for _ in range(repeats):
        for attached, column in enumerate(times):
            if attached:
                with session.attach():
                    ids, scores, took = _generate(session, inputs, how)
            else:
                ids, scores, took = _generate(session, inputs, how)
            column.append(took)
            seen.append((ids.tolist(), scores))
    first_ids, first_scores = seen[0]
    identical = all(ids == first_ids and torch.equal(s, first_scores) for ids, s in seen[1:])
    return Overhead(statistics.median(times[0]), statistics.median(times[1]), identical)


@dataclass(frozen=True)
class Suggestion:
    """Edits worth trying on a prompt, as the options spell them."""

    steer: str
    ablate: str


def suggest(loaded: Loaded, features: Features) -> Suggestion:
    """What `bundled.DEMO` says of its own SAE; elsewhere, the prompt's strongest latent is ablated
    and the second steered to three times its activation."""
    if loaded.source == f"{bundled.NAME}:{bundled.DEMO.hookpoint}":
        latent, amount = bundled.DEMO.steer
        return Suggestion(f"{latent}:{amount}", str(bundled.DEMO.ablate))
    loudest = peaks(features)
    if not loudest:
        raise UserError(f"no latent of {loaded.source} fires on this prompt; name one with --steer")
    latent, value = loudest[min(1, len(loudest) - 1)]
    return Suggestion(f"{latent}:{value * 2:.3g}", str(loudest[0][0]))


def describe_sae(loaded: Loaded) -> dict[str, Any]:
    """What an SAE is, as plain facts."""
    sae = loaded.sae
    activation: dict[str, Any] = {"type": type(sae.activation).__name__}
    if isinstance(sae.activation, TopK):
        activation["k"] = sae.activation.k
    elif isinstance(sae.activation, JumpReLU):
        threshold = sae.activation.threshold
        activation["threshold"] = (
            threshold.item()
            if threshold.dim() == 0
            else [threshold.min().item(), threshold.max().item()]
        )
    transform = sae.input_transform
    tensors = [*sae.parameters(), *sae.buffers()]
    metadata = dict(sae.metadata)
    metrics = metadata.pop("metrics", None)
    return {
        "source": loaded.source,
        "hookpoint": None if sae.hookpoint is None else str(sae.hookpoint),
        "target_hookpoint": None if sae.target_hookpoint is None else str(sae.target_hookpoint),
        "d_in": sae.d_in,
        "num_latents": sae.num_latents,
        "d_out": sae.d_out,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "activation": activation,
        "input_transform": {"type": type(transform).__name__} | vars(transform),
        "subtract_b_dec": sae.subtract_b_dec,
        "select_by_decoder_norm": sae.select_by_decoder_norm,
        "skip": sae.W_skip is not None,
        "parameters": sum(tensor.numel() for tensor in sae.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "labels": len(loaded.labels),
        "metrics": metrics if isinstance(metrics, Mapping) else {},
        "metadata": metadata,
    }


def describe_model(name: str, model: Any) -> dict[str, Any]:
    """What a language model is, as plain facts."""
    config = model.config.get_text_config()
    parameters = list(model.parameters())
    return {
        "source": name,
        "architecture": type(model).__name__,
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "vocabulary": getattr(config, "vocab_size", None),
        "context": getattr(config, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(tensor.numel() for tensor in parameters),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in parameters),
    }


def describe_edit(edit: Edit, session: Session) -> dict[str, Any]:
    """An edit as JSON."""
    assert isinstance(edit, LatentEdit)
    owner = next(one for one in session.saes if one.sae is edit.select.sae)
    positions = edit.select.positions
    return {
        "op": edit.op.name.lower(),
        "latents": list(edit.latents),
        "labels": [owner.label(latent) for latent in edit.latents],
        "amount": float(edit.amount),
        "hookpoint": owner.name,
        "positions": str(positions) if isinstance(positions, slice) else positions,
        "phase": edit.select.phase,
    }


def _generate(session: Session, inputs: Any, how: Sampling) -> tuple[Tensor, Tensor, float]:
    """New token ids [T], the logits they were drawn from [T, vocabulary], milliseconds."""
    torch.manual_seed(how.seed)
    options: dict[str, Any] = {"do_sample": how.sample}
    if how.sample:
        options |= {"temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    pad = session.tokenizer.pad_token_id
    begun = time.perf_counter()
    with torch.no_grad():
        out = session.model.generate(
            **inputs,
            **options,
            max_new_tokens=how.tokens,
            pad_token_id=session.tokenizer.eos_token_id if pad is None else pad,
            return_dict_in_generate=True,
            output_logits=True,
        )
    took = (time.perf_counter() - begun) * 1000
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    return ids, torch.cat(out.logits), took


def _bare_logprobs(session: Session, inputs: Any, ids: Tensor) -> list[float]:
    """Log-probability of each generated token under the model without SAEs, in one pass."""
    prompt = inputs["input_ids"]
    whole = torch.cat([prompt, ids[None]], 1)
    with torch.no_grad():
        logits = session.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
    return _logprobs(logits[0, prompt.shape[1] - 1 : -1], ids)


def _logprobs(scores: Tensor, ids: Tensor) -> list[float]:
    chosen = scores.float().log_softmax(-1).gather(-1, ids[:, None])
    return [float(value) for value in chosen[:, 0]]
