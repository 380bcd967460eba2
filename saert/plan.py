"""The edit itself: edit(hidden, sae, plan) -> hidden, a pure function over static tables.

    hidden' = base + scale · Σ_j (f'_j - f_j) · W_dec[j] + Σ_v amount_v · vector_v
    base    = hidden (the SAE's error is kept), or the reconstruction (splice)

The sum runs over *edited* latents only, so an edit costs what it touches: `add` needs no encode, a
few latents of a per-latent SAE need a few dot products, only TopK ranks the whole dictionary.
Nothing here looks at a value to decide what to do: shapes and branches depend on the tables'
shapes alone, so the function can be compiled, or captured in a CUDA graph with its tables
rewritten in place. Engines that edit every row differently pass tables with token dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saert.edits import LatentEdit, Op, VectorEdit
from saert.kernels.numerics import no_autocast
from saert.sae import SAE
from saert.sparse import SparseCode

SET, SCALE = int(Op.SET), int(Op.SCALE)  # dynamo cannot compare a tensor with an IntEnum


@dataclass(frozen=True, eq=False)
class Slots:
    """E edit slots. Tables are [E], or [*tokens or broadcastable, E] if edits differ by token.

    Attributes:
        latents: int64, the latent that each slot edits.
        ops: int64, an `Op`.
        amounts: floating, what is added, set or multiplied by.
        owner: int64, the first slot with the same latent: differences of one latent meet there.
        rank: int64, how many earlier slots edit the same latent: slots act in order of rank.
        rounds: 1 + the largest rank (1: no latent is edited twice).
        reads_code: whether any slot needs the activation; False where all of them are ADD.
        when_latents, when_above: the condition of each slot, or None if no slot has one; an
            unconditional slot has `when_above` = -inf.
    """

    latents: Tensor
    ops: Tensor
    amounts: Tensor
    owner: Tensor
    rank: Tensor
    rounds: int
    reads_code: bool
    when_latents: Tensor | None = None
    when_above: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Vectors:
    """V vectors [V, d_out] in the model's units, their amounts [V], and conditions like Slots'."""

    vectors: Tensor
    amounts: Tensor
    when_latents: Tensor | None = None
    when_above: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EditPlan:
    """What to do to a hidden state: slots, vectors, and where they act.

    Attributes:
        slot_gate, vector_gate: bool [*tokens or broadcastable, E or V]; None acts on every token.
        added: what the slots add to a token that all of them act on, [d_out], in the model's units;
            None where that depends on the token.
    """

    slots: Slots | None = None
    vectors: Vectors | None = None
    slot_gate: Tensor | None = None
    vector_gate: Tensor | None = None
    added: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether it changes nothing at all."""
        return self.slots is None and self.vectors is None

    @property
    def reads_code(self) -> bool:
        """Whether activations are needed: False for plain steering."""
        conditional = self.vectors is not None and self.vectors.when_latents is not None
        return conditional or (self.slots is not None and self.slots.reads_code)

    def gated(self, slot_gate: Tensor | None, vector_gate: Tensor | None) -> EditPlan:
        """The same tables with other gates."""
        return replace(self, slot_gate=slot_gate, vector_gate=vector_gate)


def compile_plan(
    latent_edits: Sequence[LatentEdit], vector_edits: Sequence[VectorEdit], sae: SAE
) -> EditPlan:
    """Tables for a list of edits, on the SAE's device; no gates yet.

    A slot per latent of each edit, in list order, and a vector per vector edit.
    """
    wide = torch.float64 if sae.dtype == torch.float64 else torch.float32
    device = sae.device
    slots = None
    if latent_edits:
        edit_of = [edit for edit in latent_edits for _ in edit.latents]
        latents = [latent for edit in latent_edits for latent in edit.latents]
        owner, rank = _order(latents)
        when_latents, when_above = _conditions(edit_of, wide, device)
        slots = Slots(
            latents=torch.tensor(latents, device=device),
            ops=torch.tensor([int(edit.op) for edit in edit_of], device=device),
            amounts=_stack([edit.amount for edit in edit_of], wide, device),
            owner=torch.tensor(owner, device=device),
            rank=torch.tensor(rank, device=device),
            rounds=1 + max(rank),
            reads_code=when_latents is not None or any(e.op is not Op.ADD for e in latent_edits),
            when_latents=when_latents,
            when_above=when_above,
        )
    vectors = None
    if vector_edits:
        vectors = Vectors(
            torch.stack([edit.vector.to(device, wide) for edit in vector_edits]),
            _stack([edit.amount for edit in vector_edits], wide, device),
            *_conditions(vector_edits, wide, device),
        )
    return EditPlan(slots, vectors)


@torch.no_grad()
def summed(plan: EditPlan, sae: SAE) -> EditPlan:
    """The plan with `added`, where its slots only add, and no weight of the SAE is trained."""
    slots = plan.slots
    trained = any(parameter.requires_grad for parameter in sae.parameters())
    if slots is None or slots.reads_code or trained or not sae.rescales_alike:
        return plan
    return replace(plan, added=sum_of_adds(sae, slots.latents, slots.amounts))


@torch.no_grad()
def sum_of_adds(sae: SAE, latents: Tensor, amounts: Tensor) -> Tensor:
    """What adding amounts [E] to latents int64 [E] adds to each token: [d_out], the model's units.

    For an SAE with `rescales_alike` only.
    """
    amounts = sae.rescale(amounts, amounts.new_zeros(sae.d_in))
    directions = sae.directions(latents).to(amounts.dtype)
    return (amounts.unsqueeze(-1) * directions).sum(0)  # a product would obey autocast


def edit(
    hidden: Tensor,
    sae: SAE,
    plan: EditPlan,
    *,
    source: Tensor | None = None,
    code: SparseCode | None = None,
    splice: bool = False,
) -> Tensor:
    """The hidden state after the plan, in the dtype and on the device of `hidden`.

    Args:
        hidden: [*tokens, d_out], what is written.
        sae: encodes `source`, and owns the directions that are written.
        plan: tables and gates; an empty plan without `splice` returns `hidden` itself.
        source: [*tokens, d_in], what the SAE reads; None: `hidden` (not a transcoder).
        code: the SAE's code of `source`, if it is known already.
        splice: start from the reconstruction instead of the hidden state: the error is dropped.
    """
    if plan.empty and not splice:
        return hidden
    x = hidden if source is None else source
    with no_autocast(hidden):
        if code is None and plan.reads_code and not sae.activation.per_latent:
            code = sae.encode(x)  # once, for conditions and slots alike
        out = hidden
        if splice:
            out = sae(x) if code is None else sae.decode(code, x)
        if plan.added is not None and plan.slot_gate is None:
            out = out + plan.added
        elif plan.slots is not None:
            difference = sae.rescale(_differences(x, sae, plan, code), x)
            latents = plan.slots.latents
            if latents.dim() > 1:
                latents = latents.expand(difference.shape)
            out = sae.written(latents, difference, base=out)
        if plan.vectors is not None:
            out = out + _vector_sum(x, sae, plan, code)
        return out.to(hidden.dtype)


def _differences(x: Tensor, sae: SAE, plan: EditPlan, code: SparseCode | None) -> Tensor:
    """f' - f per slot, gathered in the slots that own their latent: [*tokens, E]."""
    slots = plan.slots
    assert slots is not None
    shape = (*x.shape[:-1], slots.latents.shape[-1])
    gate = torch.ones(shape, dtype=torch.bool, device=x.device)
    if plan.slot_gate is not None:
        gate = gate & plan.slot_gate
    if slots.when_latents is not None and slots.when_above is not None:
        gate = gate & (_read(x, sae, slots.when_latents, code) > slots.when_above)
    f = _read(x, sae, slots.latents, code) if slots.reads_code else None
    owner = slots.owner.expand(shape)
    difference = slots.amounts.new_zeros(shape)
    for turn in range(slots.rounds):
        so_far = difference.gather(-1, owner)
        new = so_far + slots.amounts  # ADD: exact, without going through f
        if f is not None:
            new = torch.where(slots.ops == SET, slots.amounts - f, new)
            new = torch.where(slots.ops == SCALE, slots.amounts * (f + so_far) - f, new)
        acts = gate & (slots.rank == turn)
        change = torch.where(acts, new - so_far, torch.zeros_like(new))
        difference = difference.scatter_add(-1, owner, change)
    return difference


def _vector_sum(x: Tensor, sae: SAE, plan: EditPlan, code: SparseCode | None) -> Tensor:
    vectors = plan.vectors
    assert vectors is not None
    amounts = vectors.amounts.expand(*x.shape[:-1], vectors.amounts.shape[-1])
    if plan.vector_gate is not None:
        amounts = amounts * plan.vector_gate
    if vectors.when_latents is not None and vectors.when_above is not None:
        amounts = amounts * (_read(x, sae, vectors.when_latents, code) > vectors.when_above)
    return amounts @ vectors.vectors


def _read(x: Tensor, sae: SAE, latents: Tensor, code: SparseCode | None) -> Tensor:
    return sae.activations(x, latents) if code is None else code.at(latents)


def _order(latents: list[int]) -> tuple[list[int], list[int]]:
    """For each slot: the first slot with its latent, and how many slots with it came before."""
    first: dict[int, int] = {}
    seen: dict[int, int] = {}
    owner, rank = [], []
    for slot, latent in enumerate(latents):
        owner.append(first.setdefault(latent, slot))
        rank.append(seen.get(latent, 0))
        seen[latent] = rank[-1] + 1
    return owner, rank


def _conditions(
    edits: Sequence[LatentEdit | VectorEdit], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    conditions = [edit.select.when for edit in edits]
    if not any(conditions):
        return None, None
    latents = [0 if c is None else c.latent for c in conditions]
    above = [-torch.inf if c is None else c.above for c in conditions]
    return (
        torch.tensor(latents, device=device),
        torch.tensor(above, dtype=dtype, device=device),
    )


def _stack(amounts: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(a, dtype=dtype, device=device) for a in amounts])
