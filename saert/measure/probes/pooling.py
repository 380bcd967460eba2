"""From labelled texts to one sparse code an example: activations pooled over its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saert.measure.passes import encoded
from saert.measure.probes.newton import Columns
from saert.measure.progress import tracked
from saert.sae import SAE

Pool = Literal["max", "mean", "last"]
POOLS: tuple[Pool, ...] = ("max", "mean", "last")


@dataclass(frozen=True)
class Pooled:
    """N examples as an SAE and the model see them.

    Attributes:
        columns: pooled activations, [N, num_latents] latent by latent, on the CPU.
        dense: float32 [N, d_in], the hidden state: the last token's for `last`, else the mean.
        tokens: int64 [N], the tokens of each example. 0: cut off, or an empty text.
        cut: texts that did not fit the context; their first tokens were read.
    """

    columns: Columns
    dense: Tensor
    tokens: Tensor
    cut: int


@torch.no_grad()
def pooled(
    model: Any,
    tokenizer: Any,
    sae: SAE,
    texts: Sequence[str],
    *,
    pool: Pool = "max",
    text_of: Tensor | None = None,
    spans: Tensor | None = None,
    context: int | None = None,
    batch: int = 16,
    progress: bool = False,
    name: str = "reading",
) -> Pooled:
    """Activations of each example, pooled over its tokens; special tokens and padding left out.

    Args:
        texts: read one by one, `batch` of about the same length at a time.
        text_of, spans: parts of texts as examples: int64 [N], which text, and int64 [N, 2],
            characters start:end. A token belongs to every example that it overlaps. None: each
            text is an example.
        pool: the largest activation of the tokens, their mean, or that of the last token.
        context: tokens of a text that are read at most. None: what the model holds.

    Raises ValueError for spans without a fast tokenizer (only those say where a token lies).
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")
    if spans is not None and not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: labels "
            "of words need a fast tokenizer"
        )
    count = len(texts) if text_of is None else len(text_of)
    owner = torch.arange(count) if text_of is None else text_of
    read = [_read(tokenizer, text, _limit(model, context)) for text in texts]
    members: list[list[int]] = [[] for _ in texts]
    for example, text in enumerate(owner.tolist()):
        members[text].append(example)
    order = sorted(
        (at for at in range(len(texts)) if members[at]), key=lambda at: len(read[at].ids)
    )
    order = [at for at in order if read[at].ids]
    tokens = torch.zeros(count, dtype=torch.int64)
    dense = torch.zeros(count, sae.d_in)
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    starts = range(0, len(order), batch)
    for first in tracked(starts, name, progress, total=len(starts)):
        chosen = order[first : first + batch]
        examples = torch.tensor([example for at in chosen for example in members[at]])
        row = torch.tensor([r for r, at in enumerate(chosen) for _ in members[at]])
        ids, used, offsets = _padded([read[at] for at in chosen])
        inside = used[row]  # [examples, context]: the tokens of each
        if spans is not None:
            start, end = spans[examples].unbind(-1)
            begins, ends = offsets[row].unbind(-1)
            inside = inside & (begins < end[:, None]) & (ends > start[:, None])
        tokens[examples] = inside.sum(1)
        if pool == "last":
            last = torch.arange(1, inside.shape[1] + 1).mul(inside).argmax(1, keepdim=True)
            inside = torch.zeros_like(inside).scatter_(1, last, inside.any(1, keepdim=True))
        (found,) = encoded(model, sae, ids, batch=len(ids))
        member, token = inside.nonzero().unbind(-1)  # pairs of an example and one of its tokens
        share = 1 / inside.sum(1).clamp(min=1)
        x = found.x.cpu().float()[row[member], token] * share[member, None]
        dense[examples] = x.new_zeros(len(examples), sae.d_in).index_add_(0, member, x)
        code = found.code.to("cpu")
        indices = code.indices[row[member], token]
        values = code.values[row[member], token]
        if pool == "mean":
            values = values * share[member, None]
        entries.append(_grouped(examples[member], indices, values, sae.num_latents, pool))
    if not entries:
        raise ValueError(f"{name}: not one of {len(texts)} texts has a token")
    examples, latents, values = (torch.cat(parts) for parts in zip(*entries, strict=True))
    columns = Columns.from_entries(examples, latents, values, count, sae.num_latents)
    return Pooled(columns, dense, tokens, sum(one.cut for one in read))


def _grouped(
    examples: Tensor, indices: Tensor, values: Tensor, num_latents: int, pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each (example, latent) once: [P], [P, k], [P, k] -> examples, latents, activations."""
    keys = (examples[:, None] * num_latents + indices)[values != 0]
    keys, place = keys.unique(return_inverse=True)
    found = values.new_zeros(len(keys))
    found.scatter_reduce_(
        0, place, values[values != 0], "sum" if pool == "mean" else "amax", include_self=False
    )
    return keys // num_latents, keys % num_latents, found


@dataclass(frozen=True)
class _Read:
    """A text as tokens: ids, whether each is real, and its characters; `cut` if there were more."""

    ids: list[int]
    real: list[bool]
    offsets: list[tuple[int, int]]
    cut: bool


def _read(tokenizer: Any, text: str, limit: int) -> _Read:
    fast = getattr(tokenizer, "is_fast", False)
    found = tokenizer(
        text, return_special_tokens_mask=True, return_offsets_mapping=fast, verbose=False
    )
    ids, special = list(found["input_ids"]), found["special_tokens_mask"]
    offsets = list(found["offset_mapping"]) if fast else [(0, 0)] * len(ids)
    real = [not one for one in special]
    return _Read(ids[:limit], real[:limit], offsets[:limit], len(ids) > limit)


def _padded(texts: list[_Read]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, used [texts, longest] and offsets [texts, longest, 2], padded on the right.

    The padding repeats a real token: a model's own padding token would make transformers warn.
    """
    longest = max(len(one.ids) for one in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    used = torch.zeros(len(texts), longest, dtype=torch.bool)
    offsets = torch.zeros(len(texts), longest, 2, dtype=torch.int64)
    for at, one in enumerate(texts):
        ids[at] = one.ids[-1]
        ids[at, : len(one.ids)] = torch.tensor(one.ids)
        used[at, : len(one.ids)] = torch.tensor(one.real)
        offsets[at, : len(one.ids)] = torch.tensor(one.offsets)
    return ids, used, offsets


def _limit(model: Any, context: int | None) -> int:
    """Tokens that the model holds, or `context` if that is less; 2,048 where it does not say."""
    holds = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    if context is not None and not 0 < context <= holds:
        raise ValueError(f"context is {context}, expected 1 to {holds}, what the model holds")
    return int(context or holds)
