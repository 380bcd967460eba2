"""The hidden states of a language model at several hookpoints, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hooks import hooked


@torch.no_grad()
def capture(
    model: Any, rows: Tensor, hookpoints: Sequence[Hookpoint], batch: int = 16
) -> dict[Hookpoint, Tensor]:
    """rows int64 [rows, context] -> per hookpoint [rows · context, d], in token order."""
    found: dict[Hookpoint, list[Tensor]] = {h: [] for h in hookpoints}

    def keep(hookpoint: Hookpoint) -> Callable[[Tensor], None]:
        return lambda hidden: found[hookpoint].append(hidden.flatten(0, -2))

    with ExitStack() as hooks:
        for hookpoint in found:
            hooks.enter_context(hooked(model, hookpoint, keep(hookpoint)))
        for part in rows.split(batch):
            model.base_model(part, use_cache=False)
    return {hookpoint: torch.cat(parts) for hookpoint, parts in found.items()}
