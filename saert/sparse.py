"""SparseCode: what an encoder says about each token, as (latent, activation) pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCode:
    """k slots per token, each a latent and its activation.

    Attributes:
        indices: int64 [*tokens, k], the latent of each slot.
        values: floating [*tokens, k], its activation. An unused slot has value 0 and an index
            that is in range and means nothing.
        num_latents: the size of the dictionary that `indices` points into.

    >>> code = SparseCode(torch.tensor([[2, 0]]), torch.tensor([[1.5, 0.0]]), num_latents=4)
    >>> code.to_dense()
    tensor([[0.0000, 0.0000, 1.5000, 0.0000]])
    >>> code.l0()
    tensor([1])
    """

    indices: Tensor
    values: Tensor
    num_latents: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape:
            raise ValueError(
                f"SparseCode: indices are {tuple(self.indices.shape)} but values are "
                f"{tuple(self.values.shape)}; both must be [*tokens, k]"
            )
        if self.indices.dtype != torch.int64 or not self.values.is_floating_point():
            raise TypeError(
                f"SparseCode: indices are {self.indices.dtype} and values {self.values.dtype}, "
                "expected torch.int64 and a floating dtype"
            )

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseCode:
        """x [*tokens, num_latents] -> its non-zeros, largest magnitude first.

        k is the count of the widest token (at least 1, so that every token has a slot).
        """
        widest = int((x != 0).sum(-1).max()) if x.numel() else 0
        indices = x.abs().topk(max(1, min(widest, x.shape[-1])), dim=-1).indices
        return cls(indices, x.gather(-1, indices), x.shape[-1])

    @classmethod
    def cat(cls, codes: list[SparseCode], dim: int) -> SparseCode:
        """Codes joined along token dimension `dim` (from the front), padded to the widest."""
        if len(sizes := {code.num_latents for code in codes}) > 1:
            raise ValueError(f"SparseCode.cat: num_latents differ: {sorted(sizes)}")
        k = max(code.k for code in codes)
        padded = [code.widen(k) for code in codes]
        return cls(
            torch.cat([code.indices for code in padded], dim),
            torch.cat([code.values for code in padded], dim),
            codes[0].num_latents,
        )

    @property
    def k(self) -> int:
        """Slots per token."""
        return self.indices.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """[*tokens, k]."""
        return self.indices.shape

    def widen(self, k: int) -> SparseCode:
        """The same code with unused slots added up to k; ValueError if it has more already."""
        if k < self.k:
            raise ValueError(f"SparseCode.widen: found {self.k} slots, more than the {k} asked for")
        extra = (0, k - self.k)
        pad = torch.nn.functional.pad
        return SparseCode(pad(self.indices, extra), pad(self.values, extra), self.num_latents)

    def to_dense(self) -> Tensor:
        """[*tokens, num_latents], in the dtype of the values."""
        empty = self.values.new_zeros(*self.values.shape[:-1], self.num_latents)
        return empty.scatter_add(-1, self.indices, self.values)

    def at(self, latents: Tensor) -> Tensor:
        """Activations of the given latents: [*tokens or broadcastable, E] -> [*tokens, E]."""
        slots = self.indices.unsqueeze(-2) == latents.unsqueeze(-1)  # [*tokens, E, k]
        return (self.values.unsqueeze(-2) * slots).sum(-1)

    def l0(self) -> Tensor:
        """Active latents per token: int64 [*tokens]."""
        return (self.values != 0).sum(-1)

    def __getitem__(self, tokens: Any) -> SparseCode:
        """Index the token dimensions, as one indexes a tensor: `code[0, -1]`, `code[mask]`.

        The slots are not a dimension to index: IndexError, as for a dimension too many.
        """
        shape = self.shape[:-1]
        chosen = torch.arange(shape.numel(), device=self.indices.device).view(shape)[tokens]
        indices, values = (t.reshape(-1, self.k)[chosen] for t in (self.indices, self.values))
        return SparseCode(indices, values, self.num_latents)

    def to(self, target: torch.device | str | torch.dtype) -> SparseCode:
        """Moved to a device, or with the values in another floating dtype."""
        if isinstance(target, torch.dtype):
            return SparseCode(self.indices, self.values.to(target), self.num_latents)
        return SparseCode(self.indices.to(target), self.values.to(target), self.num_latents)

    def detach(self) -> SparseCode:
        """The same code, cut from the autograd graph."""
        return SparseCode(self.indices, self.values.detach(), self.num_latents)

    def __repr__(self) -> str:
        tokens = "x".join(map(str, self.shape[:-1])) or "1"
        return f"SparseCode({tokens} tokens, k={self.k}, num_latents={self.num_latents})"
