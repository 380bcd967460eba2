"""A second model of the same weights: hooks on one never fire in the other."""

from __future__ import annotations

import copy
from typing import TypeVar

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
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
