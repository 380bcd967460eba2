"""Edit tables: the edits of many requests as tensors that are rewritten in place.

An engine that batches requests, or replays a captured graph, cannot turn Python edits into a plan
(`saert.plan`) in each pass. It gives each request a row of an `EditTable`, and each token the row
of its request and its position; the tables hold everything else. Row 0 stays empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saert.edits import Edit, LatentEdit, Op, Selection
from saert.plan import EditPlan, Slots, edit, sum_of_adds
from saert.sae import SAE
from saert.sparse import SparseCode

FOREVER = 2**62  # past every position
_Range = tuple[int, int, int]  # the positions first, first + step, … < last


@dataclass(frozen=True)
class _Slot:
    latent: int
    op: int
    amount: float
    when: int
    above: float
    at: _Range
    owner: int
    rank: int


class EditTable:
    """Edits of one SAE for up to `rows - 1` requests at a time, `slots` for each.

    A slot is one latent of one edit over one range of positions; an edit at several separate
    positions takes a slot for each. The tensors are never reallocated, so a graph that was
    compiled or captured with them sees every `write`.

    Attributes:
        latents, ops, owner, rank: int64 [rows, slots], as in `saert.plan.Slots`.
        when_latents, when_above: int64 and floating [rows, slots], the condition of each slot; an
            unconditional one has `when_above` = -inf.
        amounts: floating [rows, slots]; float64 for a float64 SAE, otherwise float32.
        first, last, step: int64 [rows, slots]: a slot acts at positions first, first + step, … that
            are below `last`.
        on: int64 [rows, slots], 1 where the slot is in use.
        reads_code: whether any slot ever written needs activations (anything but a plain `add`).
        rounds: how many edits of one latent in one row there have been at most, and at least 1.
        constant: whether all edits, so far, add the same to every token of a range: plain `add`s
            over one range each row, of a frozen SAE that rescales all tokens alike. What they add
            is kept by row, and `apply` adds that.

    These three shape the graph. The first two only grow and the third only falls, until
    `clear_all`, and each change makes torch.compile compile once more. Where that cannot be (a
    captured graph), declare them and pass `grows=False`: `write` then refuses what would need more,
    and nothing is taken to be constant.

    Args:
        sae: whose latents are edited.
        rows: 1 + the largest number of requests at a time.
        slots: for each request.
        device: None: where the SAE is.
        reads_code, rounds: to begin with.
        grows: whether `write` may raise them.

    Raises ValueError: fewer than 2 rows or 1 slot or round.

    >>> table = EditTable(sae, rows=33, slots=8)
    >>> table.write(1, [add(3, 8.0, phase="generated"), ablate(5)], prompt_length=12)
    >>> hidden = table.apply(hidden, token_rows, positions)
    """

    def __init__(
        self,
        sae: SAE,
        rows: int,
        slots: int,
        *,
        device: torch.device | str | None = None,
        reads_code: bool = False,
        rounds: int = 1,
        grows: bool = True,
    ) -> None:
        if rows < 2 or slots < 1 or rounds < 1:
            raise ValueError(
                f"EditTable: found {rows} rows, {slots} slots and {rounds} rounds, expected at "
                "least 2 rows (the first stays empty), 1 slot and 1 round"
            )
        self.sae, self.rows, self.slots = sae, rows, slots
        self.reads_code, self.rounds, self.grows = reads_code, rounds, grows
        self.constant = grows and sae.rescales_alike and not reads_code
        self._summed = sae.decoder_version
        self._declared = reads_code, rounds, self.constant
        place = sae.device if device is None else torch.device(device)
        wide = torch.float64 if sae.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # an inference tensor could not be rewritten outside it
            # side by side, so that a write is two copies and a lookup two gathers
            self._whole = torch.zeros(9, rows, slots, dtype=torch.int64, device=place)
            self._real = torch.zeros(2, rows, slots, dtype=wide, device=place)
            self._empty_whole, self._empty_real = self._packed([])
            self._whole.copy_(self._empty_whole[:, None].expand_as(self._whole))
            self._real.copy_(self._empty_real[:, None].expand_as(self._real))
            self._added = torch.zeros(rows, sae.d_out, dtype=wide, device=place)
            self._reach = torch.zeros(2, rows, dtype=torch.int64, device=place)  # first and last
        (
            self.latents,
            self.ops,
            self.owner,
            self.rank,
            self.when_latents,
            self.first,
            self.last,
            self.step,
            self.on,
        ) = self._whole
        self.amounts, self.when_above = self._real

    def write(self, row: int, edits: Sequence[Edit], *, prompt_length: int | None = None) -> None:
        """Give a row these edits, in list order, instead of those it has. All of them or none.

        Args:
            row: 1 to rows - 1.
            edits: `select.sae` is not looked at: whoever writes knows whose edits these are.
            prompt_length: tokens in the request's prompt; needed where phase or negative positions
                count from its end.

        Raises ValueError: a row that does not exist, too many slots, a latent that does not exist,
        `rows=`, `add_vector`, an amount that needs a gradient, an unknown prompt length, or, with
        `grows=False`, edits beyond what was declared.
        """
        self._check_row(row)
        if prompt_length is not None and prompt_length < 0:
            raise ValueError(f"prompt_length: found {prompt_length}, expected at least 0")
        slots = self._slots_of(edits, prompt_length)
        reads_code = any(slot.op != Op.ADD or slot.above > -torch.inf for slot in slots)
        rounds = 1 + max((slot.rank for slot in slots), default=0)
        if not self.grows and (reads_code > self.reads_code or rounds > self.rounds):
            raise ValueError(
                f"row {row}: the edits need reads_code={reads_code} and rounds={rounds}, but the "
                f"table was made with reads_code={self.reads_code}, rounds={self.rounds} and "
                "grows=False; declare more when it is made"
            )
        whole, real = self._packed(slots)
        constant = self.constant and not reads_code and _one_range(slots)
        constant = constant and not any(p.requires_grad for p in self.sae.parameters())
        constant = constant and self._summed == self.sae.decoder_version
        added = None
        if constant and slots:
            latents = torch.tensor([slot.latent for slot in slots], device=self.sae.device)
            amounts = torch.tensor([slot.amount for slot in slots], dtype=self._real.dtype)
            added = sum_of_adds(self.sae, latents, amounts.to(latents.device))
        self._whole[:, row].copy_(whole)
        self._real[:, row].copy_(real)
        self.reads_code, self.rounds = self.reads_code or reads_code, max(self.rounds, rounds)
        self.constant = constant
        self._reach[:, row] = torch.tensor(slots[0].at[:2]) if slots else 0
        if added is not None:
            self._added[row] = added

    def clear(self, row: int) -> None:
        """No edits in this row any more."""
        self._check_row(row)
        self._whole[:, row].copy_(self._empty_whole)
        self._real[:, row].copy_(self._empty_real)
        self._reach[:, row] = 0

    def clear_all(self) -> None:
        """No edits anywhere, and `reads_code`, `rounds`, `constant` as they were at first."""
        self._whole.copy_(self._empty_whole[:, None].expand_as(self._whole))
        self._real.copy_(self._empty_real[:, None].expand_as(self._real))
        self._reach.zero_()
        self.reads_code, self.rounds, self.constant = self._declared
        self._summed = self.sae.decoder_version

    def plan(self, token_rows: Tensor, positions: Tensor) -> EditPlan:
        """The plan of a batch: which row and position each token has, int64 [*tokens] both.

        The shapes depend on the arguments' alone, and no value is looked at. Padding is row 0.
        """
        latents, ops, owner, rank, when, first, last, step, on = self._whole[:, token_rows]
        amounts, above = self._real[:, token_rows]
        past = positions.unsqueeze(-1) - first
        gate = (on != 0) & (past >= 0) & (positions.unsqueeze(-1) < last) & (past % step == 0)
        conditions = (when, above) if self.reads_code else (None, None)
        slots = Slots(latents, ops, amounts, owner, rank, self.rounds, self.reads_code, *conditions)
        return EditPlan(slots, slot_gate=gate)

    def apply(
        self,
        hidden: Tensor,
        token_rows: Tensor,
        positions: Tensor,
        *,
        source: Tensor | None = None,
        code: SparseCode | None = None,
    ) -> Tensor:
        """`saert.plan.edit` with this table's plan: [*tokens, d_out] -> the same, edited.

        A token that no slot acts on comes out bit for bit as it went in. Arguments as for `plan`
        and `saert.plan.edit`.
        """
        if self.constant and self._summed == self.sae.decoder_version:
            first, last = self._reach[:, token_rows]
            inside = ((positions >= first) & (positions < last)).unsqueeze(-1)
            added = (hidden + self._added[token_rows]).to(hidden.dtype)
            return torch.where(inside, added, hidden)
        plan = self.plan(token_rows, positions)
        assert plan.slot_gate is not None
        edited = edit(hidden, self.sae, plan, source=source, code=code)
        return torch.where(plan.slot_gate.any(-1, keepdim=True), edited, hidden)

    # -- helpers -------------------------------------------------------------------------------

    def _check_row(self, row: int) -> None:
        if not 1 <= row < self.rows:
            raise ValueError(
                f"EditTable: there is no row {row} to write; expected 1 to {self.rows - 1}"
            )

    def _slots_of(self, edits: Sequence[Edit], prompt_length: int | None) -> list[_Slot]:
        slots: list[_Slot] = []
        first: dict[int, int] = {}
        seen: dict[int, int] = {}
        for given in edits:
            one = self._checked(given)
            ranges = _ranges(one.select, prompt_length, repr(one))
            when, above = 0, -torch.inf
            if one.select.when is not None:
                when, above = one.select.when.latent, one.select.when.above
            for latent in one.latents if ranges else ():
                rank = seen[latent] = seen.get(latent, -1) + 1
                for at in ranges:  # apart from each other, so that they may share a rank
                    owner = first.setdefault(latent, len(slots))
                    slots.append(
                        _Slot(latent, int(one.op), float(one.amount), when, above, at, owner, rank)
                    )
        if len(slots) > self.slots:
            raise ValueError(
                f"{len(edits)} edits need {len(slots)} slots, one per latent and per range of "
                f"positions, but a row has {self.slots}"
            )
        return slots

    def _checked(self, one: Edit) -> LatentEdit:
        """The edit; ValueError for one that a table cannot hold."""
        if not isinstance(one, LatentEdit):
            raise ValueError(f"{one!r}: an edit table holds edits of latents, no vectors")
        if one.select.rows is not None:
            raise ValueError(f"{one!r} selects rows, but here each request has edits of its own")
        named = [*one.latents, *(() if one.select.when is None else (one.select.when.latent,))]
        if max(named) >= self.sae.num_latents:
            raise ValueError(
                f"{one!r}: latent {max(named)} does not exist; the SAE has "
                f"{self.sae.num_latents} latents, 0 to {self.sae.num_latents - 1}"
            )
        if isinstance(one.amount, Tensor) and one.amount.requires_grad:
            raise ValueError(f"{one!r}: its amount needs a gradient, which a table cannot carry")
        return one

    def _packed(self, slots: Sequence[_Slot]) -> tuple[Tensor, Tensor]:
        """A row's tables on the host: int64 [9, slots] and floating [2, slots]."""
        whole = torch.zeros(9, self.slots, dtype=torch.int64)
        real = torch.zeros(2, self.slots, dtype=self._real.dtype)
        whole[7], real[1] = 1, -torch.inf  # a step of 0 divides by zero
        whole[2] = torch.arange(self.slots)  # an unused slot owns itself
        for i, s in enumerate(slots):
            row = (s.latent, s.op, s.owner, s.rank, s.when, *s.at, 1)
            whole[:, i] = torch.tensor(row)
            real[:, i] = torch.tensor((s.amount, s.above), dtype=real.dtype)
        return whole, real


def _one_range(slots: Sequence[_Slot]) -> bool:
    """Whether all slots act at the same tokens, without gaps."""
    return len({slot.at for slot in slots}) <= 1 and all(slot.at[2] == 1 for slot in slots)


def _ranges(select: Selection, prompt_length: int | None, who: str) -> list[_Range]:
    """The positions that a selection means, as ranges that have no position in common."""
    if select.needs_prompt and prompt_length is None:
        raise ValueError(
            f"{who}: phase and negative positions need the end of the prompt; pass prompt_length="
        )
    end = 0 if prompt_length is None else prompt_length
    low = end if select.phase == "generated" else 0
    high = end if select.phase == "prompt" else FOREVER

    def absolute(p: int) -> int:
        return p if p >= 0 else end + p

    if select.positions is None:
        return [(low, high, 1)] if low < high else []
    if not isinstance(select.positions, slice):
        chosen = dict.fromkeys(map(absolute, select.positions))
        return [(p, p + 1, 1) for p in chosen if low <= p < high]
    wanted = select.positions
    step = 1 if wanted.step is None else wanted.step
    first = 0 if wanted.start is None else max(absolute(wanted.start), 0)
    if first < low:  # the first of its steps inside the phase
        first += -(-(low - first) // step) * step
    last = high if wanted.stop is None else min(high, absolute(wanted.stop))
    return [(first, last, step)] if first < last else []
