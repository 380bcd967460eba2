"""The SAEs on a steered model: their edits, the prompt's and then the rest's, and what they saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch

from saert.edits import Edit
from saert.measure.steering.setup import Setup
from saert.runtime import Attachment, attach
from saert.sae import SAE


@dataclass(frozen=True)
class Live:
    """What an attached SAE saw of the steered text so far, as in `SAEReport`.

    Attributes:
        l0: mean active latents per token.
        fvu: fraction of variance unexplained.
        error_norm: mean ‖y - ŷ‖₂, in the model's units.
        tokens: how many it saw: the prompt's, and those generated that were read again.
    """

    l0: float | None
    fvu: float | None
    error_norm: float | None
    tokens: int


class Watch:
    """What is attached, by source string. Made by `watched`."""

    def __init__(
        self, attachment: Attachment | None, saes: Mapping[str, SAE], setup: Setup
    ) -> None:
        self._attachment, self._saes = attachment, saes
        # Which pass is the prompt is known here, and not every cache (Mamba's) would tell.
        self._edits = {phase: _edits(setup, saes, phase) for phase in ("prompt", "generated")}

    def begin(self, phase: str) -> None:
        """Put the edits of "prompt" or "generated" tokens in force."""
        if self._attachment is not None:
            self._attachment.edits = self._edits[phase]

    def clear(self) -> None:
        """Forget what was seen."""
        if self._attachment is not None:
            self._attachment.clear()

    def live(self) -> dict[str, Live]:
        """What each saw, by source string."""
        if self._attachment is None:
            return {}
        reports = self._attachment.report().values()  # in the order of attaching
        return {
            source: Live(one.l0, one.fvu, one.error_norm, one.tokens)
            for source, one in zip(self._saes, reports, strict=True)
        }


@contextmanager
def watched(
    model: Any, saes: Mapping[str, SAE], setup: Setup, strict: bool = True
) -> Iterator[Watch]:
    """The SAEs on the model, with the edits of the prompt; without an SAE nothing is attached.

    Raises what `attach` raises, for the edits of any phase.
    """
    if not saes:
        yield Watch(None, saes, setup)
        return
    edits = [one.edit(saes[one.sae]) for one in setup.edits]
    chosen = list(saes.values())
    with attach(model, chosen, edits, splice=setup.splice, strict=strict) as attachment:
        watch = Watch(attachment, saes, setup)
        watch.begin("prompt")
        yield watch


def _edits(setup: Setup, saes: Mapping[str, SAE], phase: str) -> list[Edit]:
    mine = [one for one in setup.edits if one.phase in ("all", phase)]
    return [replace(one, phase="all").edit(saes[one.sae]) for one in mine]


def check_names(saes: Mapping[str, SAE]) -> None:
    """ValueError for one SAE under two names: it would act twice, or be watched twice."""
    for (a, one), (b, other) in combinations(saes.items(), 2):
        if _same(one, other):
            raise ValueError(f"{a} and {b} are the same SAE: use one name for it")


def _same(one: SAE, other: SAE) -> bool:
    if one is other:
        return True
    about = [(s.hookpoint, s.target_hookpoint, repr(s.activation), s.dtype) for s in (one, other)]
    if about[0] != about[1]:
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()
    )
