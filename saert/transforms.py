"""Input transforms: how an SAE rescales what it reads, and how its output is scaled back.

    x' = (x - shift) / scale,      x = x' · scale + shift

with `shift` and `scale` per token (or a constant), so that the difference an edit makes in the
SAE's units is `scale` times as large in the model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Transformed(NamedTuple):
    """`x` in the SAE's units, and what restores the model's: tensors [*tokens, 1] or None."""

    x: Tensor
    shift: Tensor | None
    scale: Tensor | None

    def restore(self, y: Tensor) -> Tensor:
        """y [*tokens, d] from the SAE's units to the model's."""
        y = self.rescale(y)
        return y if self.shift is None else y + self.shift

    def rescale(self, difference: Tensor) -> Tensor:
        """A difference of two outputs, in the model's units: the shift cancels."""
        return difference if self.scale is None else difference * self.scale


@dataclass(frozen=True)
class InputTransform:
    """No transform. The base of the others."""

    def __call__(self, x: Tensor) -> Transformed:
        """x [*tokens, d_in] -> the same in the SAE's units, with its shift and scale."""
        return Transformed(x, None, None)

    @property
    def scales_alike(self) -> bool:
        """Whether `scale` is the same for all tokens."""
        return False

    @property
    def needs_input(self) -> bool:
        """Whether a reconstruction can only be scaled back next to the input it came from."""
        return True


@dataclass(frozen=True)
class NoTransform(InputTransform):
    """The SAE reads the hidden state as it is."""

    @property
    def scales_alike(self) -> bool:
        return True

    @property
    def needs_input(self) -> bool:
        return False


@dataclass(frozen=True)
class LayerNorm(InputTransform):
    """(x - mean) / (std + eps), std with Bessel's correction; undone by · std + mean.

    OpenAI's and SAELens' flavour (openai/sparse_autoencoder model.py), not `F.layer_norm`: eps is
    added to the std on the way in, and left out on the way back unless `eps_on_return` (OpenSAE).
    """

    eps: float = 1e-5
    eps_on_return: bool = False

    def __call__(self, x: Tensor) -> Transformed:
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        # Tensor.std warns about an input without tokens; a square root has no gradient at zero
        std = centred.std(-1, keepdim=True) if x.numel() else mean
        scale = std + self.eps
        return Transformed(centred / scale, mean, scale if self.eps_on_return else std)


@dataclass(frozen=True)
class MeanCentre(InputTransform):
    """x - mean(x) per token, as in models whose writing weights were centred; the mean returns."""

    @property
    def scales_alike(self) -> bool:
        return True

    def __call__(self, x: Tensor) -> Transformed:
        mean = x.mean(-1, keepdim=True)
        return Transformed(x - mean, mean, None)


@dataclass(frozen=True)
class UnitNorm(InputTransform):
    """x · norm / ‖x‖ per token; `norm=None` means √d_in (SAELens `constant_norm_rescale`)."""

    norm: float | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and not (math.isfinite(self.norm) and self.norm > 0):
            raise ValueError(f"UnitNorm: norm is {self.norm}, expected a positive number")

    def __call__(self, x: Tensor) -> Transformed:
        norm = math.sqrt(x.shape[-1]) if self.norm is None else self.norm
        length = x.norm(dim=-1, keepdim=True)
        # a token of exactly zero stays zero instead of turning into NaN
        factor = torch.where(length > 0, norm / length.clamp_min(1e-30), torch.ones_like(length))
        return Transformed(x * factor, None, 1 / factor)


@dataclass(frozen=True)
class DatasetScale(InputTransform):
    """x · factor, one number for the whole data set; undone by / factor."""

    factor: float = 1.0

    @property
    def scales_alike(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ValueError(f"DatasetScale: factor is {self.factor}, expected a positive number")

    def __call__(self, x: Tensor) -> Transformed:
        return Transformed(x * self.factor, None, x.new_tensor(1 / self.factor))

    @property
    def needs_input(self) -> bool:
        return False

    def restore_without_input(self, y: Tensor) -> Tensor:
        """y in the model's units; possible because the factor is a constant."""
        return y / self.factor
