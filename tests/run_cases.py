"""Runs on planted batches, and sessions of the bundled model, for the tests of training."""

import json
import random

import torch
from objective_cases import planted

from saert.hookpoint import Hookpoint
from saert.train.checkpoint import checkpoints
from saert.train.config import from_table
from saert.train.mesh import Mesh
from saert.train.objectives.batch_topk import BatchTopKObjective
from saert.train.objectives.jumprelu import JumpReLUObjective
from saert.train.objectives.topk import TopKObjective
from saert.train.run import Job, Plan, Run
from saert.train.stream import Served
from saert.train.training import OptimiserConfig

READ, WRITE = Hookpoint.parse("resid_post.0"), Hookpoint.parse("mlp_out.1")
D, LATENTS = 16, 48


class Planted:
    """Batches that are a function of their number; `spoil` changes the batch of one."""

    def __init__(self, tokens=64, scale=1.0, spoil=None):
        self.tokens, self.scale, self.spoil, self.number = tokens, scale, spoil, 0

    def _serve(self, tokens, seed):
        x = self.scale * planted(tokens, seed)
        return {READ: x, WRITE: x.flip(-1) ** 2 + 0.1}

    def next(self):
        x = self._serve(self.tokens, self.number)
        if self.spoil == self.number:
            x[READ][3, 2] = torch.nan
        self.number += 1
        return Served(x)

    def sample(self, tokens):
        return self._serve(1024, 10**6)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


JOBS = [
    Job("a", READ, None, LATENTS, BatchTopKObjective(k=4), normalise="unit"),
    Job("b", READ, WRITE, LATENTS, TopKObjective(k=4), skip=True, seed=1),
    Job("c", READ, None, LATENTS, JumpReLUObjective()),
]
PLAN = Plan(12, OptimiserConfig(ema=0.9, dead_tokens=300), save_every=3)


def a_run(folder, plan=PLAN, jobs=JOBS, stream=None):
    return Run(jobs, stream or Planted(), plan, folder, Mesh())


def names(folder):
    return [path.name for path in checkpoints(folder)]


def samples(seed=0, scale=7.0):
    x = scale * planted(512, seed).double() + 0.5
    return x, 0.3 * x.flip(-1) ** 2 - x


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for line in found:
        line.pop("tokens_per_second", None)
    return found


STORY = "Once upon a time there was a little girl who had a big red dog and they went to the park"


def write_text(path, count=400, seed=0):
    draw = random.Random(seed)
    lines = [
        json.dumps({"text": " ".join(draw.choices(STORY.split(), k=40)) + "."})
        for _ in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def a_config(source, **changes):
    table = {
        "model": {"name": "bundled"},
        "data": {"source": [source], "context": 32, "holdout": 0.1},
        "sae": {"hookpoints": ["resid_post.1", "mlp_in.2->mlp_out.2"], "num_latents": 64},
        "objective": {"name": "batch_topk", "k": 4},
        "optimiser": {"ema": 0.9, "dead_tokens": 500},
        "stream": {
            "batch_tokens": 64, "buffer_tokens": 512, "lanes": 4, "forward_rows": 8, "max_norm": 5.0
        },
        "checkpoint": {"every": 4},
        "evaluation": {"every": 10, "rows": 4},
        "tokens": 64 * 25,
    }  # fmt: skip
    for key, value in changes.items():
        table[key] = table[key] | value if isinstance(value, dict) else value
    return from_table(table)


QUIET = dict(progress=False, tensorboard=False)
