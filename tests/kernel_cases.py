"""Inputs that selections go wrong on, and the numerics contract they are held to (KERNELS.md 4)."""

import torch
from torch import Tensor

from saert.kernels.encode import Encoded
from saert.kernels.numerics import HALF

KINDS = ("random", "ascending", "ties", "negative", "clustered", "duplicates")


def layer(kind: str, tokens: int, d_in: int, num_latents: int, seed: int = 0):
    """x [tokens, d_in], W_enc [num_latents, d_in], b_enc [num_latents], float32."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=make)
    W = torch.randn(num_latents, d_in, generator=make) / d_in**0.5
    b = 0.1 * torch.randn(num_latents, generator=make)
    if kind == "ascending":  # every next latent beats all before it
        x, W = x.abs(), torch.arange(1.0, num_latents + 1)[:, None].expand(-1, d_in) / num_latents
        W, b = W.contiguous(), torch.zeros(num_latents)
    elif kind == "ties":  # small integers: exact sums, many of them equal
        x = torch.randint(-1, 2, (tokens, d_in), generator=make).float()
        W = torch.randint(-1, 2, (num_latents, d_in), generator=make).float()
        b = torch.zeros(num_latents)
    elif kind == "negative":
        b = torch.full((num_latents,), -100.0)
    elif kind == "clustered":  # the hot latents are neighbours
        b[num_latents // 3 : num_latents // 3 + num_latents // 10] += 5.0
    elif kind == "duplicates":  # every latent has a twin, far away
        W = W[: (num_latents + 1) // 2].repeat(2, 1)[:num_latents]
        b = b[: (num_latents + 1) // 2].repeat(2)[:num_latents]
    return x, W, b


def scores64(x: Tensor, W: Tensor, b: Tensor | None, b_dec: Tensor | None = None) -> Tensor:
    halved = x.dtype in HALF and W.dtype in HALF  # then both factors are rounded
    x = x.double() if b_dec is None else x.double() - b_dec.double()
    x = x.float().to(W.dtype).double() if halved else x
    return x @ W.double().T + (0 if b is None else b.double())


def assert_topk(found: Encoded, x, W, b, k, *, weight=None, latents=None, b_dec=None) -> None:
    """Every selected score at least the k-th less ε, every other at most that plus ε; the values
    right; unused slots empty; descending; ties by latent."""
    scores = scores64(x, W, b, b_dec)
    size = x.abs().double().amax(-1, keepdim=True) * W.abs().double().sum(-1).amax()
    eps = 1e-6 * (1 + size)
    ranks = scores.relu() * (1 if weight is None else weight.double())
    if latents is not None:
        outside = torch.ones(W.shape[0], dtype=torch.bool)
        outside[latents] = False
        ranks[:, outside] = -1.0
    eps_rank = eps * (1 if weight is None else weight.double().amax())
    k = min(k, W.shape[0] if latents is None else len(latents))
    assert found.indices.shape == found.values.shape == (len(x), k)
    assert found.indices.dtype == torch.int64 and not found.nan.any()
    used = found.values > 0
    assert (found.indices[~used] == 0).all() and (found.values[~used] == 0).all()
    kth = ranks.sort(-1, descending=True).values[:, k - 1 : k].clamp_min(0)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    rows = torch.arange(len(x))[:, None].expand_as(found.indices)
    chosen[rows[used], found.indices[used]] = True
    assert chosen.sum() == used.sum(), "a latent was selected twice"
    assert (ranks.where(chosen, torch.inf) >= kth - eps_rank).all()
    assert (ranks.where(~chosen, -torch.inf) <= kth + eps_rank).all()
    picked = scores.gather(1, found.indices)
    assert ((found.values.double() - picked).abs().where(used, 0) <= eps).all()
    _assert_ordered(found, weight)


def assert_threshold(found: Encoded, x, W, b, threshold, *, weight=None, b_dec=None) -> None:
    """Everything clearly above its threshold is there, nothing clearly below it is."""
    scores = scores64(x, W, b, b_dec)
    size = x.abs().double().amax(-1, keepdim=True) * W.abs().double().sum(-1).amax()
    eps = 1e-6 * (1 + size)
    ranks = scores * (1 if weight is None else weight.double())
    eps_rank = eps * (1 if weight is None else weight.double().amax())
    level = torch.as_tensor(threshold).double().expand(W.shape[0])
    used = found.values > 0
    dense = torch.zeros_like(scores).scatter_add(1, found.indices, found.values.double())
    assert (dense > 0).sum() == used.sum(), "a latent was selected twice"
    surely = (ranks > level + eps_rank) & (scores > eps)
    never = (ranks < level - eps_rank) | (scores < -eps)
    assert (dense > 0)[surely].all() and not (dense > 0)[never].any()
    assert ((dense - scores).abs() <= eps)[dense > 0].all()
    assert used.shape[1] == max(1, int(used.sum(-1).max()) if len(x) else 0)
    assert (found.indices[~used] == 0).all() and (found.values[~used] == 0).all()
    _assert_ordered(found, None)


def _assert_ordered(found: Encoded, weight: Tensor | None) -> None:
    ranks = found.values if weight is None else found.values * weight[found.indices]
    slack = 0 if weight is None else 1e-5 * ranks.abs().amax() if ranks.numel() else 0
    assert (ranks[:, 1:] <= ranks[:, :-1] + slack).all()
    if weight is None:
        same = (found.values[:, 1:] == found.values[:, :-1]) & (found.values[:, 1:] > 0)
        assert (found.indices[:, 1:] > found.indices[:, :-1])[same].all(), "ties: lowest latent"


def assert_same(found: Encoded, expected: Encoded) -> None:
    """Where sums are exact, indices and values are equal to the last bit."""
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values.to(found.values.dtype))
    assert torch.equal(found.nan, expected.nan)
