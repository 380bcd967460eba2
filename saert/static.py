"""A tap for compiled models: its edits are tensors that a graph reads, not constants in it.

An ordinary `Tap` turns Python edits into gates in each pass, so a compiled graph holds them as they
were when it was made. Here they live in tables that are rewritten in place, and which tokens they
mean is worked out in the graph, from the positions and prompt ends of the pass. Only what shapes
the graph (`Shape`) is a Python value, and it never shrinks.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from saert.context import Context
from saert.edits import PHASES, Edit, Selection
from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.plan import EditPlan, Slots, Vectors
from saert.sae import SAE
from saert.static_record import StaticRecorder, still
from saert.tap import Record, Tap, outside_inference_mode
from saert.tracker import Tracker

FOREVER = 2**62  # past every position
# start, whether it counts from the prompt's end, stop, whether that does, step, phase, row
_Range = tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Shape:
    """What about the edits so far shapes the graph: sizes of tables, and what is computed at all.

    Attributes:
        slots, vectors, ranges: sizes. Ranges say where edits act that do not act everywhere.
        rounds: how often one latent is edited.
        reads_code: whether a slot needs its activation; when, vectors_when: whether any condition.
        needs_positions, needs_prompt: what selections ask about the tokens.
    """

    slots: int = 0
    vectors: int = 0
    ranges: int = 0
    rounds: int = 1
    reads_code: bool = False
    when: bool = False
    vectors_when: bool = False
    needs_positions: bool = False
    needs_prompt: bool = False

    def joined(self, other: Shape) -> Shape:
        """Room for both."""
        return Shape(*map(max, zip(astuple(self), astuple(other), strict=True)))


class StaticTap(Tap):
    """One SAE at one hookpoint of a model that is compiled: hooks, tables and recorder."""

    def __init__(self, model: nn.Module, at: Hookpoint, sae: SAE, record: Record) -> None:
        super().__init__(model, at, sae, record)
        parameters = (*self.read.module.parameters(), *self.write.module.parameters())
        here = (p.device for p in parameters if p.device.type != "meta")
        self._place = next(here, device_of(model))
        self._shape, self._grown = Shape(), False
        self._tables: _Tables | None = None
        self.recorder: StaticRecorder = StaticRecorder(sae, record)

    def go_live(self, tracker: Tracker) -> None:
        """Register the hooks. The SAE moves now: a graph that moved it would move it each time."""
        with outside_inference_mode():
            self.sae.to(self._place)
        self.recorder.settle_in()
        self._plan = self._compile()
        super().go_live(tracker)

    # -- edits ---------------------------------------------------------------------------------

    def check_edits(self, edits: list[Edit]) -> None:
        """As `Tap.check_edits`; an amount that needs a gradient is refused."""
        super().check_edits(edits)
        for one in edits:
            if isinstance(one.amount, Tensor) and one.amount.requires_grad:
                raise ValueError(
                    f"{one!r}: its amount needs a gradient, which the tables of compiled=True "
                    "cannot carry; attach without it to train an amount"
                )

    def set_edits(self, edits: list[Edit]) -> bool:
        """Rewrite the tables. True where the graph has to change: graphs made before must go."""
        super().set_edits(edits)
        return self._grown

    def _compile(self) -> EditPlan:
        plan = super()._compile()
        ordered: list[Edit] = [*self._latent_edits, *self._vector_edits]
        pieces = [_ranges(one.select) for one in ordered]
        shape = self._shape.joined(self._needed(plan, sum(map(len, pieces))))
        tables = self._tables
        fits = tables is not None and tables.fits(self.sae)
        self._grown = shape != self._shape or not fits
        if tables is not None and not fits:
            self.recorder.settle_in()
        if tables is None or self._grown:
            self._shape = shape
            with outside_inference_mode():
                tables = self._tables = _Tables(self.sae, shape)
        sizes = [len(e.latents) for e in self._latent_edits] + [1] * len(self._vector_edits)
        tables.write(plan, pieces, sizes)
        return plan

    def _needed(self, plan: EditPlan, ranges: int) -> Shape:
        slots, vectors = plan.slots, plan.vectors
        selects = [one.select for one in self._edits]
        gated = self._shape.ranges > 0 or not all(s.everywhere for s in selects)
        return Shape(
            slots=0 if slots is None else _room(slots.latents.shape[0]),
            vectors=0 if vectors is None else _room(vectors.amounts.shape[0]),
            ranges=_room(ranges) if gated else 0,
            rounds=1 if slots is None else slots.rounds,
            reads_code=slots is not None and slots.reads_code,
            when=slots is not None and slots.when_latents is not None,
            vectors_when=vectors is not None and vectors.when_latents is not None,
            needs_positions=any(s.positions is not None or s.phase != "all" for s in selects),
            needs_prompt=any(s.needs_prompt for s in selects),
        )

    # -- the pass ------------------------------------------------------------------------------

    def _plan_for(self, context: Context, device: torch.device) -> EditPlan:
        tables, shape = self._tables, self._shape
        if tables is None or not (shape.slots or shape.vectors):
            return EditPlan()
        self._check_recomputation()
        if not torch.compiler.is_compiling():  # in a graph nobody knows which edits are in force
            for one in self._edits:
                if one.select.rows is not None:
                    context.gate(one.select, device)
        gate = None if context.real is None else context.real.to(device).unsqueeze(-1)
        if shape.ranges:
            chosen = self._chosen(context, device)
            gate = chosen if gate is None else gate & chosen
        plan = tables.plan(shape)
        if gate is None or gate.shape[-1] == 1:
            return plan.gated(gate, gate)
        return plan.gated(gate[..., : shape.slots], gate[..., shape.slots :])

    def _chosen(self, context: Context, device: torch.device) -> Tensor:
        """bool [rows, T, slots + vectors]: whether any range of each edit holds the token."""
        assert self._tables is not None
        start, from_end, stop, till_end, step, phase, row = self._tables.ranges
        here = ends = torch.zeros(context.rows, context.length, dtype=torch.int64, device=device)
        asked = "the edits of this attachment, so far, have asked for it"
        if self._shape.needs_positions:
            if context.positions is None:
                raise ValueError(f"positions and phase are unknown here: {context.why}; {asked}")
            here = context.positions.to(device)
        if self._shape.needs_prompt:
            if context.prompt_lengths is None:
                raise ValueError(
                    "phase and negative positions need the end of the prompt, unknown here: "
                    f"{context.why}; {asked}"
                )
            ends = context.prompt_lengths.to(device)[:, None].expand(here.shape)
        here, ends = here.unsqueeze(-1), ends.unsqueeze(-1)
        first = torch.where(from_end != 0, (start + ends).clamp_min(0), start)
        last = torch.where(till_end != 0, stop + ends, stop)
        inside = (here >= first) & (here < last) & ((here - first) % step == 0)
        inside = inside & ((phase == 0) | ((here >= ends) == (phase == 2)))
        expansion = 1 if context.expansion is None else context.expansion
        source = torch.arange(context.rows, device=device) // expansion
        inside = inside & ((row < 0) | (source[:, None, None] == row))
        found: Tensor = inside.to(self._tables.member.dtype) @ self._tables.member
        return found > 0


class _Tables:
    """The tensors of one tap's edits. They are rewritten, never replaced, while a graph lives."""

    def __init__(self, sae: SAE, shape: Shape) -> None:
        wide = torch.float64 if sae.dtype == torch.float64 else torch.float32
        self._for = sae.device, sae.dtype

        def table(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return still(torch.zeros(size, dtype=dtype, device=sae.device))

        n, v, r = shape.slots, shape.vectors, shape.ranges
        self.latents, self.ops, self.owner, self.rank, self.when = (table(n) for _ in range(5))
        self.amounts, self.above = table(n, dtype=wide), table(n, dtype=wide)
        self.vectors, self.vector_amounts = table(v, sae.d_out, dtype=wide), table(v, dtype=wide)
        self.vector_when, self.vector_above = table(v), table(v, dtype=wide)
        self.ranges, self.member = table(7, r), table(r, n + v, dtype=torch.float32)

    def fits(self, sae: SAE) -> bool:
        """Whether the SAE is still where, and in the dtype, that the tables were made for."""
        return self._for == (sae.device, sae.dtype)

    def write(self, plan: EditPlan, pieces: list[list[_Range]], sizes: list[int]) -> None:
        """Copy a plan in; the rest of the tables does nothing.

        Args:
            pieces: of each edit, those of latents first, its ranges.
            sizes: how many slots or vectors each edit has.
        """
        slots, vectors = plan.slots, plan.vectors
        for table in (self.latents, self.ops, self.amounts, self.rank, self.when):
            table.zero_()  # to add 0
        torch.arange(self.owner.shape[0], out=self.owner)
        self.above.fill_(-torch.inf)
        if slots is not None:
            _begin(self.latents, slots.latents)
            _begin(self.ops, slots.ops)
            _begin(self.amounts, slots.amounts)
            _begin(self.owner, slots.owner)
            _begin(self.rank, slots.rank)
            _begin(self.when, slots.when_latents)
            _begin(self.above, slots.when_above)
        for table in (self.vectors, self.vector_amounts, self.vector_when):
            table.zero_()
        self.vector_above.fill_(-torch.inf)
        if vectors is not None:
            _begin(self.vectors, vectors.vectors)
            _begin(self.vector_amounts, vectors.amounts)
            _begin(self.vector_when, vectors.when_latents)
            _begin(self.vector_above, vectors.when_above)
        if self.ranges.shape[1]:
            self._write_ranges(pieces, sizes, 0 if slots is None else slots.latents.shape[0])

    def _write_ranges(self, pieces: list[list[_Range]], sizes: list[int], slots: int) -> None:
        """A column per range, and which slots and vectors each range decides.

        Slots come first in the tables, vectors behind the last slot there is room for.
        """
        ranges = torch.zeros(self.ranges.shape, dtype=torch.int64)
        member = torch.zeros(self.member.shape)
        ranges[4] = 1  # a step of 0 divides by zero
        at, column = 0, 0
        for mine, size in zip(pieces, sizes, strict=True):
            if column == slots:
                column = self.latents.shape[0]
            for one in mine:
                ranges[:, at] = torch.tensor(one)
                member[at, column : column + size] = 1
                at += 1
            column += size
        self.ranges.copy_(ranges)
        self.member.copy_(member)

    def plan(self, shape: Shape) -> EditPlan:
        """The tables as a plan without gates."""
        slots = vectors = None
        if shape.slots:
            slots = Slots(
                self.latents,
                self.ops,
                self.amounts,
                self.owner,
                self.rank,
                shape.rounds,
                shape.reads_code,
                *((self.when, self.above) if shape.when else (None, None)),
            )
        if shape.vectors:
            conditions = (self.vector_when, self.vector_above) if shape.vectors_when else ()
            vectors = Vectors(self.vectors, self.vector_amounts, *conditions)
        return EditPlan(slots, vectors)


def _ranges(select: Selection) -> list[_Range]:
    """Where a selection acts: for each of its rows, its pieces of positions."""
    phase, wanted = PHASES.index(select.phase), select.positions
    if wanted is None:
        pieces = [(-FOREVER, 0, FOREVER, 0, 1)]
    elif isinstance(wanted, slice):
        start = 0 if wanted.start is None else wanted.start
        stop = FOREVER if wanted.stop is None else wanted.stop
        pieces = [(start, int(start < 0), stop, int(stop < 0), wanted.step or 1)]
    else:
        pieces = [(p, int(p < 0), p + 1, int(p < 0), 1) for p in dict.fromkeys(wanted)]
    rows = (-1,) if select.rows is None else select.rows
    return [(*piece, phase, row) for row in rows for piece in pieces]


def _room(n: int) -> int:
    """A size for n with room for more, so that one edit more does not change the graph."""
    return 0 if n == 0 else max(8, 1 << (n - 1).bit_length())


def _begin(table: Tensor, values: Tensor | None) -> None:
    """Write a table's first entries."""
    if values is not None:
        table[: values.shape[0]].copy_(values.detach())
