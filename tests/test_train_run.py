"""Runs: stopping and going on, checkpoints, and what goes wrong."""

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_cases import JOBS, LATENTS, PLAN, READ, Planted, a_run, names
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from saert.activations import JumpReLU
from saert.train import checkpoint
from saert.train import run as run_module
from saert.train.checkpoint import CheckpointError, checkpoints
from saert.train.objectives.llama_scope import LlamaScopeObjective
from saert.train.objectives.topk import TopKObjective
from saert.train.run import Interrupted, Job, Plan, TrainingError
from saert.train.training import OptimiserConfig, Training


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


# -- stopping and going on -------------------------------------------------------------------------


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


# -- what goes wrong -------------------------------------------------------------------------------


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


# -- one step --------------------------------------------------------------------------------------


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
