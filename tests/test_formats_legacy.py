"""Configs that SAELens wrote before version 6: read with their defaults, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import sae_cases
import torch
from sae_cases import D_IN, LATENTS, TRANSFORMS, inputs, make
from safetensors.torch import save_file
from test_formats import rewrite, same_numbers

from saert.activations import ReLU, TopK
from saert.hub.format import FormatError, save
from saert.hub.formats.saelens import CONFIG, WEIGHTS
from saert.hub.load import load
from saert.sae import SAE
from saert.transforms import LayerNorm, NoTransform, UnitNorm


def legacy(folder: Path, sae: SAE, tensors: dict[str, torch.Tensor] | None = None, **config: Any):
    """A checkpoint as SAELens wrote it before version 6, not by code of saert's."""
    names = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    weights = {key: t.detach().contiguous() for key, t in names.items() if t is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights | (tensors or {}), folder / WEIGHTS)
    (folder / CONFIG).write_text(
        json.dumps(
            {
                "d_in": sae.d_in,
                "d_sae": sae.num_latents,
                "dtype": "torch.float32",
                "device": "mps",
                "model_name": "gpt2-small",
                "hook_point": "blocks.6.hook_resid_pre",
                "hook_point_layer": 6,
                "context_size": 128,
            }
            | config
        )
    )


@pytest.mark.parametrize("square", [False, True])
def test_a_legacy_config_has_defaults(tmp_path, square):
    sae = make("relu", dtype=torch.float32, n=D_IN if square else LATENTS)
    legacy(tmp_path, sae)
    loaded, x = load(tmp_path), inputs(6, dtype=torch.float32)
    dense = sae_cases.latents(sae, x)  # standard, ReLU, with b_dec subtracted
    torch.testing.assert_close(loaded.encode(x).to_dense().double(), dense, atol=1e-5, rtol=1e-5)
    assert (str(loaded.hookpoint), loaded.dtype) == ("resid_pre.6", torch.float32)
    facts = {"base_model": "gpt2", "context_size": 128, "hook_name": "blocks.6.hook_resid_pre"}
    assert facts.items() <= loaded.metadata.items()


TRAINED = {  # of jbloom's, Engels' and Marks' configs and of v3 to v5's own classes
    "hook_eval": "NOT_IN_USE", "l1_coefficient": 8e-5, "lr": [4e-4], "use_ghost_grads": False,
    "normalize_sae_decoder": True, "expansion_factor": 4, "b_dec_init_method": "zeros",
    "wandb_project": "x", "sae_lens_version": "3.14.0", "seed": 42, "store_batch_size": 32,
    "training_tokens": 10, "log_to_wandb": True, "checkpoint_path": "c", "lp_norm": 1.0,
    "feature_sampling_method": None, "decoder_heuristic_init": False, "noise_scale": 0.0,
    "hook_point_head_index": None, "finetuning_scaling_factor": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "activation", "transform"),
    [
        ({}, ReLU, NoTransform()),
        (TRAINED, ReLU, NoTransform()),
        ({"activation_fn_str": "relu", "activation_fn_kwargs": {}}, ReLU, NoTransform()),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}}, TopK, NoTransform()),
        (
            {"architecture": "standard", "activation_fn_str": "topk",
             "activation_fn_kwargs": {"k": 5}, "normalize_activations": "layer_norm"},
            TopK, LayerNorm(),
        ),
        ({"architecture": "topk", "activation_fn_kwargs": {"k": 5}}, TopK, NoTransform()),
        ({"normalize_activations": False}, ReLU, NoTransform()),
        ({"uses_scaling_factor": False}, ReLU, NoTransform()),
        ({"normalize_activations": None}, ReLU, NoTransform()),
        ({"normalize_activations": "constant_norm_rescale"}, ReLU, UnitNorm()),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("subtract", [True, False])
def test_legacy_configs_of_every_kind(tmp_path, config, activation, transform, subtract):
    act = "topk" if activation is TopK else "relu"
    name = next(key for key, value in TRANSFORMS.items() if value == transform)
    sae = make(act, name, dtype=torch.float32, subtract_b_dec=subtract)
    legacy(tmp_path, sae, apply_b_dec_to_input=subtract, **config)
    loaded, x = load(tmp_path), inputs(6, dtype=torch.float32)
    assert type(loaded.activation) is activation
    assert loaded.input_transform == transform
    dense = sae_cases.latents(sae, x)
    torch.testing.assert_close(loaded.encode(x).to_dense().double(), dense, atol=1e-4, rtol=1e-4)
    expected = sae_cases.reconstruct(sae, dense, x)
    torch.testing.assert_close(loaded(x).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("act", ["gated", "jumprelu"])
def test_legacy_gated_and_jumprelu(tmp_path, act):
    sae = make(act, dtype=torch.float32)
    extra = {name: t.contiguous() for name, t in sae.activation.named_buffers()}
    legacy(tmp_path, sae, extra, architecture=act, activation_fn_str="relu")
    same = load(tmp_path)
    x = inputs(6, dtype=torch.float32)
    assert same(x).equal(sae(x))


def test_a_legacy_hook_is_found_under_either_name(tmp_path):
    sae = make("relu", dtype=torch.float32)
    legacy(tmp_path / "a", sae, hook_point="blocks.{layer}.hook_mlp_out", hook_point_layer=3)
    assert str(load(tmp_path / "a").hookpoint) == "mlp_out.3"
    legacy(tmp_path / "b", sae, hook_name="blocks.2.attn.hook_z", hook_layer=2)
    rewrite(tmp_path / "b", config=lambda c: [c.pop("hook_point"), c.pop("hook_point_layer")])
    assert str(load(tmp_path / "b").hookpoint) == "attn_z.2"
    legacy(tmp_path / "c", sae, model_from_pretrained_kwargs={"center_writing_weights": True})
    assert load(tmp_path / "c").metadata["reads_centred"] is True


def test_a_legacy_sae_is_written_anew_in_todays_words(tmp_path):
    sae = make("relu", dtype=torch.float32)
    legacy(tmp_path / "old", sae, sae_lens_version="3.14.0")
    loaded = load(tmp_path / "old")
    save(loaded, tmp_path / "new")
    again = load(tmp_path / "new")
    same_numbers(loaded, again)
    assert again.metadata["sae_lens_training_version"] == "3.14.0"
    assert again.metadata["format"] == "SAELens"


@pytest.mark.parametrize("value", [1.0, 1.01])
@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_factors_after_training_are_dropped_if_they_are_ones(tmp_path, name, value):
    sae, x = make("relu", dtype=torch.float32), inputs(5, dtype=torch.float32)
    flag = {"uses_scaling_factor" if name == "scaling_factor" else name: True}
    legacy(tmp_path, sae, {name: torch.full((LATENTS,), value)}, **flag)
    if value == 1:
        assert load(tmp_path)(x).equal(sae(x))
        return
    with pytest.raises(FormatError, match=rf"{name} is not 1 .*1\.01.*multiply the rows of W_dec"):
        load(tmp_path)


def test_a_legacy_scale_that_was_not_folded_is_said_so(tmp_path):
    legacy(tmp_path, make("relu", dtype=torch.float32), normalize_activations=True)
    with pytest.warns(UserWarning, match="scaled by one number"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"l2_coefficient": 1.0}, r"unknown keys \['l2_coefficient'\]"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu'.*expected 'relu'"),
        ({"activation_fn": "topk"}, "'topk' and activation_fn_kwargs {}, expected"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 5, "signed": 1}}, "signed"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2.5}}, "k is 2.5, expected an"),
        ({"architecture": "gated", "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}},
         "'gated' with activation_fn 'topk'"),
        ({"architecture": "topk"}, "'topk' and activation_fn_kwargs {}"),
        ({"architecture": "crosscoder"}, "'crosscoder', expected one of"),
        ({"architecture": "jumprelu"}, r"missing \['threshold'\]"),
        ({"uses_scaling_factor": True}, "no tensor of .* says by what"),
        ({"finetuning_scaling_factor": True}, "no tensor of .* says by what"),
        ({"d_in": 9}, "declares d_in = 9, but the tensors hold 10"),
        ({"d_sae": None}, r"missing keys \['d_sae'\]"),
        ({"normalize_activations": "batch"}, "normalize_activations 'batch', expected"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input is None, expected"),
        ({"metadata": {"model_name": "gpt2"}}, "metadata of SAELens 6.*expected sae_lens_version"),
    ],
    ids=str,
)  # fmt: skip
def test_legacy_configs_that_cannot_be_meant_are_named(tmp_path, config, match):
    legacy(tmp_path, make("relu", dtype=torch.float32), **config)
    with pytest.raises(FormatError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("hookpoint", "model", "centred"),
    [
        ("mlp_out.1", "gpt2-small", True),
        ("attn_z.1", "gpt2-small", False),  # written by nothing whose weights were centred
        ("mlp_in.1", "gpt2-small", False),
        ("resid_post.1", "gemma-2b", False),  # RMSNorm: TransformerLens leaves such models alone
    ],
)
def test_centring_reaches_only_what_it_changed(tmp_path, hookpoint, model, centred):
    legacy(
        tmp_path, make("relu", dtype=torch.float32), model_name=model,
        hook_point=TL_NAMES[hookpoint.partition(".")[0]].format(1),
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )  # fmt: skip
    sae = load(tmp_path)
    assert str(sae.hookpoint) == hookpoint
    assert sae.metadata.get("reads_centred", False) is centred


TL_NAMES = {
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_z": "blocks.{}.attn.hook_z",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "resid_post": "blocks.{}.hook_resid_post",
}
