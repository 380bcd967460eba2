"""Sessions: the folder that a run makes, and going on in it."""

import json
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
from run_cases import JOBS, PLAN, QUIET, a_config, a_run, logged, names, write_text

from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.load import load
from saert.measure.reports.evaluate import evaluate
from saert.runtime import attach
from saert.train import session
from saert.train.config import ConfigError, from_table
from saert.train.objectives.batch_topk import BatchTopKObjective
from saert.train.report import Report
from saert.train.run import Interrupted

WRITE_2 = Hookpoint.parse("mlp_out.2")


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


# -- the folder ------------------------------------------------------------------------------------


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


# -- going on --------------------------------------------------------------------------------------


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
    from run_cases import QUIET, a_config
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
