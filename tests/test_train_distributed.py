"""Latents over shards and tokens over replicas: the same numbers as one process."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_cases
import distributed_run
import pytest
import torch

from saert.train.mesh import Mesh

HERE = Path(__file__).parent


def torchrun(processes: int, *arguments: object) -> None:
    """Run a script of this folder under torchrun; its errors become the test's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(processes), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone():
    return {
        name: distributed_cases.train(objective, Mesh())
        for name, objective in distributed_cases.cases().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("shards, replicas", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_objective_trains_as_in_one_process(shards, replicas, alone, tmp_path):
    torchrun(shards * replicas, HERE / "distributed_cases.py", tmp_path, shards)
    for name, expected in alone.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            close = torch.allclose(found[tensor].double(), value.double(), rtol=1e-8, atol=1e-10)
            assert close, (name, tensor, (found[tensor] - value).abs().max())


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_processes(tmp_path):
    """4 processes (2 replicas of 2 shards), then 1, then 2 shards: as one process throughout."""
    expected = distributed_run.train(tmp_path / "alone", Mesh())
    folder = tmp_path / "moved"
    folder.mkdir()
    torchrun(4, HERE / "distributed_run.py", folder, 2, 5)
    first = torch.load(folder / "until-5.pt")
    middle = distributed_run.train(folder / "checkpoints", Mesh(), 9)
    torchrun(2, HERE / "distributed_run.py", folder, 2, distributed_run.STEPS)
    last = torch.load(folder / f"until-{distributed_run.STEPS}.pt")
    logged = {name: t for part in (first, middle, last) for name, t in part.items()}
    assert logged.keys() == expected.keys() and "9/jumprelu/l0" in middle
    for name, value in expected.items():
        close = torch.allclose(logged[name].double(), value.double(), rtol=1e-8, atol=1e-10)
        assert close, (name, (logged[name] - value).abs().max())
