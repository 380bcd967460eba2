"""One process of a group with an SAE in shards: see tests/test_sharded.py.

torchrun --nproc-per-node 2 tests/sharded_run.py FOLDER [MODEL]
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sae_cases import inputs, make
from test_attach import make_sae
from test_sharded import CASES, EDITS, overflowing, seen
from tiny_models import tiny

from saert import attach, shard


def error(act):
    """What a call says that has to fail in every process."""
    try:
        act()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def main(folder: Path, model_path: str | None) -> None:
    if model_path is None:
        dist.init_process_group("gloo")
        model = tiny("llama")
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path, tp_plan="auto").eval()
        assert "DTensor" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    group, rank = dist.group.WORLD, dist.get_rank()
    found = {}
    for case in CASES:
        sae = shard(make(*case), group=group)
        x = inputs(3, 4)
        code = sae.encode(x)
        some = sae.activations(x, torch.tensor([2, 20, 9, 2]))
        found[case] = code.indices, code.values, sae.decode(code, x), sae.activations(x), some
    for activation in ("topk", "jumprelu"):
        sae = shard(make_sae(activation=activation), group=group)
        for splice in (False, True):
            with torch.no_grad(), attach(model, sae, EDITS, splice=splice) as attachment:
                found[activation, splice] = seen(model, attachment)

    sae = shard(make("topk"), group=group)
    gated = shard(make("gated"), group=group)
    overflows = shard(overflowing(), group=group)
    wide = torch.ones(2, sae.d_in + rank)
    found["refused"] = {
        "NaN": error(lambda: overflows.encode(torch.full((2, 4), 10.0))),
        "other": error(lambda: sae.encode(inputs(3, 4) + rank)),
        "order": error(lambda: sae.encode(inputs(3, 4).roll(rank, 0))),
        "shape": error(lambda: sae.encode(inputs(3 + rank, 4))),
        "width": error(lambda: sae.encode(wide)),
        "width of all": error(lambda: sae.pre_activations(wide)),
        "width of some": error(lambda: gated.activations(wide, torch.tensor([2]))),
        "latents": error(lambda: sae.directions(torch.tensor([rank]))),
        "one gradient": error(lambda: sae.encode(inputs(2).requires_grad_(rank == 0))),
        "gradient": error(lambda: sae.encode(inputs(2).requires_grad_())),
        "sae": error(lambda: shard(make("topk", n=24 + rank), group=group)),
    }
    found["after"] = sae.encode(inputs(3, 4)).to_dense()  # nobody waits for anybody
    found["repr"] = repr(sae)
    torch.save(found, folder / f"rank{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
