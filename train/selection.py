"""Exact selections over latents and tokens that are spread over processes.

Every rule is a total order, so that the same entries win whatever the number of processes: the
larger first; among equals the lower latent, or the earlier token and then the lower latent.
Only candidates travel, never scores [tokens, num_latents].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saert.train.mesh import Mesh


@torch.no_grad()
def token_ranks(ranked: Tensor, mesh: Mesh) -> Tensor:
    """The place of each candidate among its token's candidates on all shards.

    ranked [T, c]: each shard's c best, best first, equals by latent -> int64 [T, c], 0 the best.
    """
    candidates = mesh.gather_latents(ranked)
    order = candidates.sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    width = ranked.shape[-1]
    return places[:, mesh.shard * width : (mesh.shard + 1) * width]


@torch.no_grad()
def keep_largest(ranked: Tensor, count: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The `count` largest positive candidates of the whole batch, all tokens and shards.

    ranked [T, c], best first in each row -> (bool [T, c], the smallest that was kept, or 0).
    """
    candidates = mesh.gather_tokens(mesh.gather_latents(ranked))
    width = candidates.shape[-1]
    flat = candidates.flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    best = flat.sort(descending=True, stable=True)
    chosen = best.values[:count] > 0
    kept[best.indices[:count][chosen]] = True
    least = best.values[:count][chosen][-1:].sum()  # 0 if nothing is positive
    rows = slice(mesh.replica * len(ranked), (mesh.replica + 1) * len(ranked))
    columns = slice(mesh.shard * ranked.shape[-1], (mesh.shard + 1) * ranked.shape[-1])
    return kept.view(-1, width)[rows, columns], least


def batch_largest(
    best: Callable[[int], tuple[Tensor, Tensor]], tokens: int, k: int, most: int, mesh: Mesh
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BatchTopK: the k · tokens largest entries of the batch, from each token's best few.

    A token whose candidates were all kept may have more entries that belong: then the search is
    repeated with twice as many candidates, so the result is exact.

    Args:
        best: width -> (indices, values [T, width]) of this shard's best latents of each token.
        tokens: in the batch, over all replicas.
        most: how wide the candidates can get: this shard's latents.

    Returns:
        indices, values, kept (bool, of the same shape) and the smallest value kept.
    """
    width = min(most, 4 * k)
    while True:
        indices, values = best(width)
        kept, least = keep_largest(values.detach(), k * tokens, mesh)
        full = bool(kept[:, -1].any()) and width < most
        if not mesh.any(full):
            return indices, values, kept, least
        width = min(most, 2 * width)
