"""What we write, read by the installed sae-lens and eai-sparsify; what they write, read by us.

`make peers` has an environment with both. SAERT_PEERS_PYTHON names its python; without one that
can import them, these tests skip.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers_run
import pytest
import torch
from sae_cases import ACTIVATIONS, K, inputs, make
from safetensors.torch import load_file, save_file

from saert.activations import AbsTopK, GroupMax, TopK
from saert.hub.format import save
from saert.hub.load import load
from saert.pursuit import MatchingPursuit
from saert.sae import SAE

pytestmark = [pytest.mark.peers, pytest.mark.slow]

PYTHON = os.environ.get("SAERT_PEERS_PYTHON", sys.executable)
MLP = dict(hookpoint="mlp_in.2", target_hookpoint="mlp_out.2", subtract_b_dec=False)


def with_activation(activation: Any, **options: Any) -> SAE:
    """A case's weights around another activation."""
    base = make("topk", dtype=torch.float32)
    tensors = (base.W_enc, base.W_dec, base.b_enc, base.b_dec)
    return SAE.from_weights(*tensors, activation=activation, hookpoint="resid_post.0", **options)


def tied() -> SAE:
    base = make("topk", dtype=torch.float32)
    W = base.W_dec / base.W_dec.norm(dim=-1, keepdim=True)
    return SAE.from_weights(
        W, W, b_dec=base.b_dec, activation=MatchingPursuit(0.01, 6), hookpoint="resid_post.0"
    )


def ours_for_sae_lens() -> dict[str, tuple[str, SAE]]:
    """Every architecture that SAELens has, by a name of its own: folder and SAE."""
    f32 = dict(dtype=torch.float32)
    saes = {
        f"{act} {transform}": make(act, transform, **f32)
        for act in ACTIVATIONS
        for transform in ("none", "layer_norm", "unit_norm")
    }
    for act in ("relu", "topk", "jumprelu"):
        saes[f"{act} plain"] = make(act, kind="sae_plain", **f32)
        saes[f"{act} attn_z"] = make(act, hookpoint="attn_z.0", **f32)
    for act in ("relu", "jumprelu"):
        saes[f"{act} transcoder"] = make(act, kind="transcoder", **f32)
        saes[f"{act} skip transcoder"] = make(act, kind="transcoder_skip", **f32)
        saes[f"{act} transcoder layer_norm"] = make(act, "layer_norm", "transcoder", **f32)
    saes["bfloat16"] = make("topk", dtype=torch.bfloat16)
    saes["abstopk"] = with_activation(AbsTopK(K))
    saes["matching_pursuit"] = tied()
    saes["no biases"] = SAE.from_weights(saes["relu none"].W_enc, saes["relu none"].W_dec,
                                         activation=TopK(K), hookpoint="resid_post.0")  # fmt: skip
    return {name: ("sae", one) for name, one in saes.items()}


SAE_LENS_LACKS = {  # our own extension of the layout, which it must not misread
    "topk transcoder": lambda: make("topk", kind="transcoder", dtype=torch.float32),
    "mean_centre": lambda: make("relu", "mean_centre", dtype=torch.float32),
    "skip": lambda: make("relu", kind="sae_skip", dtype=torch.float32),
    "groupmax": lambda: with_activation(GroupMax(4)),
    "decoder norm": lambda: with_activation(TopK(K), select_by_decoder_norm=True),
}


def ours_for_sparsify() -> dict[str, tuple[str, SAE]]:
    f32 = dict(dtype=torch.float32)
    square = make("topk", kind="transcoder_square", **f32, **MLP)
    skip = make("topk", kind="sae_skip", **f32)
    return {
        "topk": ("layers.0", make("topk", **f32)),
        "bfloat16": ("layers.0", make("topk", dtype=torch.bfloat16)),
        "groupmax": ("layers.0", with_activation(GroupMax(4))),
        "skip": ("layers.0", skip),
        "folded": ("layers.0", make("topk", kind="sae_plain", **f32)),
        "no biases": (
            "layers.0",
            SAE.from_weights(skip.W_enc, skip.W_dec, activation=TopK(K)),
        ),
        "transcoder": ("layers.2.mlp", square),
        "skip transcoder": (
            "layers.2.mlp",
            SAE.from_weights(skip.W_enc, skip.W_dec, skip.b_enc, skip.b_dec, W_skip=skip.W_skip,
                             activation=GroupMax(4), **MLP),
        ),
        "transcoder folded": (
            "layers.2.mlp",
            make("topk", kind="transcoder_square", **f32, **MLP | dict(subtract_b_dec=True)),
        ),
    }  # fmt: skip


def run(package: str, folder: Path, ours: dict[str, tuple[str, SAE]]) -> Path:
    """Ours saved and theirs made, each with what the package computes."""
    probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if subprocess.run([PYTHON, "-c", probe]).returncode:
        pytest.skip(f"{PYTHON} has no {package}; `make peers`, or set SAERT_PEERS_PYTHON")
    for name, (inner, sae) in ours.items():
        place = folder / "ours" / name
        save(sae, place / inner, format="sparsify" if package == "sparsify" else "saelens")
        x = inputs(40, dtype=torch.float32)
        heads = sae.hookpoint is not None and sae.hookpoint.site == "attn_z"
        save_file({"x": x.view(40, 2, -1) if heads else x}, place / "x.safetensors")
    environment = os.environ | dict(
        SPARSIFY_DISABLE_TRITON="1",  # eai-sparsify's decoder needs a GPU otherwise
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, peers_run.__file__, package, folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def sae_lens(tmp_path_factory) -> Path:
    lacking = {name: ("sae", build()) for name, build in SAE_LENS_LACKS.items()}
    folder = tmp_path_factory.mktemp("sae_lens")
    return run("sae_lens", folder, ours_for_sae_lens() | lacking)


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory) -> Path:
    return run("sparsify", tmp_path_factory.mktemp("sparsify"), ours_for_sparsify())


def agrees(sae: SAE, x: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """Exact support, values within 1e-4 of the largest."""
    latents, recon = sae.encode(x).to_dense(), sae(x)
    assert (latents != 0).equal(expected["latents"] != 0)
    assert latents.any()
    for found, wanted in [(latents, expected["latents"]), (recon, expected["recon"])]:
        within = 1e-4 * wanted.abs().max().item()
        torch.testing.assert_close(found, wanted.view_as(found), rtol=0, atol=within)


def found(folder: Path) -> dict[str, torch.Tensor]:
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("name", ours_for_sae_lens())
def test_sae_lens_computes_the_same_from_what_we_write(sae_lens, name):
    sae = ours_for_sae_lens()[name][1]
    agrees(sae.float(), inputs(40, dtype=torch.float32), found(sae_lens / "ours" / name))


@pytest.mark.parametrize("name", SAE_LENS_LACKS)
def test_sae_lens_refuses_what_it_cannot_compute(sae_lens, name):
    assert "saert" in (sae_lens / "ours" / name / "error.txt").read_text()


@pytest.mark.parametrize("name", ours_for_sparsify())
def test_sparsify_computes_the_same_from_what_we_write(sparsify, name):
    sae = ours_for_sparsify()[name][1]
    agrees(sae.float(), inputs(40, dtype=torch.float32), found(sparsify / "ours" / name))


@pytest.mark.parametrize("name", ours_for_sparsify())
def test_what_we_write_for_sparsify_we_read_as_it_does(sparsify, name):
    x = inputs(40, dtype=torch.float32)
    agrees(load(sparsify / "ours" / name, dtype=x.dtype), x, found(sparsify / "ours" / name))


@pytest.mark.parametrize("package", ["sae_lens", "sparsify"])
def test_we_compute_the_same_from_what_they_write(request, package):
    folder = request.getfixturevalue(package) / "theirs"
    assert len(names := sorted(one.name for one in folder.iterdir())) >= 6
    for name in names:
        expected = load_file(folder / name / "expected.safetensors")
        sae = load(folder / name)
        assert sae.is_transcoder == ("transcoder" in name)
        agrees(sae, expected["x"].flatten(1), expected)
