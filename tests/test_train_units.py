"""Units and export: the SAEs that leave a run, and those that it starts from."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from objective_cases import planted, trained
from run_cases import JOBS, LATENTS, PLAN, READ, WRITE, D, Planted, a_run, samples

from saert.activations import Gated, TopK
from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train import run as run_module
from saert.train.export import to_sae
from saert.train.initialise import new_dictionary, random_directions, start_from
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES as BY_NAME
from saert.train.objectives.base import Batch
from saert.train.objectives.batch_topk import BatchTopKObjective
from saert.train.objectives.gated import GatedObjective
from saert.train.objectives.jumprelu import JumpReLUObjective
from saert.train.objectives.llama_scope import LlamaScopeObjective
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.objectives.topk import TopKObjective
from saert.train.run import Job
from saert.train.training import OptimiserConfig, Training
from saert.train.units import KINDS, Units


def random_training(units, objective, transcodes, skip, seed=0):
    """A training whose every number is its own, and of the size that training gives it."""
    x, y = samples()
    x, y = units.enter(x, y if transcodes else None)
    d = new_dictionary(
        x, y, LATENTS, objective, Mesh(), seed=seed, transcodes=transcodes, skip=skip
    )
    objective.prepare(d, run_module.Batch.of(x, y, Mesh()))
    spread = x.std().item()
    with torch.no_grad():
        for name, p in d.named_parameters():
            p.add_(torch.randn_like(p) * (0.1 * spread if name.startswith("b_") else 0.05))
            if name == "extra.log_threshold":
                p.copy_(torch.linspace(0.05, 0.6, LATENTS).mul(spread).log())
            if name == "extra.b_mag":
                p.copy_(0.3 * spread * torch.randn_like(p))
        for name, t in d.state.items():
            if "threshold" in name:
                d.state[name] = torch.full_like(t, 0.5 * spread)
        if objective.unit_decoder:
            d.W_dec.div_(d.W_dec.norm(dim=-1, keepdim=True))
    return Training(d, objective, OptimiserConfig(), 10)


def activations(training, x):
    """Dense, straight from the formula of the objective, in the units of training."""
    d, objective = training.dictionary, training.objective
    pre = (x - d.b_dec if d.subtract_b_dec else x) @ d.W_enc.T
    a = pre + d.b_enc
    if isinstance(objective, GatedObjective):
        return (a > 0) * (d.extra["r_mag"].exp() * pre + d.extra["b_mag"]).relu()
    if isinstance(objective, JumpReLUObjective):
        return a * (a > d.extra["log_threshold"].exp())
    if isinstance(objective, BatchTopKObjective):
        return a * (a > d.state["threshold"])
    if isinstance(objective, LlamaScopeObjective):
        return a * (a * d.W_dec.norm(dim=-1) > d.state["threshold"])
    if isinstance(objective, TopKObjective):
        kept = a.topk(objective.k)
        return torch.zeros_like(a).scatter(1, kept.indices, kept.values.relu())
    return a.relu()


OBJECTIVES = [
    TopKObjective(k=5),
    BatchTopKObjective(k=5),
    JumpReLUObjective(),
    GatedObjective(),
    ReLUL1Objective(),
    LlamaScopeObjective(k=5),
]


SHAPES = {"autoencoder": (False, False), "transcoder": (True, False), "skip": (True, True)}


CASES = [
    (kind, shape) for kind in KINDS for shape in SHAPES if (kind, shape[:4]) != ("layer_norm",)
]
CASES = [(k, s) for k, s in CASES if k != "layer_norm" or s == "autoencoder"]


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("kind, shape", CASES)
def test_the_exported_sae_reads_and_writes_the_models_units(objective, kind, shape):
    transcodes, skip = SHAPES[shape]
    raw, target = samples()
    units = Units.of(kind, raw, target, transcodes)
    training = random_training(units, objective, transcodes, skip)
    d = training.dictionary
    with torch.no_grad():
        x, _ = units.enter(raw, target)
        if objective.name == "llama_scope":
            scores = (x @ d.W_enc.T + d.b_enc) * d.W_dec.norm(dim=-1)
            d.state["threshold"] = scores.quantile(0.803)  # between two of them
        f = activations(training, x)
        assert 0.01 < (f > 0).double().mean() < 0.9
        estimate = f @ d.W_dec + d.b_dec
        if skip:
            assert d.W_skip.abs().max() > 0
            estimate = estimate + x @ d.W_skip.T
        sae = to_sae(training, units, READ, WRITE if transcodes else None)
        code = sae.encode(raw)
        assert torch.equal(code.to_dense() > 0, f > 0)
        torch.testing.assert_close(sae.decode(code, raw), units.leave(estimate, raw))
        norms = sae.W_dec.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sae.target_hookpoint == (WRITE if transcodes else None)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_average_of_the_weights_is_exported_without_its_bias(ema):
    run = a_run(None, replace(PLAN, optimiser=OptimiserConfig(ema=ema)), JOBS[1:2])
    member = run.members[0]
    history = []

    def keep(step, logs):
        tensors = member.training.dictionary.named_parameters()
        history.append({n: p.detach().clone() for n, p in tensors})

    run.train(keep)
    factors = [(1 - ema) * ema ** (len(history) - 1 - i) for i in range(len(history))]
    average = {
        n: sum(f * h[n] for f, h in zip(factors, history, strict=True)) / sum(factors)
        for n in history[0]
    }
    for _ in range(2):  # before and after what comes at the end
        sae = member.sae()
        for name in ("W_enc", "b_enc", "b_dec", "W_skip"):
            torch.testing.assert_close(getattr(sae, name).data, average[name])
        direction = average["W_dec"] / average["W_dec"].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(sae.W_dec.data, direction)
        run.calibrate()


# -- units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_units_do_what_they_say(kind):
    x, y = samples()
    units = Units.of(kind, x, y, transcodes=False)
    inside, target = units.enter(x)
    assert target is inside
    if kind == "unit":
        assert inside.square().sum(-1).mean().item() == pytest.approx(1)
    if kind == "sqrt_d":
        assert inside.norm(dim=-1).mean().item() == pytest.approx(math.sqrt(D))
    if kind == "layer_norm":
        size = inside[x.std(-1) > 0.1].norm(dim=-1)  # a constant token has none
        torch.testing.assert_close(size, torch.full_like(size, math.sqrt(D - 1)), rtol=1e-4, atol=0)
    if kind == "none":
        assert torch.equal(inside, x)
    torch.testing.assert_close(units.leave(inside, x), x, rtol=1e-4, atol=1e-4)
    restored = Units(**json.loads(json.dumps(asdict(units))))
    assert restored == units


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "layer_norm"])
def test_a_transcoders_target_has_a_factor_of_its_own(kind):
    x, y = samples()
    units = Units.of(kind, x, 50 * y, transcodes=True)
    inside, target = units.enter(x, 50 * y)
    torch.testing.assert_close(
        target, Units.of(kind, y, y, False).enter(y)[0] * (1, 50)[kind == "none"]
    )
    torch.testing.assert_close(units.leave(target, x), 50 * y)
    assert kind == "none" or units.factor_x != units.factor_y


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_enters_as_the_derivative_by_what_was_entered(kind):
    x, _ = samples()
    units = Units.of(kind, x, x, False)
    inside = units.enter(x)[0].requires_grad_()
    left = units.leave(inside, x)
    g = torch.randn_like(x)
    (expected,) = torch.autograd.grad((left * g).sum(), inside)
    torch.testing.assert_close(units.enter_gradient(g, x), expected)


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, 0.3), (0.3, 5.0)])
def test_unfold_is_the_inverse_of_fold(factors):
    units = Units("unit", *factors, transcodes=factors[0] != factors[1])
    weights = {n: torch.randn(3, 3) for n in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")}
    for back in (units.unfold(units.fold(weights)), units.fold(units.unfold(weights))):
        assert back.keys() == weights.keys()
        for name, t in weights.items():
            torch.testing.assert_close(back[name], t)


def test_units_without_sense_are_refused():
    x, y = samples()
    with pytest.raises(ValueError, match="'inches', expected auto or one of none, layer_norm"):
        Units.of("inches", x, y, False)
    with pytest.raises(ValueError, match="layer_norm is undone token by token"):
        Units.of("layer_norm", x, y, True)
    with pytest.raises(ValueError, match="size is nan"):
        Units.of("unit", x * torch.nan, y, False)


# -- starting from an SAE --------------------------------------------------------------------------


@pytest.mark.parametrize("kind, shape", CASES)
def test_a_run_that_starts_from_an_sae_begins_with_its_output(kind, shape):
    transcodes, skip = SHAPES[shape]
    objective = TopKObjective(k=5)
    raw, target = samples()
    first = Units.of(kind, raw, target, transcodes)
    saved = to_sae(
        random_training(first, objective, transcodes, skip),
        first,
        READ,
        WRITE if transcodes else None,
    )
    job = Job(
        "j", READ, WRITE if transcodes else None, LATENTS, objective,
        skip=skip, normalise=kind, start=saved,
    )  # fmt: skip
    run = a_run(None, replace(PLAN, dtype=torch.float64), [job], Planted(scale=3.0))
    units = run.members[0].units
    assert kind in ("none", "layer_norm") or units.factor_x != first.factor_x
    sae = run.members[0].sae()
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(raw).to_dense(), saved.encode(raw).to_dense())
        torch.testing.assert_close(
            sae.decode(sae.encode(raw), raw), saved.decode(saved.encode(raw), raw)
        )


def test_starting_from_an_sae_without_biases_starts_without_them():
    W = random_directions(slice(0, LATENTS), D, 3, "cpu")
    start = SAE.from_weights(W, W.clone(), activation=TopK(4), hookpoint=READ)
    run = a_run(None, jobs=[Job("j", READ, None, LATENTS, TopKObjective(k=4), start=start)])
    x = planted(50)
    sae = run.members[0].sae()
    with torch.no_grad():
        torch.testing.assert_close(
            sae.decode(sae.encode(x), x), start.decode(start.encode(x), x), atol=1e-6, rtol=1e-5
        )


def test_starting_from_an_sae_that_does_not_fit_is_refused():
    W = random_directions(slice(0, 32), D, 3, "cpu")
    start = SAE.from_weights(W, W.clone(), activation=TopK(4), hookpoint=READ)
    job = Job("j", READ, None, LATENTS, TopKObjective(k=4), start=start)
    with pytest.raises(ValueError, match=r"= \[32, 16, 16\], this run \[48, 16, 16\]"):
        a_run(None, jobs=[job])
    with pytest.raises(ValueError, match="trains with LayerNorm"):
        a_run(None, jobs=[replace(job, num_latents=32, normalise="layer_norm")])


@pytest.mark.parametrize("name", ["gated", "jumprelu", "topk"])
def test_going_on_from_an_sae_keeps_its_thresholds_and_biases(name):
    options = {"topk": {"k": 4}}.get(name, {"target_l0": 4.0})
    objective = BY_NAME[name](**options)
    training, _ = trained(objective, steps=150)
    x = planted(512, seed=5)
    units = Units.of("unit", x, x, False)
    sae = to_sae(training, units, Hookpoint.parse("resid_post.0"), None)
    inside, _ = units.enter(x)
    d = new_dictionary(inside, inside, 48, objective, Mesh())
    start_from(d, sae, units)
    objective.prepare(d, Batch.of(inside, inside, Mesh()))
    objective.adopt(d, units.unfold_activation(sae.activation))
    again = Training(d, objective, OptimiserConfig(), 10)
    same = to_sae(again, units, Hookpoint.parse("resid_post.0"), None)
    torch.testing.assert_close(
        same.encode(x).to_dense(), sae.encode(x).to_dense(), atol=1e-4, rtol=1e-3
    )
    with pytest.raises(ValueError, match="a gated SAE can start gated training only"):
        zeros = torch.zeros(48)
        BY_NAME["topk"]().adopt(d, Gated(zeros, zeros, zeros))
