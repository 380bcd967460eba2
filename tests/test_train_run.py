"""Runs: stopping and going on, checkpoints, units, export, and the folder a session makes."""

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from objective_cases import planted, trained
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from saert.activations import Gated, JumpReLU, TopK
from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.load import load
from saert.runtime import attach
from saert.sae import SAE
from saert.train import checkpoint, session
from saert.train import run as run_module
from saert.train.checkpoint import CheckpointError, checkpoints
from saert.train.config import ConfigError, from_table
from saert.train.evaluate import Metrics, evaluate
from saert.train.export import to_sae
from saert.train.initialise import geometric_median, new_dictionary, random_directions, start_from
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES as BY_NAME
from saert.train.objectives.base import Batch, Step
from saert.train.objectives.batch_topk import BatchTopKObjective
from saert.train.objectives.gated import GatedObjective
from saert.train.objectives.jumprelu import JumpReLUObjective
from saert.train.objectives.llama_scope import LlamaScopeObjective
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.objectives.topk import TopKObjective
from saert.train.record import alone_in, as_before, write
from saert.train.report import Report
from saert.train.run import Interrupted, Job, Plan, Run, TrainingError
from saert.train.stream import Served
from saert.train.training import OptimiserConfig, Training
from saert.train.units import KINDS, Units

READ, WRITE = Hookpoint.parse("resid_post.0"), Hookpoint.parse("mlp_out.1")
D, LATENTS = 16, 48


class Planted:
    """Batches that are a function of their number; `spoil` changes the batch of one."""

    def __init__(self, tokens=64, scale=1.0, spoil=None):
        self.tokens, self.scale, self.spoil, self.number = tokens, scale, spoil, 0

    def _serve(self, tokens, seed):
        x = self.scale * planted(tokens, seed)
        return {READ: x, WRITE: x.flip(-1) ** 2 + 0.1}

    def next(self):
        x = self._serve(self.tokens, self.number)
        if self.spoil == self.number:
            x[READ][3, 2] = torch.nan
        self.number += 1
        return Served(x)

    def sample(self, tokens):
        return self._serve(1024, 10**6)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


JOBS = [
    Job("a", READ, None, LATENTS, BatchTopKObjective(k=4), normalise="unit"),
    Job("b", READ, WRITE, LATENTS, TopKObjective(k=4), skip=True, seed=1),
    Job("c", READ, None, LATENTS, JumpReLUObjective()),
]
PLAN = Plan(12, OptimiserConfig(ema=0.9, dead_tokens=300), save_every=3)


def a_run(folder, plan=PLAN, jobs=JOBS, stream=None):
    return Run(jobs, stream or Planted(), plan, folder, Mesh())


def weights(run):
    return {name: t.clone() for name, t in run._tensors().items()}


def equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole():
    """The tensors of a run that never stopped."""
    run = a_run(None)
    run.train()
    return weights(run)


def names(folder):
    return [path.name for path in checkpoints(folder)]


# -- stopping and going on ----------------------------------------------------------------------


def test_a_run_that_stopped_anywhere_ends_as_one_that_never_did(tmp_path, whole):
    for until in (1, 5, 6, 11):
        a_run(tmp_path).train(until=until)
    run = a_run(tmp_path)
    assert run.step == 11
    run.train()
    equal(weights(run), whole)
    again = a_run(tmp_path)
    again.train()  # nothing left to do
    equal(weights(again), whole)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    a_run(tmp_path).train()
    assert names(tmp_path) == ["step-000000009", "step-000000012"]
    a_run(tmp_path / "more", replace(PLAN, keep=3)).train()
    assert names(tmp_path / "more") == [f"step-{step:09d}" for step in (6, 9, 12)]
    a_run(tmp_path / "none", replace(PLAN, keep=0)).train()
    assert names(tmp_path / "none") == ["step-000000012"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on(tmp_path, whole, number):
    before = signal.getsignal(number)
    run = a_run(tmp_path)

    def report(step, logs):
        if step == 5:
            assert signal.getsignal(number) is not before
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is before  # a second one does what it always did

    with pytest.raises(Interrupted, match="stopped after step 5, saved; run again to go on"):
        run.train(report)
    assert names(tmp_path)[-1] == "step-000000005"
    assert signal.getsignal(signal.SIGINT) is not None and signal.getsignal(number) is before
    run = a_run(tmp_path)
    assert run.step == 5
    run.train()
    equal(weights(run), whole)


def test_other_jobs_in_the_same_folder_are_refused(tmp_path):
    a_run(tmp_path).train(until=3)
    for changed in (replace(JOBS[0], name="d"), replace(JOBS[0], num_latents=32)):
        with pytest.raises(CheckpointError, match="step-000000003: .*another configuration"):
            a_run(tmp_path, jobs=[changed, *JOBS[1:]])


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_ignored(tmp_path, whole):
    a_run(tmp_path).train(until=6)
    (tmp_path / ".step-000000009.partial").mkdir()
    (tmp_path / ".step-000000009.partial" / "state.json").write_text("{}")
    (tmp_path / "step-000000012").mkdir()  # without a state
    run = a_run(tmp_path)
    assert run.step == 6
    run.train()
    equal(weights(run), whole)
    assert names(tmp_path)[-1] == "step-000000012"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(tmp_path, whole, file, how):
    a_run(tmp_path).train(until=6)
    path = checkpoints(tmp_path)[-1] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "gone" and file == "state.json":
        path.write_bytes(b"")  # without it there is no checkpoint
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"6: {file} is damaged. Remove it to go on from"):
        a_run(tmp_path)
    for part in checkpoints(tmp_path)[-1].iterdir():
        part.unlink()
    run = a_run(tmp_path)
    assert run.step == 3
    run.train()
    equal(weights(run), whole)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["state", "tensors", "folder"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, whole, monkeypatch, where):
    run = a_run(tmp_path)
    run.train(until=3)
    if where == "state":
        monkeypatch.setattr(checkpoint, "write_atomically", full_disk)
    elif where == "tensors":  # comes wrapped in torch's CheckpointException
        monkeypatch.setattr(FileSystemWriter, "write_data", full_disk)
    else:
        monkeypatch.setattr(Path, "mkdir", full_disk)
    message = "the disk is full: .* the last good checkpoint is step-000000003. Free space"
    with pytest.raises(CheckpointError, match=message):
        run.train()
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000000003"] and not list(tmp_path.glob(".*"))
    run = a_run(tmp_path)
    assert run.step == 3
    run.train()
    equal(weights(run), whole)


def test_another_failure_of_writing_is_passed_on(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "the cable is out")

    monkeypatch.setattr(FileSystemWriter, "write_data", broken)
    with pytest.raises(CheckpointError, match="not written .*cable is out.*; there is no earlier"):
        a_run(tmp_path).train()


def test_nan_in_the_activations_stops_the_run_and_the_last_checkpoint_is_good(tmp_path, whole):
    run = a_run(tmp_path, stream=Planted(spoil=7))
    message = r"step 7, .: .*nan.*the last good checkpoint is step-000000006. Lower the learning"
    with pytest.raises(TrainingError, match=f"(?i){message}"):
        run.train()
    run = a_run(tmp_path)
    run.train()
    equal(weights(run), whole)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.objective.name)
@pytest.mark.parametrize("tensor", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_nan_in_a_weight_stops_the_run(tmp_path, job, tensor):
    run = a_run(tmp_path, jobs=[job])
    run.train(until=3)
    weight = getattr(run.members[0].training.dictionary, tensor)
    with torch.no_grad():
        weight.view(-1)[::3] = torch.nan
    with pytest.raises(TrainingError, match=f"step 3, {job.name}: .*checkpoint is step-000000003"):
        run.train()
    assert a_run(tmp_path, jobs=[job]).step == 3


def test_divergence_stops_the_run_at_a_checkpoint_from_before(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "DIVERGED", 20)
    # the rate rises until it is far too large
    wild = OptimiserConfig(lr=0.5, warmup=1.0, decay=0.0)
    plan = Plan(2000, wild, save_every=2, keep=1)
    jobs = [Job("b", READ, None, LATENTS, TopKObjective(k=4))]
    seen = []
    with pytest.raises(TrainingError, match="above 1.5 for 20 steps .*diverges; the last good"):
        a_run(tmp_path, plan, jobs).train(lambda _, logs: seen.append(logs["b"]["fvu"]))
    run = a_run(tmp_path, plan, jobs)
    assert 0 < run.step <= len(seen) - 19
    assert seen[run.step - 1] <= 1.5 and all(fvu > 1.5 for fvu in seen[-19:])


def test_without_a_folder_nothing_is_written_and_errors_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        a_run(None, stream=Planted(spoil=4)).train()
    assert not list(tmp_path.iterdir())


# -- units and export ---------------------------------------------------------------------------


def samples(seed=0, scale=7.0):
    x = scale * planted(512, seed).double() + 0.5
    return x, 0.3 * x.flip(-1) ** 2 - x


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


# -- where a dictionary starts ------------------------------------------------------------------


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


# -- the log ------------------------------------------------------------------------------------

HELD_OUT = Metrics(*range(1, 11), tokens=7, density=(0,) * 12)


def a_report(folder, done=0):
    return Report(
        folder, {}, total=100, batch_tokens=4, done=done, progress=False, tensorboard=False
    )


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


LOGS = {"a": {"fvu": 0.5, "l0": 3.0, "dead": 0.0}}


def test_the_log_goes_on_where_the_checkpoint_is(tmp_path):
    def write(folder, steps, done=0, evaluations=()):
        with a_report(folder, done) as report:
            for step in steps:
                report.step(step, LOGS)
                if step in evaluations:
                    report.evaluation(step, "a", HELD_OUT)

    write(tmp_path / "whole", range(1, 41), evaluations=(20, 40))
    write(tmp_path / "cut", range(1, 36), evaluations=(20,))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 36, "to')
    # the checkpoint was at step 20: its evaluation is made again
    with a_report(tmp_path / "cut", 20) as report:
        report.evaluation(20, "a", HELD_OUT)
        for step in range(21, 41):
            report.step(step, LOGS)
        report.evaluation(40, "a", HELD_OUT)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "cut")] == [1, 10, 20, 20, 30, 40, 40]
    assert not list((tmp_path / "cut").glob("*.partial"))


# -- sessions -----------------------------------------------------------------------------------

STORY = "Once upon a time there was a little girl who had a big red dog and they went to the park"


def write_text(path, count=400, seed=0):
    draw = random.Random(seed)
    lines = [
        json.dumps({"text": " ".join(draw.choices(STORY.split(), k=40)) + "."})
        for _ in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def a_config(source, **changes):
    table = {
        "model": {"name": "bundled"},
        "data": {"source": [source], "context": 32, "holdout": 0.1},
        "sae": {"hookpoints": ["resid_post.1", "mlp_in.2->mlp_out.2"], "num_latents": 64},
        "objective": {"name": "batch_topk", "k": 4},
        "optimiser": {"ema": 0.9, "dead_tokens": 500},
        "stream": {
            "batch_tokens": 64, "buffer_tokens": 512, "lanes": 4, "forward_rows": 8, "max_norm": 5.0
        },
        "checkpoint": {"every": 4},
        "evaluation": {"every": 10, "rows": 4},
        "tokens": 64 * 25,
    }  # fmt: skip
    for key, value in changes.items():
        table[key] = table[key] | value if isinstance(value, dict) else value
    return from_table(table)


QUIET = dict(progress=False, tensorboard=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "stories.jsonl")


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """(folder, metrics) of a whole run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, session.train(a_config(text), folder, **QUIET)


def content(folder):
    """Every file, its bytes and when it was written."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def same_results(a, b):
    for name in ("resid_post.1", "mlp_in.2"):
        for file in ("sae_weights.safetensors", "cfg.json", "metrics.json", "README.md"):
            path = Path("saes") / name / file
            assert (a / path).read_bytes() == (b / path).read_bytes(), path
    assert logged(a) == logged(b)


def test_a_finished_folder_holds_what_it_should(finished):
    folder, found = finished
    assert found.keys() == {"resid_post.1", "mlp_in.2"}
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "run.json", "metrics.jsonl", "checkpoints", "saes"
    }  # fmt: skip
    assert names(folder / "checkpoints") == ["step-000000024", "step-000000025"]
    for name, metrics in found.items():
        at = folder / "saes" / name
        assert {p.name for p in at.iterdir()} == {
            "cfg.json", "sae_weights.safetensors", "metrics.json", "training.json", "README.md"
        }  # fmt: skip
        assert json.loads((at / "metrics.json").read_text()) == metrics
        assert (at / "training.json").read_text().strip() == (folder / "run.json").read_text()
        assert json.loads((at / "cfg.json").read_text())["metadata"]["metrics"] == metrics
    steps = [line["step"] for line in logged(folder)]
    assert steps == [1, 10, 10, 10, 20, 20, 20, 25, 25]


def test_the_record_says_what_decided_the_numbers_and_nothing_of_this_machine(finished, text):
    folder, _ = finished
    record = json.loads((folder / "run.json").read_text())
    assert from_table(record["config"]).objective == BatchTopKObjective(k=4)
    assert record["config"]["tokens"] == 64 * 25 and record["config"]["optimiser"]["ema"] == 0.9
    (file,) = record["data"]["files"]
    sha = subprocess.run(["sha256sum", text], capture_output=True, text=True).stdout.split()[0]
    assert file == {"name": "stories.jsonl", "bytes": Path(text).stat().st_size, "sha256": sha}
    assert record["versions"]["torch"] == torch.__version__
    assert record["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", record["git_commit"])
    assert record["model"]["name"] == bundled.BASE_MODEL
    for path in [folder / "run.json", *folder.glob("saes/*/*")]:
        if path.suffix in (".json", ".md"):
            said = path.read_text()
            for secret in (str(Path(text).parent), str(Path.cwd()), str(Path.home()), "/tmp/"):
                assert secret not in said, (path.name, secret)


def test_the_saved_saes_load_attach_and_measure_as_their_metrics_say(finished, text):
    folder, found = finished
    model, config = bundled.model(), a_config(text)
    held = session.Session(config)
    for name, metrics in found.items():
        sae = load(folder / "saes", name)
        assert sae.target_hookpoint == (None if name == "resid_post.1" else WRITE_2)
        measured = evaluate(model, sae, held.heldout, 8, held.special)
        assert measured.fvu == pytest.approx(metrics["fvu"], rel=1e-5)
        assert json.loads(json.dumps(asdict(measured))).keys() == metrics.keys()
        assert 0 < metrics["fvu"] < 1 and 0 < metrics["l0"] < 64
        with attach(model, sae) as attachment, torch.no_grad():
            model(held.heldout[:1])
            codes = attachment.codes[name]
        assert codes.num_latents == 64 and (codes.values > 0).any()


WRITE_2 = Hookpoint.parse("mlp_out.2")


def test_a_finished_run_is_left_alone(finished, text):
    folder, found = finished
    before, said = content(folder), []
    assert session.train(a_config(text), folder, **QUIET, say=said.append) == found
    assert content(folder) == before
    assert said == [f"{folder} is finished; nothing to do"]


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"optimiser": {"ema": 0.5}}, r"config.optimiser.ema = 0.9, this one has 0.5"),
        ({"tokens": 64 * 26}, "config.tokens = 1600, this one has 1664"),
        ({"objective": {"k": 5}}, "config.objective.k = 4, this one has 5"),
        ({"sae": {"hookpoints": ["resid_post.1"]}}, "config.sae.hookpoints = "),
        ({"data": {"context": 16}}, "config.data.context = 32"),
    ],
)
def test_another_configuration_in_the_folder_is_refused_by_its_key(finished, text, changes, key):
    folder, _ = finished
    before = content(folder)
    with pytest.raises(ConfigError, match=key):
        session.train(a_config(text, **changes), folder, **QUIET)
    assert content(folder) == before


def test_other_text_under_the_same_name_is_refused(finished, tmp_path):
    folder, _ = finished
    other = write_text(tmp_path / "stories.jsonl", seed=1)
    with pytest.raises(ConfigError, match=r"holds a run with data.files = .*sha256"):
        session.train(a_config(other), folder, **QUIET)


def test_what_decides_no_number_may_change(finished, text):
    folder, found = finished
    changed = a_config(text, checkpoint={"every": 7, "keep": 1})
    assert session.train(changed, folder, **QUIET, say=lambda _: None) == found


def test_a_run_without_held_out_text_says_that_nothing_was_measured(text, tmp_path):
    config = a_config(text, data={"holdout": 0.0}, tokens=64 * 12)
    found = session.train(config, tmp_path, **QUIET)
    assert found == {"resid_post.1": None, "mlp_in.2": None}
    at = tmp_path / "saes" / "resid_post.1"
    assert json.loads((at / "metrics.json").read_text()) is None
    assert "Nothing: the run held out no text" in (at / "README.md").read_text()
    assert load(at).num_latents == 64
    assert session.train(config, tmp_path, **QUIET, say=lambda _: None) == found


def test_too_little_held_out_text_is_an_error_before_training(tmp_path):
    source = write_text(tmp_path / "few.jsonl", 20)
    with pytest.raises(ValueError, match="held-out side does not fill one row"):
        session.train(a_config(source, data={"holdout": 0.001}), tmp_path / "out", **QUIET)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_run_from_a_saved_sae_says_nothing_of_its_folder(finished, text, tmp_path):
    folder, _ = finished
    start = folder / "saes" / "resid_post.1"
    sae = {"hookpoints": ["resid_post.1"], "init": str(start)}
    config = a_config(text, sae=sae, tokens=64, objective={"name": "topk"})
    session.train(config, tmp_path, **QUIET)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["sae"]["init"] == "resid_post.1"
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".md") and "checkpoints" not in path.parts:
            assert str(folder) not in path.read_text(), path.name


def test_two_dictionaries_of_one_name_are_refused(text, tmp_path):
    config = a_config(text, sae={"hookpoints": ["mlp_in.2", "mlp_in.2->mlp_out.2"]})
    with pytest.raises(ConfigError, match="two dictionaries that read mlp_in.2"):
        session.train(config, tmp_path, **QUIET)


def test_a_cache_changes_nothing_and_a_finished_one_serves_other_objectives(
    finished, text, tmp_path
):
    folder, _ = finished
    cache = tmp_path / "cache"
    for out in ("first", "second"):
        session.train(a_config(text), tmp_path / out, cache=cache, **QUIET)
        same_results(tmp_path / out, folder)
    one = session.Session(a_config(text, objective={"name": "topk"}), cache=cache)
    stream = one.stream(one.jobs())
    stream.model = lambda: pytest.fail("the model was called")
    stream.next()
    # with fewer hookpoints other tokens are outliers, so other ones would be served
    fewer = a_config(text, sae={"hookpoints": ["resid_post.1"]})
    other = session.Session(fewer, cache=cache)
    with pytest.raises(ValueError, match="made with max_norm_over"):
        other.stream(other.jobs())


def test_the_dictionaries_live_where_the_configuration_says_also_when_read_from_a_cache(text):
    plan = session.Session(a_config(text), device="meta").plan()
    assert plan.device == "meta"
    run = a_run(None, replace(PLAN, device="cpu"), JOBS[:1])
    assert run.members[0].training.dictionary.W_enc.device.type == "cpu"


def test_the_objective_that_runs_the_model_trains_and_refuses_a_cache(text, tmp_path):
    changes = dict(objective={"name": "end_to_end"}, sae={"hookpoints": ["resid_post.1"]})
    config = a_config(text, **changes, stream={"batch_tokens": 128}, tokens=128 * 6)
    found = session.train(config, tmp_path / "a", **QUIET)
    assert found["resid_post.1"]["fvu"] > 0
    kl = [line["resid_post.1/kl"] for line in logged(tmp_path / "a") if "resid_post.1/kl" in line]
    assert 0 < kl[0] < 20  # nats a token
    with pytest.raises(ConfigError, match="goes with no cache"):
        session.train(config, tmp_path / "b", cache=tmp_path / "c", **QUIET)


@pytest.mark.parametrize("step", [3, 10, 20])
def test_a_session_that_was_interrupted_ends_as_one_that_was_not(
    finished, text, tmp_path, monkeypatch, step
):
    folder, _ = finished
    log = Report.step

    def interrupt(self, number, logs):
        log(self, number, logs)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "step", interrupt)
    with pytest.raises(Interrupted):
        session.train(a_config(text), tmp_path, **QUIET)
    monkeypatch.undo()
    said = []
    session.train(a_config(text), tmp_path, **QUIET, say=said.append)
    assert said == [f"going on from step {step} of 25"]
    same_results(tmp_path, folder)


@pytest.mark.parametrize("after", range(5))
def test_a_run_that_was_cut_while_it_published_publishes_all(
    finished, text, tmp_path, monkeypatch, after
):
    """Evaluations are not logged twice, and what is calibrated is the same."""
    folder, _ = finished
    count = iter(range(100))
    write = session.write_atomically

    def cut(path, content):
        if next(count) > after:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(session, "write_atomically", cut)
    with pytest.raises(KeyboardInterrupt):
        session.train(a_config(text), tmp_path, **QUIET)
    monkeypatch.undo()
    session.train(a_config(text), tmp_path, **QUIET, say=lambda _: None)
    same_results(tmp_path, folder)


SCRIPT = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from test_train_run import QUIET, a_config
    from saert.train import session
    from saert.train.run import Interrupted

    text, out = sys.argv[1], Path(sys.argv[2])

    def start(folder, **options):
        child = os.fork()
        if child:
            return child
        try:
            session.train(a_config(text), folder, **QUIET, **options)
            os._exit(0)
        except Interrupted:
            os._exit(3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)

    def wait(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    begin = time.monotonic()
    assert wait(start(out / "whole")) == 0
    length = time.monotonic() - begin

    draw, codes, number = random.Random(int(sys.argv[3])), [], 0
    while 0 not in codes:
        child = start(out / "killed", cache=out / "cache")
        if number < 7:
            time.sleep(draw.uniform(0.15, 0.75) * length)
            os.kill(child, signal.SIGKILL)
        codes.append(wait(child))
        number += 1
    found = {"codes": codes, "length": length}
    (out / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_never_was(text, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    seed = random.SystemRandom().randrange(10**6)
    done = subprocess.run(
        [sys.executable, str(script), text, str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, (seed, done.stderr[-3000:])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["codes"]) <= {0, -9} and -9 in found["codes"], found
    same_results(tmp_path / "killed", tmp_path / "whole")


# -- what a review found --------------------------------------------------------------------------


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


def test_llama_scope_can_be_evaluated_before_the_end(tmp_path):
    run = a_run(None, jobs=[replace(JOBS[0], objective=LlamaScopeObjective(k=4))])
    run.train(until=3)
    (sae,) = run.saes().values()
    assert isinstance(sae.activation, JumpReLU)


def test_tf32_is_for_the_step_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Training, "step", lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32) or {}
    )
    run = a_run(None, replace(PLAN, tf32=True))
    run._advance()
    assert set(seen) == {True} and not torch.backends.cuda.matmul.allow_tf32


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    other = "another process is training in"
    with alone_in(tmp_path), pytest.raises(ConfigError, match=other), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_run_goes_on_with_the_revisions_it_began_with(tmp_path):
    config = from_table(
        {
            "model": {"name": "org/model"},
            "data": {"source": ["org/data"]},
            "sae": {"hookpoints": ["resid_post.1"]},
        }
    )
    assert as_before(tmp_path, config) == config
    facts = {"dataset": "org/data", "revision": "abc"}
    write(tmp_path, {"config": {}, "data": facts, "model": {"name": "org/model", "commit": "def"}})
    pinned = as_before(tmp_path, config)
    assert pinned.data.revision == "abc" and pinned.model.revision == "def"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "cuda"}, "no CUDA"),
        ({"context": 2048}, r"data\.context is 2048, but the model was made for at most 256"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(options, message, tmp_path):
    (tmp_path / "a.txt").write_text("one two three\n" * 5000)
    table = {
        "model": {"name": "bundled"},
        "data": {"source": [str(tmp_path / "a.txt")], "context": options.pop("context", 32)},
        "sae": {"hookpoints": ["resid_post.1"], "num_latents": 32},
    }
    if torch.cuda.is_available() and "device" in options:
        pytest.skip("there is CUDA here")
    with pytest.raises(ConfigError, match=message):
        session.train(from_table(table), tmp_path / "run", **options)
