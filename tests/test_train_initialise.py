"""Where a dictionary starts."""

from dataclasses import replace

import pytest
import torch
from objective_cases import planted
from run_cases import LATENTS, PLAN, READ, WRITE, D, Planted, a_run, samples

from saert.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.initialise import (
    geometric_median,
    new_dictionary,
    random_directions,
    start_from,
)
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES as BY_NAME
from saert.train.objectives.base import Batch, Step
from saert.train.objectives.jumprelu import PUBLISHED_START, JumpReLUObjective
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.objectives.topk import TopKObjective
from saert.train.run import Job
from saert.train.units import Units


@pytest.mark.parametrize("transcodes", [False, True])
def test_a_shard_draws_its_own_part_of_the_same_rows(transcodes, monkeypatch):
    monkeypatch.setattr("saert.train.initialise.BLOCK", 20)  # shards begin inside a block
    # which needs the other shards; tests/test_train_distributed.py has them
    monkeypatch.setattr("saert.train.initialise._least_squares", lambda *_: 1.0)
    x, y = samples()
    y = y if transcodes else x
    objective = ReLUL1Objective()
    one = new_dictionary(x, y, LATENTS, objective, Mesh(), transcodes=transcodes)
    for shard in range(3):
        mesh = Mesh(shards=3, shard=shard)
        part = new_dictionary(x, y, LATENTS, objective, mesh, transcodes=transcodes)
        own = slice(16 * shard, 16 * shard + 16)
        assert part.latents == own
        for name in ("W_enc", "W_dec", "b_enc"):
            torch.testing.assert_close(getattr(part, name), getattr(one, name)[own])
        torch.testing.assert_close(part.b_dec, one.b_dec)


def test_directions_depend_on_their_number_and_the_seed_only():
    whole = random_directions(slice(0, 3000), 8, 5, "cpu")
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(3000))
    for rows in (slice(0, 10), slice(1000, 1050), slice(1024, 2048), slice(2990, 3000)):
        assert torch.equal(random_directions(rows, 8, 5, "cpu"), whole[rows])
    assert not (whole == random_directions(slice(0, 3000), 8, 6, "cpu")).any(-1).any()
    assert len({row.tobytes() for row in whole.numpy()}) == 3000


def test_the_geometric_median_is_nowhere_farther_from_the_data():
    x = torch.randn(300, 6, dtype=torch.float64) ** 3
    x[:30] += 100  # what would move a mean
    median = geometric_median(x)

    def distance(p):
        return (x - p).norm(dim=-1).sum()

    for _ in range(50):
        step = torch.randn(6, dtype=torch.float64)
        assert distance(median) < distance(median + 0.05 * step / step.norm())
    assert median.norm() < 0.2 * x.mean(0).norm()
    repeated = torch.cat([torch.ones(7, 3), torch.randn(4, 3)])  # begins at a row of the data
    torch.testing.assert_close(geometric_median(repeated), torch.ones(3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["none", "layer_norm", "sqrt_d"])
@pytest.mark.parametrize("transcodes", [False, True])
def test_a_new_reconstruction_is_about_as_long_as_what_it_reconstructs(kind, transcodes):
    raw, target = samples()
    if transcodes and kind == "layer_norm":
        return
    x, y = Units.of(kind, raw, target, transcodes).enter(raw, target if transcodes else None)
    d = new_dictionary(x, y, LATENTS, TopKObjective(k=5), Mesh(), transcodes=transcodes)
    written = d.decode(d.topk(x, 5), x, bias=False)
    assert written.norm(dim=-1).mean().item() == pytest.approx(
        (y - d.b_dec).norm(dim=-1).mean().item(), rel=1e-6
    )
    torch.testing.assert_close(d.b_dec.data, geometric_median(y))
    torch.testing.assert_close(d.W_dec.norm(dim=-1).data, torch.ones(LATENTS).double())


def test_a_dictionary_that_cannot_be_is_refused():
    x, _ = samples()
    with pytest.raises(ValueError, match="5 shards do not divide 48 latents"):
        new_dictionary(x, x, LATENTS, TopKObjective(k=5), Mesh(shards=5))
    with pytest.raises(ValueError, match="k is 99, but num_latents 48"):
        new_dictionary(x, x, LATENTS, TopKObjective(k=99), Mesh())


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("transcodes", [False, True])
@pytest.mark.parametrize("expansion", [4, 16])
def test_no_dictionary_starts_worse_than_nothing(name, transcodes, expansion):
    """Dense objectives used to start with reconstructions n / 2d times too long."""
    x = planted(4096)
    y = x @ torch.randn(16, 16) if transcodes else x
    objective = BY_NAME[name]()
    units = Units.of(objective.normalise, x, y, transcodes)
    x, y = units.enter(x, y if transcodes else None)
    d = new_dictionary(x, y, 16 * expansion, objective, Mesh(), transcodes=transcodes)
    batch = Batch.of(
        x[:512], y[:512], Mesh(), gradient=torch.randn(512, 16), downstream=lambda e: e.sum() * 0
    )
    objective.prepare(d, Batch.of(x, y, Mesh()))
    loss = objective.loss(d, batch, Step(0, 100, torch.zeros(d.local, dtype=torch.bool)))
    assert loss.fvu < 1.5, loss.fvu


# -- starting from an SAE with decoder norms of its own --------------------------------------------

NORMS = {"1": 1.0, "3": 3.0, "0.3": 0.3, "unequal": torch.linspace(0.3, 3, LATENTS)[:, None]}
VARIED = torch.linspace(0.5, 2.0, LATENTS, dtype=torch.float64)
GATED = Gated(-VARIED, VARIED.flip(0) - 1, VARIED / 4)
RANKING = [name for name, kind in BY_NAME.items() if hasattr(kind, "k")]
CASES = {  # name: (objective, what the SAE has)
    "topk": (TopKObjective(k=4), TopK(4)),
    "llama_scope": (BY_NAME["llama_scope"](k=4, jumprelu=False), TopK(4)),
    "batch_topk": (BY_NAME["batch_topk"](k=4), BatchTopK(1.5)),
    "matryoshka": (BY_NAME["matryoshka"](k=4), BatchTopK(1.5)),
    "mutual_choice": (BY_NAME["mutual_choice"](k=4), BatchTopK(1.5)),
    "feature_choice": (BY_NAME["feature_choice"](k=4), BatchTopK(1.5)),
    "jumprelu": (JumpReLUObjective(), JumpReLU(VARIED)),
    "jumprelu, target": (JumpReLUObjective(target_l0=4.0), JumpReLU(VARIED)),
    "jumprelu from batch_topk": (JumpReLUObjective(), BatchTopK(1.5)),
    "gated": (BY_NAME["gated"](), GATED),
    "relu_l1": (BY_NAME["relu_l1"](), ReLU()),
}


def saved_sae(activation, norms, transcodes=False, **more):
    """float64; with b_enc unless it is gated."""
    W = random_directions(slice(0, LATENTS), D, 3, "cpu").double()
    b_enc = None if isinstance(activation, Gated) else torch.linspace(-0.3, 0.3, LATENTS).double()
    return SAE.from_weights(
        W / 4, W.flip(1) * norms, b_enc, torch.linspace(-1, 1, D).double(),
        activation=activation, hookpoint=READ, target_hookpoint=WRITE if transcodes else None,
        **more,
    )  # fmt: skip


def begun(saved, objective, kind, transcodes=False):
    """The run that starts from it, before its first step."""
    target = WRITE if transcodes else None
    job = Job("j", READ, target, LATENTS, objective, normalise=kind, start=saved)
    return a_run(None, replace(PLAN, dtype=torch.float64), [job], Planted(scale=3.0)).members[0]


@torch.no_grad()
def assert_same(sae, saved):
    """Equal reconstructions, and activations that carry the norms of the saved decoder."""
    raw, _ = samples()
    code, expected = sae.encode(raw).to_dense(), saved.encode(raw).to_dense()
    assert 1 < (expected > 0).sum(-1).double().mean() < LATENTS - 1
    torch.testing.assert_close(code, expected * saved.W_dec.norm(dim=-1))
    torch.testing.assert_close(sae(raw), saved(raw))


@pytest.mark.parametrize("kind, transcodes", [("none", False), ("unit", True), ("sqrt_d", False)])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_begins_as_the_sae_it_starts_from_whatever_its_decoder_norms(
    case, norms, kind, transcodes
):
    objective, activation = CASES[case]
    saved = saved_sae(activation, NORMS[norms], transcodes)
    if norms == "unequal" and hasattr(objective, "k"):
        with pytest.raises(ValueError, match=r"compares plain scores.* norms are 0\.3 to 3; "):
            begun(saved, objective, kind, transcodes)
    else:
        assert_same(begun(saved, objective, kind, transcodes).sae(), saved)


@pytest.mark.parametrize("case", [name for name in CASES if name != "gated"])
def test_a_run_begins_as_the_sae_that_selects_by_decoder_norm(case):
    objective, activation = CASES[case]
    saved = saved_sae(activation, NORMS["unequal"], select_by_decoder_norm=True)
    assert_same(begun(saved, objective, "unit").sae(), saved)


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(1.5)], ids=["TopK", "BatchTopK"])
def test_what_ranks_by_other_scores_than_the_sae_does_refuses_it(name, activation):
    assert len(RANKING) > 5
    saved = saved_sae(activation, NORMS["unequal"])
    with pytest.raises(ValueError, match=f"; {name} ranks by score times norm, .* True first"):
        begun(saved, BY_NAME[name](k=4), "none")


def test_norms_that_differ_by_rounding_are_equal():
    saved = saved_sae(TopK(4), 3.0).to(torch.bfloat16)
    norm = saved.W_dec.double().norm(dim=-1)
    assert 1 < norm.max() / norm.min() < 1.004
    found = begun(saved, TopKObjective(k=4), "none").sae()
    torch.testing.assert_close(found.W_enc, saved.W_enc.double() * norm[:, None])


@pytest.mark.parametrize("target", [None, 4.0])
@pytest.mark.parametrize("norms", ["3", "unequal"])
def test_the_window_is_as_wide_as_the_thresholds_it_starts_from(target, norms):
    saved = saved_sae(JumpReLU(VARIED), NORMS[norms])
    member = begun(saved, JumpReLUObjective(target_l0=target), "unit")
    d = member.training.dictionary
    folded = VARIED * saved.W_dec.norm(dim=-1).detach() * member.units.factor_y
    torch.testing.assert_close(d.state["bandwidth"], folded.median())
    silent = saved_sae(JumpReLU(0.0), NORMS[norms])
    d = begun(silent, JumpReLUObjective(target_l0=target), "unit").training.dictionary
    assert d.state["bandwidth"] == PUBLISHED_START
    for chosen in ({"bandwidth": 0.25}, {"threshold": 0.25}):
        objective = JumpReLUObjective(target_l0=target, **chosen)
        assert begun(saved, objective, "unit").training.dictionary.state["bandwidth"] == 0.25


def test_a_shard_starts_from_its_own_latents_thresholds():
    saved = saved_sae(JumpReLU(VARIED), NORMS["unequal"])
    x, _ = samples()
    units = Units.of("none", x, x, False)
    for shard in range(3):
        d = new_dictionary(x, x, LATENTS, JumpReLUObjective(), Mesh())
        mesh = Mesh(shards=3, shard=shard)
        own = slice(16 * shard, 16 * shard + 16)
        part = Dictionary(
            d.W_enc[own].detach(), d.W_dec[own].detach(), d.b_enc[own].detach(), d.b_dec.detach(),
            num_latents=LATENTS, mesh=mesh,
        )  # fmt: skip
        objective = JumpReLUObjective()
        start_from(part, saved, units)
        objective.prepare(part, Batch.of(x, x, Mesh()))
        objective.adopt(part, units.unfold_activation(saved.activation))
        wanted = VARIED * saved.W_dec.norm(dim=-1).detach()
        torch.testing.assert_close(part.extra["log_threshold"].exp().data, wanted[own])
        torch.testing.assert_close(part.state["bandwidth"], wanted.median())
