"""Hooks that find a module's hidden state, however it is passed in or returned."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saert.hookpoint import Hookpoint, Location
from saert.parts import gathered

Act = Callable[[Tensor], Tensor | None]


@contextmanager
def hooked(model: nn.Module, hookpoint: Hookpoint, act: Act) -> Iterator[None]:
    """Call `act` on the hidden state at a hookpoint; what it returns, if anything, replaces it.

    A compiled model runs uncompiled meanwhile: a graph made before would not know of the hook.
    """
    location = hookpoint.resolve(model)
    changes: list[Tensor] = []

    def replace(hidden: Tensor) -> Tensor | None:
        new = act(hidden)
        changes[:] = [] if new is None else [new - hidden]
        return new

    def carry(hidden: Tensor) -> Tensor | None:
        return hidden + changes.pop().view_as(hidden) if changes else None

    if location.carry is None:
        handles = [_register(model, location, act)]
    else:  # the block goes on with a copy of its own, which has to change as well
        block = Location(location.carry, model.get_submodule(location.carry), "out")
        # before other hooks on the block's output, which must see the change
        handles = [
            _register(model, location, replace),
            _register(model, block, carry, prepend=True),
        ]
    try:
        with eager():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Eager:
    """Compiled models run uncompiled inside, in every thread: torch has one stance for all.

    So the first to enter sets it and the last to leave restores it, whatever their order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stance: AbstractContextManager[object] | None = None
        self._inside = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
            yield
            return
        with self._lock:
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    stance, self._stance = self._stance, None
                    stance.__exit__(None, None, None)


eager = _Eager()


def _register(model: nn.Module, at: Location, act: Act, prepend: bool = False) -> RemovableHandle:
    act = gathered(model, at, act)
    if at.side == "in":
        hook = InputHook(act)
        return at.module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True)
    return at.module.register_forward_hook(OutputHook(act), prepend=prepend)


class OutputHook:
    """A forward hook that passes the module's tensor output (the first of a tuple) to `act`."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)  # attention, old blocks; OpenAI GPT's list
        hidden = output[0] if several else output
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"{type(module).__name__} returns {type(output).__name__}, expected a tensor or a "
                "tuple that begins with one; choose a hookpoint inside it"
            )
        new = self.act(hidden)
        if new is None:
            return None
        return type(output)((new, *output[1:])) if several else new


class InputHook:
    """A forward pre-hook that passes the module's first tensor argument to `act`."""

    def __init__(self, act: Act) -> None:
        self.act = act

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if args and isinstance(args[0], Tensor):
            new = self.act(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        name = "hidden_states" if "hidden_states" in tensors else next(iter(tensors), None)
        if name is None:
            raise TypeError(f"{type(module).__name__} was called without a tensor")
        new = self.act(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: what it says, or its first parameter that is not offloaded
    (those stand on the meta device until they are used)."""
    hook = getattr(model, "_hf_hook", None)  # accelerate's
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    found = (parameter.device for parameter in model.parameters())
    return next((device for device in found if device.type != "meta"), torch.device("cpu"))
