"""edit(hidden, sae, plan) against its definition on dense codes, and what it may cost."""

import random
from dataclasses import replace

import pytest
import torch
from sae_cases import (
    ACTIVATIONS,
    D_IN,
    LATENTS,
    TRANSFORMS,
    inputs,
    latents,
    make,
    reconstruct,
)
from torch import Tensor, nn
from torch.autograd import gradcheck

from saert.edits import Edit, LatentEdit, VectorEdit, ablate, active, add, add_vector, apply
from saert.edits import clamp as set_to
from saert.edits import scale as times
from saert.plan import EditPlan, Slots, Vectors, compile_plan, edit
from saert.sae import SAE
from saert.sparse import SparseCode

KINDS = ["sae", "sae_skip", "transcoder", "transcoder_square"]
# (activation, transform, kind): every pair of activation and transform, and every kind once each
COMBINATIONS = [(a, t, "sae") for a in ACTIVATIONS for t in TRANSFORMS]
COMBINATIONS += [(a, "layer_norm", kind) for a in ACTIVATIONS for kind in KINDS[1:]]


def plan_of(edits: list[Edit], sae: SAE) -> EditPlan:
    return compile_plan(
        [e for e in edits if isinstance(e, LatentEdit)],
        [e for e in edits if isinstance(e, VectorEdit)],
        sae,
    )


def random_edits(seed: int, d_out: int, firing: list[int]) -> list[Edit]:
    """Edits that meet on few latents, so that their order matters."""
    rng = random.Random(seed)
    choice = [*firing[:3], firing[-1]]
    edits: list[Edit] = []
    for _ in range(7):
        when = (
            active(rng.choice(choice), above=rng.choice([0.0, 0.3])) if rng.random() < 0.4 else None
        )
        amount: float | Tensor = rng.uniform(-2, 2)
        if rng.random() < 0.5:
            amount = torch.tensor(amount, dtype=torch.float64)
        kind = rng.randrange(5)
        if kind == 3:
            edits.append(ablate(rng.sample(choice, 2), to=amount, when=when))
        elif kind == 4:
            vector = torch.tensor([rng.gauss(0, 1) for _ in range(d_out)], dtype=torch.float64)
            edits.append(add_vector(vector, amount, when=when))
        else:
            edits.append((add, set_to, times)[kind](rng.choice(choice), amount, when=when))
    return edits


def setting(act: str, transform: str, kind: str, *tokens: int) -> tuple[SAE, Tensor, Tensor]:
    """An SAE, what it reads, and what is written (the same, unless it is a transcoder)."""
    sae, x = make(act, transform, kind), inputs(*tokens)
    if not sae.is_transcoder:
        return sae, x, x
    generator = torch.Generator().manual_seed(5)
    return sae, x, torch.randn(*tokens, sae.d_out, generator=generator, dtype=torch.float64)


def definition(hidden: Tensor, sae: SAE, edits: list[Edit], x: Tensor, splice: bool) -> Tensor:
    """hidden + decode(apply(edits, code)) - decode(code), dense and in float64."""
    f = latents(sae, x)
    edited = apply(
        [e for e in edits if isinstance(e, LatentEdit)], SparseCode.from_dense(f)
    ).to_dense()
    before, after = reconstruct(sae, f, x), reconstruct(sae, edited, x)
    out = after if splice else hidden.double() + after - before
    for e in edits:
        if isinstance(e, VectorEdit):
            acts = torch.ones_like(f[..., :1])
            if e.select.when is not None:
                acts = (f[..., e.select.when.latent, None] > e.select.when.above).double()
            out = out + acts * float(e.amount) * e.vector.double()
    return out


def most_active(sae: SAE, x: Tensor) -> list[int]:
    return (latents(sae, x) != 0).flatten(0, -2).sum(0).argsort(descending=True).tolist()


# -- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("splice", [False, True], ids=["keep error", "splice"])
@pytest.mark.parametrize(("act", "transform", "kind"), COMBINATIONS)
def test_edit_is_its_definition(act, transform, kind, splice):
    sae, x, hidden = setting(act, transform, kind, 2, 4)
    source = x if sae.is_transcoder else None
    for seed in range(3):
        edits = random_edits(seed, sae.d_out, most_active(sae, x))
        plan = plan_of(edits, sae)
        expected = definition(hidden, sae, edits, x, splice)
        assert not torch.allclose(expected, hidden)
        out = edit(hidden, sae, plan, source=source, splice=splice)
        torch.testing.assert_close(out, expected)
        known = edit(hidden, sae, plan, source=source, splice=splice, code=sae.encode(x))
        torch.testing.assert_close(known, expected)


@pytest.mark.parametrize("act", ["topk", "jumprelu"])
def test_edit_with_selection_by_decoder_norm_is_its_definition(act):
    sae, x = make(act, "layer_norm", select_by_decoder_norm=True), inputs(2, 4)
    edits = random_edits(1, D_IN, most_active(sae, x))
    out = edit(x, sae, plan_of(edits, sae))
    torch.testing.assert_close(out, definition(x, sae, edits, x, False))


@pytest.mark.parametrize("tokens", [(), (5,), (2, 1, 3), (0,)], ids=str)
def test_any_number_of_token_dimensions(tokens):
    sae, x, _ = setting("topk", "unit_norm", "sae", *tokens)
    edits = [times(3, 2.0), add(4, 1.0), set_to(3, 1.0), add_vector(torch.ones(D_IN))]
    out = edit(x, sae, plan_of(edits, sae))
    assert out.shape == x.shape
    torch.testing.assert_close(out, definition(x, sae, edits, x, False))


def test_the_order_of_edits_on_one_latent_matters():
    sae, x = make("relu"), inputs(6)
    j = most_active(sae, x)[0]
    one, other = [add(j, 1.0), times(j, 3.0)], [times(j, 3.0), add(j, 1.0)]
    difference = edit(x, sae, plan_of(one, sae)) - edit(x, sae, plan_of(other, sae))
    torch.testing.assert_close(difference, (2.0 * sae.W_dec[j]).expand(6, -1))


def test_many_rounds_on_one_latent_interleaved_with_others():
    sae, x = make("relu", "layer_norm"), inputs(4)
    j, i, *_ = most_active(sae, x)
    edits = [add(j, 1.0), set_to(i, 2.0), times(j, 2.0), add(i, 1.0), add(j, -0.5), times(i, 0.5)]
    plan = plan_of(edits, sae)
    assert plan.slots.rounds == 3
    torch.testing.assert_close(edit(x, sae, plan), definition(x, sae, edits, x, False))


@pytest.mark.parametrize("splice", [False, True])
def test_gates_choose_tokens_for_each_slot_and_vector(splice):
    sae, x = make("topk", "layer_norm"), inputs(2, 4)
    j, i, *_ = most_active(sae, x)
    edits = [times(j, 3.0), add(j, 1.0), ablate(i)]
    vectors = [add_vector(torch.ones(D_IN), 2.0), add_vector(torch.arange(D_IN).double())]
    generator = torch.Generator().manual_seed(2)
    slot_gate = torch.rand(2, 4, 3, generator=generator) < 0.5
    vector_gate = torch.rand(2, 4, 2, generator=generator) < 0.5
    plan = plan_of([*edits, *vectors], sae).gated(slot_gate, vector_gate)
    out = edit(x, sae, plan, splice=splice)
    for b in range(2):
        for t in range(4):
            chosen = [e for e, on in zip(edits, slot_gate[b, t], strict=True) if on]
            chosen += [v for v, on in zip(vectors, vector_gate[b, t], strict=True) if on]
            token = x[b, t]
            torch.testing.assert_close(out[b, t], definition(token, sae, chosen, token, splice))


# -- tables that differ by row -------------------------------------------------------------------


def stacked(plans: list[EditPlan]) -> EditPlan:
    """One plan with tables [B, 1, E] from a plan per row with tables [E]."""
    slots = [p.slots for p in plans]

    def rows(tables: list[Tensor]) -> Tensor:
        return torch.stack(tables).unsqueeze(1)

    names = ("latents", "ops", "amounts", "owner", "rank", "when_latents", "when_above")
    return EditPlan(
        Slots(
            **{name: rows([getattr(s, name) for s in slots]) for name in names},
            rounds=max(s.rounds for s in slots),
            reads_code=True,
        ),
        Vectors(
            plans[0].vectors.vectors,
            rows([p.vectors.amounts for p in plans]),
        ),
    )


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_tables_per_row_give_what_a_call_per_row_gives(act, kind, splice):
    sae, x, hidden = setting(act, "layer_norm", kind, 3, 4)
    source = x if sae.is_transcoder else None
    j, i, h, *_ = most_active(sae, x)
    vector = torch.ones(sae.d_out, dtype=torch.float64)
    lists = [
        [add(j, 1.0), times(j, 2.0), set_to(i, 1.0, when=active(j)), add_vector(vector, 1.0)],
        [set_to(h, 3.0), add(i, 1.0), times(j, 0.0, when=active(h)), add_vector(vector, -2.0)],
        [add(i, 1.0), add(i, 2.0, when=active(h, 0.2)), times(i, 2.0), add_vector(vector, 0.0)],
    ]
    plans = [plan_of(edits, sae) for edits in lists]
    gate = torch.rand(3, 4, 3) < 0.7
    together = edit(hidden, sae, stacked(plans).gated(gate, None), source=source, splice=splice)
    for row, plan in enumerate(plans):
        alone = edit(
            hidden[row],
            sae,
            plan.gated(gate[row], None),
            source=None if source is None else source[row],
            splice=splice,
        )
        torch.testing.assert_close(together[row], alone)
    assert not torch.allclose(together[0] - hidden[0], together[1] - hidden[1])


# -- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_steering_never_encodes(monkeypatch, kind, transform):
    sae, x, hidden = setting("topk", transform, kind, 2, 3)
    edits = [add(3, 2.0), add(3, 1.0), add(5, -1.0), add_vector(torch.ones(sae.d_out))]
    plan = plan_of(edits, sae)
    expected = definition(hidden, sae, edits, x, False)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the SAE was read")

    for name in ("encode", "activations", "pre_activations"):
        monkeypatch.setattr(sae, name, refuse)
    assert not plan.reads_code
    source = x if sae.is_transcoder else None
    torch.testing.assert_close(edit(hidden, sae, plan, source=source), expected)
    reading = plan_of([times(3, 2.0)], sae)
    assert reading.reads_code
    with pytest.raises(AssertionError, match="was read"):
        edit(hidden, sae, reading, source=source)


@pytest.mark.parametrize(
    "edits", [[add(3, 1.0, when=active(1))], [add_vector(torch.ones(D_IN), when=active(1))]]
)
def test_a_condition_reads_the_code(edits):
    assert plan_of(edits, make()).reads_code


@pytest.mark.parametrize("act", ["relu", "jumprelu", "batchtopk", "gated"])
def test_editing_few_latents_of_a_per_latent_sae_does_not_encode(monkeypatch, act):
    sae, x = make(act), inputs(2, 3)
    plan = plan_of([times(3, 2.0), ablate(5)], sae)
    monkeypatch.setattr(sae, "encode", None)
    widths = []
    score = sae.pre_activations
    monkeypatch.setattr(sae, "pre_activations", lambda x, i=None: widths.append(i) or score(x, i))
    edit(x, sae, plan)
    assert widths
    assert all(latents is not None for latents in widths)


def test_topk_ranks_the_dictionary_once(monkeypatch):
    sae, x = make("topk"), inputs(2, 3)
    calls = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: calls.append(1) or encode(x))
    edit(x, sae, plan_of([times(3, 2.0, when=active(1))], sae))
    assert len(calls) == 1


def test_an_empty_plan_returns_the_very_same_tensor(monkeypatch):
    sae, x = make("topk", "layer_norm"), inputs(2, 3)
    monkeypatch.setattr(sae, "forward", None)
    assert EditPlan().empty
    assert compile_plan([], [], sae).empty
    assert edit(x, sae, EditPlan()) is x
    assert edit(x, sae, EditPlan(), code=SparseCode.from_dense(torch.zeros(2, 3, LATENTS))) is x


def test_an_empty_plan_with_splice_is_the_reconstruction():
    sae, x = make("topk", "layer_norm"), inputs(2, 3)
    torch.testing.assert_close(edit(x, sae, EditPlan(), splice=True), sae(x))


def test_a_plan_with_closed_gates_changes_nothing():
    sae, x = make("relu", "layer_norm"), inputs(2, 3)
    plan = plan_of([set_to(1, 9.0), add_vector(torch.ones(D_IN))], sae)
    closed = plan.gated(torch.zeros(2, 1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
    assert edit(x, sae, closed).equal(x)


def test_edit_leaves_its_arguments_alone():
    sae, x = make("topk", "layer_norm"), inputs(2, 3)
    plan = plan_of(random_edits(0, D_IN, most_active(sae, x)), sae)
    tables = {n: t for n, t in vars(plan.slots).items() if isinstance(t, Tensor)}
    before = [t.clone() for t in (x, *tables.values(), *sae.state_dict().values())]
    edit(x, sae, plan, splice=True)
    after = (x, *tables.values(), *sae.state_dict().values())
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


# -- dtypes --------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_keeps_the_dtype_of_the_hidden_state(dtype, weights, splice):
    sae, x = make("relu", "layer_norm", dtype=weights), inputs(2, 3, dtype=dtype)
    edits = [add(3, 1.0), times(1, 2.0), add_vector(torch.ones(D_IN, dtype=torch.float64))]
    out = edit(x, sae, plan_of(edits, sae), splice=splice)
    assert out.dtype == dtype
    coarse = {torch.bfloat16, torch.float16} & {dtype, weights}
    tolerance = 0.1 if coarse else 1e-5
    expected = definition(x, sae, edits, x, splice)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "edits", [[add(3, 1.0)], [add_vector(torch.linspace(0, 1, D_IN))]], ids=["add", "add_vector"]
)
def test_autocast_does_not_round_the_edit(edits):
    sae, x = make(dtype=torch.float32), inputs(2, 3, dtype=torch.float32)
    plan = plan_of(edits, sae)
    expected = edit(x, sae, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = edit(x, sae, plan)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# -- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "kind", "splice", "per_row"),
    [
        ("jumprelu", "sae", False, False),
        ("gated", "sae_skip", True, False),
        ("topk", "sae", True, False),
        ("relu", "transcoder", False, True),
    ],
)
def test_compiled_edit_equals_eager_and_reads_its_tables_in_place(act, kind, splice, per_row):
    sae, x, hidden = setting(act, "layer_norm", kind, 2, 3)
    source = x if sae.is_transcoder else None
    j, i, *_ = most_active(sae, x)
    edits = [times(j, 2.0), add(j, 1.0, when=active(i)), set_to(i, 1.0)]
    edits += [add_vector(torch.ones(sae.d_out), 2.0)]
    plan = plan_of(edits, sae)
    plan = stacked([plan, plan]) if per_row else plan
    plan = plan.gated(torch.ones(2, 3, 3, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool))

    def step(hidden: Tensor) -> Tensor:
        return edit(hidden, sae, plan, source=source, splice=splice)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden), step(hidden))
        before = step(hidden)
        with torch.compiler.set_stance("fail_on_recompile"):
            plan.slots.latents.copy_(plan.slots.latents.flip(-1))
            plan.slots.owner.copy_(torch.arange(3).expand_as(plan.slots.owner))
            plan.slots.rank.zero_()
            plan.slots.ops.copy_(torch.tensor([1, 2, 0]).expand_as(plan.slots.ops))
            plan.slots.amounts.mul_(-3)
            plan.slots.when_above.fill_(0.1)
            plan.vectors.amounts.fill_(7.0)
            plan.slot_gate[0, 1] = False
            plan.vector_gate[1] = False
            torch.testing.assert_close(compiled(hidden), step(hidden))
        assert not torch.allclose(step(hidden), before)


# -- gradients -----------------------------------------------------------------------------------


class Editing(nn.Module):
    """edit() as a module, so that functional_call can put other weights into the SAE."""

    def __init__(self, sae: SAE, splice: bool) -> None:
        super().__init__()
        self.sae, self.splice = sae, splice

    def forward(self, x: Tensor, edits: list[Edit]) -> Tensor:
        return edit(x, self.sae, plan_of(edits, self.sae), splice=self.splice)


@pytest.mark.parametrize("splice", [False, True], ids=["keep error", "splice"])
@pytest.mark.parametrize(
    ("act", "transform"),
    [("relu", "layer_norm"), ("relu", "unit_norm"), ("jumprelu", "none"), ("topk", "layer_norm")],
)
def test_gradients_flow_through_edits_and_splice(act, transform, splice):
    sae = make(act, transform, d_in=4, n=7).requires_grad_(True)
    x = inputs(2, d_in=4).requires_grad_()
    j, i, h, *_ = most_active(sae, x.detach())
    amounts = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (0.7, 1.3, 0.4)]
    vector = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    model = Editing(sae, splice)
    names = [name for name, _ in model.named_parameters()]

    def run(x, a, b, c, vector, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        edits = [times(j, a), add(j, b), set_to(i, c), add_vector(vector, a, when=active(h, 0.05))]
        return torch.func.functional_call(model, weights, (x, edits))

    arguments = (x, *amounts, vector, *sae.parameters())
    assert gradcheck(run, arguments)
    expected = (
        definition(x, sae, [times(j, 0.7), add(j, 1.3), set_to(i, 0.4)], x, splice)
        + (latents(sae, x)[..., h, None] > 0.05) * 0.7 * vector
    )
    torch.testing.assert_close(run(*arguments), expected)
    weight = torch.linspace(1, 2, 4, dtype=torch.float64)
    (run(*arguments) * weight).sum().backward()
    (dense,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(x.grad, dense)
    assert all(a.grad is not None and a.grad != 0 for a in amounts)


def test_gates_cut_gradients_where_they_are_closed():
    sae, x = make("relu"), inputs(2)
    amount = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    plan = plan_of([add(1, amount)], sae)
    edit(x, sae, plan.gated(torch.tensor([[True], [False]]), None)).sum().backward()
    torch.testing.assert_close(amount.grad, sae.W_dec[1].sum())


# -- tables --------------------------------------------------------------------------------------


def test_tables_are_on_the_sae_s_device_and_never_narrower_than_float32():
    for dtype, wide in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        plan = plan_of([add(1, 0.1), add_vector(torch.ones(D_IN))], make(dtype=dtype))
        assert plan.slots.amounts.dtype == plan.vectors.amounts.dtype == wide
        assert plan.vectors.vectors.dtype == wide
    plan = plan_of([add(1, 0.1, when=active(1))], make().to("meta"))
    assert plan.slots.latents.device.type == plan.slots.when_above.device.type == "meta"


def test_a_plan_is_frozen_and_gated_copies_share_its_tables():
    plan = plan_of([add(1, 1.0)], make())
    other = plan.gated(torch.ones(1, 1, dtype=torch.bool), None)
    assert other.slots is plan.slots
    assert plan.slot_gate is None
    with pytest.raises(AttributeError):
        plan.slots = None
    assert replace(plan, slots=None).empty
