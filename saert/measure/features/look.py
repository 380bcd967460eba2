"""What the latents of an SAE do in one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.measure.passes import Special, encoded
from saert.sae import SAE
from saert.sparse import SparseCode


@dataclass(frozen=True, eq=False)
class Look:
    """A text as an SAE sees it.

    Attributes:
        ids: int64 [tokens]; used: bool [tokens], false at special tokens, where nothing is shown.
        code: SparseCode [tokens, k] on the CPU, empty where `used` is false.
    """

    ids: Tensor
    used: Tensor
    code: SparseCode

    def at(self, token: int) -> list[tuple[int, float]]:
        """The active latents at a token with their activations, the strongest first."""
        values, latents = self.code.values[token], self.code.indices[token]
        active = values != 0
        values, latents = values[active], latents[active]
        order = values.abs().argsort(descending=True, stable=True)
        return list(zip(latents[order].tolist(), values[order].tolist(), strict=True))

    def of(self, latent: int) -> Tensor:
        """float32 [tokens]: a latent's activation at each. ValueError if there is no such latent"""
        check_latent(latent, self.code.num_latents)
        return (self.code.values * (self.code.indices == latent)).sum(-1)

    @property
    def totals(self) -> Tensor:
        """float32 [tokens]: the sum of all activations at each."""
        return self.code.values.abs().sum(-1)

    @property
    def l0(self) -> Tensor:
        """int64 [tokens]: how many latents are active at each."""
        return (self.code.values != 0).sum(-1)


def check_latent(latent: int, num_latents: int, where: str = "the SAE") -> None:
    """ValueError unless `where` has such a latent."""
    if not 0 <= latent < num_latents:
        raise ValueError(f"latent {latent}: {where} has 0 to {num_latents - 1}")


@torch.no_grad()
def look(model: Any, sae: SAE, ids: Tensor | Sequence[int], special: Special | None = None) -> Look:
    """The latents of an SAE in a text, `ids` int64 [tokens]. Raises what `encoded` raises."""
    rows = torch.as_tensor(ids, dtype=torch.int64).reshape(1, -1)
    found = next(encoded(model, sae, rows, special=special))
    code = found.code[0].to("cpu")
    code = SparseCode(code.indices, code.values.float(), code.num_latents)
    return Look(rows[0].cpu(), found.used[0].cpu(), code)
