"""What a checkpoint declares about itself, and how far a measurement may be from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saert.sae import SAE

FACTS = ("l0", "fvu", "explained_variance", "dead", "unit_norm_decoder")
"""What `declared` reads and `expect` accepts: active latents per token; the fraction of variance
unexplained, or one minus it; the share of latents that are never active; whether every row of
W_dec has length 1."""


@dataclass(frozen=True)
class Tolerance:
    """How far a measured number may be from the declared one.

    Other text than the trainer's moves both numbers. Tokens of TinyStories against text that the
    bundled model writes itself: L0 by 1%, FVU by 17%.

    Attributes:
        l0: factor, either way.
        fvu: factor, either way; fvu_slack: added on top above, and subtracted below.
        better: another way to read the weights has to have an FVU of at most this part of that of
            the SAE as it is, to count as the right one.
    """

    l0: float = 1.3
    fvu: float = 1.5
    fvu_slack: float = 0.02
    better: float = 0.85

    def __post_init__(self) -> None:
        for name, value in (("l0", self.l0), ("fvu", self.fvu)):
            if not (math.isfinite(value) and value >= 1):
                raise ValueError(f"Tolerance: {name} is {value!r}, expected a factor of at least 1")
        if not self.fvu_slack >= 0 or not 0 < self.better < 1:
            raise ValueError(
                f"Tolerance: fvu_slack is {self.fvu_slack!r} and better {self.better!r}, expected "
                "fvu_slack ≥ 0 and better between 0 and 1"
            )

    def span(self, fact: str, declared: float) -> tuple[float, float]:
        """The range allowed for a declared `l0` or `fvu`."""
        if fact == "l0":
            return declared / self.l0, declared * self.l0
        return declared / self.fvu - self.fvu_slack, declared * self.fvu + self.fvu_slack


def declared(sae: SAE, expect: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Declared numbers of an SAE by fact: `l0`, `fvu`, `dead`, `unit_norm_decoder` (1.0 or 0.0).

    `expect` goes before `metadata["declared"]` (what a format or a path says), that before
    `metadata["metrics"]` (what saert's training measured on held-out text).

    Raises ValueError for a fact in `expect` that cannot be verified, or a value that is no number.
    """
    if unknown := sorted(set(expect or {}) - set(FACTS)):
        raise ValueError(f"expect: unknown facts {unknown}; expected some of {list(FACTS)}")
    found: dict[str, float] = {}
    for source in (sae.metadata.get("metrics"), sae.metadata.get("declared"), expect):
        if not isinstance(source, Mapping):
            continue
        for fact in FACTS:
            value = source.get(fact)
            if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
                if source is expect and fact in source:
                    raise ValueError(f"expect: {fact} is {value!r}, expected a number from 0 up")
                continue
            if fact == "explained_variance":
                found["fvu"] = 1.0 - float(value)
            else:
                found[fact] = float(value)
    return found
