"""The training benchmarks run end to end at tiny sizes and say what they measured."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = ("the", "a", "big", "small", "red", "cat", "dog", "girl", "tree", "ran", "saw", "and")


@pytest.fixture
def text(tmp_path):
    """Lines enough for a few hundred rows of tokens."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=60)) for _ in range(600)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def bench(script, folder, *options):
    """What was printed, and the record that was saved."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options, "--save", "--results", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.json")
    record = json.loads(path.read_text())
    assert {"date", "device", "command", "versions", "load", "rows"} <= set(record)
    assert script in record["command"]
    return done.stdout, record


@pytest.mark.slow
def test_quality_is_measured_as_it_is_trained_and_as_it_is_tuned(tmp_path, text):
    results = tmp_path / "results"
    results.mkdir()
    printed, record = bench(
        "train_quality.py", results, "--model", "bundled", "--text", str(text), "--only", "saert",
        "--tokens", "1024", "--batch", "256", "--expansion", "1", "--k", "8", "--heldout", "256",
        "--seeds", "2",
    )  # fmt: skip
    default, tuned = record["rows"]
    assert [default["variant"], tuned["variant"]] == ["default", "tuned"]
    for row in record["rows"]:
        assert len(row["fvu"]) == 2 and all(0 < fvu < 2 for fvu in row["fvu"])
        assert all(0 < l0 <= 8 for l0 in row["l0"]) and row["ratio"] == 1
    best = min(tuned["validation"], key=tuned["validation"].get)
    assert float(best) == tuned["rate"]
    assert "tuned" in printed and "lr by default_rate" in printed


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dead", "0.5")])
def test_a_step_is_timed_whole_and_in_parts(tmp_path, options):
    printed, record = bench(
        "train_step.py", tmp_path, "--d", "32", "--latents", "256", "--k", "4", "--tokens", "64",
        "--rounds", "2", "--no-peer", *options,
    )  # fmt: skip
    times = {row["what"]: row["median"] for row in record["rows"]}
    whole, saert = times.pop("the whole step"), times.pop("saert")
    assert whole > 0 and saert > 0 and whole >= max(times.values())
    assert {"encode", "decode", "backward", "Adam", "the rest"} <= set(times)
    assert "the parts of saert's step" in printed


@pytest.mark.slow
def test_end_to_end_training_is_timed_beside_the_model(tmp_path, text):
    results = tmp_path / "results"
    results.mkdir()
    printed, record = bench(
        "train_step.py", results, "--end-to-end", "--text", str(text), "--latents", "128",
        "--k", "4", "--buffer", "4096", "--rounds", "2",
    )  # fmt: skip
    train, forward = record["rows"]
    assert train["what"].startswith("saert, training: ") and train["median"] > 0
    assert forward["what"].startswith("the model alone: ") and forward["median"] > 0
    assert "tokens/s" in printed


@pytest.mark.slow
def test_half_precision_runs_where_there_are_instructions_and_is_refused_visibly_elsewhere(
    tmp_path,
):
    import torch

    printed, record = bench(
        "train_step.py", tmp_path, "--d", "32", "--latents", "256", "--k", "4", "--tokens", "64",
        "--rounds", "2", "--no-peer", "--half",
    )  # fmt: skip
    row = record["rows"][0]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert row["median"] > 0
    else:
        assert row["status"] == "not run: this CPU has no bfloat16 instructions"
        assert row["status"] in printed
