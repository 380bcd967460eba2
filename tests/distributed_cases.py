"""Training in one process or in several: run by tests/test_train_distributed.py under torchrun.

torchrun --nproc-per-node 4 tests/distributed_cases.py OUT SHARDS
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from objective_cases import D_IN, a_dictionary, planted

from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES
from saert.train.objectives.base import Batch, Objective
from saert.train.training import OptimiserConfig, Training

TOKENS, STEPS, LATENTS = 64, 6, 48
DEAD = torch.tensor([0, 1, 2, 3, 4, 5, 29])  # not equally many on every shard, on some none


def cases() -> dict[str, Objective]:
    """Every objective, and its variants that share no code with the plain one."""
    found = {}
    for name, kind in OBJECTIVES.items():
        options = {"k": 4} if "k" in kind.__dataclass_fields__ else {}
        found[name] = kind(**options)
    found["topk-multi"] = OBJECTIVES["topk"](k=4, multi=1 / 8)
    return found


def readout(estimate: torch.Tensor) -> torch.Tensor:
    """KL of a fixed linear readout, summed over tokens."""
    W = torch.randn(D_IN, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    clean = (torch.ones_like(estimate) @ W).log_softmax(-1)
    log_q = (estimate @ W).log_softmax(-1)
    return (clean.exp() * (clean - log_q)).sum()


def a_batch(seed: int, mesh: Mesh, objective: Objective) -> Batch:
    """This replica's part of a batch that is the same however many there are."""
    x = planted(TOKENS, seed).double()
    x[3] = x[60]  # equal tokens: ties over replicas
    gradient = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(seed)).double()
    own = slice(
        mesh.replica * TOKENS // mesh.replicas, (mesh.replica + 1) * TOKENS // mesh.replicas
    )
    more = {}
    if objective.wants == "gradient":
        more["gradient"] = gradient[own]
    if objective.wants == "downstream":
        more["downstream"] = lambda estimate: readout(estimate) / TOKENS
    return Batch.of(x[own], x[own], mesh, **more)


def train(objective: Objective, mesh: Mesh) -> dict[str, torch.Tensor]:
    """A few steps in float64; every tensor whole, and the logs."""
    full = a_dictionary(LATENTS, dtype=torch.float64)
    part = slice(mesh.shard * LATENTS // mesh.shards, (mesh.shard + 1) * LATENTS // mesh.shards)
    d = Dictionary(
        full.W_enc[part].detach().clone(), full.W_dec[part].detach().clone(),
        full.b_enc[part].detach().clone(), full.b_dec.detach().clone(),
        num_latents=LATENTS, mesh=mesh, subtract_b_dec=objective.subtract_b_dec,
    )  # fmt: skip
    objective.prepare(d, a_batch(10**6, mesh, objective))
    config = OptimiserConfig(lr=1e-3, dead_tokens=2 * TOKENS, clip=0.5, ema=0.9)
    training = Training(d, objective, config, STEPS)
    local = DEAD - part.start
    with torch.no_grad():
        d.b_enc[local[(local >= 0) & (local < d.local)]] -= 50.0
    logs = []
    for step in range(STEPS):
        found = training.step(a_batch(step, mesh, objective), step)
        logs.append(torch.stack([v.double() for _, v in sorted(found.items())]))
    if objective.wants is None:
        objective.calibrate(d, a_batch(10**6 + 1, mesh, objective))
    tensors = d.whole(
        training.state_dict() | {f"weights.{n}": t for n, t in training.weights().items()}
    )
    return tensors | {"logs": torch.stack(logs)}


def main() -> None:
    out, shards = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())  # nothing may depend on it
    mesh = Mesh.of(shards)
    for name, objective in cases().items():
        found = train(objective, mesh)
        if mesh.is_first:
            torch.save(found, out / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
