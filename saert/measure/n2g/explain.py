"""explain: N2G graphs of latents, with precision and recall (Gao et al. 2024, section 4.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saert.measure.identity import model_identity, sae_identity
from saert.measure.n2g.drafts import Maker
from saert.measure.n2g.examples import Sampler, random_keys
from saert.measure.n2g.explanations import Explanations, append, resume
from saert.measure.n2g.score import score
from saert.measure.passes import Encoded, Special, encoded, sites
from saert.measure.progress import tracked
from saert.sae import SAE

GROUP = 64  # latents scored and saved together
TOGETHER = 16  # latents whose altered texts share batches


def explain(
    model: Any,
    sae: SAE,
    rows: Tensor,
    latents: Sequence[int] | None = None,
    *,
    pad_token: int,
    sample: int | None = None,
    special: Special | None = None,
    train: int = 16,
    heldout: int = 16,
    seed: int = 0,
    bos: int | Literal["auto"] | None = "auto",
    evaluation: Tensor | None = None,
    batch: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> Explanations:
    """N2G explanations of latents from random activations on rows of text.

    For each latent, `train` random nonzero activations make its graph and `heldout` others measure
    recall; a latent with fewer activations splits those it has in the same proportion. Precision
    and correlation come from a pass over the evaluation set.

    Args:
        model, sae: a causal language model and an SAE or transcoder on it; what is explained are
            the latents' activations where the SAE reads.
        rows: int64 [rows, context].
        latents: which ones, in this order. None: all that fire in the rows, or a random `sample`
            of them; a larger sample with the same seed contains the smaller one.
        pad_token: what replaces a token to see whether it matters: `neutral_token(tokenizer)`, or
            any other that means little. Not the tokenizer's own padding or end-of-text, which many
            models read as the start of something new.
        special: rows -> bool, positions that are neither examples nor scored (special tokens,
            padding on the right). They still stand in the text that the model reads.
        bos: the token that begins every row and stays in front of every altered text, so that
            models which were trained behind a BOS are not asked what they do without one. "auto":
            the one that all of several rows begin with, if there is one. None: no token is kept, as
            in the original. A graph's START is the place behind it.
        evaluation: int64 [rows, context], other rows for precision and correlation. None: `rows`,
            without the tokens that a latent's own graph was built from.
        batch: rows at a time; memory is that of `batch` rows.
        out: a file that every finished group of latents is appended to. If it is there and its
            settings are these, only what is missing is done.

    Raises:
        ValueError: rows of the wrong shape or dtype, unknown latents, counts below their least,
            a `bos` that rows do not begin with, or a file of other settings.
    """
    rows = _checked(rows, "rows")
    scored = rows if evaluation is None else _checked(evaluation, "evaluation")
    if train < 1 or heldout < 0 or (sample is not None and sample < 1):
        raise ValueError(
            f"explain: found train={train}, heldout={heldout}, sample={sample}; expected at least "
            "1, 0 and 1"
        )
    begin = _bos(rows, scored, bos)
    left_out = behind(special, first := int(begin is not None))
    settings = {
        "model": model_identity(model, sae)["fingerprint"],
        "sae": sae_identity(sae)["fingerprint"],
        "hookpoint": str(sites(sae)[0]),
        "num_latents": sae.num_latents,
        "rows": _digest(rows),
        "evaluation": None if evaluation is None else _digest(scored),
        "left_out": _digest(torch.cat([left_out(part).flatten() for part in (rows, scored)])),
        "train": train,
        "heldout": heldout,
        "seed": seed,
        "pad_token": pad_token,
        "bos": begin,
    }
    wanted = None if latents is None else _known(latents, sae.num_latents)
    done = resume(out, settings)

    def read(part: Tensor, what: str) -> Iterator[Encoded]:
        passes = encoded(model, sae, part, batch=batch, special=left_out)
        return tracked(passes, what, progress, total=-(-len(part) // batch))

    mask = None
    if wanted is not None:
        if all(latent in done for latent in wanted):
            return Explanations(tuple(done[latent] for latent in wanted), settings)
        mask = torch.zeros(sae.num_latents, dtype=torch.bool)
        mask[wanted] = True
    sampler = Sampler(sae.num_latents, train + heldout, seed)
    sampler.read(read(rows, "Activations"), mask)
    if wanted is None:
        wanted = _alive(sampler.counts, sample, seed)
    missing = [latent for latent in wanted if latent not in done]
    maker = Maker(model, sae, rows, sampler, (train, heldout), pad_token, begin, batch)
    for group in _split(missing, GROUP):
        parts = tracked(_split(group, TOGETHER), "Graphs", progress)
        drafts = [draft for part in parts for draft in maker.drafts(part)]
        built_from = [[] if evaluation is not None else draft.train for draft in drafts]
        scores = score(
            [draft.graph for draft in drafts], group, read(scored, "Precision"), built_from, first
        )
        finished = [draft.explanation(scores, i) for i, draft in enumerate(drafts)]
        done |= {one.latent: one for one in finished}
        append(out, finished)
    return Explanations(tuple(done[latent] for latent in wanted), settings)


def neutral_token(tokenizer: Any) -> int:
    """What `explain` may put in place of a token: an underscore, with or without a space before it,
    as in OpenAI's code (" _", 4808 in GPT-2). Raises ValueError if the tokenizer has neither."""
    for text in (" _", "_"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    raise ValueError(
        f"{type(tokenizer).__name__} has no single token for ' _' or '_': choose pad_token yourself"
    )


def _checked(rows: Tensor, name: str) -> Tensor:
    if rows.dim() != 2 or rows.dtype != torch.int64 or not rows.numel():
        raise ValueError(
            f"explain: {name} is {rows.dtype} {list(rows.shape)}, expected token ids, int64 "
            "[rows, context], at least one"
        )
    return rows.cpu()


def _bos(rows: Tensor, scored: Tensor, bos: int | str | None) -> int | None:
    """The token in front of every row, None if there is none to keep."""
    heads = torch.cat([rows[:, 0], scored[:, 0]]).unique().tolist()
    if bos is None:
        return None
    if bos == "auto":
        return int(heads[0]) if len(heads) == 1 and len(rows) > 1 else None
    if heads != [bos]:
        raise ValueError(f"explain: bos is {bos}, but rows begin with {heads[:5]}")
    return int(bos)


def behind(special: Special | None, first: int) -> Special:
    """The positions that `special` leaves out, and those in front of `first`."""

    def left_out(rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows, dtype=torch.bool) if special is None else special(rows).clone()
        out[:, :first] = True
        return out

    return left_out


def _known(latents: Sequence[int], num_latents: int) -> list[int]:
    wanted = [int(latent) for latent in latents]
    if wrong := [latent for latent in wanted if not 0 <= latent < num_latents]:
        raise ValueError(f"explain: found latents {wrong[:5]}, the SAE has 0 to {num_latents - 1}")
    return list(dict.fromkeys(wanted))


def _alive(counts: Tensor, sample: int | None, seed: int) -> list[int]:
    """Latents that fire, in ascending order; `sample` of them by their hash."""
    alive = counts.nonzero().flatten().numpy()
    if sample is not None:
        alive = alive[np.argsort(random_keys(seed, alive, np.zeros_like(alive)))[:sample]]
    return sorted(alive.tolist())


def _digest(tensor: Tensor) -> str:
    shape = str(list(tensor.shape)).encode()
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return sha256(shape + data).hexdigest()[:16]


def _split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
