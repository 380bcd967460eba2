"""Edits are frozen data that say what they mean, and refuse what cannot be meant."""

import dataclasses

import numpy as np
import pytest
import torch

from saert.edits import (
    Condition,
    Op,
    ablate,
    active,
    add,
    add_vector,
    apply,
    clamp,
    scale,
)
from saert.hookpoint import Hookpoint
from saert.sparse import SparseCode

VECTOR = torch.ones(4)
# each constructor with its own arguments filled in
EACH = {
    "add": lambda **kw: add(3, 1.0, **kw),
    "clamp": lambda **kw: clamp(3, 1.0, **kw),
    "scale": lambda **kw: scale(3, 1.0, **kw),
    "ablate": lambda **kw: ablate(3, **kw),
    "add_vector": lambda **kw: add_vector(VECTOR, **kw),
}
LATENT = {"add": add, "clamp": clamp, "scale": scale, "ablate": ablate}


def dense(*rows: list[float]) -> SparseCode:
    return SparseCode.from_dense(torch.tensor(rows))


# -- what they mean ------------------------------------------------------------------------------

F = [0.0, 2.0, -1.0, 0.5]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([], F),
        ([add(1, 3.0)], [0.0, 5.0, -1.0, 0.5]),
        ([add(0, 3.0)], [3.0, 2.0, -1.0, 0.5]),  # whether or not it fires
        ([clamp(1, 3.0)], [0.0, 3.0, -1.0, 0.5]),
        ([clamp(0, 3.0)], [3.0, 2.0, -1.0, 0.5]),
        ([scale(1, 3.0)], [0.0, 6.0, -1.0, 0.5]),
        ([scale(0, 3.0)], F),
        ([ablate([1, 3])], [0.0, 0.0, -1.0, 0.0]),
        ([ablate([0, 1], to=0.25)], [0.25, 0.25, -1.0, 0.5]),
        ([add(1, 1.0), scale(1, 2.0)], [0.0, 6.0, -1.0, 0.5]),
        ([scale(1, 2.0), add(1, 1.0)], [0.0, 5.0, -1.0, 0.5]),
        ([clamp(1, 7.0), ablate(1)], [0.0, 0.0, -1.0, 0.5]),
        ([ablate(1), clamp(1, 7.0)], [0.0, 7.0, -1.0, 0.5]),
        ([add(0, 1.0, when=active(1))], [1.0, 2.0, -1.0, 0.5]),
        ([add(0, 1.0, when=active(1, above=2.0))], F),  # strictly above
        ([add(1, 1.0, when=active(0))], F),
        # decided on the code as it came in, not as edited
        ([add(0, 1.0), add(3, 1.0, when=active(0))], [1.0, 2.0, -1.0, 0.5]),
        ([ablate(1), add(3, 1.0, when=active(1))], [0.0, 0.0, -1.0, 1.5]),
        ([add(0, torch.tensor(3.0))], [3.0, 2.0, -1.0, 0.5]),
    ],
    ids=repr,
)
def test_apply_is_the_list_in_order(edits, expected):
    assert apply(edits, dense(F)).to_dense().tolist() == [expected]


def test_conditions_are_decided_per_token():
    code = dense([1.0, 0.0], [0.0, 1.0])
    after = apply([clamp(1, 5.0, when=active(0))], code)
    assert after.to_dense().tolist() == [[1.0, 5.0], [0.0, 1.0]]


def test_apply_is_pure():
    code = dense(F, [1.0, 0.0, 0.0, 2.0])
    before = code.indices.clone(), code.values.clone()
    edits = [add(0, 1.0), ablate([1, 2]), scale(3, 2.0)]
    first = apply(edits, code).to_dense()
    assert code.indices.equal(before[0])
    assert code.values.equal(before[1])
    assert apply(edits, code).to_dense().equal(first)
    assert apply([], code).values.data_ptr() != code.values.data_ptr()


@pytest.mark.parametrize(
    "edit",
    [
        lambda a: add(1, a),
        lambda a: scale(1, a),
        lambda a: clamp(1, a),
    ],
    ids=["add", "scale", "clamp"],
)
def test_apply_passes_gradients_to_tensor_amounts(edit):
    amount = torch.tensor(1.5, requires_grad=True)
    apply([edit(amount)], dense(F)).to_dense().sum().backward()
    assert amount.grad is not None
    assert amount.grad != 0


# -- as data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_edits_are_frozen(make):
    edit = make(rows=[1, 2], positions=-1, phase="prompt", when=active(2))
    for field in dataclasses.fields(edit):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(edit, field.name, None)
    for field in dataclasses.fields(edit.select):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(edit.select, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.select.when.above = 1.0


def test_edits_do_not_alias_the_lists_they_were_made_from():
    latents, rows, positions = [1, 2], [0], [3]
    edit = ablate(latents, rows=rows, positions=positions)
    for values in (latents, rows, positions):
        values.append(9)
    assert (edit.latents, edit.select.rows, edit.select.positions) == ((1, 2), (0,), (3,))


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
def test_common_keywords_are_kept_and_default_to_everywhere(make):
    assert make().select.everywhere
    assert not make().select.needs_prompt
    select = make(
        sae="blocks.3.hook_resid_post", rows=1, positions=[0, 2], phase="generated", when=active(5)
    ).select
    assert select.sae == Hookpoint.parse("resid_post.3")
    assert (select.rows, select.positions, select.phase) == ((1,), (0, 2), "generated")
    assert select.when == Condition(5, 0.0)
    assert not select.everywhere


@pytest.mark.parametrize(
    ("keywords", "needs"),
    [
        ({}, False),
        (dict(rows=[0], positions=[0, 4]), False),
        (dict(positions=slice(2, None)), False),
        (dict(positions=-1), True),
        (dict(positions=[0, -1]), True),
        (dict(positions=slice(-3, None)), True),
        (dict(positions=slice(None, -1)), True),
        (dict(phase="prompt"), True),
        (dict(phase="generated"), True),
    ],
    ids=str,
)
def test_only_phases_and_negative_positions_need_the_prompt(keywords, needs):
    assert add(0, 1.0, **keywords).select.needs_prompt is needs


@pytest.mark.parametrize(
    "value", [3, np.int64(3), torch.tensor(3), True + 2], ids=["int", "numpy", "tensor", "bool sum"]
)
@pytest.mark.parametrize("make", [add, clamp, scale], ids=["add", "clamp", "scale"])
def test_latents_are_anything_that_counts(make, value):
    assert make(value, 1.0).latents == (3,)


@pytest.mark.parametrize(
    "value",
    [
        [3, 4],
        (3, 4),
        range(3, 5),
        np.array([3, 4]),
        torch.tensor([3, 4]),
        (i for i in (3, 4)),
    ],
    ids=["list", "tuple", "range", "numpy", "tensor", "generator"],
)
def test_ablate_takes_any_sequence(value):
    assert ablate(value).latents == (3, 4)


@pytest.mark.parametrize(
    "make", [lambda v: ablate(v), lambda v: add(0, 1.0, rows=v), lambda v: add(0, 1.0, positions=v)]
)
def test_a_0d_tensor_counts_as_an_int(make):
    make(torch.tensor(3))


def test_amounts_are_numbers_or_tensors_kept_as_they_are():
    amount = torch.tensor(2.0, requires_grad=True)
    assert add(1, amount).amount is amount
    assert type(add(1, np.float32(2)).amount) is float
    assert [e.op for e in (add(1, 1.0), clamp(1, 1.0), scale(1, 1.0), ablate(1))] == [
        Op.ADD, Op.SET, Op.SCALE, Op.SET,
    ]  # fmt: skip


def test_repr_is_short_and_says_what_happens():
    assert repr(add(3, 8.0)) == "add([3], 8)"
    assert repr(ablate(range(9))) == "set([0, 1, 2, 3, 4, 5, …], 0)"
    assert repr(add_vector(VECTOR, 0.5)) == "add_vector([4], 0.5)"


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LATENT.values(), ids=LATENT)
@pytest.mark.parametrize(
    ("latent", "error", "match"),
    [
        (-1, ValueError, "latent: found -1; latents count from 0"),
        (1.5, TypeError, "latent: found 1.5, expected an index"),
        (None, TypeError, "latent: found None"),
    ],
)
def test_impossible_latents_are_named(make, latent, error, match):
    arguments = () if make is ablate else (1.0,)
    with pytest.raises(error, match=match):
        make(latent, *arguments)


@pytest.mark.parametrize(
    ("latents", "match"),
    [([], "no latents given"), ([3, 4, 3], "listed twice"), ([1, -2], "found -2")],
)
def test_impossible_lists_of_latents_are_named(latents, match):
    with pytest.raises(ValueError, match=match):
        ablate(latents)


@pytest.mark.parametrize("make", LATENT.values(), ids=LATENT)
@pytest.mark.parametrize(
    ("amount", "error", "match"),
    [
        (float("nan"), ValueError, "amount: found nan, expected a finite number"),
        (torch.tensor(torch.inf), ValueError, "amount: found inf"),
        (torch.ones(2), ValueError, r"amount: found a tensor \[2\], expected a number or 0-d"),
        (None, TypeError, "amount: found None, expected a number"),
        ("much", (TypeError, ValueError), "amount: found 'much', expected a number"),
    ],
)
def test_impossible_amounts_are_named(make, amount, error, match):
    with pytest.raises(error, match=match):
        make(3, to=amount) if make is ablate else make(3, amount)


@pytest.mark.parametrize(
    ("vector", "match"),
    [
        (torch.zeros(2, 3), r"found \[2, 3\], expected a tensor \[d_out\]"),
        (torch.tensor(1.0), r"found \[\]"),
        ([1.0, 2.0], "found list"),
        (torch.tensor([1.0, torch.nan]), "contains NaN"),
    ],
)
def test_impossible_vectors_are_named(vector, match):
    with pytest.raises(ValueError, match=f"add_vector: .*{match}"):
        add_vector(vector)


@pytest.mark.parametrize("make", EACH.values(), ids=EACH)
@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        (dict(phase="decode"), ValueError, "phase: found 'decode', expected one of 'all'"),
        (dict(when=3), TypeError, r"when: found int, expected active\(latent"),
        (dict(rows=-1), ValueError, "rows: found -1; rows count from 0"),
        (dict(rows=[0, -2]), ValueError, "rows: found -2"),
        (dict(rows=[]), ValueError, "rows: an empty selection"),
        (dict(rows=1.5), TypeError, "rows: found 1.5, expected an int"),
        (dict(rows="ab"), TypeError, "rows: found 'ab'"),
        (dict(positions=[]), ValueError, "positions: an empty selection"),
        (dict(positions=[0.5]), TypeError, r"positions: found \[0.5\]"),
        (dict(positions=slice(0, 4, -1)), ValueError, "positions: the step is -1"),
        (dict(positions=slice(0, 4, 0)), ValueError, "positions: the step is 0"),
    ],
    ids=str,
)
def test_impossible_selections_are_named(make, keywords, error, match):
    with pytest.raises(error, match=match):
        make(**keywords)


def test_slices_have_integer_ends():
    with pytest.raises(TypeError, match="positions"):
        add(0, 1.0, positions=slice(0.5, None))


def test_a_condition_is_validated_like_an_edit():
    with pytest.raises(ValueError, match="latents count from 0"):
        active(-1)
    with pytest.raises(ValueError, match="finite"):
        active(1, above=float("nan"))
    assert active(np.int64(2), above=torch.tensor(0.5)) == Condition(2, 0.5)
