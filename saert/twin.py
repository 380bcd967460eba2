"""A second model of the same weights: hooks on one never fire in the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from saert.hooks import InputHook, OutputHook

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of a model's modules around the same parameters and buffers.

    It takes milliseconds and no memory for weights. What is attached to a twin, generated with it
    or compiled of it stays its own, so several threads can steer one model at a time, each with a
    twin. Training one trains the other.

    Raises TypeError for a model with something attached, or whose hidden states are being read
    or changed (`saert.hooks.hooked`), as those hooks would be copied. Hooks of anyone else are.
    Also for one where somebody replaced the `forward` of a module that has weighty children by a
    function which cannot be copied: the twin would run the children of the original.

    >>> with attach(twin(model), sae, add(3, 8.0)):
    ...     logits = model(**inputs).logits  # as if nothing were attached
    """
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(isinstance(hook, InputHook | OutputHook) for hook in hooks):
            raise TypeError(
                "the model cannot be copied while something is attached to it, or reads or changes "
                "its hidden states: detach that first, or take the twin before"
            )
    own = (*model.parameters(), *model.buffers(), *_offloaded(model))
    other = copy.deepcopy(model, {id(one): one for one in own})
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        kept = forward is not None and vars(other.get_submodule(name))["forward"] is forward
        if kept and any(next(child.parameters(), None) is not None for child in module.children()):
            raise TypeError(
                f"{name or 'the model'}: its forward was replaced by {forward!r}, which would run "
                "the original's modules in a twin, past every hook; take the twin before that"
            )
    return other


def _offloaded(model: nn.Module) -> Iterator[Any]:
    """Where accelerate keeps the weights of modules that it fills for each pass."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            if weights is not None:
                yield weights
