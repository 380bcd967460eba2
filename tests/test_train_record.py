"""What a run keeps beside its tensors, the log, the lock and the revisions; what it refuses."""

import pytest
import torch
from run_cases import logged

from saert.measure.reports.evaluate import Metrics
from saert.train import session
from saert.train.config import ConfigError, from_table
from saert.train.record import alone_in, as_before, write
from saert.train.report import Report

HELD_OUT = Metrics(*range(1, 11), tokens=7, density=(0,) * 12)


LOGS = {"a": {"fvu": 0.5, "l0": 3.0, "dead": 0.0}}


def a_report(folder, done=0):
    return Report(
        folder, {}, total=100, batch_tokens=4, done=done, progress=False, tensorboard=False
    )


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
