"""Edits: what to change about a code, at which tokens, as frozen data.

An edit does nothing by itself: `attach(model, sae, edits)` compiles edits into a plan of static
tables (`saert.plan`) that is applied inside the forward pass. `apply` is the definition of what
they mean, on a sparse code, and what the tests compare the runtime with.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypedDict, Unpack

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.sparse import SparseCode

if TYPE_CHECKING:
    from saert.sae import SAE

Phase = Literal["all", "prompt", "generated"]
Positions = int | Sequence[int] | slice | None
Rows = int | Sequence[int] | None
PHASES = ("all", "prompt", "generated")


class Where(TypedDict, total=False):
    """The keywords that every edit takes.

    Attributes:
        sae: which attached SAE, by hookpoint or object; required if more than one is attached.
        rows: rows of the caller's batch (beams and returned sequences follow their source row).
        positions: token positions, an int, ints or a slice; they count each row's real tokens
            from 0, padding excluded; negative ones count from the end of the prompt.
        phase: "prompt", "generated" (positions past the prompt) or "all".
        when: `active(latent, above)`: only at tokens where that latent fires.
    """

    sae: SAE | Hookpoint | str | None
    rows: Rows
    positions: Positions
    phase: Phase
    when: Condition | None


class Op(IntEnum):
    """What happens to an activation f: ADD f + amount, SET amount, SCALE f · amount."""

    ADD = 0
    SET = 1
    SCALE = 2


@dataclass(frozen=True)
class Condition:
    """True at tokens where `latent`, as the SAE encoded it before any edit, exceeds `above`."""

    latent: int
    above: float = 0.0


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens, of which rows, and which attached SAE an edit is for."""

    sae: SAE | Hookpoint | str | None = None
    rows: tuple[int, ...] | None = None
    positions: tuple[int, ...] | slice | None = None
    phase: Phase = "all"
    when: Condition | None = None

    @property
    def needs_prompt(self) -> bool:
        """Whether it can only be decided by someone who knows where the prompt ends."""
        if self.phase != "all":
            return True
        if isinstance(self.positions, slice):
            ends = (self.positions.start, self.positions.stop)
            return any(end is not None and end < 0 for end in ends)
        return self.positions is not None and any(p < 0 for p in self.positions)

    @property
    def everywhere(self) -> bool:
        """Whether it selects every token of every row."""
        return self.rows is None and self.positions is None and self.phase == "all"


@dataclass(frozen=True, eq=False)
class LatentEdit:
    """One operation on the activations of some latents."""

    latents: tuple[int, ...]
    op: Op
    amount: float | Tensor
    select: Selection

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.latents[:6])) + (", …" if len(self.latents) > 6 else "")
        return f"{self.op.name.lower()}([{names}], {_number(self.amount):g})"


@dataclass(frozen=True, eq=False)
class VectorEdit:
    """`amount · vector` added to the hidden state itself; vector [d_out], in the model's units."""

    vector: Tensor
    amount: float | Tensor
    select: Selection

    def __repr__(self) -> str:
        return f"add_vector([{self.vector.shape[0]}], {_number(self.amount):g})"


Edit = LatentEdit | VectorEdit


def add(latent: SupportsIndex, amount: float | Tensor, **where: Unpack[Where]) -> LatentEdit:
    """Steer: f' = f + amount, whether or not the latent fires. Needs no encoding.

    The hidden state becomes hidden + amount · W_dec[latent] (times the input transform's scale).

    Args:
        latent: index into the dictionary.
        amount: a number, or a 0-d tensor if gradients should reach it.
        where: `sae`, `rows`, `positions`, `phase` and `when`; see `Where`.

    Raises:
        ValueError, TypeError: an argument that cannot be meant; named in the message.

    >>> add(3, 8.0, phase="generated")
    add([3], 8)
    """
    return LatentEdit((_latent(latent),), Op.ADD, _amount(amount), _selection(where))


def clamp(latent: SupportsIndex, value: float | Tensor, **where: Unpack[Where]) -> LatentEdit:
    """Set a latent: f' = value, whatever it was. Keywords as for `add`.

    >>> clamp(3, 5.0, positions=-1)
    set([3], 5)
    """
    return LatentEdit((_latent(latent),), Op.SET, _amount(value), _selection(where))


def scale(latent: SupportsIndex, factor: float | Tensor, **where: Unpack[Where]) -> LatentEdit:
    """Multiply a latent: f' = factor · f; nothing where it does not fire. Keywords as for `add`.

    >>> scale(3, 2.0, when=active(7))
    scale([3], 2)
    """
    return LatentEdit((_latent(latent),), Op.SCALE, _amount(factor), _selection(where))


def ablate(
    latents: SupportsIndex | Iterable[SupportsIndex],
    to: float | Tensor = 0.0,
    **where: Unpack[Where],
) -> LatentEdit:
    """Silence latents: f' = to (0, or for example their mean). Keywords as for `add`.

    >>> ablate([3, 9], rows=0)
    set([3, 9], 0)
    """
    chosen = tuple(_latent(latent) for latent in _each(latents))
    if not chosen:
        raise ValueError("ablate: no latents given")
    if len(set(chosen)) < len(chosen):
        raise ValueError("ablate: a latent is listed twice")
    return LatentEdit(chosen, Op.SET, _amount(to), _selection(where))


def add_vector(vector: Tensor, amount: float | Tensor = 1.0, **where: Unpack[Where]) -> VectorEdit:
    """Add `amount · vector` to the hidden state where the SAE writes. Keywords as for `add`.

    `vector` is [d_out] in the model's own units: no input transform scales it.

    >>> add_vector(torch.ones(16), 0.5)
    add_vector([16], 0.5)
    """
    if not isinstance(vector, Tensor) or vector.dim() != 1:
        found = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"add_vector: found {found}, expected a tensor [d_out]")
    if not vector.isfinite().all():
        raise ValueError("add_vector: the vector contains NaN or inf")
    return VectorEdit(vector, _amount(amount), _selection(where))


def active(latent: SupportsIndex, above: float = 0.0) -> Condition:
    """A condition for `when`: the token's activation of `latent`, before any edit, is > above."""
    return Condition(_latent(latent), _number(_amount(above)))


def apply(edits: Sequence[LatentEdit], code: SparseCode) -> SparseCode:
    """The edits, in order, at every token of a code: what they mean, without rows or positions.

    Pure: returns another code, with slots for latents that did not fire. `when` is decided on
    `code` as it came in.

    >>> code = SparseCode(torch.tensor([[2]]), torch.tensor([[1.5]]), num_latents=4)
    >>> apply([scale(2, 2.0), add(0, 1.0)], code).to_dense()
    tensor([[1., 0., 3., 0.]])
    """
    before = code.to_dense()
    after = before.clone()
    for edit in edits:
        chosen = torch.tensor(edit.latents, device=before.device)
        f = after[..., chosen]
        new = (f + edit.amount, torch.zeros_like(f) + edit.amount, f * edit.amount)[edit.op]
        if (when := edit.select.when) is not None:
            new = torch.where(before[..., when.latent, None] > when.above, new, f)
        after[..., chosen] = new
    return SparseCode.from_dense(after)


def _selection(where: Where) -> Selection:
    if unknown := sorted(set(where) - set(Where.__annotations__)):
        raise TypeError(
            f"unknown keyword {unknown[0]!r}; expected {', '.join(Where.__annotations__)}"
        )
    sae, when, phase = where.get("sae"), where.get("when"), where.get("phase", "all")
    if phase not in PHASES:
        raise ValueError(f"phase: found {phase!r}, expected one of {', '.join(map(repr, PHASES))}")
    if when is not None and not isinstance(when, Condition):
        raise TypeError(f"when: found {type(when).__name__}, expected active(latent, above=0.0)")
    if isinstance(sae, str):
        sae = Hookpoint.parse(sae)
    elif sae is not None and not isinstance(sae, Hookpoint | torch.nn.Module):
        raise TypeError(f"sae: found {type(sae).__name__}, expected a hookpoint or an attached SAE")
    rows = where.get("rows")
    chosen_rows = None if rows is None else _ints("rows", rows)
    if chosen_rows is not None and min(chosen_rows) < 0:
        raise ValueError(f"rows: found {min(chosen_rows)}; rows count from 0")
    return Selection(sae, chosen_rows, _positions(where.get("positions")), phase, when)


def _positions(positions: Positions) -> tuple[int, ...] | slice | None:
    if not isinstance(positions, slice):
        return None if positions is None else _ints("positions", positions)
    for end in (positions.start, positions.stop, positions.step):
        if end is not None and not isinstance(end, int):
            raise TypeError(f"positions: found {positions!r}, expected a slice of ints")
    if positions.step is not None and positions.step < 1:
        raise ValueError(f"positions: the step is {positions.step}, expected at least 1")
    return positions


def _ints(name: str, value: SupportsIndex | Iterable[SupportsIndex]) -> tuple[int, ...]:
    try:
        chosen = tuple(operator.index(v) for v in _each(value))
    except TypeError:
        raise TypeError(f"{name}: found {value!r}, expected an int or a sequence of ints") from None
    if not chosen:
        raise ValueError(f"{name}: an empty selection selects nothing; leave it out to select all")
    return chosen


def _each(value: SupportsIndex | Iterable[SupportsIndex]) -> Iterable[SupportsIndex]:
    """One index as a sequence of one; a 0-d tensor is one, although it claims to be iterable."""
    single = isinstance(value, Tensor) and value.dim() == 0
    if single or not isinstance(value, Iterable):
        return (value,)  # type: ignore[return-value]
    return value


def _latent(value: SupportsIndex) -> int:
    try:
        latent = operator.index(value)
    except TypeError:
        raise TypeError(f"latent: found {value!r}, expected an index into the dictionary") from None
    if latent < 0:
        raise ValueError(f"latent: found {latent}; latents count from 0")
    return latent


def _amount(value: float | Tensor) -> float | Tensor:
    number = _number(value)
    if not torch.tensor(number).isfinite():
        raise ValueError(f"amount: found {number}, expected a finite number")
    return value if isinstance(value, Tensor) else number


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.dim() > 0:
        raise ValueError(f"amount: found a tensor {list(value.shape)}, expected a number or 0-d")
    if isinstance(value, str):
        raise TypeError(f"amount: found {value!r}, expected a number")
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        raise TypeError(f"amount: found {value!r}, expected a number") from None
