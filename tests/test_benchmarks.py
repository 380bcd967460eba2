"""The kernels' benchmark runs end to end, keeps its promises, and hides no red check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = ["encode_topk", "encode_threshold", "sparse_decode", "inference"]
OPS += ["row_gradient", "gather_dot", "training", "refine"]


def bench(folder, *options):
    """The finished process and the record that it saved."""
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--rounds", "2", "--save"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--results", str(folder), *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert len(records) == 1, done.stderr
    return done, records[0]


@pytest.mark.slow
def test_a_quick_run_times_every_op_and_saves_what_it_promises(tmp_path):
    done, record = bench(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(record) == {
        "date", "device", "command", "versions", "rounds", "load", "notes", "rows",
    }  # fmt: skip
    assert "torch" in record["versions"] and "--quick" in record["command"]
    rows = record["rows"]
    assert list(dict.fromkeys(row["op"] for row in rows)) == OPS
    for row in rows:
        assert row["op"] in done.stdout and row["contender"] in done.stdout
        assert set(row["shape"]) == {"d", "n", "k", "tokens", "dtype"}
        if row["status"]:  # named with its reason, never left out
            assert row["status"].startswith("not run: ") and row["seconds"] == []
            continue
        assert len(row["seconds"]) == record["rounds"] == 2
        assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
        assert 0 < row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] >= 0
        if row["role"] == "saert":
            assert row["check"] == "green"
    skipped = [row["status"] for row in rows if row["contender"].endswith("compiled")]
    assert skipped and all("torch.compile" in status for status in skipped)


@pytest.mark.slow
def test_a_red_check_withholds_the_speed_up(tmp_path):
    spoilt = ["encode_topk", "row_gradient", "training", "refine"]
    options = [word for op in spoilt for word in ("--op", op, "--spoil", op)]
    done, record = bench(tmp_path, *options, "--op", "gather_dot", "--tokens", "8")
    assert done.returncode == 1
    assert "CHECK RED" in done.stdout
    for op in spoilt:
        ours, *others = (row for row in record["rows"] if row["op"] == op)
        assert ours["check"] == "red" and ours["status"].startswith("CHECK RED: ")
        assert ours["seconds"] == [] and ours["ratio"] is None
        assert any(row["seconds"] for row in others)
        assert all(row["ratio"] is None for row in others)
    honest = [row for row in record["rows"] if row["op"] == "gather_dot"]
    assert honest[0]["check"] == "green" and all(row["ratio"] for row in honest)
