"""The tap as an operator that torch.compile does not look into.

A graph that vLLM compiles may be loaded from its cache in another process, where tensors it was
traced with do not exist. So the graph holds the tap's name only, and finds the tap when it runs.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from saert.engines.taps import Tap

NAME = "saert::tap"
TAPS: WeakValueDictionary[str, Tap] = WeakValueDictionary()


@torch.library.custom_op(NAME, mutates_args=("out",))
def tap_operator(
    out: Tensor, hidden: Tensor, residual: Tensor | None, source: Tensor | None, name: str
) -> None:
    """`Tap.act` of the tap of that name."""
    TAPS[name].act(out, hidden, residual, source)


@tap_operator.register_fake
def _(
    out: Tensor, hidden: Tensor, residual: Tensor | None, source: Tensor | None, name: str
) -> None:
    return None


def make_opaque(tap: Tap) -> None:
    """Let a tap run as the operator, in every pass: for hooks that are compiled once.

    Raises ValueError: a tap of that name lives in this process, for another engine.
    """
    if tap.name in TAPS:
        raise ValueError(
            f"{tap.name}: another compiled engine of this process has an SAE there; start each in "
            "a process of its own (VLLM_ENABLE_V1_MULTIPROCESSING=1)"
        )
    TAPS[tap.name] = tap
    name = tap.name

    def run(out: Tensor, hidden: Tensor, residual: Tensor | None, source: Tensor | None) -> None:
        tap_operator(out, hidden, residual, source, name)

    tap.run, tap.always = run, True
