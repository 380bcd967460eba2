"""Scaling laws: what is fitted to data of known law, what is refused, and what is drawn."""

import json
import math
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from saert.train.scaling import (
    GPT4_COMPUTE,
    GPT4_JOINT,
    Point,
    PowerLaw,
    fit_compute,
    fit_joint,
    fit_latents,
    frontier,
    load_points,
    sae_flops,
    save_points,
)

pytest.importorskip("scipy")
LATENTS = PowerLaw(E=0.1, A=2.0, alpha=0.25)


def point(loss, *, n=1024, k=32, flops=1.0):
    return Point(num_latents=n, k=k, tokens=1000, flops=float(flops), loss=float(loss))


def noisy(loss, noise, seed=0):
    """Losses with log-normal noise."""
    return loss * np.exp(noise * np.random.default_rng(seed).standard_normal(np.shape(loss)))


def joint_points(noise=0.0, seed=0, ns=range(12, 21), ks=(16, 32, 64, 128, 256)):
    """The published law on a grid; `ns` are powers of two."""
    grid = [(2**n, k) for n in ns for k in ks]
    losses = noisy(GPT4_JOINT.predict(*np.array(grid).T), noise, seed)
    return [point(loss, n=n, k=k) for (n, k), loss in zip(grid, losses, strict=True)]


def latents_points(noise=0.0, seed=0, ns=range(9, 20)):
    sizes = [2**n for n in ns]
    losses = noisy(LATENTS.predict(sizes), noise, seed)
    return [point(loss, n=n) for n, loss in zip(sizes, losses, strict=True)]


def covered(fit, law):
    return all(c.low <= getattr(law, name) <= c.high for name, c in fit.coefficients.items())


def values(fit):
    return {name: c.value for name, c in fit.coefficients.items()}


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (32, (0.585, 0.474, 0.419, 0.356, 0.299)),
        (128, (0.518, 0.393, 0.336, 0.277, 0.231)),
        (512, (0.459, 0.326, 0.272, 0.221, 0.187)),
    ],
)
def test_joint_law_reproduces_published_table(k, expected):
    """ALGORITHMS.md 1.8, to the three digits given."""
    predicted = GPT4_JOINT.predict([2**n for n in (12, 15, 17, 20, 24)], k)
    assert predicted.round(3).tolist() == pytest.approx(expected, abs=1e-9)


def test_compute_law_is_the_published_one():
    assert GPT4_COMPUTE.predict(1.0) == pytest.approx(0.146)
    assert GPT4_COMPUTE.predict(1e-6) == pytest.approx(0.09 + 0.056 * 10**0.504)


def test_exact_joint_data_give_back_the_coefficients():
    fit = fit_joint(joint_points(), draws=5)
    for name, value in values(fit).items():
        assert value == pytest.approx(getattr(GPT4_JOINT, name), abs=1e-5), name
    assert fit.identified and fit.notes == ()
    assert fit.rms < 1e-7 and fit.r_squared == pytest.approx(1)


def test_noisy_joint_data_are_covered():
    """1% noise. The intercepts lie at ln n = ln k = 0, far from the data, and are known worst."""
    fit = fit_joint(joint_points(noise=0.01, seed=1), draws=150)
    assert covered(fit, GPT4_JOINT), fit.table()
    assert fit.identified
    tolerance = {"alpha": 0.3, "beta_k": 0.08, "beta_n": 0.05, "gamma": 0.012}
    for name, allowed in (tolerance | {"zeta": 0.3, "eta": 0.06}).items():
        c = fit.coefficients[name]
        assert c.value == pytest.approx(getattr(GPT4_JOINT, name), abs=allowed), name
        assert 0 < c.standard_error < allowed
    assert 0.005 < fit.rms < 0.015
    inside = GPT4_JOINT.predict(2**16, 64)
    assert fit.predict(2**16, 64) == pytest.approx(inside, rel=0.01)


def test_exact_compute_data_give_back_the_coefficients():
    C = np.logspace(-8, 0, 25)
    data = [point(loss, flops=c) for c, loss in zip(C, GPT4_COMPUTE.predict(C), strict=True)]
    fit = fit_compute(data, draws=20)
    assert values(fit) == pytest.approx({"E": 0.09, "A": 0.056, "alpha": 0.084}, abs=1e-5)
    assert fit.predict(1e-4) == pytest.approx(float(GPT4_COMPUTE.predict(1e-4)), rel=1e-6)


def test_unit_rescales_A_alone():
    C = np.logspace(-8, 0, 25)
    data = [point(loss, flops=c) for c, loss in zip(C, GPT4_COMPUTE.predict(C), strict=True)]
    fit = fit_compute(data, unit=1e-3, draws=10)
    expected = {"E": 0.09, "A": 0.056 * 1e-3**-0.084, "alpha": 0.084}
    assert values(fit) == pytest.approx(expected, abs=1e-5)
    assert fit.predict(1e-4) == pytest.approx(float(GPT4_COMPUTE.predict(1e-4)), rel=1e-6)


def test_noisy_latents_are_covered():
    fit = fit_latents(latents_points(noise=0.01), draws=150)
    assert covered(fit, LATENTS) and fit.identified, fit.table()
    assert values(fit)["E"] == pytest.approx(0.1, abs=0.03)
    assert values(fit)["alpha"] == pytest.approx(0.25, abs=0.04)


def test_few_points_widen_the_intervals():
    """Five points leave two degrees of freedom: resampled residuals alone cover half as often."""
    hits = sum(
        covered(fit_latents(latents_points(0.005, seed, range(9, 19, 2)), draws=60), LATENTS)
        for seed in range(8)
    )
    assert hits >= 7


def test_robust_fit_ignores_a_run_that_went_wrong():
    data = latents_points(noise=0.002)
    data[8] = point(data[8].loss * 1.5, n=data[8].num_latents)
    plain, robust = (fit_latents(data, robust=r, draws=30) for r in (False, True))
    assert abs(robust.law.alpha - 0.25) < 0.01 < abs(plain.law.alpha - 0.25)
    assert robust.coefficients["alpha"].standard_error < 0.02


def test_same_seed_same_fit():
    data = latents_points(noise=0.01)
    assert fit_latents(data, draws=20, seed=3) == fit_latents(data, draws=20, seed=3)
    assert fit_latents(data, draws=20, seed=3) != fit_latents(data, draws=20, seed=4)


def test_frontier_ignores_dominated_points():
    best = [point(0.5, flops=1), point(0.4, flops=2), point(0.3, flops=8)]
    worse = [point(0.6, flops=1), point(0.45, flops=4), point(0.4, flops=3), point(0.9, flops=20)]
    assert frontier(worse + best[::-1]) == best


def test_fit_compute_sees_the_frontier_alone():
    C = np.logspace(-8, 0, 25)
    losses = GPT4_COMPUTE.predict(C)
    best = [point(loss, flops=c) for c, loss in zip(C, losses, strict=True)]
    worse = [point(1.3 * loss, n=99, flops=1.1 * c) for c, loss in zip(C, losses, strict=True)]
    fit = fit_compute(worse + best, draws=10)
    assert list(fit.points) == best
    assert values(fit) == pytest.approx({"E": 0.09, "A": 0.056, "alpha": 0.084}, abs=1e-5)


@pytest.mark.parametrize("fit", [fit_latents, fit_joint])
def test_constant_losses_identify_nothing(fit):
    ks = (32,) if fit is fit_latents else (32, 64)
    found = fit([point(0.3, n=2**n, k=k) for n in range(9, 14) for k in ks], draws=8)
    assert not any(c.identified for c in found.coefficients.values())
    assert "does not fall with num_latents" in found.notes[0]
    assert found.predict(*((2**11,) if fit is fit_latents else (2**11, 32))) == pytest.approx(0.3)
    assert math.isnan(found.r_squared)
    assert "not identified" in [row[1] for row in found.table()]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["r_squared"] is None


def test_noise_about_a_constant_identifies_nothing():
    rng = np.random.default_rng(5)
    data = [point(0.3 * math.exp(0.01 * rng.standard_normal()), n=2**n) for n in range(9, 17)]
    assert not any(c.identified for c in fit_latents(data, draws=60).coefficients.values())


def test_one_k_identifies_no_k():
    """Exact data: only the Jacobian can tell. What does not depend on k stays predictable."""
    fit = fit_joint(joint_points(ks=(32,)), draws=10)
    assert not any(fit.coefficients[n].identified for n in ("beta_k", "gamma", "eta", "alpha"))
    assert not math.isfinite(fit.condition)
    assert all(math.isnan(c.standard_error) for c in fit.coefficients.values())
    assert fit.predict(2**15, 32) == pytest.approx(0.474, abs=1e-3)


def test_a_sliver_of_k_identifies_no_exponent_of_k():
    fit = fit_joint(joint_points(noise=0.01, ks=(32, 33, 34)), draws=80)
    assert not fit.coefficients["beta_k"].identified and not fit.coefficients["eta"].identified


def test_two_sizes_identify_no_power_law():
    """Exact data again, and every coefficient has leverage: only together are they free."""
    fit = fit_latents(2 * latents_points(ns=(10, 14)), draws=10)
    assert not any(c.identified for c in fit.coefficients.values())


def test_a_floor_that_is_not_there_is_not_identified():
    data = [point(2 * p.num_latents**-0.25, n=p.num_latents) for p in latents_points()]
    fit = fit_latents(data, draws=10)
    assert not fit.coefficients["E"].identified
    assert values(fit)["alpha"] == pytest.approx(0.25, abs=1e-3)
    assert values(fit)["A"] == pytest.approx(2, rel=1e-2)


def test_a_unit_far_from_the_data_leaves_A_open():
    C = np.logspace(14, 18, 20)
    losses = noisy(PowerLaw(0.1, 0.2, 0.25, unit=1e16).predict(C), 0.03)
    data = [point(loss, flops=c) for c, loss in zip(C, losses, strict=True)]
    near, far = (fit_compute(data, unit=unit, draws=60) for unit in (1e16, 1e-20))
    assert near.identified and far.coefficients["alpha"].identified
    assert not far.coefficients["A"].identified
    assert near.predict(1e15) == pytest.approx(float(far.predict(1e15)), rel=1e-4)


def test_a_short_range_does_not_identify_the_floor():
    fit = fit_latents(latents_points(noise=0.01, ns=range(9, 14)), draws=80)
    assert not fit.coefficients["E"].identified
    assert any(note.startswith("E is not identified: ") for note in fit.notes)


@pytest.mark.parametrize(
    ("fit", "data", "message"),
    [
        (fit_latents, latents_points()[:3], "found 3 points for 3 coefficients.*at least 4"),
        (fit_joint, joint_points()[:6], "found 6 points for 6 coefficients.*at least 7"),
        (fit_compute, [point(0.3, flops=c) for c in range(1, 9)], "of 8 points has 1 points"),
        (fit_latents, joint_points(), r"found k = \[16, 32, 64, 128, 256\], expected one k"),
    ],
)
def test_refusals(fit, data, message):
    with pytest.raises(ValueError, match=message):
        fit(data)


@pytest.mark.parametrize("loss", [0.0, -0.1, math.nan, math.inf])
def test_a_loss_without_logarithm_is_refused(loss):
    with pytest.raises(ValueError, match="loss is .*expected a finite number above 0"):
        point(loss)


def test_points_survive_the_disk(tmp_path):
    path = tmp_path / "points.json"
    for points in ([], joint_points(noise=0.01)[:3]):
        save_points(path, points)
        assert load_points(path) == points


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "found a dict, expected a list"),
        ('[{"k": 3}]', r"point 0 has \['k'\], expected exactly \['num_latents', 'k'"),
        ("[7]", "point 0 has 7"),
    ],
)
def test_a_broken_points_file_is_refused(tmp_path, text, message):
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_points(tmp_path / "points.json")


def test_flops_match_a_count_of_products():
    """torch's own counter on the dense encoder, and k rows of the sparse rest."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens, d_in, d_out, n, k = 3, 8, 10, 40, 4
    x, W_enc = torch.randn(tokens, d_in), torch.randn(n, d_in)
    rows = torch.randn(tokens, k, d_out, requires_grad=True)
    selected = torch.randn(tokens, k, d_in, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        _ = x @ W_enc.T
    dense = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        # The values again, from the selected rows alone: their backward is what TopK leaves.
        scores = torch.bmm(selected, x[:, :, None])
        torch.bmm(scores.transpose(1, 2), rows).sum().backward()
    sparse = counter.get_total_flops() - 2 * tokens * k * d_in  # less the second forward
    assert sae_flops(d_in, n, k, tokens, d_out) == dense + sparse
    assert sae_flops(d_in, n, k, tokens) == sae_flops(d_in, n, k, tokens, d_in)


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"scipy.*pip install 'saert\[train\]'"):
        fit_latents(latents_points())


def curves():
    """Three training runs that take turns on the frontier."""
    return [
        point(0.1 + 2 * n**-0.25 + 3 * (n / t) ** 0.8, n=n, flops=2 * n * t)
        for n in (512, 2048, 8192)
        for t in np.geomspace(4e3, 1e6, 8)
    ]


@pytest.mark.parametrize("kind", ["compute", "latents", "joint", "not identified"])
def test_plots_are_written(tmp_path, kind):
    pytest.importorskip("matplotlib")
    from saert.train import scaling_plots

    path = tmp_path / "blocks.2.png"
    if kind == "compute":
        fit = fit_compute(curves(), draws=20)
        written = scaling_plots.plot_compute(curves(), fit, path)
    elif kind == "joint":
        fit = fit_joint(joint_points(), draws=5)
        written = scaling_plots.plot_joint(joint_points(), fit, path)
    else:
        data = latents_points(0.01, ns=range(9, 14 if kind == "not identified" else 20))
        fit = fit_latents(data, draws=50)
        written = scaling_plots.plot_latents(data, fit, path)
    png, svg = written
    assert (png.name, svg.name) == ("blocks.2.png", "blocks.2.svg")
    header = png.read_bytes()[:24]
    assert header[1:4] == b"PNG" and int.from_bytes(header[16:20], "big") >= 1200
    assert ET.parse(svg).getroot().tag.endswith("svg")
    assert ("not identified" in svg.read_text()) == (not fit.identified)
    assert "matplotlib.pyplot" not in sys.modules


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    from saert.train import scaling_plots

    fit = fit_latents(latents_points(), draws=5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*pip install 'saert\[train\]'"):
        scaling_plots.plot_latents(latents_points(), fit, tmp_path / "x")
