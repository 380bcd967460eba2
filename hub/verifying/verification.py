"""What verification says: a line for each fact, and the probable cause where they do not agree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from saert.hub.errors import FormatError
from saert.sae import SAE


@dataclass(frozen=True)
class Check:
    """One fact.

    Attributes:
        fact: `l0`, `fvu`, `W_dec rows`, …
        declared: what the checkpoint or the caller says; None where nobody says anything, and
            `expected` is a limit of plausibility.
        measured: what was found.
        expected: the range that was allowed, in words; "" for a number that is only reported.
        ok: whether it is in that range.
        hint: what a wrong one points at.
        serious: a wrong one is a mismatch, which is refused; otherwise it is a warning.
    """

    fact: str
    declared: float | str | None
    measured: float | str
    expected: str = ""
    ok: bool = True
    hint: str = ""
    serious: bool = False

    def __str__(self) -> str:
        said = "" if self.declared is None else f", declared {shown(self.declared)}"
        wanted = f" (expected {self.expected})" if self.expected else ""
        return f"{self.fact} is {shown(self.measured)}{said}{wanted}" + (
            f": {self.hint}" if self.hint and not self.ok else ""
        )


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        name: which SAE, for messages.
        checks: every fact that was looked at.
        tokens: how many the measured ones rest on; 0 where only weights were looked at.
        cause: the probable cause of what does not agree, None where all does.
        fits: FVU and L0 of every other way to read the weights that was tried, best first:
            `{"read at resid_post.1": (0.31, 16.0), …}`. The first tokens only.
    """

    name: str
    checks: tuple[Check, ...]
    tokens: int = 0
    cause: str | None = None
    fits: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def mismatches(self) -> tuple[Check, ...]:
        """What the measurement contradicts."""
        return tuple(check for check in self.checks if not check.ok and check.serious)

    @property
    def warnings(self) -> tuple[Check, ...]:
        """What is implausible, though nobody declared otherwise."""
        return tuple(check for check in self.checks if not check.ok and not check.serious)

    @property
    def ok(self) -> bool:
        """Whether nothing is contradicted; there may be warnings."""
        return not self.mismatches

    def __getitem__(self, fact: str) -> Check:
        """The check of a fact; KeyError names those there are."""
        for check in self.checks:
            if check.fact == fact:
                return check
        raise KeyError(f"{fact!r}; there are {[check.fact for check in self.checks]}")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def message(self, chosen: Sequence[Check]) -> str:
        """Some of the checks as one text, the cause last."""
        lines = [f"{self.name}: {chosen[0]}", *(str(check) for check in chosen[1:])]
        return "\n".join([*lines, *([f"probable cause: {self.cause}"] if self.cause else [])])

    def __str__(self) -> str:
        """A table."""
        rows = [("", "fact", "measured", "declared", "expected")]
        for check in self.checks:
            mark = " " if check.ok else "✗" if check.serious else "!"
            said = "" if check.declared is None else shown(check.declared)
            rows.append((mark, check.fact, shown(check.measured), said, check.expected))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"{check.fact}: {check.hint}" for check in self.checks if not check.ok]
        return "\n".join([*lines, *([f"probable cause: {self.cause}"] if self.cause else [])])


class VerificationError(FormatError):
    """Weights or measurements contradict what is declared: reading them so gives wrong numbers.

    A FormatError, so that one `except` covers all that `load` refuses about a checkpoint.
    `verification` has the facts.
    """

    def __init__(self, verification: Verification) -> None:
        super().__init__(verification.message(verification.mismatches))
        self.verification = verification


OnMismatch = Literal["refuse", "warn", "report"]


def check_action(on_mismatch: str) -> None:
    """ValueError for a word that `act_on` does not know."""
    if on_mismatch not in (known := get_args(OnMismatch)):
        raise ValueError(f"on_mismatch is {on_mismatch!r}, expected one of {list(known)}")


def act_on(verification: Verification, on_mismatch: OnMismatch, stacklevel: int) -> None:
    """Raise VerificationError for mismatches ("refuse") or warn of them ("warn"), and warn of what
    is implausible; "report" does neither."""
    if on_mismatch == "report":
        return
    if verification.mismatches and on_mismatch == "refuse":
        raise VerificationError(verification)
    if wrong := (*verification.mismatches, *verification.warnings):
        warnings.warn(verification.message(wrong), stacklevel=stacklevel)


def shown(value: float | str) -> str:
    """A number with four digits, NaN as itself."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def name_of(sae: SAE) -> str:
    """What messages call an SAE: where it comes from, where it reads and writes."""
    parts = [str(sae.metadata[key]) for key in ("source", "path") if sae.metadata.get(key)]
    places = [str(at) for at in (sae.hookpoint, sae.target_hookpoint) if at is not None]
    where = f" at {' → '.join(places)}" if places else ""
    return f"the SAE{where}" + (f" of {':'.join(parts)}" if parts else "")
