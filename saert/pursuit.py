"""Matching pursuit as an encoder: latents one after the other, not all at one look."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saert.activations import Activation, chunked, count
from saert.kernels.encode import Encoded
from saert.kernels.linear import linear_scores
from saert.sparse import SparseCode


class MatchingPursuit(Activation):
    """Each latent the best for what the ones before left unexplained (SAELens `matching_pursuit`).

    With r = x − b_dec at first, again and again

        i = argmax_j ⟨r, W_enc[j]⟩,    a = relu(⟨r, W_enc[i]⟩),    f_i += a,    r −= a · W_enc[i]

    until ‖r‖ < `residual_threshold` (where that is positive), until a step brings no new latent
    (where `stop_on_duplicate`), or `max_iterations` times (None: d_in). For tied SAEs, whose W_enc
    is their W_dec, with unit rows and without b_enc. Every step is a product with the dictionary.
    """

    per_latent = False

    def __init__(
        self,
        residual_threshold: float = 1e-2,
        max_iterations: int | None = None,
        stop_on_duplicate: bool = True,
    ) -> None:
        super().__init__()
        if not (math.isfinite(residual_threshold) and residual_threshold >= 0):
            raise ValueError(
                f"MatchingPursuit: residual_threshold is {residual_threshold}, expected a length "
                "of at least 0"
            )
        if max_iterations is not None:
            count("MatchingPursuit: max_iterations", max_iterations)
        self.residual_threshold = float(residual_threshold)
        self.max_iterations = max_iterations
        self.stop_on_duplicate = stop_on_duplicate

    def forward(self, pre: Tensor, weight: Tensor | None = None) -> Tensor:
        """Raises NotImplementedError: pre-activations are those of the first step only."""
        raise NotImplementedError("MatchingPursuit needs the input, not only its pre-activations")

    def encode_input(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Encoded:
        if b_enc is not None or weight is not None:
            raise ValueError(
                "MatchingPursuit: defined without b_enc and without weighting by decoder norms"
            )
        return chunked(x, W_enc, b_dec, lambda part: self._pursue(part, W_enc))

    def _pursue(self, rest: Tensor, W_enc: Tensor) -> tuple[SparseCode, Tensor]:
        """rest [T, d_in] -> its code, and which tokens have a NaN among their scores."""
        dense = rest.new_zeros(len(rest), W_enc.shape[0])
        going = torch.ones(len(rest), 1, dtype=torch.bool, device=rest.device)
        nan = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
        for _ in range(self.max_iterations or W_enc.shape[1]):
            with torch.no_grad():
                scores = linear_scores(rest, W_enc, None)
                nan |= scores.isnan().any(-1)
                best = scores.relu().argmax(-1, keepdim=True)
            row = W_enc[best[:, 0]].to(rest.dtype)
            step = (rest * row).sum(-1, keepdim=True).relu() * going
            if self.stop_on_duplicate:
                going = going & (step > 0) & (dense.gather(-1, best) == 0)
            dense = dense.scatter_add(-1, best, step)
            rest = rest - step * row
            if self.residual_threshold > 0:
                going = going & (rest.norm(dim=-1, keepdim=True) >= self.residual_threshold)
            if not going.any():
                break
        return SparseCode.from_dense(dense), nan

    def extra_repr(self) -> str:
        return (
            f"residual_threshold={self.residual_threshold}, "
            f"max_iterations={self.max_iterations}, stop_on_duplicate={self.stop_on_duplicate}"
        )
