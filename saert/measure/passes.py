"""Sparse codes of rows of tokens: the pass over text that most measures begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.sae import SAE
from saert.sparse import SparseCode
from saert.tracker import is_attached

Special = Callable[[Tensor], Tensor]
"""rows of token ids -> bool of the same shape: positions that no measure looks at."""


@dataclass(frozen=True)
class Encoded:
    """A batch of rows with what an SAE says about them.

    Attributes:
        rows: int64 [batch, context].
        used: bool [batch, context]; false at positions that are left out.
        x, y: [batch, context, d_in] and [batch, context, d_out], what the SAE reads and what it
            should write (the same tensor, but for transcoders).
        code: SparseCode [batch, context, k], empty where `used` is false.
    """

    rows: Tensor
    used: Tensor
    x: Tensor
    y: Tensor
    code: SparseCode


def encoded(
    model: Any, sae: SAE, rows: Tensor, *, batch: int = 16, special: Special | None = None
) -> Iterator[Encoded]:
    """rows int64 [rows, context] -> `Encoded`, `batch` rows at a time, on the SAE's device.

    The model runs no further than the SAE's hookpoints. For rows of unequal length pad on the
    right and let `special` name the padding: a causal model does not look ahead.
    Raises ValueError if the SAE does not say where it reads.
    """
    read, write = sites(sae)
    check_ready(model)
    device = device_of(model)
    for part in rows.split(batch):
        used = torch.ones_like(part, dtype=torch.bool) if special is None else ~special(part)
        hidden = capture(model, part.to(device), (read, write), batch=len(part))
        x, y = (hidden[h].view(*part.shape, -1).to(sae.device) for h in (read, write))
        used = used.to(sae.device)
        yield Encoded(part, used, x, y, masked(sae.encode(x), used))


def check_ready(model: nn.Module) -> None:
    """ValueError if a measure would see another model than the one that will be used."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout is on: call model.eval()")
    if is_attached(model):
        raise ValueError("the model has SAEs attached, which would be measured with it: detach")


def masked(code: SparseCode, used: Tensor) -> SparseCode:
    """The code with empty slots at the tokens where `used` [*tokens] is false."""
    return SparseCode(code.indices, code.values * used.unsqueeze(-1), code.num_latents)


def sites(sae: SAE) -> tuple[Hookpoint, Hookpoint]:
    """Where an SAE reads and where it writes."""
    if sae.hookpoint is None:
        raise ValueError("the SAE does not say where it reads: set sae.hookpoint, as resid_post.6")
    return sae.hookpoint, sae.target_hookpoint or sae.hookpoint


def by_hookpoint(saes: SAE | Sequence[SAE] | Mapping[Any, SAE]) -> dict[Hookpoint, SAE]:
    """SAEs by where they write; ValueError if two write to one place."""
    if isinstance(saes, SAE):
        saes = [saes]
    listed = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    found = {sites(sae)[1]: sae for sae in listed}
    if len(found) != len(listed):
        raise ValueError(f"{len(listed)} SAEs write to {len(found)} places: give one SAE for each")
    return found
