"""Registering a function as a torch.library operator, so that graphs, autocast and fakes take it.

This is `torch.library.custom_op` by its lower-level functions. That decorator wraps the function
twice more, which costs 180 µs a call instead of 60 one token at a time, when a dictionary has just
pushed everything else out of the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

_LIBRARY = torch.library.Library("saert", "FRAGMENT")


def operator(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """The operator `saert::<name>` of a schema `name(Tensor x, …) -> …`.

    Args:
        run: computes it, on every device; mutates nothing and returns no input.
        fake: makes outputs of the right shape and dtype.
        backward, save: its gradient, as for `torch.library.register_autograd`. Without them
            a backward pass through the operator raises RuntimeError.
    """
    name = schema.split("(")[0]

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"saert::{name} has no gradient: it is one itself, or not differentiable"
        )

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"saert::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"saert::{name}", backward or refuse, setup_context=save, lib=_LIBRARY
    )
    packet: Any = getattr(torch.ops.saert, name)
    overload: Callable[..., Any] = packet.default
    return overload
