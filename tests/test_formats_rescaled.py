"""Weights that are rescaled as they are read: to the last digit, and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saert.hub.errors import FormatError
from saert.hub.files.tensors import open_tensors

SHAPES = {"tall": (70, 6), "wide": (5, 90), "row": (1, 8), "column": (40, 1)}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_scaled_before_they_are_rounded(tmp_path, shape, stored, dtype):
    matrix = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(3)).to(stored)
    save_file({"m": matrix, "t": matrix.T.clone().contiguous()}, tmp_path / "a.safetensors")
    tensors = open_tensors(tmp_path / "a.safetensors", dtype=dtype)
    by = torch.linspace(0.1, 3, len(matrix), dtype=torch.float64)
    wide = torch.float64 if torch.float64 in (stored, dtype) else torch.float32
    for name, turned in (("m", False), ("t", True)):
        rows = tensors.scaled(name, by, transpose=turned)
        all_alike = tensors.scaled(name, -0.3, transpose=turned)
        assert rows.equal((matrix.to(wide) * by.to(wide)[:, None]).to(dtype or wide))
        assert all_alike.equal((matrix.to(wide) * -0.3).to(dtype or wide))
        norms = tensors.row_norms(name, transpose=turned)
        assert norms.dtype == wide
        expected = matrix.double().pow(2).sum(1).sqrt()
        torch.testing.assert_close(norms.double(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_stored_column_after_column_is_scaled_alike(tmp_path, turned):
    matrix = np.arange(60, dtype=np.float32).reshape(12, 5)
    np.savez(tmp_path / "a.npz", m=np.asfortranarray(matrix))
    tensors = open_tensors(tmp_path / "a.npz")
    seen = torch.from_numpy(matrix.T if turned else matrix)
    by = torch.arange(1, len(seen) + 1)
    assert tensors.scaled("m", by, transpose=turned).equal(seen * by[:, None])
    torch.testing.assert_close(tensors.row_norms("m", transpose=turned), seen.norm(dim=1))


def test_only_a_matrix_of_floats_is_scaled(tmp_path):
    save_file({"v": torch.ones(3), "i": torch.ones(3, 2).int()}, tmp_path / "a.safetensors")
    tensors = open_tensors(tmp_path / "a.safetensors")
    for name in "vi":
        with pytest.raises(FormatError, match=f"{name} is .*expected a matrix of floats"):
            tensors.scaled(name, 2.0)


PEAK = """
import sys
from pathlib import Path
import torch
from saert.hub.load import load

def memory(name):
    line = next(x for x in Path("/proc/self/status").read_text().split("\\n") if name in x)
    return int(line.split()[1]) << 10

load("bundled", "resid_post.2")  # what the first load of a process imports
before = memory("VmRSS")
for folder in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    sae = load(folder, dtype=torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in sae.parameters())
    print((memory("VmHWM") - before) / size)
    del sae
"""
N, D = 20480, 768  # 60 MiB in bfloat16


def saelens() -> tuple[str, dict[str, list[int]], dict[str, object]]:
    config = {
        "d_in": D, "d_sae": N, "architecture": "topk", "k": 32, "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": True, "metadata": {"sae_lens_version": "6.1"},
    }  # fmt: skip
    shapes = {"W_enc": [D, N], "W_dec": [N, D], "b_enc": [N], "b_dec": [D]}
    return "sae_weights.safetensors", shapes, {"cfg.json": config}


def llama_scope() -> tuple[str, dict[str, list[int]], dict[str, object]]:
    config = {
        "hook_point_in": "blocks.8.hook_resid_mid", "hook_point_out": "blocks.8.hook_mlp_out",
        "apply_decoder_bias_to_pre_encoder": False, "d_model": D, "d_sae": N, "act_fn": "relu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
        "dataset_average_activation_norm": {"in": 27.7, "out": 3.39},
    }  # fmt: skip
    shapes = {
        "encoder.weight": [N, D], "decoder.weight": [D, N], "encoder.bias": [N],
        "decoder.bias": [D],
    }  # fmt: skip
    return "checkpoints/final.safetensors", shapes, {"hyperparams.json": config}


def dictionary_learning() -> tuple[str, dict[str, list[int]], dict[str, object]]:
    shapes = {
        "encoder.weight": [N, D], "decoder.weight": [D, N], "encoder.bias": [N], "bias": [D],
    }  # fmt: skip
    return "ae.pt", shapes, {}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
def test_rescaling_needs_the_weights_and_a_little(tmp_path):
    """Both matrices in float32 before they are cast would be three times the weights."""
    layouts = (saelens, llama_scope, dictionary_learning)
    for layout in layouts:
        weights, shapes, configs = layout()
        path = tmp_path / layout.__name__ / weights
        path.parent.mkdir(parents=True)
        tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
        for name, config in configs.items():
            (tmp_path / layout.__name__ / name).write_text(json.dumps(config))
    folders = [str(tmp_path / layout.__name__) for layout in layouts]
    own = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed buffers go back to the system
    command = [sys.executable, "-c", PEAK, *folders]
    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = dict(zip(folders, map(float, done.stdout.split()), strict=True))
    assert max(ratios.values()) < 1.5, ratios
