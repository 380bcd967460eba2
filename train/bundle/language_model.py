"""A small GPT-2-architecture language model with its own byte-level BPE tokenizer.

AdamW, linear warm-up, constant rate, linear decay to zero. Checkpoints hold the whole state and a
batch is a function of its step, so a stopped run continues as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saert.train.bundle.config import LanguageModelConfig
from saert.train.bundle.windows import CUT, CUT_ID, END, END_ID, Rows, Segment
from saert.train.schedule import trapezoid


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. A text encodes behind `<|endoftext|>`: a prompt starts a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, CUT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, END_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[CUT],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(config: LanguageModelConfig, vocab_size: int) -> GPT2LMHeadModel:
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.context,
            n_embd=config.d_model,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # gelu_new's formula, in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
            pad_token_id=END_ID,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        suppress_tokens=[CUT_ID],  # it says that a training text was cut, never part of a story
        max_length=config.context,
        do_sample=True,
        temperature=0.5,
        top_p=0.95,
    )
    return model


def _optimiser(model: GPT2LMHeadModel, config: LanguageModelConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )


def train_language_model(
    model: GPT2LMHeadModel,
    documents: Sequence[Sequence[int]],
    config: LanguageModelConfig,
    checkpoint: Path | None = None,
    *,
    stop: int | None = None,
    every: int = 250,
    progress: bool = True,
) -> GPT2LMHeadModel:
    """Train in place from `checkpoint`, if it exists, up to step `stop` (default: the last).

    In a process group the ranks share each batch and average their gradients.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = Rows(documents, config.context, config.batch, config.seed)
    optimiser = _optimiser(model, config)
    done = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
    last = config.steps if stop is None else min(stop, config.steps)

    bar = Progress(
        *Progress.get_default_columns(),
        TextColumn("{task.fields[note]}"),
        disable=not progress or rank > 0,
    )
    task = bar.add_task("language model", total=config.steps, completed=done, note="")
    bar.start()
    model.train()
    for step in range(done, last):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * trapezoid(step, config.steps, config.warmup, config.decay)
        batch = rows[step]
        part = batch[rank::world]
        logits = model(part, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        if world > 1:
            _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        optimiser.zero_grad()
        bar.update(task, completed=step + 1)
        if step % 10 == 0:
            bar.update(task, note=f"loss {loss.item():.3f}")
        if checkpoint is not None and rank == 0 and ((step + 1) % every == 0 or step + 1 == last):
            state = {
                "step": step + 1,
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)  # a cut write never destroys the last good state
    bar.stop()
    model.eval()
    return model


def _average_gradients(model: GPT2LMHeadModel) -> None:
    """One all-reduce of all gradients: on CPUs its latency costs more than its bytes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@dataclass(frozen=True)
class BitsPerCharacter:
    """Cross-entropy of text in bits per character, the unit in which tokenizers compare."""

    nats: float
    characters: int
    tokens: int
    segments: int

    @property
    def value(self) -> float:
        return self.nats / math.log(2) / self.characters


@torch.no_grad()
def bits_per_character(
    model: Any,
    encode: Callable[[Segment], tuple[list[int], list[int]]],
    segments: Sequence[Segment],
    batch: int = 16,
) -> BitsPerCharacter:
    """Score the stripped text of each segment, after context tokens that are not scored.

    `encode(segment)` gives (context ids, text ids). The sum runs over all text tokens; a text
    longer than the model's context is scored in pieces, each after the context tokens.
    """
    encoded: list[tuple[list[int], list[int]]] = []
    for context, text in map(encode, segments):
        room = model.config.max_position_embeddings - len(context)
        encoded += [(context, text[i : i + room]) for i in range(0, len(text), room)]
    encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    nats = 0.0
    for i in range(0, len(encoded), batch):
        part = encoded[i : i + batch]
        width = max(len(c) + len(t) for c, t in part)
        ids = torch.zeros(len(part), width, dtype=torch.int64)
        scored = torch.zeros(len(part), width, dtype=torch.bool)
        for row, (context, text) in enumerate(part):
            ids[row, : len(context) + len(text)] = torch.tensor(context + text)
            scored[row, len(context) : len(context) + len(text)] = True
        losses = _token_losses(model, ids)
        nats += losses[scored[:, 1:]].double().sum().item()
    return BitsPerCharacter(
        nats,
        sum(len(s.text.strip()) for s in segments),
        sum(len(text) for _, text in encoded),
        len(segments),
    )


def _token_losses(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, `[batch, sequence - 1]`, in nats."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
