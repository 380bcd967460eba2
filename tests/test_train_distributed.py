"""Latents over shards and tokens over replicas: the same numbers as one process."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_cases
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
