"""The cases of tests/parallel_cases.py on models that the processes share.

torchrun --nproc-per-node 2 tests/parallel_run.py FOLDER ARCHITECTURE... [-- CASE...]
"""

import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import ALL, CASES, TOYS, Toy, edited, refused, toy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM

ACT = "model.layers.1.mlp.act_fn"
HEAD_NORM = "model.layers.1.self_attn.q_norm"


def attempt(case, model):
    """What a case finds, or how it failed."""
    try:
        return case(model)
    except Exception:
        return traceback.format_exc()


def refusals(model):
    """What is refused of a split model, and says so."""
    found = {"inside": refused(lambda: edited(ACT)(model))}
    if hasattr(model.model.layers[1].self_attn, "q_norm"):
        found["head norm"] = refused(lambda: edited(HEAD_NORM)(model))
    model._tp_plan["layers.*.input_layernorm"] = "sequence_parallel"
    found["sequence"] = refused(lambda: edited("resid_post.1")(model))
    del model._tp_plan["layers.*.input_layernorm"]
    return found


def toys(mesh):
    plan = {
        "entry": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
        ),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
    }
    model = parallelize_module(Toy(), mesh, plan)
    found = {name: attempt(case, model) for name, case in TOYS.items()}
    found["summand"] = refused(lambda: toy("down", 32)(model))
    return found


def main(folder, architectures, cases):
    results = {}
    for name in architectures:
        model = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()
        results[name] = {"refusals": attempt(refusals, model)}
        for case in cases or CASES:
            results[name][case] = attempt(ALL[case], model)
    if not cases:
        results["toys"] = toys(init_device_mesh("cpu", (2,)))
    torch.save(results, folder / f"rank{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    names = sys.argv[2:]
    at = names.index("--") if "--" in names else len(names)
    main(Path(sys.argv[1]), names[:at], names[at + 1 :])
