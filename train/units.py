"""The units of training: what an input transform does to x and y, and its way back at export.

    none         x as it is
    layer_norm   each token to mean 0 and standard deviation 1 (openai/sparse_autoencoder: unbiased
                 std, so ‖x‖ = √(d − 1); ALGORITHMS.md 1.1). Stays part of the SAE.
    unit         x · c with E‖x‖² = 1 (dictionary_learning's and Gemma Scope's JumpReLU)
    sqrt_d       x · c with E‖x‖ = √d (Llama Scope)

A constant c is folded into the weights: every activation here is positively homogeneous, so
b_enc / c, b_dec / c and thresholds / c give the SAE of the unscaled x, with W_enc and W_dec as
they are and activations 1/c as large. A transcoder's y has a factor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saert.activations import Activation, Gated, JumpReLU
from saert.transforms import InputTransform, LayerNorm, NoTransform

KINDS = ("none", "layer_norm", "unit", "sqrt_d")


@dataclass(frozen=True)
class Units:
    """How the activations of one hookpoint enter training. `factor_y` differs for transcoders."""

    kind: str = "none"
    factor_x: float = 1.0
    factor_y: float = 1.0
    transcodes: bool = False

    @classmethod
    def of(cls, kind: str, x: Tensor, y: Tensor, transcodes: bool) -> Units:
        """The units that a sample [tokens, d] asks for.

        Raises ValueError for an unknown kind, and for a sample without extent.
        """
        if kind not in KINDS:
            raise ValueError(f"normalise: {kind!r}, expected auto or one of {', '.join(KINDS)}")
        if kind == "layer_norm" and transcodes:
            raise ValueError(
                "normalise: layer_norm is undone token by token, which a transcoder's target has "
                "no part in; choose none, unit or sqrt_d"
            )
        if kind in ("none", "layer_norm"):
            return cls(kind, transcodes=transcodes)
        factor_x = _factor(kind, x)
        return cls(kind, factor_x, _factor(kind, y) if transcodes else factor_x, transcodes)

    @property
    def transform(self) -> InputTransform:
        """What the exported SAE keeps."""
        return LayerNorm() if self.kind == "layer_norm" else NoTransform()

    def enter(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [tokens, d_in] and the target [tokens, d_out] (None: x) in the units of training."""
        inside = self.transform(x).x if self.kind == "layer_norm" else x * self.factor_x
        return inside, inside if y is None else y * self.factor_y

    def leave(self, estimate: Tensor, x: Tensor) -> Tensor:
        """A reconstruction [tokens, d_out] of x (in the model's units) in the model's units."""
        if self.kind == "layer_norm":
            return self.transform(x).restore(estimate)
        return estimate / self.factor_y

    def enter_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        """∂L/∂y [tokens, d_out] as ∂L/∂y' of the units of training."""
        if self.kind == "layer_norm":
            return self.transform(x).rescale(gradient)
        return gradient / self.factor_y

    def fold(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of training as weights that read and write the model's units."""
        found = dict(whole)
        for name in {"b_enc", "b_dec"} & set(found):
            found[name] = found[name] / self.factor_y
        found["W_enc"] = found["W_enc"] * (self.factor_x / self.factor_y)
        if "W_skip" in found:
            found["W_skip"] = found["W_skip"] * (self.factor_x / self.factor_y)
        return found

    def unfold(self, whole: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The inverse of `fold`, without the tensors that are None."""
        back = Units(self.kind, 1 / self.factor_x, 1 / self.factor_y, self.transcodes)
        return back.fold({name: t for name, t in whole.items() if t is not None})

    def fold_activation(self, activation: Activation) -> Activation:
        """The same for an activation's thresholds and biases."""
        if isinstance(activation, JumpReLU):
            return type(activation)(activation.threshold / self.factor_y)
        if isinstance(activation, Gated):
            c = self.factor_y
            return Gated(activation.b_gate / c, activation.b_mag / c, activation.r_mag)
        return activation

    def unfold_activation(self, activation: Activation) -> Activation:
        """The inverse of `fold_activation`."""
        back = Units(self.kind, 1 / self.factor_x, 1 / self.factor_y, self.transcodes)
        return back.fold_activation(activation)


def _factor(kind: str, x: Tensor) -> float:
    x = x.double()
    size = x.square().sum(-1).mean().sqrt() if kind == "unit" else x.norm(dim=-1).mean()
    wanted = 1.0 if kind == "unit" else math.sqrt(x.shape[-1])
    if not (torch.isfinite(size) and size > 0):
        raise ValueError(f"normalise: the sample's size is {size.item()}, expected it positive")
    return wanted / size.item()
