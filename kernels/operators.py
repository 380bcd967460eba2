"""Registering a function as a torch.library operator, so that graphs, autocast and fakes take it.

This is `torch.library.custom_op` by its lower-level functions. That decorator wraps the function
twice more: 15 µs a call instead of 5, and more one token at a time, when a dictionary has just
pushed everything else out of the caches (LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

_LIBRARIES: dict[str, torch.library.Library] = {}  # one an operator: reloading replaces it


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

    if name in _LIBRARIES:
        _LIBRARIES.pop(name)._destroy()
    library = _LIBRARIES[name] = torch.library.Library("saert", "FRAGMENT")
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"saert::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"saert::{name}", backward or refuse, setup_context=save, lib=library
    )
    packet: Any = getattr(torch.ops.saert, name)
    overload: Callable[..., Any] = packet.default
    return overload


def refuse_forward_mode(name: str) -> None:
    """Raise RuntimeError under forward-mode differentiation: torch would give zeros for it."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name}: forward-mode differentiation (torch.func.jvp) is not defined for saert's "
            "operators; use backward, or the plain-PyTorch reference beside the operator"
        )
