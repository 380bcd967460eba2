"""Tensor parallelism: two gloo processes, one model, the same edits and the same numbers."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from parallel_cases import ALL, CASES, FEW, TOYS, Toy, even

from saert import HookpointError

SCRIPT = Path(__file__).parent / "parallel_run.py"
EARLY = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17)
OTHERS = ("qwen3", "gemma2", "mixtral", "olmo2", "phi3")
if EARLY:  # transformers 5.0 cannot share experts without a GPU
    OTHERS = tuple(name for name in OTHERS if name != "mixtral")


def in_two_processes(folder, architectures, cases=()):
    """What each of two processes finds: {architecture: {case: tensors}}."""
    for name in architectures:
        even(name).save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), str(folder), *architectures, "--", *cases]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(2)]


def check(found, expected):
    """The tensors of one process, or the error it ended with, against those of the whole model."""
    assert not isinstance(found, str), found
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
        else:
            assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("parallel"), ["llama"])


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_parallel_model_is_edited_like_a_whole_one(llama, name):
    expected = CASES[name](even("llama"))
    for rank in llama:
        if name == "down_proj" and EARLY:  # a hook of its own, behind ours, adds up and adds a bias
            assert "each process holds a summand" in rank["llama"][name]
        else:
            check(rank["llama"][name], expected)


@pytest.mark.parametrize("name", TOYS)
def test_dtensors_are_edited_like_whole_tensors(llama, name):
    expected = TOYS[name](Toy())
    for rank in llama:
        check(rank["toys"][name], expected)


REFUSED = {
    "inside": r"act_fn: tensor parallelism splits .* nothing says which part .* choose attn_z",
    "sequence": r"splits the sequence between processes \(sequence_parallel\)",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_process_holds_whole_is_refused(llama, what):
    for rank in llama:
        assert re.search(REFUSED[what], rank["llama"]["refusals"][what])


def test_a_summand_is_refused(llama):
    for rank in llama:
        assert "each process holds a summand" in rank["toys"]["summand"]


@pytest.mark.slow
def test_other_architectures(tmp_path):
    results = in_two_processes(tmp_path, OTHERS, FEW)
    for name, case in product(OTHERS, FEW):
        try:
            expected = CASES[case](even(name))
        except HookpointError as error:  # mixtral's experts are fused
            assert all(str(error) in rank[name][case] for rank in results)
            continue
        for rank in results:
            check(rank[name][case], expected)
    assert re.search("q_norm: tensor parallelism", results[0]["qwen3"]["refusals"]["head norm"])


@pytest.mark.slow
def test_in_a_graph(tmp_path):
    results = in_two_processes(tmp_path, ["llama"], ["graph"])
    for rank in results:
        check(rank["llama"]["graph"], ALL["graph"](even("llama")))
