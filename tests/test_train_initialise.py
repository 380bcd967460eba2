"""Where a dictionary starts."""

import pytest
import torch
from objective_cases import planted
from run_cases import LATENTS, samples

from saert.train.initialise import geometric_median, new_dictionary, random_directions
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES as BY_NAME
from saert.train.objectives.base import Batch, Step
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.objectives.topk import TopKObjective
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
