"""One edit as plain data, which a form, a link or a file can hold."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from saert.edits import PHASES, Edit, Phase, ablate, active, add, clamp, scale
from saert.hub.session import BUNDLED, canonical
from saert.sae import SAE

Op = Literal["add", "clamp", "scale", "ablate"]
OPS = get_args(Op)
LONGEST_NAME = 1024  # characters of a source string or a model's name
_MAKERS: dict[str, Callable[..., Edit]] = {
    "add": add,
    "clamp": clamp,
    "scale": scale,
    "ablate": ablate,
}


@dataclass(frozen=True)
class EditSpec:
    """An edit of one latent; what each `op` does is `saert.edits`.

    Attributes:
        sae: the SAE's source string; "bundled" is spelt out, as `source_of` does.
        latent: index into its dictionary.
        op: "add", "clamp", "scale" or "ablate".
        amount: what is added, the value clamped to, the factor, or the value ablated to; add's and
            clamp's in units of the activation.
        phase: edit the tokens of the "prompt", the "generated" ones, or "all".
        when, above: only at tokens where the latent `when` of the same SAE exceeds `above`.

    Raises ValueError, TypeError: a value that cannot be meant.

    >>> EditSpec("bundled:resid_post.2", 71, amount=9.0, phase="generated").edit(sae)
    add([71], 9)
    """

    sae: str
    latent: int
    op: Op = "add"
    amount: float = 0.0
    phase: Phase = "all"
    when: int | None = None
    above: float = 0.0

    def __post_init__(self) -> None:
        """Check every value, and make whole numbers int and others float."""
        _set(self, "sae", source_of("sae", self.sae))
        _set(self, "latent", whole("latent", self.latent))
        choice("op", self.op, OPS)
        _set(self, "amount", number("amount", self.amount))
        choice("phase", self.phase, PHASES)
        if self.when is not None:
            _set(self, "when", whole("when", self.when))
        _set(self, "above", number("above", self.above))

    def edit(self, sae: SAE) -> Edit:
        """The edit itself, of an SAE that will be attached."""
        when = None if self.when is None else active(self.when, self.above)
        return _MAKERS[self.op](self.latent, self.amount, sae=sae, phase=self.phase, when=when)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> EditSpec:
        """From `to_dict`, or from anyone. ValueError, TypeError: an unknown key, a bad value."""
        return cls(**known_fields(cls, given, "an edit"))


def source_of(name: str, value: object) -> str:
    """A source string as it is compared: no spaces around it, the bundled SAE by its whole name."""
    found = checked_name(name, value, "a source string, as bundled:resid_post.2")
    return canonical(found) if found.partition(":")[0] == BUNDLED else found


def checked_name(name: str, value: object, what: str) -> str:
    """Text that names something, without spaces around it."""
    found = checked_text(name, value).strip()
    if not found:
        raise ValueError(f"{name}: found nothing, expected {what}")
    if len(found) > LONGEST_NAME:
        raise ValueError(f"{name}: found {len(found)} characters ({short(found)}), expected {what}")
    return found


def known_fields(cls: Any, given: object, what: str) -> dict[str, Any]:
    """`given` if it holds fields of the dataclass, and all that have no default."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{what}: found {type(given).__name__}, expected a mapping")
    names = {field.name: field for field in fields(cls)}
    if unknown := [key for key in given if key not in names]:
        raise ValueError(f"{what}: unknown key {short(unknown[0])}; expected {', '.join(names)}")
    needed = [name for name, field in names.items() if field.default is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{what}: {missing[0]!r} is missing")
    return dict(given)


def checked_text(name: str, value: object) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: found {type(value).__name__}, expected text")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name}: holds half of a UTF-16 pair, which is not a character")
    return value


def whole(name: str, value: Any, low: int = 0, high: int = 2**63 - 1) -> int:
    """A whole number between `low` and `high`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"{name}: found {short(value)}, expected a whole number")
    if not low <= found <= high:
        raise ValueError(f"{name}: found {short(found)}, expected {low} to {high}")
    return found


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool | str | bytes):
        raise TypeError(f"{name}: found {short(value)}, expected a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: found {short(value)}, expected a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{name}: found {found}, expected a finite number")
    return found


def choice(name: str, value: object, among: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the words."""
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"{name}: found {short(value)}, expected one of {', '.join(among)}")


def short(value: object, most: int = 60) -> str:
    """A value as an error quotes it: its beginning, if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return f"an {type(value).__name__} too long to write"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _set(spec: EditSpec, name: str, value: Any) -> None:
    object.__setattr__(spec, name, value)  # frozen for everyone else
