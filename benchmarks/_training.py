"""One training step, forward to Adam: saert's and plain PyTorch's, and the check of its gradients.

The loss is the fraction of variance unexplained. The weights, their gradients and Adam's state are
float32. Nothing else happens in a step: no unit-norm decoder, no clipping, no schedule, no count of
dead latents, for saert and for its peers alike.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._checks import CheckRed, within_twice
from benchmarks._inputs import Inputs
from benchmarks._timing import NotRun
from saert.kernels.decode import sparse_decode
from saert.kernels.encode import encode_topk

LEARNING_RATE = 2e-4
Weights = Sequence[Tensor]  # W_enc, b_enc, W_dec, b_dec


@dataclass(frozen=True)
class Step:
    """A call is one step; it returns the gradients that Adam was given."""

    weights: Weights
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> list[Tensor | None]:
        self.loss().backward()
        grads = [weight.grad for weight in self.weights]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grads


def saert_step(i: Inputs, arithmetic: torch.dtype = torch.float32) -> Step:
    """saert's kernels; in bfloat16 arithmetic the scores are float32 all the same."""
    if arithmetic != torch.float32 and not computes_in_half(i.x.device):
        raise NotRun("this CPU has no bfloat16 instructions")
    W_enc, b_enc, W_dec, b_dec = weights = _copies(i)

    def loss() -> Tensor:
        read, write = W_enc.to(arithmetic), W_dec.to(arithmetic)
        code = encode_topk(i.x, read, b_enc, i.shape.k, b_dec=b_dec)
        return fvu(sparse_decode(code.indices, code.values, write, b_dec), i.x)

    return Step(weights, loss, _adam(weights))


def torch_step(i: Inputs, decode: Callable[..., Tensor], autocast: bool = False) -> Step:
    """Linear, relu, topk, and a decoder (indices, values, W_dec) -> [T, d], all by autograd."""
    if autocast and not computes_in_half(i.x.device):
        raise NotRun("this CPU has no bfloat16 instructions")
    W_enc, b_enc, W_dec, b_dec = weights = _copies(i)

    def loss() -> Tensor:
        with torch.autocast(i.x.device.type, torch.bfloat16, enabled=autocast):
            best = F.linear(i.x - b_dec, W_enc, b_enc).relu().topk(i.shape.k)
            return fvu(decode(best.indices, best.values.to(W_dec.dtype), W_dec) + b_dec, i.x)

    return Step(weights, loss, _adam(weights))


def bag(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """A decoder by `F.embedding_bag`."""
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")


def dense(indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """A decoder by scatter and product."""
    return values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values) @ W_dec


def fvu(reconstruction: Tensor, x: Tensor) -> Tensor:
    """The fraction of variance unexplained."""
    return (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def computes_in_half(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by itself."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_step(i: Inputs, found: Any) -> None:
    """Gradients of all weights, against dense autograd in float64. No token may be a near tie."""
    plain, exact = (_dense_gradients(i, kind) for kind in (torch.float32, torch.float64))
    names = ("dW_enc", "db_enc", "dW_dec", "db_dec")
    for name, *gradients in zip(names, found, plain, exact, strict=True):
        within_twice(name, *gradients)


def check_rounded_step(i: Inputs, found: Any) -> None:
    """Gradients of bfloat16 arithmetic: the direction of each, against float64."""
    names = ("dW_enc", "db_enc", "dW_dec", "db_dec")
    for name, grad, exact in zip(names, found, _dense_gradients(i, torch.float64), strict=True):
        cosine = float(F.cosine_similarity(grad.double().flatten(), exact.flatten(), dim=0))
        if not cosine > 0.98:  # rounding turns near ties
            raise CheckRed(f"{name} has cosine {cosine:.4f} with float64's")


def _dense_gradients(i: Inputs, kind: torch.dtype) -> tuple[Tensor, ...]:
    weights = [t.detach().to(kind).requires_grad_() for t in _tensors(i)]
    W_enc, b_enc, W_dec, b_dec = weights
    x = i.x.to(kind)
    best = F.linear(x - b_dec, W_enc, b_enc).relu().topk(i.shape.k)
    recon = (best.values.unsqueeze(1) @ W_dec[best.indices]).squeeze(1) + b_dec
    return torch.autograd.grad(fvu(recon, x), weights)


def _tensors(i: Inputs) -> Weights:
    return i.W_enc, i.b_enc, i.W_dec, i.b_dec


def _copies(i: Inputs) -> Weights:
    return [t.clone().requires_grad_() for t in _tensors(i)]


# -- the optimiser ---------------------------------------------------------------------------------


def _adam(weights: Weights) -> torch.optim.Adam:
    fused, default = adam_seconds(weights[0].device)
    return torch.optim.Adam(weights, LEARNING_RATE, fused=True if fused < default else None)


@functools.cache
def adam_seconds(device: torch.device) -> tuple[float, float]:
    """Seconds of a fused and of a default Adam step on 4096 × 768 weights, measured once."""
    return _adam_seconds(device, True), _adam_seconds(device, None)


def _adam_seconds(device: torch.device, fused: bool | None) -> float:
    weight = torch.zeros(4096, 768, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.Adam([weight], LEARNING_RATE, fused=fused)
    took = []
    for _ in range(6):
        begun = time.perf_counter()
        adam.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begun)
    return min(took[1:])  # the first allocates
