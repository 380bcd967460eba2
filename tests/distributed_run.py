"""A whole run on a tiny model, in any number of processes: see tests/test_train_distributed.py.

torchrun --nproc-per-node 4 tests/distributed_run.py FOLDER SHARDS UNTIL
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import VOCAB, tiny

from saert.hookpoint import Hookpoint
from saert.train.mesh import Mesh
from saert.train.objectives import OBJECTIVES
from saert.train.run import Job, Plan, Run
from saert.train.stream import ActivationStream, StreamConfig
from saert.train.training import OptimiserConfig

CONTEXT, STEPS = 16, 12


class Counted:
    """Rows that depend on their number alone."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, count):
        rows = [
            torch.randint(3, VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(i))
            for i in range(self.position, self.position + count)
        ]
        self.position += count
        rows = torch.stack(rows)
        rows[:, 0] = 1
        return rows

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def jobs() -> list[Job]:
    read, write = Hookpoint.parse("mlp_in.1"), Hookpoint.parse("mlp_out.1")
    stream = Hookpoint.parse("resid_post.1")
    return [
        Job("topk", stream, None, 64, OBJECTIVES["topk"](k=4), normalise="layer_norm"),
        Job("transcoder", read, write, 64, OBJECTIVES["batch_topk"](k=4), skip=True),
        Job("jumprelu", stream, None, 32, OBJECTIVES["jumprelu"](target_l0=6.0)),
    ]


def train(folder: Path, mesh: Mesh, until: int = STEPS) -> dict[str, torch.Tensor]:
    """Go on to step `until`; every tensor whole, and the numbers of each step taken."""
    model = tiny("gpt2").double().requires_grad_(False)
    sites = [Hookpoint.parse(s) for s in ("resid_post.1", "mlp_in.1", "mlp_out.1")]
    config = StreamConfig(batch_tokens=64, buffer_tokens=256, max_norm=2.0, forward_rows=4)
    stream = ActivationStream(
        lambda: model, Counted(), sites, CONTEXT, config,
        special=lambda rows: rows == 1, mesh=mesh, wants_gradient=False,
    )  # fmt: skip
    optimiser = OptimiserConfig(lr=1e-3, clip=0.5, ema=0.9, dead_tokens=256)
    plan = Plan(STEPS, optimiser, dtype=torch.float64, save_every=5)
    run = Run(jobs(), stream, plan, folder, mesh)
    found = {}

    def keep(step, logs):
        for job, log in logs.items():
            for name, value in log.items():
                found[f"{step}/{job}/{name}"] = torch.tensor(value, dtype=torch.float64)

    run.train(keep, until)
    for member in run.members:
        whole = member.training.dictionary.whole(member.training.state_dict())
        found |= {f"{member.job.name}/{name}": t for name, t in whole.items()}
        found[f"{member.job.name}/sae"] = member.sae().W_enc
    return found


def main() -> None:
    folder, shards, until = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo")
    mesh = Mesh.of(shards)
    found = train(folder / "checkpoints", mesh, until)
    if mesh.is_first:
        torch.save(found, folder / f"until-{until}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
