"""The hidden states of a language model at several hookpoints, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hooks import hooked


@torch.no_grad()
def capture(
    model: Any, rows: Tensor, hookpoints: Sequence[Hookpoint], batch: int = 16
) -> dict[Hookpoint, Tensor]:
    """rows int64 [rows, context] -> per hookpoint [rows · context, d], in token order.

    The model runs no further than the last of the hookpoints.
    """
    found: dict[Hookpoint, Tensor] = {}
    first, waiting = 0, set[Hookpoint]()

    def keep(hookpoint: Hookpoint) -> Callable[[Tensor], None]:
        def copy(hidden: Tensor) -> None:  # a copy: some models go on adding to the tensor in place
            flat = hidden.flatten(0, -2)
            if hookpoint not in found:
                found[hookpoint] = flat.new_empty(rows.numel(), flat.shape[-1])
            found[hookpoint][first : first + len(flat)] = flat
            waiting.discard(hookpoint)
            if not waiting:
                raise _Enough

        return copy

    with ExitStack() as hooks:
        for hookpoint in dict.fromkeys(hookpoints):
            hooks.enter_context(hooked(model, hookpoint, keep(hookpoint)))
        for part in rows.split(batch):
            waiting.update(hookpoints)
            with suppress(_Enough):
                model.base_model(part, use_cache=False)
            first += part.numel()
    return found


class _Enough(Exception):
    """Every hookpoint has been seen in this pass."""
