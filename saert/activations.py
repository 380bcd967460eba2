"""Activations: pre-activations in, sparse activations out.

ReLU, JumpReLU, BatchTopK and Gated are *per latent*: f_i depends on the pre-activation of latent i
alone. An edit of a few latents then needs a few dot products and no ranking (DESIGN, the delta
law). TopK, AbsTopK, GroupMax and MatchingPursuit look at the other latents too. Activations are
never negative, but for AbsTopK's.

`weight` is ‖W_dec[i]‖ for SAEs that select by decoder-norm-weighted score (Llama Scope):
the selection looks at relu(pre)·weight, the kept values are the plain pre-activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from saert.kernels import dispatch
from saert.kernels.encode import Encoded, encode_threshold, encode_topk
from saert.kernels.linear import linear_scores
from saert.kernels.numerics import accumulation_dtype
from saert.kernels.select import topk
from saert.sparse import SparseCode


class Activation(nn.Module):
    """From pre-activations [*tokens, num_latents] to activations of the same shape."""

    per_latent: ClassVar[bool] = True
    shared_allowed: ClassVar[bool] = True  # whether one number may serve all latents
    signed: ClassVar[bool] = False  # whether activations may be negative

    def forward(self, pre: Tensor, weight: Tensor | None = None) -> Tensor:
        """Dense activations [*tokens, num_latents]."""
        return self.at(pre, None, weight)

    def encode(self, pre: Tensor, weight: Tensor | None = None) -> SparseCode:
        """The activations as a SparseCode; k is the widest token's count."""
        return SparseCode.from_dense(self(pre, weight))

    @property
    def level(self) -> float | Tensor | None:
        """What a positive pre-activation has to exceed, a number or [num_latents]; None where the
        activation is not its pre-activation or nothing."""
        return None

    def encode_input(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Encoded:
        """`encode` of the pre-activations of x [*tokens, d_in], a few tokens at a time."""
        if (level := self.level) is not None:
            if not isinstance(level, Tensor):
                weight = None  # zero is passed whatever the score is multiplied by
            return encode_threshold(x, W_enc, b_enc, level, b_dec=b_dec, weight=weight)

        def encoded(part: Tensor) -> tuple[SparseCode, Tensor]:
            pre = linear_scores(part, W_enc, b_enc)
            return self.encode(pre, weight), pre.isnan().any(-1)

        return chunked(x, W_enc, b_dec, encoded)

    def at(self, pre: Tensor, latents: Tensor | None, weight: Tensor | None = None) -> Tensor:
        """Activations of `latents` (int64 [..., E]; None: all) from their pre-activations.

        `pre` and `weight` hold those latents only. Raises NotImplementedError for activations that
        depend on other latents too.
        """
        raise NotImplementedError(f"{type(self).__name__} is not a per-latent activation")

    def check(self, num_latents: int) -> None:
        """Raise ValueError if the parameters do not fit a dictionary of this size."""
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            scalar = value.dim() == 0 and self.shared_allowed
            if not scalar and value.shape != (num_latents,):
                raise ValueError(
                    f"{type(self).__name__}: {name} has shape {list(value.shape)}, expected "
                    f"[{num_latents}], one per latent"
                )
            if not value.isfinite().all():
                raise ValueError(f"{type(self).__name__}: {name} contains NaN or inf")

    def extra_repr(self) -> str:
        tensors = (*self.named_parameters(), *self.named_buffers())
        return ", ".join(f"{n}={_brief(t)}" for n, t in tensors)


class _PerToken(Activation):
    """At most k latents a token, chosen by comparing them with each other."""

    per_latent = False

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = count(f"{type(self).__name__}: k", k)

    def forward(self, pre: Tensor, weight: Tensor | None = None) -> Tensor:
        return self.encode(pre, weight).to_dense()

    def encode(self, pre: Tensor, weight: Tensor | None = None) -> SparseCode:
        ranks = self._ranks(pre.detach(), None if weight is None else weight.detach())
        flat = ranks.reshape(-1, ranks.shape[-1])
        best, indices = (t.view(*pre.shape[:-1], t.shape[1]) for t in self._best(flat))
        unused = best <= 0  # NaN is kept, to be seen
        values = pre.gather(-1, indices).masked_fill(unused, 0)
        return SparseCode(indices.masked_fill(unused, 0), values, pre.shape[-1])

    def _ranks(self, pre: Tensor, weight: Tensor | None) -> Tensor:
        """What latents are compared by; one at 0 or below is never kept."""
        return pre.relu() if weight is None else pre.relu() * weight

    def _best(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Of ranks [T, num_latents], those that are kept: values and latents [T, k], descending."""
        best, indices = topk(ranks, min(self.k, ranks.shape[-1]))
        return best, indices

    def check(self, num_latents: int) -> None:
        if self.k > num_latents:
            raise ValueError(
                f"{type(self).__name__}: k is {self.k}, but there are only {num_latents} latents"
            )

    def extra_repr(self) -> str:
        return f"k={self.k}"


class TopK(_PerToken):
    """Keep the k largest pre-activations of each token, then ReLU (Gao et al. 2024, section 2.3).

    A token with fewer than k positive pre-activations has fewer than k active latents.
    """

    def encode_input(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Encoded:
        return encode_topk(x, W_enc, b_enc, self.k, b_dec=b_dec, weight=weight)


class AbsTopK(_PerToken):
    """Keep the k pre-activations of largest magnitude of each token, signs and all: a latent fires
    in either direction (arXiv 2510.00404; SAELens `abstopk`). `weight` ranks by |pre| · weight.

    What presumes activations of at least 0 (`refine`, `feature_index`) refuses it.
    """

    signed = True

    def _ranks(self, pre: Tensor, weight: Tensor | None) -> Tensor:
        return pre.abs() if weight is None else pre.abs() * weight


class GroupMax(_PerToken):
    """The largest pre-activation, if positive, of each of k groups of num_latents / k neighbours
    (EleutherAI sparsify `groupmax`).
    """

    def _best(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        best, indices = ranks.unflatten(-1, (self.k, -1)).max(dim=-1)
        best, groups = best.sort(dim=-1, descending=True, stable=True)
        return best, indices.gather(-1, groups) + groups * (ranks.shape[-1] // self.k)

    def check(self, num_latents: int) -> None:
        super().check(num_latents)
        if num_latents % self.k:
            raise ValueError(
                f"GroupMax: {num_latents} latents do not divide into k = {self.k} equal groups"
            )


class ReLU(Activation):
    """f = relu(pre)."""

    def at(self, pre: Tensor, latents: Tensor | None, weight: Tensor | None = None) -> Tensor:
        return pre.relu()

    @property
    def level(self) -> float:
        return 0.0


class JumpReLU(Activation):
    """f_i = pre_i · 1[pre_i > θ_i], zero for pre_i ≤ 0 (Rajamanoharan et al. 2024).

    `threshold` is one number or [num_latents]; the comparison is strict.
    """

    threshold: Tensor

    def __init__(self, threshold: float | Tensor) -> None:
        super().__init__()
        value = torch.as_tensor(threshold)
        value = value if value.is_floating_point() else value.float()
        if value.dim() > 1 or not value.isfinite().all():
            raise ValueError(
                f"{type(self).__name__}: threshold must be finite, a number or [num_latents]; "
                f"found shape {list(value.shape)}, values {_brief(value)}"
            )
        self.register_buffer("threshold", value.detach().clone())

    def at(self, pre: Tensor, latents: Tensor | None, weight: Tensor | None = None) -> Tensor:
        threshold = _take(self.threshold, latents).to(pre.dtype)
        score = pre if weight is None else pre * weight
        return pre.relu() * (score > threshold)

    @property
    def level(self) -> Tensor:
        return self.threshold


class BatchTopK(JumpReLU):
    """BatchTopK at inference: JumpReLU with one threshold for all latents (Bussmann et al. 2024).

    `threshold` is the training-time estimate of the smallest kept activation; a negative one means
    that it was never estimated, and every positive pre-activation passes.
    """


class Gated(Activation):
    """f = 1[π + b_gate > 0] · relu(exp(r_mag) · π + b_mag), π = W_enc x (gated SAE).

    The pre-activation is π without a bias: a gated SAE has no `b_enc`. All three parameters are
    [num_latents].
    """

    shared_allowed = False
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def __init__(self, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> None:
        super().__init__()
        for name, value in (("b_gate", b_gate), ("b_mag", b_mag), ("r_mag", r_mag)):
            self.register_buffer(name, value.detach().clone())

    def at(self, pre: Tensor, latents: Tensor | None, weight: Tensor | None = None) -> Tensor:
        if weight is not None:
            raise ValueError("Gated: decoder-norm-weighted selection is not defined for it")
        b_gate, b_mag, r_mag = (
            _take(t, latents).to(pre.dtype) for t in (self.b_gate, self.b_mag, self.r_mag)
        )
        return (pre + b_gate > 0) * (pre * r_mag.exp() + b_mag).relu()


def chunked(
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    encoded: Callable[[Tensor], tuple[SparseCode, Tensor]],
) -> Encoded:
    """Codes and NaN flags of x − b_dec [*tokens, d_in], a few tokens [T, d_in] at a time."""
    wide = accumulation_dtype(W_enc.dtype)
    flat = x.reshape(-1, x.shape[-1]).to(wide)
    flat = flat if b_dec is None else flat - b_dec.to(wide)
    parts = [encoded(p) for p in flat.split(dispatch.tokens_per_chunk(W_enc.shape[0], wide))]
    code, tokens = SparseCode.cat([one for one, _ in parts], dim=0), x.shape[:-1]
    shape = (*tokens, code.k)
    nan = torch.cat([flag for _, flag in parts]).view(tokens)
    return Encoded(code.indices.view(shape), code.values.view(shape), nan)


def count(name: str, value: int) -> int:
    """A number of things, checked."""
    if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1")
    return value


def _take(parameter: Tensor, latents: Tensor | None) -> Tensor:
    return parameter if latents is None or parameter.dim() == 0 else parameter[latents]


def _brief(value: Tensor) -> str:
    if value.dim() == 0:
        return f"{value.item():.4g}"
    low, high = (value.min().item(), value.max().item()) if value.numel() else (math.nan, math.nan)
    return f"[{low:.4g}…{high:.4g}]"
