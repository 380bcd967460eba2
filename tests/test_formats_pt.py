"""Families that lie in a `.pt` or `.pth`: OpenAI, Goodfire, qresearch, Qwen Scope, ckkissane,
BatchTopK. dictionary_learning has a file of its own."""

from typing import Any

import pytest
import torch
from pt_cases import (
    ATTENTION,
    BATCH,
    CASES,
    DEEPSEEK,
    LLAMA,
    NEURAL,
    QWEN,
    V5,
    K,
    above,
    agrees,
    agrees_with_case,
    attention_config,
    batch_config,
    compute,
    draw,
    linear,
    openai,
    parameters,
    qwen,
    relu,
    topk,
    write,
)  # fmt: skip
from sae_cases import inputs

from saert.hub.detect import find_saes
from saert.hub.format import FormatError
from saert.hub.load import load


@pytest.mark.parametrize("n", [24, 8], ids=["n>d", "square"])
@pytest.mark.parametrize("name", CASES)
def test_a_family_computes_its_equations(tmp_path, name, n):
    w = draw(n)
    path, how = CASES[name](tmp_path, w)
    x = inputs(40, d_in=8, dtype=torch.float32)
    agrees(load(tmp_path, path), x, compute(w, x, **how))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_half_precision_weights_are_used_as_stored(tmp_path, name, asked):
    w = draw(dtype=torch.bfloat16)
    path, how = CASES[name](tmp_path, w)
    sae = load(tmp_path, path, dtype=asked)
    assert sae.dtype == (asked or torch.bfloat16)
    if "jumprelu" in name:  # the file holds the logarithm, rounded
        how["activate"] = above(w.theta.log().double().exp())
    x = inputs(40, d_in=8, dtype=torch.float32)
    agrees(sae, x, compute(w, x, **how))


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("case", "hookpoint", "base_model"),
    [
        ("openai_v5_topk", "resid_post.6", "gpt2"),
        ("goodfire_8b", "resid_post.19", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen_scope", "resid_post.5", "Qwen/Qwen3-1.7B-Base"),
    ],
)
def test_their_libraries_give_the_same(shared, case, hookpoint, base_model, dtype):
    sae = agrees_with_case(shared / "cases" / case, dtype)
    assert str(sae.hookpoint) == hookpoint
    assert sae.metadata["base_model"] == base_model


# -- what the names and configs say --------------------------------------------------------------

FACTS = {
    "OpenAI 5": ("resid_post.6", "gpt2", {"l0": 4.0}),
    "OpenAI 1": ("resid_post.6", "gpt2", None),
    "Goodfire": ("resid_post.19", "meta-llama/Llama-3.1-8B-Instruct", None),
    "qresearch": ("resid_post.19", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None),
    "Qwen Scope": ("resid_post.5", "Qwen/Qwen3-1.7B-Base", {"l0": 4.0}),
    "ckkissane": ("attn_z.9", "gpt2", None),
    "BatchTopK topk": ("resid_pre.8", "gpt2", {"l0": 4.0}),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_the_checkpoint_says_of_itself(tmp_path, name):
    path, _ = CASES[name](tmp_path, draw())
    sae = load(tmp_path, path)
    found = str(sae.hookpoint), sae.metadata["base_model"], sae.metadata.get("declared")
    assert found == FACTS[name]
    assert sae.metadata["format"] == name.split()[0].replace("Qwen", "Qwen Scope")
    assert not sae.is_transcoder


@pytest.mark.parametrize(
    ("path", "hookpoint"),
    [
        ("resid_delta_attn_v5_128k/autoencoders/0.pt", "attn_out.0"),
        ("resid_post_attn_v5_32k/autoencoders/11.pt", "resid_mid.11"),
        ("resid_delta_mlp/autoencoders/3.pt", "mlp_out.3"),
        ("resid_delta_mlp_v4/autoencoders/3.pt", "mlp_out.3"),
        ("mlp_post_act/autoencoders/5.pt", "mlp_act.5"),
        ("renamed.pt", "None"),
    ],
)
def test_openai_s_locations_are_sites(tmp_path, path, hookpoint):
    assert str(load(write(tmp_path, path, openai(draw()))).hookpoint) == hookpoint


@pytest.mark.parametrize("again", [K, torch.tensor(K)], ids=["beside the tensors", "a tensor"])
def test_openai_s_own_state_dict_is_accepted(tmp_path, again):
    content = openai(draw(), **V5) | {"activation.k": again, "activation.postact_fn": "ReLU"}
    assert load(write(tmp_path, "6.pt", content), dtype=torch.bfloat16).activation.k == K


def test_qwen_scope_s_config_goes_before_the_name(tmp_path):
    config = dict(
        model_type="topk_sae", base_model="Qwen/Qwen3-8B-Base", d_model=8, d_sae=24, k=3,
        num_layers=36, hook_point="resid_mid", dtype="float32",
    )  # fmt: skip
    sae = load(write(tmp_path, QWEN, qwen(draw()), config=config))
    assert (sae.activation.k, sae.metadata["base_model"]) == (3, "Qwen/Qwen3-8B-Base")
    assert str(sae.hookpoint) == "resid_mid.5"


def test_a_batchtopk_without_a_threshold_needs_one(tmp_path):
    w = draw()
    write(tmp_path, BATCH, parameters(w), config=batch_config(w, "batchtopk"))
    with pytest.raises(FormatError, match="stores no threshold.*load\\(…, threshold=0\\)"):
        load(tmp_path)
    x = inputs(40, d_in=8, dtype=torch.float32)
    how = dict(subtract=True, layer_norm=True, b_enc=False)
    agrees(load(tmp_path, threshold=0.4), x, compute(w, x, above(0.4), **how))
    agrees(load(tmp_path, threshold=0), x, compute(w, x, relu, **how))
    with pytest.raises(ValueError, match="threshold='x', expected a number"):
        load(tmp_path, threshold="x")


def test_a_stored_threshold_is_never_rounded(tmp_path):
    content = parameters(draw(), threshold=torch.tensor(0.7001))
    write(tmp_path, BATCH, content, config=batch_config(draw(), "batchtopk"))
    sae = load(tmp_path, dtype=torch.bfloat16)
    assert sae.activation.threshold.item() == torch.tensor(0.7001).item()


def test_batchtopk_s_first_version_could_add_b_enc(tmp_path):
    w = draw()
    config = batch_config(w, "topk", use_encoder_bias=True, l1_warmup_frac=0.01, activation="relu")
    x = inputs(40, d_in=8, dtype=torch.float32)
    sae = load(write(tmp_path, BATCH, parameters(w), config=config))
    agrees(sae, x, compute(w, x, topk(K), subtract=True, layer_norm=True))


# -- detection -----------------------------------------------------------------------------------


def test_siblings_of_every_family_are_told_apart(tmp_path):
    for name in ("OpenAI 5", "Goodfire", "qresearch", "Qwen Scope", "ckkissane", "BatchTopK topk"):
        CASES[name](tmp_path, draw())
    (tmp_path / "README.md").write_text("# SAEs")
    for other in ("optimizer_0.pt", "lr_scheduler.pt", "run/state.pt", "run/rng_state_0.pth"):
        write(tmp_path, other, {"step": 1})
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    found = [one.path for one in find_saes(names)]
    assert sorted(found) == sorted([NEURAL, LLAMA, DEEPSEEK, QWEN, ATTENTION, "run"])
    assert {load(tmp_path, one).metadata["format"] for one in found} == {
        "OpenAI", "Goodfire", "qresearch", "Qwen Scope", "ckkissane", "BatchTopK",
    }  # fmt: skip


def test_a_pt_of_no_family_names_what_it_holds(tmp_path):
    write(tmp_path, "mystery.pt", {"W_in": torch.zeros(2, 2)})
    with pytest.raises(FormatError, match=r"holds tensors \['W_in'\].*none of: OpenAI, Goodfire"):
        load(tmp_path)


# -- refusals ------------------------------------------------------------------------------------


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "an unknown tensor": (NEURAL, openai(draw(), W_skip=torch.ones(8, 8)), {}, "unknown.*W_skip"),
    "a missing tensor": (
        LLAMA, without(linear(draw(), "encoder_linear", "decoder_linear"), "encoder_linear.bias"),
        {}, r"missing \['encoder_linear.bias'\]",
    ),
    "an unknown entry": (DEEPSEEK, linear(draw(), "encoder", "decoder") | {"scale": 2.0}, {},
        r"\['scale'\] beside the tensors"),
    "a transposed encoder": (QWEN, parameters(draw()), {}, r"b_enc is \[24\], expected \[8\]"),
    "a transposed decoder": (QWEN, qwen(draw()) | {"W_dec": draw().W_dec}, {},
        r"W_dec is \[24, 8\], expected \[8, 24\]"),
    "a vector for a matrix": (QWEN, qwen(draw()) | {"W_enc": torch.ones(24)}, {},
        r"W_enc is \[24\], expected a matrix"),
    "integers": (QWEN, qwen(draw()) | {"b_dec": torch.ones(8, dtype=torch.long)}, {}, "b_dec"),
    "NaN": (QWEN, qwen(draw()) | {"b_dec": torch.full((8,), torch.nan)}, {}, "b_dec.*NaN"),
    "another activation": (NEURAL, openai(draw(), activation="Identity"), {},
        "activation 'Identity'.*expected 'ReLU'"),
    "signed top-k": (
        NEURAL,
        openai(draw(), activation="TopK", activation_state_dict={"k": 4, "postact_fn": "Identity"}),
        {}, "Identity.*followed by 'ReLU'",
    ),
    "a tensor for k": (
        NEURAL,
        openai(draw(), activation="TopK", activation_state_dict={"k": torch.tensor(4)}),
        {}, r"activation_state_dict: k is a tensor.*expected a plain value.*k\.item\(\)",
    ),
    "another activation's state": (
        NEURAL, openai(draw(), activation="TopK", activation_state_dict={"q": torch.ones(2)}), {},
        r"holds \['q'\], expected k",
    ),
    "two values of k": (NEURAL, openai(draw(), **V5) | {"activation.k": 5}, {},
        r"k is \['4', '5'\], expected one"),
    "no k": (NEURAL, openai(draw(), activation="TopK"), {}, "k is nowhere"),
    "a fraction for k": (
        NEURAL, openai(draw(), activation="TopK", activation_state_dict={"k": 0.5}), {},
        "k is 0.5, expected an integer",
    ),
    "k without a source": ("layer5.sae.pt", qwen(draw()), {}, "k is unknown"),
    "another Qwen kind": (QWEN, qwen(draw()), {"config": {"k": 4, "model_type": "relu_sae"}},
        "model_type is 'relu_sae'"),
    "an unknown Qwen key": (QWEN, qwen(draw()), {"config": {"k": 4, "norm": "rms"}}, "norm"),
    "a Qwen width": (QWEN, qwen(draw()), {"config": {"k": 4, "d_model": 9}}, "d_model = 9"),
    "more k than latents": (QWEN, qwen(draw()), {"config": {"k": 25}}, "k is 25"),
    "one head": (
        ATTENTION, parameters(draw()),
        {f"{ATTENTION[:-3]}_cfg": attention_config(draw(), concat_heads=False)},
        "concat_heads is False",
    ),
    "an unknown attention key": (
        ATTENTION, parameters(draw()),
        {f"{ATTENTION[:-3]}_cfg": attention_config(draw(), normalization_type="LN")},
        "normalization_type",
    ),
    "an attention width": (
        ATTENTION, parameters(draw()),
        {f"{ATTENTION[:-3]}_cfg": attention_config(draw(), act_size=9)}, "act_size = 9",
    ),
    "another type": (BATCH, parameters(draw()), {"config": batch_config(draw(), "quantile")},
        "sae_type is 'quantile'"),
    "tied weights": (
        BATCH, parameters(draw()), {"config": batch_config(draw(), "topk", tied_weights=True)},
        "tied_weights is True",
    ),
    "gelu": (
        BATCH, parameters(draw()), {"config": batch_config(draw(), "topk", activation="gelu")},
        "activation is 'gelu'",
    ),
    "an early vanilla with a norm": (
        BATCH, parameters(draw()),
        {"config": batch_config(draw(), "vanilla", l1_warmup_frac=0.01)}, "which ignored it",
    ),
    "a stray threshold": (
        BATCH, parameters(draw(), threshold=torch.tensor(0.5)),
        {"config": batch_config(draw(), "topk")}, r"unknown \['threshold'\]",
    ),
    "thresholds of another count": (
        BATCH, parameters(draw(), **{"jumprelu.log_threshold": torch.ones(3)}),
        {"config": batch_config(draw(), "jumprelu")}, r"log_threshold is \[3\], expected \[24\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_read_without_guessing_is_refused(tmp_path, why):
    path, content, configs, message = REFUSED[why]
    write(tmp_path, path, content, **configs)
    with pytest.raises(FormatError, match=message):
        load(tmp_path)
