"""Random inputs of a shape, and the scores of an encoder in plain PyTorch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from saert import SAE, TopK
from saert.kernels.decode import sparse_decode


@dataclass(frozen=True)
class Shape:
    """d_in, num_latents, k, tokens, and the dtype of the weights."""

    d: int
    n: int
    k: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.d} × {self.n}, k {self.k}, {self.dtype}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Random weights with unit rows, tokens x, and a code (indices, values) of other tokens.

    Some latents are hot, as in trained SAEs: b_enc spreads the scores of x, and the code names its
    hottest latents on √(k/n) of the tokens. About k scores of a token exceed `threshold`. `g`
    stands for a gradient dL/dx̂.
    """

    shape: Shape
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    x: Tensor
    g: Tensor
    indices: Tensor
    values: Tensor
    threshold: float

    @functools.cached_property
    def sae(self) -> SAE:
        """The weights as a TopK SAE."""
        weights = (self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        return SAE.from_weights(*weights, activation=TopK(self.shape.k))

    @functools.cached_property
    def target(self) -> Tensor:
        """What `refine` fits: the code's reconstruction and some noise."""
        return sparse_decode(self.indices, self.values, self.W_dec) + 0.02 * self.g

    @functools.cached_property
    def start(self) -> Tensor:
        """Where `refine` starts: values that an encoder shrank."""
        return 0.8 * self.values


@torch.inference_mode(False)  # else tensors that training may not touch
def draw(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Inputs of a shape. Another seed: other tokens and codes, the same weights."""
    weights = _weights(shape.d, shape.n, shape.dtype, device)
    random = torch.Generator(device).manual_seed(seed)
    T, k = shape.tokens, shape.k
    x = torch.randn(T, shape.d, device=device, generator=random).to(weights[0].dtype)
    g = torch.randn(T, shape.d, device=device, generator=random)
    # slot j draws from the latents that are j modulo k, so that no token names one twice
    square = torch.rand(T, k, device=device, generator=random).square()
    indices = (square * (shape.n // k)).long() * k + torch.arange(k, device=device)
    values = torch.rand(T, k, device=device, generator=random) + 0.1
    # scores are normal, their variance the sum of those of x, b_enc and b_dec
    threshold = NormalDist(0, math.sqrt(1 + 0.5**2 + 0.1**2)).inv_cdf(1 - k / shape.n)
    return Inputs(shape, *weights, x, g, indices, values, threshold)


@functools.lru_cache(maxsize=1)
def _weights(
    d: int, n: int, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=random)

    W_enc, W_dec = (F.normalize(normal(n, d), dim=-1).to(kind) for _ in range(2))
    return W_enc, (0.5 * normal(n)).to(kind), W_dec, (0.1 * normal(d)).to(kind)


def centred(i: Inputs) -> Tensor:
    """x − b_dec as an encoder reads it: in float32, then in the dtype of the weights."""
    return (i.x.float() - i.b_dec.float()).to(i.W_enc.dtype)


def plain_scores(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` with float32 scores, whatever the weights."""
    if W.dtype == torch.float32:
        return F.linear(x, W, bias)
    if W.is_cuda:
        return torch.mm(x, W.T, out_dtype=torch.float32) + bias
    return F.linear(x.float(), W.float(), bias.float())
