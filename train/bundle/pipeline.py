"""The embedded default: text → tokenizer → language model → SAEs → metrics → model cards.

Each stage is skipped when its own output exists, and continues from its checkpoint when it was
cut: the same command finishes a stopped run. Under torchrun the ranks share the batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.format import save
from saert.measure.reports.evaluate import evaluate
from saert.train.bundle import cards
from saert.train.bundle.config import Recipe, SAEConfig
from saert.train.bundle.language_model import (
    bits_per_character,
    new_model,
    train_language_model,
    train_tokenizer,
)
from saert.train.bundle.windows import (
    CUT_ID,
    END_ID,
    PackedRows,
    Segment,
    frame,
    pack,
    read_windows,
    segments,
    split_windows,
)
from saert.train.mesh import Mesh
from saert.train.objectives.topk import TopKObjective
from saert.train.run import Job, Plan, Run
from saert.train.stream import ActivationStream, StreamConfig
from saert.train.training import OptimiserConfig

PROMPT = "Once upon a time"

Encoder = Callable[[Segment], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Corpus:
    train: list[Segment]
    heldout: list[Segment]

    @classmethod
    def read(cls, texts: Sequence[Path], recipe: Recipe) -> Corpus:
        data = recipe.data
        train, heldout = split_windows(read_windows(texts), data.holdout, data.shingle, data.seed)
        return cls(segments(train), segments(heldout))


def tokenize(tokenizer: Any, found: Sequence[Segment]) -> list[list[int]]:
    """Framed token ids of every segment."""
    encoded = tokenizer([s.text for s in found], add_special_tokens=False)["input_ids"]
    return [frame(ids, segment) for ids, segment in zip(encoded, found, strict=True)]


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def language_model_stage(
    corpus: Corpus, recipe: Recipe, work: Path, out: Path, reference: Path | None = None
) -> tuple[Any, Any]:
    """Train or load `out/model`. `work` holds the tokenizer and checkpoints of a run under way."""
    folder, config, (rank, world) = out / "model", recipe.language_model, rank_and_world()
    if (folder / "README.md").exists():
        return _load(folder)
    if rank == 0 and not (work / "tokenizer.json").exists():
        texts = (s.text for s in corpus.train)
        train_tokenizer(texts, config.vocab_size, config.context).save_pretrained(work)
    if world > 1:
        dist.barrier()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    model = new_model(config, len(tokenizer))
    documents = tokenize(tokenizer, corpus.train)
    train_language_model(model, documents, config, work / "language_model.pt")
    if rank == 0:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        metrics = language_model_metrics(model, tokenizer, corpus.heldout, reference)
        _write_json(folder / "metrics.json", metrics)
        text = cards.language_model(
            recipe, model.num_parameters(), metrics, sample(model, tokenizer, PROMPT)
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
    if world > 1:
        dist.barrier()
    return _load(folder)


def _load(folder: Path) -> tuple[Any, Any]:
    model = GPT2LMHeadModel.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def language_model_metrics(
    model: Any, tokenizer: Any, heldout: Sequence[Segment], reference: Path | None
) -> dict[str, dict[str, float]]:
    """Bits per character of held-out text, by model; `starts` counts beginnings of stories only.

    The reference knows no text that starts in the middle, so `starts` is the fairer comparison.
    """
    scored: dict[str, tuple[Any, Encoder]] = {"bundled": (model, own_encoder(tokenizer))}
    if reference is not None:
        other = AutoModelForCausalLM.from_pretrained(reference).eval()
        encoder = bos_encoder(AutoTokenizer.from_pretrained(reference))
        scored[reference.name] = (other, encoder)
    starts = [s for s in heldout if s.starts]
    found: dict[str, dict[str, float]] = {}
    for name, (scored_model, encode) in scored.items():
        everything = bits_per_character(scored_model, encode, heldout)
        found[name] = {
            "bits_per_character": everything.value,
            "bits_per_character_starts": bits_per_character(scored_model, encode, starts).value,
            "characters": everything.characters,
            "tokens": everything.tokens,
        }
    return found


def own_encoder(tokenizer: Any) -> Encoder:
    """A story's beginning is scored after `<|endoftext|>`, a later part after `<|cut|>`."""

    def encode(segment: Segment) -> tuple[list[int], list[int]]:
        context = [END_ID if segment.starts else CUT_ID]
        return context, tokenizer.encode(segment.text.strip(), add_special_tokens=False)

    return encode


def bos_encoder(tokenizer: Any) -> Encoder:
    """Any text is scored after the tokenizer's first token of a text."""

    def encode(segment: Segment) -> tuple[list[int], list[int]]:
        text = tokenizer.encode(segment.text.strip(), add_special_tokens=False)
        return [tokenizer.bos_token_id], text

    return encode


def sample(model: Any, tokenizer: Any, prompt: str, seed: int = 0, tokens: int = 200) -> str:
    """A story by the model, cut after `tokens`."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_length=tokens)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def sae_stage(
    model: GPT2LMHeadModel,
    tokenizer: Any,
    corpus: Corpus,
    recipe: Recipe,
    work: Path,
    out: Path,
) -> None:
    """Train `out/saes/<hookpoint>`, measure them and write their cards. Ranks share the tokens."""
    c, context, mesh = recipe.sae, recipe.language_model.context, Mesh.of()
    if all((out / "saes" / job.name / "README.md").exists() for job in sae_jobs(c)):
        return
    rows = PackedRows(tokenize(tokenizer, corpus.train), context, c.seed)
    jobs = sae_jobs(c)
    stream = ActivationStream(
        lambda: model,
        rows,
        list(dict.fromkeys(s for job in jobs for s in (job.hookpoint, job.target) if s)),
        context,
        StreamConfig(c.batch_tokens, c.buffer_tokens, exclude_special=False),
        special=torch.zeros_like,
        mesh=mesh,
        seed=c.seed,
    )
    plan = Plan(
        steps=c.tokens // c.batch_tokens,
        optimiser=OptimiserConfig(
            lr=c.lr, warmup=c.warmup, decay=c.decay, dead_tokens=c.dead_tokens
        ),
        save_every=200,
    )
    run = Run(jobs, stream, plan, work / "saes", mesh)
    run.train(lambda step, logs: _say(step, plan.steps, logs) if mesh.is_first else None)
    heldout = pack(tokenize(tokenizer, corpus.heldout), context, seed=0)[:-1]  # the last is padded
    for member in run.members:
        sae, folder = member.sae(), out / "saes" / member.job.name
        if mesh.is_first:
            metrics = asdict(evaluate(model, sae, heldout))
            sae.metadata = metadata(model, recipe, metrics)
            save(sae, folder)
            _write_json(folder / "metrics.json", metrics)
            (folder / "README.md").write_text(cards.sae(sae, recipe, metrics), encoding="utf-8")
    mesh.wait()


def sae_jobs(c: SAEConfig) -> list[Job]:
    """TopK at every hookpoint, and the transcoders with their own size."""

    def job(read: str, write: str | None, num_latents: int, k: int) -> Job:
        objective = TopKObjective(k=k, aux=c.aux_coefficient, k_aux=c.k_aux)
        target = None if write is None else Hookpoint.parse(write)
        return Job(read, Hookpoint.parse(read), target, num_latents, objective, c.seed)

    return [job(h, None, c.num_latents, c.k) for h in c.hookpoints] + [
        job(h, target, c.transcoder_latents, c.transcoder_k) for h, target in c.transcoders
    ]


def _say(step: int, steps: int, logs: Mapping[str, Mapping[str, float]]) -> None:
    if step % 50 == 0 or step == steps:
        found = "  ".join(f"{h} {log['fvu']:.3f}/{log['dead']:.0%}" for h, log in logs.items())
        print(f"SAEs: step {step:,} of {steps:,}: {found}")


def metadata(model: Any, recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any]:
    """What an SAE's cfg.json says of where it comes from and how good it is."""
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {
        "base_model": bundled.BASE_MODEL,
        "base_model_config": {name: getattr(model.config, name) for name in fields},
        "context_size": recipe.language_model.context,
        "training": {"recipe": recipe.name, **asdict(recipe.sae)},
        "metrics": metrics,
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
