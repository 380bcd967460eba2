"""Gemma Scope 1 and 2: read as Google's equations say, placed by names, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scope_cases import agrees, inputs, is_as_its_makers_say, normal
from tiny_models import tiny, tiny_multimodal
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hub.format import FormatError
from saert.hub.formats.hooks import module_hook
from saert.hub.load import load, load_all

D, N = 12, 40
Tensors = dict[str, Tensor]


def draw(n: int = N, d: int = D, d_out: int | None = None, **more: Tensor) -> Tensors:
    """Tensors of Gemma Scope, W_enc [d_in, n]."""
    out = d if d_out is None else d_out
    return {
        "W_enc": normal(d, n, by=d**-0.5), "W_dec": normal(n, out, seed=1), "b_enc": normal(n) / 5,
        "b_dec": normal(out, seed=2), "threshold": normal(n, seed=3).abs() / 2, **more,
    }  # fmt: skip


def jump(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """f = relu(pre) · 1[pre > θ], y = f W_dec + b_dec, latent by latent in float64."""
    t, x = {name: value.double() for name, value in t.items()}, x.double()
    f = torch.zeros(len(x), t["W_enc"].shape[1], dtype=torch.float64)
    for i, theta in enumerate(t["threshold"]):
        pre = (x * t["W_enc"][:, i]).sum(-1) + t["b_enc"][i]
        f[:, i] = torch.where((pre > theta) & (pre > 0), pre, 0)
    y = sum(f[:, i, None] * row for i, row in enumerate(t["W_dec"])) + t["b_dec"]
    return f, y + (x @ t["affine"] if "affine" in t else 0)


# -- Gemma Scope 1 -------------------------------------------------------------------------------


def npz(root: Path, path: str, tensors: Tensors) -> Path:
    (root / path).mkdir(parents=True, exist_ok=True)
    np.savez(root / path / "params.npz", **{name: t.numpy() for name, t in tensors.items()})
    return root


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("name", ["gemma_scope_res", "gemma_scope_2_resid_post"])
def test_the_cases_are_read_as_their_makers_say(shared, name, dtype):
    is_as_its_makers_say(shared, name, dtype=dtype)


@pytest.mark.parametrize("n", [N, D])  # also square, where only the format knows the orientation
@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope_computes_its_equations(tmp_path, n, lower):
    tensors = draw(n)
    stored = {k.lower() if lower else k: t for k, t in tensors.items()}
    sae = load(npz(tmp_path, "layer_3/width_16k/average_l0_82", stored))
    assert not sae.subtract_b_dec
    x = inputs(D)
    agrees(sae, x, *jump(tensors, x))


PLACES = {
    "gemma-scope-2b-pt-res": ("google/gemma-2-2b", "resid_post.3", None),
    "gemma-scope-9b-it-res": ("google/gemma-2-9b-it", "resid_post.3", None),
    "gemma-scope-27b-pt-mlp": ("google/gemma-2-27b", "mlp_out.3", None),
    "gemma-scope-2b-pt-att": ("google/gemma-2-2b", "attn_z.3", None),
    "gemma-scope-2b-pt-transcoders": ("google/gemma-2-2b", None, "mlp_out.3"),
    "my-copy": (None, None, None),
}


@pytest.mark.parametrize("repo", PLACES)
def test_gemma_scope_is_placed_by_its_names(tmp_path, repo):
    model, hookpoint, target = PLACES[repo]
    root = npz(tmp_path / repo, "layer_3/width_16k/average_l0_82", draw())
    sae = load(root)
    spelled = [None if one is None else str(one) for one in (sae.hookpoint, sae.target_hookpoint)]
    assert (sae.metadata.get("base_model"), *spelled) == (model, hookpoint, target)
    assert sae.metadata["declared"] == {"l0": 82.0}
    if target is not None:
        assert sae.is_transcoder
        assert sae.metadata["hook_name"] == "blocks.3.ln2.hook_normalized"
        assert "resid_mid.3 over its own RMS" in sae.metadata["note"]


def test_a_layer_is_the_innermost_folder_of_that_name(tmp_path):
    root = tmp_path / "layer_9" / "gemma-scope-2b-pt-res"
    assert str(load(npz(root, "layer_3/width_1m/average_l0_7", draw())).hookpoint) == "resid_post.3"


def test_the_embedding_reads_what_the_model_calls_so(tmp_path):
    root = npz(tmp_path / "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", draw())
    sae = load(root)
    assert str(sae.hookpoint) == "embed"
    assert "b_dec was left" in sae.metadata["note"]
    x = inputs(D) * D**0.5  # transformers 5's embed_tokens has multiplied
    bare = draw() | {"b_dec": torch.zeros(D)}
    latents, output = jump(bare, x / D**0.5)
    agrees(sae, x, latents, output * D**0.5 + draw()["b_dec"])
    assert load(root, dtype=torch.bfloat16).W_enc.equal(sae.W_enc.bfloat16())


def test_several_are_listed_among_other_files(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    for layer in (0, 11):
        npz(root, f"layer_{layer}/width_16k/average_l0_82", draw())
    (root / "README.md").write_text("words")
    (root / "layer_0" / "cfg.json").write_text("{}")
    assert list(load_all(root)) == ["resid_post.0", "resid_post.11"]
    assert list(load_all(root, "layer_11/*")) == ["resid_post.11"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, "missing .*threshold"),
        ({"scale": torch.ones(N)}, "unknown .*scale"),
        ({"W_enc": normal(N, D)}, "expected"),
        ({"W_dec": normal(D, N)}, "W_dec is"),
        ({"threshold": torch.ones(N - 1)}, "threshold is"),
        ({"threshold": torch.full((N,), torch.nan)}, "finite"),
        ({"W_dec": normal(N, D + 1), "b_dec": normal(D + 1)}, "keep the repo's name"),
    ],
)
def test_gemma_scope_refuses(tmp_path, change, message):
    tensors = {k: t for k, t in (draw() | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        load(npz(tmp_path, "layer_3/width_16k/average_l0_82", tensors))


# -- Gemma Scope 2 -------------------------------------------------------------------------------

BEFORE, AFTER = (f"model.layers.17.{n}_feedforward_layernorm.output" for n in ("pre", "post"))
RES = dict(
    hf_hook_point_in="model.layers.17.output", hf_hook_point_out="model.layers.17.output",
    width=N, model_name="google/gemma-3-4b-pt", architecture="jump_relu", l0=150,
    affine_connection=False, type="sae",
)  # fmt: skip
TRANSCODER = RES | dict(hf_hook_point_in=BEFORE, hf_hook_point_out=AFTER, type="transcoder")
SKIPPING = TRANSCODER | dict(affine_connection=True)
FOLDER = "resid_post/layer_17_width_16k_l0_big"


def params(root: Path, path: str, config: dict[str, Any] | None, tensors: Tensors) -> Path:
    (root / path).mkdir(parents=True, exist_ok=True)
    stored = {k.replace("W_", "w_"): t.contiguous() for k, t in tensors.items()}
    if "affine" in stored:
        stored["affine_skip_connection"] = stored.pop("affine")
    save_file(stored, root / path / "params.safetensors")
    if config is not None:
        (root / path / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("n", [N, D])
@pytest.mark.parametrize("config", [RES, TRANSCODER, SKIPPING])
def test_gemma_scope_2_computes_its_equations(tmp_path, n, config):
    skip = {"affine": normal(D, D, seed=4)} if config["affine_connection"] else {}
    tensors = draw(n, **skip)
    sae = load(params(tmp_path, FOLDER, config | {"width": n}, tensors))
    x = inputs(D)
    agrees(sae, x, *jump(tensors, x))


def test_a_skip_path_may_change_the_width(tmp_path):
    tensors = draw(d_out=D - 2, affine=normal(D, D - 2, seed=4))
    sae = load(params(tmp_path, "transcoder/layer_17_width_16k_l0_big_affine", SKIPPING, tensors))
    x = inputs(D)
    agrees(sae, x, *jump(tensors, x))


HOOKS = {
    "model.layers.17.output": "resid_post.17",
    "model.layers.17.self_attn.o_proj.input": "attn_z.17",
    AFTER: "mlp_out.17",
    BEFORE: "mlp_in.17",
    "model.language_model.layers.17.output": "resid_post.17",
    "model.layers.17": "resid_post.17",
    "model.layers.17.pre_feedforward_layernorm": "mlp_in.17",
    "model.layers.17.mlp.output": "layers.17.mlp",
    "model.layers.17.mlp.down_proj.input": "layers.17.mlp.down_proj:in",
    "language_model.model.layers.17.mlp.output": "layers.17.mlp",
    "model.vision_tower.encoder.layers.17.output": "model.vision_tower.encoder.layers.17",
}


@pytest.mark.parametrize("name", HOOKS)
def test_gemma_scope_2_is_placed_by_its_config(tmp_path, name):
    config = RES | dict(hf_hook_point_in=name, hf_hook_point_out=name)
    sae = load(params(tmp_path, FOLDER, config, draw()))
    assert str(sae.hookpoint) == HOOKS[name]
    assert sae.target_hookpoint is None
    assert sae.metadata["hook_name"] == name
    assert sae.metadata["base_model"] == "google/gemma-3-4b-pt"
    assert sae.metadata["declared"] == {"l0": 150.0}


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3"])
def test_a_module_of_the_text_model_is_found_in_either_size(name):
    model = tiny_multimodal() if name == "gemma3" else tiny(name)
    layer = Hookpoint.parse("resid_post.1").resolve(model).path
    for prefix in ("model", "model.language_model"):
        found = Hookpoint.parse(module_hook(f"{prefix}.layers.1.mlp.down_proj.input"))
        assert found.resolve(model).path == f"{layer}.mlp.down_proj"


NULLS = {key: None for key in ("hf_hook_point_out", "affine_connection", "l0", "type", "width")}


def test_gemma_scope_2_s_nulls_are_missing_keys(tmp_path):
    skipping = params(tmp_path / "a", FOLDER, SKIPPING | {"affine_connection": None, "type": None},
                      draw(affine=normal(D, D, seed=4)))  # fmt: skip
    assert load(skipping).W_skip is not None
    sae = load(params(tmp_path / "b", FOLDER, RES | NULLS | {"model_name": None}, draw()))
    assert (str(sae.hookpoint), sae.target_hookpoint) == ("resid_post.17", None)
    assert not {"declared", "base_model"} & set(sae.metadata)


PATHS = {
    "resid_post_all/layer_5_width_16k_l0_small": ("resid_post.5", None),
    "attn_out/layer_5_width_16k_l0_small": ("attn_z.5", None),
    "mlp_out_all/layer_5_width_262k_l0_big": ("mlp_out.5", None),
    "transcoder_all/layer_5_width_16k_l0_big": ("mlp_in.5", "mlp_out.5"),
    "transcoder/layer_5_width_16k_l0_big_affine": ("mlp_in.5", "mlp_out.5"),
}


@pytest.mark.parametrize("path", PATHS)
def test_gemma_scope_2_without_a_config_is_placed_by_its_path(tmp_path, path):
    skip = {"affine": normal(D, D, seed=4)} if path.endswith("affine") else {}
    root = params(tmp_path / "gemma-scope-2-270m-pt", path, None, draw(**skip))
    sae = load(root, path)
    target = None if sae.target_hookpoint is None else str(sae.target_hookpoint)
    assert (str(sae.hookpoint), target) == PATHS[path]
    assert sae.metadata["base_model"] == "google/gemma-3-270m"  # no -pt on the Hub
    assert (sae.W_skip is not None) == bool(skip)
    assert "declared" not in sae.metadata


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3"])
def test_the_hookpoints_are_modules_of_gemma_3(name):
    """The sites are the modules that Google's names say, in the multimodal models too."""
    model = tiny_multimodal() if name == "gemma3" else tiny(name)
    layers = Hookpoint.parse("resid_post.1").resolve(model).path
    pairs = {
        "attn_z.1": ("self_attn.o_proj", "in"), "mlp_in.1": ("pre_feedforward_layernorm", "out"),
        "mlp_out.1": ("post_feedforward_layernorm", "out"),
    }  # fmt: skip
    for spelling, (child, side) in pairs.items():
        found = Hookpoint.parse(spelling).resolve(model)
        if spelling == "mlp_in.1":  # one tensor: what the norm gives, the MLP takes
            child, side = "mlp", "in"
        assert (found.path, found.side) == (f"{layers}.{child}", side)


@pytest.mark.parametrize(
    ("path", "config", "change", "message"),
    [
        (FOLDER, RES | {"type": "clt"}, {}, "cross-layer"),
        (FOLDER, RES | {"type": "crosscoder"}, {}, "several layers"),
        ("clt/layer_5_width_16k_l0_big", None, {}, "cross-layer"),
        ("crosscoder/layer_5_9_width_1m_l0_big", None, {}, "several layers"),
        ("elsewhere", None, {}, "the path does not say"),
        (FOLDER, RES | {"architecture": "topk"}, {}, "architecture"),
        (FOLDER, RES | {"rescale": 2}, {}, r"unknown keys \['rescale'\]"),
        (FOLDER, RES | {"width": N + 1}, {}, "declares width"),
        (FOLDER, RES | {"type": "transcoder"}, {}, "type 'transcoder'"),
        (FOLDER, TRANSCODER | {"type": "sae"}, {}, "type 'sae'"),
        (FOLDER, SKIPPING, {}, "affine_connection is True"),
        (FOLDER, TRANSCODER, {"affine": normal(D, D)}, "affine_connection is False"),
        (FOLDER, SKIPPING, {"affine": normal(D, D + 1)}, "affine_skip_connection is"),
        (FOLDER, RES, {"b_enc": None}, "missing"),
        (FOLDER, RES, {"extra": torch.ones(1)}, "unknown"),
        (FOLDER, RES, {"W_enc": normal(N, D)}, "expected"),
        (FOLDER, RES, {"W_dec": normal(D, N)}, "w_dec is"),
        (FOLDER, RES | {"hf_hook_point_in": 5}, {}, "expected a name"),
        (FOLDER, RES | {"l0": "many"}, {}, "l0 is 'many'"),
        (FOLDER, RES | {"hf_hook_point_in": None}, {}, "missing keys"),
    ],
)
def test_gemma_scope_2_refuses(tmp_path, path, config, change, message):
    tensors = {k: t for k, t in (draw() | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        load(params(tmp_path, path, config, tensors))


def test_a_cross_layer_transcoder_says_what_it_is(tmp_path):
    folder = tmp_path / "clt" / "width_262k_l0_big"
    folder.mkdir(parents=True)
    save_file({"w_dec": normal(N, 3, D)}, folder / "params_layer_0.safetensors")
    with pytest.raises(FormatError, match="cross-layer transcoder"):
        load(tmp_path, "clt/width_262k_l0_big/params_layer_0.safetensors")


def test_examples_beside_the_weights_are_left_alone(tmp_path):
    root = params(tmp_path, FOLDER, RES, draw())
    save_file({"examples": normal(3, 3)}, root / FOLDER / "examples.safetensors")
    params(root, "transcoder/layer_17_width_16k_l0_big", TRANSCODER, draw())
    assert sorted(load_all(root)) == ["mlp_in.17", "resid_post.17"]
