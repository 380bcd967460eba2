"""The exact selections on a chunk of scores, in plain PyTorch, for every device without Triton.

    top-k:      m[t, j] = max over group j of the row's ranks; the k largest entries of a row lie in
                the k groups of largest m, so only those groups are ranked
    threshold:  count, then place each kept entry behind the row's earlier ones

`torch.topk` breaks ties as it likes. Here the lowest latent wins: a tie shows as two equal
neighbours among the k + 1 largest, and only such rows are sorted again.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from saert.kernels import dispatch
from saert.kernels.operators import operator

FEW = 320  # entries that Python compares sooner than half a dozen torch calls do


def topk_rows(ranks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of each row [T, n], the lowest index first among equals.

    A NaN ranks above everything, so it shows in the first column. Entries at or below zero come in
    no particular order: they fill unused slots.
    """
    rows, n = ranks.shape
    want = min(k + 1, n)
    grouped = dispatch.selects_by_groups(rows, n, want)
    values, indices = (_group_topk if grouped else torch.topk)(ranks, want)
    if descends(values):
        return values[:, :k], indices[:, :k]
    same = values[:, 1:] == values[:, :-1]
    if same.any():
        tied = (same & (values[:, 1:] > 0)).any(-1).nonzero().squeeze(-1)
        values[tied], indices[tied] = _ordered(ranks, values[tied], indices[tied], tied, k)
    return values[:, :k], indices[:, :k]


def _topk(ranks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = topk_rows(ranks, k)
    return values.contiguous(), indices.contiguous()


def _topk_fake(ranks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values = ranks.new_empty(ranks.shape[0], k)
    return values, values.to(torch.int64)


# `topk_rows` for callers that may be compiled
topk = operator("topk(Tensor ranks, int k) -> (Tensor, Tensor)", _topk, _topk_fake)


def descends(values: Tensor, above: float = -math.inf) -> bool:
    """Whether a few rows [T, k] descend strictly and end above a bound; False if they are many.

    Looked at in Python: a few tokens at a time, when a dictionary has just gone through the caches,
    a torch call costs 20 µs, and masks take several.
    """
    return values.numel() <= FEW and all(
        row[-1] > above and all(a > b for a, b in pairwise(row)) for row in values.tolist()
    )


def _group_topk(ranks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows, n = ranks.shape
    size = dispatch.GROUP
    groups = n // size  # strided: entry i belongs to group i mod groups
    maxima = ranks[:, : groups * size].view(rows, size, groups).amax(1)
    best = maxima.topk(k, sorted=False).indices
    members = torch.arange(0, groups * size, groups, device=ranks.device)
    candidates = (best.unsqueeze(1) + members.unsqueeze(-1)).flatten(1)  # [T, size * k]
    if groups * size < n:  # the rest belongs to no group
        rest = torch.arange(groups * size, n, device=ranks.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], 1)
    values, chosen = ranks.gather(1, candidates).topk(k)
    return values, candidates.gather(1, chosen)


def _ordered(
    ranks: Tensor, values: Tensor, indices: Tensor, rows: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Rows with ties: lowest index first, the whole row sorted where the k-th value is tied."""
    by_index = indices.argsort(-1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    indices = indices.gather(1, order)
    width = values.shape[1]
    if width > k:
        for row in (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1).tolist():
            whole = ranks[rows[row]].sort(descending=True, stable=True)
            values[row], indices[row] = whole.values[:width], whole.indices[:width]
    return values, indices


def threshold_rows(scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where `kept` bool [T, n]: (values, indices) [T, max(1, widest)], largest first, 0 elsewhere.

    The width depends on the data, so this waits for the device.
    """
    row, latent = kept.nonzero(as_tuple=True)  # by row, then by latent
    counts = torch.bincount(row, minlength=len(kept))
    width = max(1, int(counts.max())) if len(kept) else 1
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = scores.new_zeros(len(kept), width)
    indices = row.new_zeros(len(kept), width)
    values[row, place] = scores[row, latent]
    indices[row, place] = latent
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(1, order)
