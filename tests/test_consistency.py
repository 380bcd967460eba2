"""Matching latents: the exact optimum by scipy's dense solver, the bound, the definitions."""

import json

import pytest
import sae_cases
import torch
from scipy.optimize import linear_sum_assignment

from saert.activations import TopK
from saert.measure import consistency, feature_splitting
from saert.measure.matching.assignment import match
from saert.sae import SAE


def rows(n=200, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def related(n=200, d=16, seed=0):
    """Two decoders that share most directions, in another order, with noise and other lengths."""
    g = torch.Generator().manual_seed(seed + 100)
    a = unit(rows(n, d, seed))
    noise = torch.rand(n, 1, generator=g) * 0.5
    b = a + noise * torch.randn(n, d, generator=g)
    b[: n // 4] = rows(n // 4, d, seed + 1)
    return a, (b * torch.rand(n, 1, generator=g))[torch.randperm(n, generator=g)]


def exact(a, b):
    """partner and cosines by the Hungarian method on the whole matrix, in float64."""
    cosines = unit(a.double()) @ unit(b.double()).T
    _, partner = linear_sum_assignment(1 - cosines.numpy())
    return torch.from_numpy(partner), cosines[torch.arange(len(a)), partner]


@pytest.mark.parametrize("candidates", [1, 4, 32, 1000])
@pytest.mark.parametrize("shared", [True, False])
def test_the_matching_is_the_optimum_over_all_pairs(candidates, shared):
    a, b = related() if shared else (rows(seed=5), rows(seed=6))
    found = match(unit(a), unit(b), candidates=candidates, tolerance=0, max_rounds=100)
    partner, cosines = exact(a, b)
    assert found.mean == pytest.approx(float(cosines.mean()), abs=2e-7)
    assert torch.equal(found.partner, partner)
    torch.testing.assert_close(found.cosines, cosines, rtol=0, atol=1e-6)
    assert found.mean <= found.bound <= found.mean + 2e-7
    assert sorted(found.partner.tolist()) == list(range(len(a)))


def test_a_matching_cut_short_comes_with_a_bound_that_holds():
    a, b = related(400, 24)
    partner, cosines = exact(a, b)
    best, gaps = float(cosines.mean()), []
    for most in range(4):
        found = match(unit(a), unit(b), candidates=2, tolerance=0, max_rounds=most)
        assert found.mean <= best + 1e-7 <= found.bound + 2e-7
        gaps.append(found.bound - found.mean)
    assert gaps[0] > 1e-3 and gaps[-1] < gaps[0]


def test_small_blocks_see_every_pair(monkeypatch):
    a, b = related()
    whole = match(unit(a), unit(b))
    monkeypatch.setattr("saert.measure.matching.assignment.BLOCK", 700)
    parts = match(unit(a), unit(b))
    assert torch.equal(whole.partner, parts.partner)
    torch.testing.assert_close(whole.nearest, parts.nearest)
    cosines = unit(a) @ unit(b).T
    torch.testing.assert_close(parts.nearest, cosines.amax(1))
    torch.testing.assert_close(parts.nearest_back, cosines.amax(0))


def test_a_permutation_of_itself_is_wholly_consistent():
    sae = sae_cases.make("topk", n=60)
    order = torch.randperm(60)
    other = SAE.from_weights(
        sae.W_enc[order] * 3, sae.W_dec[order] * 0.5, activation=TopK(5), hookpoint="resid_post.0"
    )
    (pair,) = consistency(sae, other).pairs
    assert torch.equal(pair.decoder.partner, order.argsort())
    assert pair.pw_mcc == pytest.approx(1, abs=1e-6)
    assert pair.shared == pair.shared_notebook == pair.same_counterpart == 1


def test_cosines_are_signed_and_a_row_of_zeros_matches_nothing():
    a = torch.eye(4)
    assert consistency(a, -a).pw_mcc == 0  # matching i with itself would give -1
    b = a.clone()
    b[2] = 0
    assert consistency(a, b).pw_mcc == pytest.approx(0.75)


def test_shared_latents_by_both_definitions():
    """Latents 1 and 2 have swapped encoders: near by the notebook's rule, not by the paper's."""
    eye = torch.eye(6)
    swapped = eye[[0, 2, 1, 3, 4, 5]].clone()
    tilted = eye.clone()
    tilted[3] = unit(torch.tensor([0, 0, 0, 1.0, 1.1, 0]))  # cosine 0.67 with row 3
    tilted[4] = unit(torch.tensor([0, 0, 0, -1.1, 1.0, 0]))
    a = SAE.from_weights(eye, eye, activation=TopK(2))
    b = SAE.from_weights(swapped, tilted, activation=TopK(2))
    (pair,) = consistency(a, b).pairs
    cosines = {i: float(pair.decoder.cosines[i]) for i in range(6)}
    low = [i for i in range(6) if cosines[i] < 0.7]
    assert pair.same_counterpart == pytest.approx(
        float((pair.decoder.partner == pair.encoder.partner).double().mean())
    )
    by_hand = [
        pair.decoder.partner[i] == pair.encoder.partner[i]
        and cosines[i] >= 0.7 and float(pair.encoder.cosines[i]) >= 0.7
        for i in range(6)
    ]  # fmt: skip
    assert pair.shared == pytest.approx(sum(map(bool, by_hand)) / 6)
    assert pair.shared_notebook == pytest.approx((6 - len(low)) / 6)
    assert pair.shared == pytest.approx(pair.shared_notebook - 2 / 6)


def test_mean_and_spread_are_over_all_pairs(tmp_path):
    a, b = related()
    c = rows(seed=9)
    found = consistency(a, b, c, names=["a", "b", "c"])
    assert [(p.a, p.b) for p in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    each = torch.tensor([exact(x, y)[1].mean() for x, y in ((a, b), (a, c), (b, c))])
    assert found.pw_mcc == pytest.approx(float(each.mean()), abs=1e-6)
    assert found.pw_mcc_std == pytest.approx(float(each.std(correction=0)), abs=1e-6)
    assert found.shared is None and "3 pair(s)" in str(found)
    assert sum(found.pairs[0].histogram()) == 200
    assert found.to_pandas().pw_mcc.tolist() == [pair.pw_mcc for pair in found.pairs]
    assert json.loads(found.save(tmp_path / "c.json").read_text())["pw_mcc"] == found.pw_mcc


def test_feature_splitting_counts_what_was_found_split_and_new():
    small = torch.eye(8)[:4]
    near = unit(torch.eye(8)[0] + 0.2 * torch.eye(8)[5])
    large = torch.stack((torch.eye(8)[0], near, torch.eye(8)[1], torch.eye(8)[6], torch.eye(8)[7]))
    found = feature_splitting(small, large, 0.7, top=2)
    facts = found.as_dict()
    assert facts["found"] == 0.5 and facts["split"] == 0.25 and facts["new"] == 0.4
    assert found.close_children.tolist() == [2, 1, 0, 0] and int(found.children.sum()) == 5
    assert found.neighbours[0].tolist() == [0, 1] and found.parent[:3].tolist() == [0, 0, 1]
    a, b = rows(30), rows(90, seed=3)
    found = feature_splitting(a, b)
    cosines = unit(a) @ unit(b).T
    assert torch.equal(found.neighbours, cosines.topk(5, 1).indices)
    assert torch.equal(found.parent, cosines.argmax(0))


def test_what_cannot_be_compared_is_refused():
    a, sae = rows(), sae_cases.make("topk")
    with pytest.raises(ValueError, match="expected two or more"):
        consistency(a)
    with pytest.raises(ValueError, match="feature_splitting"):
        consistency(a, a[:50])
    with pytest.raises(ValueError, match="writes width 16 and 1 12"):
        consistency(a, rows(d=12))
    with pytest.raises(ValueError, match="NaN"):
        consistency(a, a * float("nan"))
    with pytest.raises(ValueError, match=r"expected \[num_latents, d\]"):
        consistency(a[0], a[0])
    with pytest.raises(ValueError, match="is a transcoder and the other is not"):
        consistency(sae, sae_cases.make("topk", kind="transcoder_square"))
    wide = sae_cases.make("topk", kind="transcoder", d_in=12)
    with pytest.raises(ValueError, match="reads width 10 and 1 12"):
        consistency(sae_cases.make("topk", kind="transcoder"), wide)
    with pytest.raises(ValueError, match="the small one comes first"):
        feature_splitting(a, a[:50])
    with pytest.raises(ValueError, match="3 names for 2"):
        consistency(a, a, names=["x", "y", "z"])


def test_bfloat16_weights_and_transcoders_of_one_shape_compare():
    one = sae_cases.make("jumprelu", kind="transcoder", dtype=torch.bfloat16)
    (pair,) = consistency(one, one).pairs
    assert pair.shared == 1 and pair.pw_mcc == pytest.approx(1, abs=1e-6)
