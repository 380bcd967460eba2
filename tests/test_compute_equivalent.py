"""Losses as compute: the law, its inverse, and fits to losses that follow one."""

import math

import numpy as np
import pytest

from saert.measure.reports.compute import LossLaw, compute_equivalent, fit_losses

LAW = LossLaw(a=1.7, b=1.2, c=0.05, low=1e-4, high=1.0)


def test_a_model_of_a_tenth_of_the_compute_is_found():
    assert compute_equivalent(1.7 + 1.2 * 0.1**-0.05, LAW) == pytest.approx(0.1, rel=1e-9)
    flops = LossLaw(a=1.7, b=1.2 * 2e25**0.05, c=0.05)
    spliced = flops.loss(3e24)
    assert compute_equivalent(spliced, flops, whole=2e25) == pytest.approx(0.15, rel=1e-9)
    own = flops.loss(1.5e25)
    assert compute_equivalent(spliced, flops, model_loss=own) == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("a, b, c", [(1.7, 1.2, 0.05), (0.0, 3.0, 0.1), (2.0, 0.5, 0.4)])
def test_fits_find_the_law_that_made_the_losses(a, b, c):
    compute = np.logspace(17, 22, 8)
    losses = a + b * (compute / 1e20) ** -c
    law = fit_losses(list(compute), list(losses))
    assert (law.low, law.high) == (compute[0], compute[-1]) and law.rms < 1e-7
    assert law.a == pytest.approx(a, abs=1e-5)
    assert law.c == pytest.approx(c, rel=1e-5)
    assert law.b == pytest.approx(b * 1e20**c, rel=1e-3)
    at = float(np.sqrt(compute[2] * compute[3]))
    found = compute_equivalent(law.loss(at), law, whole=float(compute[-1]))
    assert found == pytest.approx(at / compute[-1], rel=1e-6)


def test_a_noisy_fit_is_the_one_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(3)
    compute = np.logspace(0, 4, 30)
    losses = 2 + 1.5 * compute**-0.3 + draw.normal(0, 0.01, 30)
    law = fit_losses(list(compute), list(losses))
    (a, b, c), _ = optimize.curve_fit(lambda x, a, b, c: a + b * x**-c, compute, losses, [1, 1, 1])
    assert (law.a, law.b, law.c) == pytest.approx((a, b, c), rel=1e-4)
    assert law.rms == pytest.approx(np.sqrt(np.mean((a + b * compute**-c - losses) ** 2)), rel=1e-6)


@pytest.mark.parametrize(
    "loss, message",
    [
        (1.6, "not above 1.7, the law's irreducible loss"),
        (math.nan, "not above 1.7"),
        (2.5, "outside what the law was measured on.*measure larger models"),
        (9.0, "measure smaller models"),
    ],
)
def test_losses_outside_the_law_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        compute_equivalent(loss, LAW)


def test_the_ends_of_the_range_are_inside_it():
    for end in (LAW.low, LAW.high):
        assert compute_equivalent(LAW.loss(end), LAW) == pytest.approx(end, rel=1e-9)


@pytest.mark.parametrize("change", [{"b": 0.0}, {"c": -0.1}, {"a": math.nan}, {"low": 2.0}])
def test_laws_that_are_none(change):
    with pytest.raises(ValueError, match="LossLaw"):
        LossLaw(**({"a": 1.7, "b": 1.2, "c": 0.05, "high": 1.0} | change))


@pytest.mark.parametrize(
    "compute, losses, message",
    [
        ([1, 2, 3], [3, 2, 1], "four or more different computes"),
        ([1, 1, 2, 3], [3, 3, 2, 1], "four or more"),
        ([1, 2, 3, 4], [3, 2, 1], "pairs"),
        ([1, 2, 3, 4], [3, 2, math.nan, 1], "finite and above 0"),
        ([1, 10, 100, 1000], [1, 2, 3, 4], "must fall with compute"),
        ([1, 10, 100, 1000], [4, 4, 4, 4], "must fall with compute"),
    ],
)
def test_losses_that_follow_no_law(compute, losses, message):
    with pytest.raises(ValueError, match=message):
        fit_losses(compute, losses)


def test_the_models_own_compute_has_to_be_one():
    with pytest.raises(ValueError, match="whole is 0"):
        compute_equivalent(LAW.loss(0.5), LAW, whole=0)
