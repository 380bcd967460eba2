"""Activations of a language model at several hookpoints, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saert.hookpoint import Hookpoint
from saert.train.data import Rows


@contextmanager
def hooked(
    model: nn.Module, hookpoint: Hookpoint, act: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `act` on the hidden state at a hookpoint; what it returns, if anything, replaces it."""
    location = hookpoint.resolve(model)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = act(args[0])
        return None if hidden is None else (hidden, *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        whole = isinstance(out, Tensor)  # some modules return a tuple, decided by what comes
        hidden = act(out if whole else out[0])
        return hidden if hidden is None or whole else (hidden, *out[1:])

    handle = (
        location.module.register_forward_pre_hook(enter)
        if location.side == "in"
        else location.module.register_forward_hook(leave)
    )
    try:
        yield
    finally:
        handle.remove()


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


class ActivationStream:
    """Batches of activations, the same tokens at every hookpoint.

    A buffer of rows is run once and shuffled over its tokens. Which rows fill a buffer and how it
    is shuffled depend on its number only, so a batch is a function of the step and a resumed run
    sees what the stopped one would have seen.
    """

    def __init__(
        self, model: Any, rows: Rows, hookpoints: Sequence[Hookpoint], batch: int, seed: int
    ) -> None:
        self.model, self.rows, self.hookpoints = model, rows, hookpoints
        self.batch, self.seed = batch, seed
        self.per_buffer = rows.batch * rows.context // batch
        if self.per_buffer == 0:
            raise ValueError(
                f"a buffer of {rows.batch * rows.context} tokens has no batch of {batch}"
            )
        self.number = -1
        self.buffer: Mapping[Hookpoint, Tensor] = {}
        self.order = torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> dict[Hookpoint, Tensor]:
        number, i = divmod(step, self.per_buffer)
        if number != self.number:
            self.buffer = capture(self.model, self.rows[number], self.hookpoints)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self.order = torch.randperm(self.rows.batch * self.rows.context, generator=generator)
            self.number = number
        chosen = self.order[i * self.batch : (i + 1) * self.batch]
        return {hookpoint: x[chosen] for hookpoint, x in self.buffer.items()}
