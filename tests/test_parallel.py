"""Tensor parallelism: two gloo processes, one model, the same edits and the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attach import IDS, make_sae
from tiny_models import tiny

from saert import add, attach, scale

SCRIPT = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_attach import IDS, make_sae
from transformers import AutoModelForCausalLM
from saert import add, attach, scale

model = AutoModelForCausalLM.from_pretrained({model!r}, tp_plan="auto").eval()
assert "DTensor" in type(model.model.layers[0].mlp.up_proj.weight).__name__
options = dict(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
with attach(model, make_sae(), [add(3, 3.0), scale(5, 2.0)], splice=True) as attachment:
    with torch.no_grad():
        logits = model(IDS).logits
    code = attachment.codes["resid_post.1"].to_dense()
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
torch.save((logits, code, tokens), {out!r} + os.environ["RANK"])
"""


@pytest.mark.slow
def test_a_tensor_parallel_model_is_edited_like_a_whole_one(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(
        SCRIPT.format(
            tests=str(Path(__file__).parent),
            model=str(tmp_path / "model"),
            out=str(tmp_path / "rank"),
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with attach(model, make_sae(), [add(3, 3.0), scale(5, 2.0)], splice=True) as attachment:
        with torch.no_grad():
            logits = model(IDS).logits
        code = attachment.codes["resid_post.1"].to_dense()
        tokens = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=5,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    for rank in range(2):
        theirs = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        torch.testing.assert_close(theirs[0], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(theirs[1], code, atol=1e-4, rtol=1e-4)
        assert torch.equal(theirs[2], tokens)
