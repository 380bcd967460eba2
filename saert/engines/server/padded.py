"""The key-value cache of many requests as one batch: right-aligned rows, padded on the left.

    row 0   · · · a b c d
    row 1   · x y z u v w        a pass adds a column; a request that leaves takes its row along,
    row 2   p q r s t u v        and columns that were only its own

This is the layout of `generate` with a batch of prompts, so every model that can do that can be
served, sliding windows and ALiBi included. Layers keep all columns, also those behind a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Padded:
    """Rows of a cache; `lengths` says how many tokens each holds."""

    def __init__(self) -> None:
        self.cache = DynamicCache()
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        """Columns."""
        return max(self.lengths, default=0)

    def join(self, caches: Sequence[tuple[Any, int]]) -> None:
        """Add rows at the end: the caches of single rows, and how many tokens each holds."""
        if not caches:
            return
        lengths = [*self.lengths, *(length for _, length in caches)]
        width, parts = max(lengths), [cache for cache, _ in caches]
        if self.lengths:
            parts.insert(0, self.cache)
        joined = DynamicCache()
        for layer, (keys, values) in _layers(parts[0]):
            pairs = [(keys, values), *(_layer(part, layer) for part in parts[1:])]
            keys, values = (_stack([pair[i] for pair in pairs], width) for i in (0, 1))
            joined.update(keys, values, layer)
        self.cache, self.lengths = joined, lengths

    def keep(self, rows: Sequence[int]) -> None:
        """These rows only, in this order."""
        lengths = [self.lengths[row] for row in rows]
        kept = DynamicCache()
        if lengths:
            width = max(lengths)
            for layer, (keys, values) in _layers(self.cache):
                chosen, begin = torch.tensor(rows, device=keys.device), keys.shape[2] - width
                keys, values = (t[:, :, begin:].index_select(0, chosen) for t in (keys, values))
                kept.update(keys, values, layer)
        self.cache, self.lengths = kept, lengths

    def next(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For a pass of one token per row: the mask int64 [rows, width + 1], positions [rows]."""
        lengths = torch.tensor(self.lengths)
        columns = torch.arange(self.width + 1)
        mask = (columns >= self.width - lengths[:, None]).long()
        return mask.to(device), lengths.to(device)

    def grown(self) -> None:
        """A pass has added a token to every row."""
        self.lengths = [length + 1 for length in self.lengths]


def check(cache: Any) -> None:
    """Raise ValueError for a cache that cannot be put in rows with others."""
    layers = getattr(cache, "layers", [])
    odd = [layer for layer in layers if layer.is_initialized and type(layer) is not DynamicLayer]
    if not layers or odd:
        what = f"a {type(odd[0]).__name__}" if odd else "a state of its own"
        raise ValueError(
            f"the model keeps its past in {what}, so that requests cannot share a batch; expected "
            "keys and values of attention layers"
        )


def _layers(cache: Any) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """Keys and values by layer; a layer that shares another's has none."""
    return [
        (i, (layer.keys, layer.values)) for i, layer in enumerate(cache.layers) if _filled(layer)
    ]


def _layer(cache: Any, i: int) -> tuple[Tensor, Tensor]:
    return cache.layers[i].keys, cache.layers[i].values


def _filled(layer: Any) -> bool:
    return bool(layer.is_initialized and layer.keys.numel())


def _stack(tensors: Sequence[Tensor], width: int) -> Tensor:
    return torch.cat([pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])
