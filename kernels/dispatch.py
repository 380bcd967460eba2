"""Which path runs: the conditions on device, dtype and shape, which the operators only ask about.

| tensors                         | encode                         | decode, gradients    |
|---------------------------------|--------------------------------|----------------------|
| CUDA, float32 or half, triton   | `kernels/gpu`                  | `kernels/gpu`        |
| CPU                             | chunks, group maxima           | `embedding_bag`      |
| anything else (float64, mps, …) | the same, in plain PyTorch     | the same             |

The constants for CPUs were measured on one with AVX2 (LOG.md); those for GPUs are estimates, until
`make gpu` has run on one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WORKSPACE = 24 << 20
"""Bytes of scores that exist at a time off the GPU. Below 32 MiB glibc hands the same memory out
again; a larger block is mapped afresh. Chunks of 64 MiB took a tenth longer."""

WIDENED = 128 << 20
"""Bytes of half-precision weights that may be widened to float32 at once, for several chunks."""

WIDENED_ROWS = 4096
"""Rows of half-precision weights widened at a time otherwise."""

GPU_MAX_K = 2048
"""The streaming selection keeps k keys in the registers of one program."""

ONEDNN_LEAST = 1 << 21
"""Entries of W_enc below which oneDNN does not pay: a call costs 40 µs more than `F.linear`."""

GROUP = 8  # latents per group maximum: 8 beats 16 and 32 at 32,768 latents
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uses_triton(weights: Tensor, k: int = 1) -> bool:
    """Whether the Triton kernels serve a call with these weights, selecting k."""
    fits = weights.dtype in _GPU_DTYPES and k <= GPU_MAX_K
    return weights.is_cuda and fits and _has_triton()


def tokens_per_chunk(num_latents: int, dtype: torch.dtype) -> int:
    """How many tokens' scores fit into the workspace, at least one."""
    return max(1, WORKSPACE // max(1, num_latents * dtype.itemsize))


def pieces(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors [T, …] a few tokens at a time: `width` entries of scratch a token fit."""
    step = max(1, WORKSPACE // (4 * max(1, width)))
    return zip(*(t.split(step) for t in tensors), strict=True)


def selects_by_groups(rows: int, num_latents: int, k: int) -> bool:
    """Whether group maxima find the k largest of each row sooner than `torch.topk` does."""
    # a few rows gain nothing, and waking a second thread for the maxima may cost a lot
    return rows >= 16 and num_latents >= 2048 and k * 4 * GROUP <= num_latents


def screens(W_enc: Tensor) -> bool:
    """Whether a half-precision product is so much faster that screening with it pays."""
    if W_enc.dtype != torch.float32:
        return False
    if W_enc.device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return W_enc.is_cuda


def decodes_densely(tokens: int, k: int, W_dec: Tensor) -> bool:
    """Whether a dense product with W_dec beats gathering k rows per token."""
    factor = 8 if tokens >= 64 else 4 if tokens >= 16 else 1  # few tokens share the product
    if W_dec.is_cuda:
        factor = 184  # k rows at 4.3 TB/s against a row's arithmetic at 790 TFLOP/s (KERNELS.md 2)
    return k * factor >= W_dec.shape[0]


def uses_onednn(x: Tensor, W_enc: Tensor) -> bool:
    """Whether oneDNN multiplies x and W_enc: float32 on a CPU, and enough of it."""
    right = x.dtype == W_enc.dtype == torch.float32 and x.device.type == "cpu"
    return right and W_enc.numel() >= ONEDNN_LEAST and prefers_onednn()


def exchanges(tokens: int) -> bool:
    """Whether oneDNN computes x · W_encᵀ sooner as (W_enc · xᵀ)ᵀ: it reorders its second factor
    at every call, and for a few tokens x is the smaller one by far."""
    return 2 <= tokens <= 16


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN's float32 product is there and clearly faster than `F.linear`: timed once.

    The two differ in the last digits. SAERT_CPU_GEMM=onednn or =blas fixes the choice, for runs
    that must agree between machines.
    """
    wish = os.environ.get("SAERT_CPU_GEMM", "")
    if wish not in ("", "onednn", "blas"):
        raise ValueError(f"SAERT_CPU_GEMM is {wish!r}, expected 'onednn', 'blas' or nothing")
    if wish == "blas" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    x, W = torch.ones(16, 512, **like), torch.ones(16_384, 512, **like)  # 32 MiB: from memory
    try:
        if not torch.equal(onednn_linear(x, W, None), torch.full((16, 16_384), 512.0, **like)):
            return False
    except (RuntimeError, NotImplementedError):
        return False
    if wish == "onednn":
        return True
    linear: Product = torch.nn.functional.linear
    rounds = [(_seconds(linear, x, W), _seconds(onednn_linear, x, W)) for _ in range(5)]
    blas, onednn = (min(times) for times in zip(*rounds, strict=True))
    return bool(onednn * 1.15 < blas)


def onednn_linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, d] @ W [n, d]ᵀ + bias, by oneDNN. A private operator: only after `prefers_onednn`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")
    return out


def _seconds(product: Product, x: Tensor, W: Tensor) -> float:
    begun = time.perf_counter()
    product(x, W, None)
    return time.perf_counter() - begun


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
