"""A second model of the same weights: hooks on one never fire in the other."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A copy of a model's modules around the same parameters and buffers.

    It takes milliseconds and no memory for weights. What is attached to a twin, generated with it
    or compiled of it stays its own, so several threads can steer one model at a time, each with a
    twin. Training one trains the other.

    Raises TypeError for a model with something attached: its hooks would be copied as well.

    >>> with attach(twin(model), sae, add(3, 8.0)):
    ...     logits = model(**inputs).logits  # as if nothing were attached
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
