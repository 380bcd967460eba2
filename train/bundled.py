"""The embedded default: text → tokenizer → language model → SAEs → metrics → model cards.

Each stage is skipped when its own output exists, and continues from its checkpoint when it was
cut: the same command finishes a stopped run. Under torchrun the ranks share the language model's
batches, and then each trains its own share of the SAEs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from saert.hub.format import save
from saert.train import cards
from saert.train.config import Recipe
from saert.train.data import (
    CUT_ID,
    END_ID,
    Segment,
    frame,
    pack,
    read_windows,
    segments,
    split_windows,
)
from saert.train.evaluate import evaluate
from saert.train.language_model import (
    bits_per_character,
    new_model,
    train_language_model,
    train_tokenizer,
)
from saert.train.loop import train_saes

BASE_MODEL = "saert/bundled-tinystories"
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
    """Train this rank's share of `out/saes/<hookpoint>`, measure it and write its card."""
    config, (rank, world) = recipe.sae, rank_and_world()
    wanted = [(h, None) for h in config.hookpoints] + list(config.transcoders)
    pairs = [
        (Hookpoint.parse(h), None if target is None else Hookpoint.parse(target))
        for h, target in wanted[rank::world]
        if not (out / "saes" / h / "README.md").exists()
    ]
    if not pairs:
        return
    context = recipe.language_model.context
    checkpoint = work / ("saes-" + "-".join(str(h) for h, _ in pairs) + ".pt")
    documents = tokenize(tokenizer, corpus.train)
    saes = train_saes(model, documents, pairs, config, context, checkpoint, progress=rank == 0)
    heldout = pack(tokenize(tokenizer, corpus.heldout), context, seed=0)[:-1]  # the last is padded
    for sae in saes:
        folder = out / "saes" / str(sae.hookpoint)
        metrics = asdict(evaluate(model, sae, heldout))
        sae.metadata = metadata(model, recipe, metrics)
        save(sae, folder)
        _write_json(folder / "metrics.json", metrics)
        (folder / "README.md").write_text(cards.sae(sae, recipe, metrics), encoding="utf-8")


def metadata(model: Any, recipe: Recipe, metrics: dict[str, Any]) -> dict[str, Any]:
    """What an SAE's cfg.json says of where it comes from and how good it is."""
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {
        "base_model": BASE_MODEL,
        "base_model_config": {name: getattr(model.config, name) for name in fields},
        "context_size": recipe.language_model.context,
        "training": {"recipe": recipe.name, **asdict(recipe.sae)},
        "metrics": metrics,
    }


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
