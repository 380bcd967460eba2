"""Edit tables against the definition, against `attach`, and as tensors that never move."""

import random

import pytest
import torch
from sae_cases import D_IN, LATENTS, inputs, latents, make, reconstruct
from tiny_models import tiny
from torch import Tensor

from saert.edits import Edit, ablate, active, add, add_vector, apply
from saert.edits import clamp as set_to
from saert.edits import scale as times
from saert.plan import edit
from saert.runtime import attach
from saert.sae import SAE
from saert.sparse import SparseCode
from saert.tables import EditTable

CASES = [
    ("topk", "none", "sae"),
    ("topk", "layer_norm", "transcoder"),
    ("abstopk", "unit_norm", "sae"),
    ("jumprelu", "layer_norm", "sae"),
    ("batchtopk", "dataset_scale", "sae_skip"),
    ("gated", "mean_centre", "sae"),
    ("relu", "layer_norm", "transcoder_square"),
]
SEQUENCE, SLOTS = 9, 40


def selection(rng: random.Random, firing: list[int]) -> dict:
    """A random `where`: phase, positions of every kind, a condition."""
    positions = rng.choice(
        [
            None,
            None,
            rng.randrange(-4, SEQUENCE),
            [rng.randrange(-4, SEQUENCE) for _ in range(3)],
            slice(rng.randrange(-5, 5), rng.choice([None, rng.randrange(-4, 12)])),
            slice(rng.choice([None, 1, -3]), None, rng.randrange(1, 4)),
            slice(50, None),  # nothing
        ]
    )
    where = {"phase": rng.choice(["all", "all", "prompt", "generated"]), "positions": positions}
    if rng.random() < 0.4:
        where["when"] = active(rng.choice(firing), above=rng.choice([0.0, 0.3]))
    return where


def random_edits(rng: random.Random, firing: list[int], count: int) -> list[Edit]:
    """Edits that meet on few latents, so that their order matters."""
    choice = [*firing[:3], firing[-1]]
    edits: list[Edit] = []
    for _ in range(count):
        amount, where = rng.uniform(-2, 2), selection(rng, firing)
        kind = rng.randrange(4)
        if kind == 3:
            edits.append(ablate(rng.sample(choice, 2), to=torch.tensor(amount), **where))
        else:
            edits.append((add, set_to, times)[kind](rng.choice(choice), amount, **where))
    return edits


def most_active(sae: SAE, x: Tensor) -> list[int]:
    return (latents(sae, x) != 0).flatten(0, -2).sum(0).argsort(descending=True).tolist()


def selects(one: Edit, position: int, prompt: int) -> bool:
    """Whether an edit means a token, said in Python's own indexing."""
    where = one.select
    if where.phase != "all" and (where.phase == "generated") != (position >= prompt):
        return False
    wanted = where.positions
    if wanted is None:
        return True
    if not isinstance(wanted, slice):
        return position in [p if p >= 0 else prompt + p for p in wanted]
    start, stop = wanted.start or 0, wanted.stop
    start = start if start >= 0 else max(prompt + start, 0)
    if stop is not None and position >= (stop if stop >= 0 else prompt + stop):
        return False
    return position >= start and (position - start) % (wanted.step or 1) == 0


def definition(
    hidden: Tensor, sae: SAE, edits: list[Edit], x: Tensor, position: int, prompt: int
) -> Tensor:
    """One token: hidden + decode(apply(edits, code)) - decode(code), dense and in float64."""
    f = latents(sae, x)
    here = [e for e in edits if selects(e, position, prompt)]
    after = apply(here, SparseCode.from_dense(f)).to_dense()
    return hidden.double() + reconstruct(sae, after, x) - reconstruct(sae, f, x)


# -- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "transform", "kind"), CASES)
def test_every_token_gets_the_edits_of_its_row_at_its_position(act, transform, kind):
    """Five requests with edits and prompts of their own, their tokens shuffled into one batch."""
    sae, rng = make(act, transform, kind), random.Random(f"{act}{kind}")
    table = EditTable(sae, rows=6, slots=SLOTS)
    tokens = 40
    x = inputs(tokens)
    hidden = torch.randn(tokens, sae.d_out, dtype=torch.float64) if sae.is_transcoder else x
    source = x if sae.is_transcoder else None
    firing = most_active(sae, x)
    rows = [rng.randrange(6) for _ in range(tokens)]
    positions = [rng.randrange(SEQUENCE) for _ in range(tokens)]
    for _ in range(3):  # rewritten in place
        requests = {row: (random_edits(rng, firing, 6), rng.randrange(7)) for row in range(1, 6)}
        for row, (edits, prompt) in requests.items():
            table.write(row, edits, prompt_length=prompt)
        where = torch.tensor(rows), torch.tensor(positions)
        out = edit(hidden, sae, table.plan(*where), source=source)
        expected = torch.stack(
            [
                definition(hidden[t], sae, *requests[rows[t]][:1], x[t], positions[t],
                           requests[rows[t]][1])
                if rows[t]
                else hidden[t].double()
                for t in range(tokens)
            ]
        )  # fmt: skip
        assert not torch.allclose(expected, hidden)
        torch.testing.assert_close(out, expected)
        applied = table.apply(hidden, *where, source=source, code=sae.encode(x))
        torch.testing.assert_close(applied, expected)


@pytest.mark.parametrize("act", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_does_what_attach_does(act, dtype):
    """In a model: the tokens of each row of a padded batch, as the eager hook edits them."""
    model = tiny("llama").to(dtype)
    sae = make(act, "layer_norm", dtype=torch.float32, d_in=32, n=64, hookpoint="resid_post.1")
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    seen: list[Tensor] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        model(ids, attention_mask=mask)
        bare = seen.pop()
        firing = sae.encode(bare).indices.flatten().unique().tolist()
        rng = random.Random(1)
        for _ in range(6):
            edits = random_edits(rng, firing, 4)
            with attach(model, sae, edits):
                model(ids, attention_mask=mask)
            expected = seen.pop()
            table = EditTable(sae, rows=3, slots=SLOTS)
            table.write(1, edits, prompt_length=5)
            table.write(2, edits, prompt_length=8)
            rows = torch.tensor([[1], [2]]) * mask
            out = edit(bare, sae, table.plan(rows, mask.cumsum(-1) - 1))
            assert out.dtype == dtype
            real = mask.bool()
            torch.testing.assert_close(out[real], expected[real])  # rounds in another order
            assert torch.equal(out[~real], bare[~real])
    handle.remove()


# -- rows that add the same to every token -------------------------------------------------------


def plain_adds(rng: random.Random, n: int) -> list[Edit]:
    """Adds of one range: what a table keeps as one vector."""
    where = rng.choice(
        [
            {},
            {"phase": "prompt"},
            {"phase": "generated"},
            {"positions": slice(2, rng.randrange(3, 9))},
        ]
    )
    return [add(rng.randrange(n), rng.uniform(-2, 2), **where) for _ in range(rng.randrange(1, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("act", "transform", "kind", "constant"),
    [
        ("topk", "none", "sae", True),
        ("jumprelu", "mean_centre", "sae", True),
        ("batchtopk", "dataset_scale", "sae_skip", True),
        ("relu", "layer_norm", "transcoder_square", True),  # writes in the model's own units
        ("topk", "layer_norm", "sae", False),
        ("abstopk", "unit_norm", "sae", False),
    ],
)
def test_plain_adds_are_one_vector_per_row(act, transform, kind, constant, dtype):
    sae, rng = make(act, transform, kind), random.Random(act)
    table = EditTable(sae, rows=5, slots=8)
    x = inputs(60).to(dtype)
    hidden = torch.randn(60, sae.d_out).to(dtype) if sae.is_transcoder else x
    source = x if sae.is_transcoder else None
    rows = torch.tensor([rng.randrange(5) for _ in range(60)])
    positions = torch.tensor([rng.randrange(SEQUENCE) for _ in range(60)])
    for _ in range(5):  # rewritten in place
        for row in (1, 2, 3):  # 4 stays empty
            table.write(row, plain_adds(rng, sae.num_latents), prompt_length=rng.randrange(1, 8))
        assert table.constant == constant
        out = table.apply(hidden, rows, positions, source=source)
        plan = table.plan(rows, positions)
        assert out.dtype == dtype
        torch.testing.assert_close(out, edit(hidden, sae, plan, source=source))
        still = ~plan.slot_gate.any(-1)
        assert still.any() and torch.equal(out[still], hidden[still])
        assert not torch.equal(out, hidden)
    table.clear(2)
    two = rows == 2
    assert torch.equal(table.apply(hidden, rows, positions, source=source)[two], hidden[two])


@pytest.mark.parametrize(
    "edits",
    [
        [set_to(3, 1.0)],
        [add(3, 1.0, when=active(5))],
        [add(3, 1.0, positions=slice(0, None, 2))],
        [add(3, 1.0, phase="prompt"), add(4, 1.0)],
        [add(3, 1.0, positions=[1, 4])],
    ],
)
def test_other_edits_make_a_table_general_until_all_is_cleared(edits):
    sae, x = make("topk", "none"), inputs(12)
    table = EditTable(sae, rows=3, slots=4)
    table.write(1, [add(7, 2.0)])
    assert table.constant
    table.write(2, edits, prompt_length=4)
    assert not table.constant
    rows, positions = torch.arange(12) % 3, torch.arange(12) // 2
    out = table.apply(x, rows, positions)
    torch.testing.assert_close(out, edit(x, sae, table.plan(rows, positions)))
    table.clear(2)
    table.write(2, [add(8, 1.0)])
    assert not table.constant  # rows from before have no vector
    table.clear_all()
    assert table.constant and torch.equal(table.apply(x, rows, positions), x)
    table.write(1, [add(9, -1.0)])
    expected = edit(x, sae, table.plan(rows, positions))
    torch.testing.assert_close(table.apply(x, rows, positions), expected)


# -- tokens without edits ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_unedited_token_is_bit_for_bit_itself(dtype):
    sae, hidden = make("topk", "layer_norm", dtype=torch.float32), inputs(4, dtype=dtype)
    hidden[0, 0] = -0.0
    table = EditTable(sae, rows=3, slots=4, reads_code=True)
    table.write(1, [add(3, 2.0, positions=[1]), set_to(4, 9.0, positions=[7])], prompt_length=2)
    out = table.apply(hidden, torch.tensor([0, 2, 1, 1]), torch.tensor([1, 1, 0, 1]), code=None)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(out[:3].view(bits), hidden[:3].view(bits))
    assert not torch.equal(out[3], hidden[3])


def test_clear_empties_one_row_and_clear_all_everything():
    sae, hidden = make("jumprelu"), inputs(2)
    table = EditTable(sae, rows=3, slots=4)
    twice = [set_to(3, 2.0), add(3, 1.0)]
    table.write(1, twice)
    table.write(2, twice)
    assert (table.reads_code, table.rounds) == (True, 2)
    where = torch.tensor([1, 2]), torch.tensor([0, 0])
    table.clear(1)
    out = table.apply(hidden, *where)
    assert torch.equal(out[0], hidden[0]) and not torch.equal(out[1], hidden[1])
    table.write(2, [])
    assert torch.equal(table.apply(hidden, *where), hidden)
    assert (table.reads_code, table.rounds) == (True, 2)  # the graph's; they do not shrink
    table.write(2, twice)
    table.clear_all()
    assert (table.reads_code, table.rounds) == (False, 1)
    assert torch.equal(table.apply(hidden, *where), hidden)
    assert not table.on.any() and (table.when_above == -torch.inf).all()


# -- the graph -----------------------------------------------------------------------------------


def test_tables_are_rewritten_in_place_and_compiled_once():
    sae = make("topk")
    table = EditTable(sae, rows=4, slots=SLOTS, reads_code=True, rounds=4, grows=False)
    addresses = [t.data_ptr() for t in (table.latents, table.amounts, table.first, table.on)]
    compiled = torch.compile(table.apply, fullgraph=True, backend=(count := CountingBackend()))
    rng, hidden = random.Random(2), inputs(3, 5)
    rows, positions = torch.randint(0, 4, (3, 5)), torch.arange(5).expand(3, 5)
    firing = most_active(sae, hidden)
    for _ in range(5):
        for row in (1, 2, 3):
            table.write(row, random_edits(rng, firing, 4), prompt_length=3)
        torch.testing.assert_close(
            compiled(hidden, rows, positions), table.apply(hidden, rows, positions)
        )
    assert count.graphs == 1
    assert addresses == [
        t.data_ptr() for t in (table.latents, table.amounts, table.first, table.on)
    ]


class CountingBackend:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def test_add_alone_never_encodes(monkeypatch):
    sae, hidden = make("topk"), inputs(2)
    table = EditTable(sae, rows=2, slots=2)
    table.write(1, [add(3, 2.0), add(4, 1.0, phase="generated")], prompt_length=1)
    monkeypatch.setattr(SAE, "encode", lambda *_: pytest.fail("encoded"))
    out = table.apply(hidden, torch.tensor([1, 1]), torch.tensor([0, 1]))
    torch.testing.assert_close(out[1], hidden[1] + 2.0 * sae.W_dec[3] + sae.W_dec[4])


def test_written_in_inference_mode_and_outside():
    with torch.inference_mode():
        table = EditTable(make("topk"), rows=2, slots=2)
        table.write(1, [add(3, 2.0)])
    table.write(1, [add(4, 2.0)])
    assert table.latents[1, 0] == 4


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([add(1, 1.0, positions=[1, 2, 3, 4, 5])], "2 edits need 6 slots"),
        ([ablate([1, 2, 3]), ablate([4, 5])], "3 edits need 6 slots"),
        ([add(LATENTS, 1.0)], "latent 24 does not exist"),
        ([add(1, 1.0, when=active(99))], "latent 99 does not exist"),
        ([add(1, 1.0, rows=0)], "selects rows"),
        ([add_vector(torch.ones(D_IN))], "no vectors"),
        ([add(1, torch.tensor(1.0, requires_grad=True))], "needs a gradient"),
        ([add(1, 1.0, phase="prompt")], "pass prompt_length="),
        ([add(1, 1.0, positions=-1)], "pass prompt_length="),
    ],
)
def test_what_a_table_cannot_hold_is_refused_and_changes_nothing(edits, message):
    table = EditTable(make("topk"), rows=2, slots=4)
    table.write(1, [add(7, 2.0)])
    before = table._whole.clone(), table._real.clone()
    with pytest.raises(ValueError, match=message):
        table.write(1, [set_to(2, 1.0), *edits])
    assert torch.equal(table._whole, before[0]) and torch.equal(table._real, before[1])
    assert (table.reads_code, table.rounds) == (False, 1)


def test_rows_that_do_not_exist_and_sizes_that_make_no_sense():
    table = EditTable(make("topk"), rows=2, slots=4)
    for row in (0, 2, -1):
        with pytest.raises(ValueError, match="no row"):
            table.write(row, [])
        with pytest.raises(ValueError, match="no row"):
            table.clear(row)
    with pytest.raises(ValueError, match="prompt_length"):
        table.write(1, [], prompt_length=-1)
    for sizes in (dict(rows=1, slots=1), dict(rows=2, slots=0)):
        with pytest.raises(ValueError, match="at least 2 rows"):
            EditTable(make("topk"), **sizes)


def test_a_table_that_may_not_grow_refuses_what_it_was_not_made_for():
    table = EditTable(make("topk"), rows=2, slots=4, grows=False)
    table.write(1, [add(3, 1.0), add(4, 1.0)])
    for edits in ([set_to(3, 1.0)], [add(3, 1.0), add(3, 1.0)], [add(3, 1.0, when=active(4))]):
        with pytest.raises(ValueError, match="grows=False"):
            table.write(1, edits)
    assert table.latents[1].tolist() == [3, 4, 0, 0]


def test_separate_positions_of_one_edit_need_one_round():
    table = EditTable(make("topk"), rows=2, slots=8)
    table.write(1, [add(3, 1.0, positions=[0, 4, -1, 4])], prompt_length=5)
    assert table.rounds == 1 and int(table.on.sum()) == 2  # -1 is 4 as well
