"""circuit-tracer's transcoders and OpenSAE: their equations, or a refusal; and layouts that are
only recognised."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from scope_cases import agrees, inputs, is_as_its_makers_say, normal
from torch import Tensor

from saert.activations import ReLU, TopK
from saert.hookpoint import Hookpoint
from saert.hub.format import FormatError, save
from saert.hub.load import load, load_all

D, N, K = 12, 40, 6
Tensors = dict[str, Tensor]
Config = dict[str, Any]


# -- circuit-tracer ------------------------------------------------------------------------------

QWEN = dict(
    model_kind="transcoder_set", model_name="Qwen/Qwen3-4B", feature_input_hook="mlp.hook_in",
    feature_output_hook="mlp.hook_out", scan="mwhanna/qwen3-4b-transcoders",
)  # fmt: skip
RUN = {"d_model": {"value": D}, "d_feature": {"value": N}, "act_fn": {"value": "relu"}, "_wandb": 1}
THRESHOLD = "activation_function.threshold"


def draw(n: int = N, d_out: int = D, **more: Tensor) -> Tensors:
    return {
        "W_enc": normal(n, D, by=D**-0.5), "W_dec": normal(n, d_out, seed=1),
        "b_enc": normal(n) / 5, "b_dec": normal(d_out, seed=2), **more,
    }  # fmt: skip


def write(root: Path, tensors: Tensors, config: Config | None = None, run: Config | None = None,
          layer: int = 7, run_name: str = "wandb-config.yaml") -> Path:  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    save_file(tensors, root / f"layer_{layer}.safetensors")
    for name, content in (("config.yaml", config), (run_name, run)):
        if content is not None:
            (root / name).write_text(yaml.safe_dump(content))
    return root


def transcoder(t: Tensors, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """FORMATS section 8, latent by latent in float64."""
    t, x = {name: value.double() for name, value in t.items()}, x.double()
    pre = torch.stack(
        [(x * row).sum(-1) + b for row, b in zip(t["W_enc"], t["b_enc"], strict=True)], dim=1
    )
    above = t.get(THRESHOLD, torch.zeros(()))
    if k is not None:
        above = pre.sort(dim=-1, descending=True).values[:, k : k + 1]
    f = torch.where((pre > above) & (pre > 0), pre, 0)
    y = sum(f[:, i, None] * row for i, row in enumerate(t["W_dec"])) + t["b_dec"]
    return f, y + (torch.stack([t["W_skip"] @ token for token in x]) if "W_skip" in t else 0)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_case_is_read_as_its_makers_say(shared, dtype):
    sae = is_as_its_makers_say(shared, "mwhanna_qwen3", dtype=dtype)
    assert (str(sae.hookpoint), str(sae.target_hookpoint)) == ("mlp_in.7", "mlp_out.7")


@pytest.mark.parametrize("n", [N, D])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "skip", "skip jumprelu"])
def test_circuit_tracer_computes_its_equations(tmp_path, kind, n):
    more, config, k = {}, QWEN, None
    if "skip" in kind:
        more["W_skip"] = normal(D, D, seed=4)
    if "jumprelu" in kind:
        more[THRESHOLD] = normal(n, seed=3).abs() / 2
    if kind == "topk":
        k = K
        config = QWEN | {"activation": "topk", "k": K}
    tensors = draw(n, **more)
    sae, x = load(write(tmp_path, tensors, config)), inputs(D)
    assert not sae.subtract_b_dec
    agrees(sae, x, *transcoder(tensors, x, k))


def test_a_skip_path_may_change_the_width(tmp_path):
    tensors = draw(d_out=D - 3, W_skip=normal(D - 3, D, seed=4))
    sae, x = load(write(tmp_path, tensors, QWEN)), inputs(D)
    agrees(sae, x, *transcoder(tensors, x))


HOOKS = {
    ("mlp.hook_in", "mlp.hook_out"): ("mlp_in.7", "mlp_out.7"),
    ("hook_resid_mid", "hook_mlp_out"): ("resid_mid.7", "mlp_out.7"),
    ("ln2.hook_normalized", "hook_mlp_out"): (None, "mlp_out.7"),
    ("hook_mlp_in", "hook_mlp_out"): (None, "mlp_out.7"),
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_circuit_tracer_is_placed_by_its_config(tmp_path, hooks):
    config = QWEN | dict(zip(("feature_input_hook", "feature_output_hook"), hooks, strict=True))
    sae = load(write(tmp_path, draw(), config), "layer_7.safetensors")
    at = None if sae.hookpoint is None else str(sae.hookpoint)
    assert (at, str(sae.target_hookpoint)) == HOOKS[hooks]
    assert sae.metadata["base_model"] == "Qwen/Qwen3-4B"
    assert "zeroes the latents of the first token" in sae.metadata["note"]
    if at is None:
        assert hooks[0] in sae.metadata["note"]
        assert sae.metadata["hook_name"] == f"blocks.7.{hooks[0]}"


def test_in_gemma_the_mlp_is_not_its_contribution(tmp_path):
    sae = load(write(tmp_path, draw(), QWEN | {"model_name": "google/gemma-3-1b-pt"}))
    assert sae.target_hookpoint == Hookpoint.parse("layers.7.mlp:out")


@pytest.mark.parametrize("run_name", ["wandb-config.yaml", "wanb-config.yaml"])
@pytest.mark.parametrize("repo", ["qwen3-14b-transcoders-lowl0", "my-copy"])
def test_a_training_run_stands_in_for_a_config(tmp_path, repo, run_name):
    sae = load(write(tmp_path / repo, draw(), run=RUN, run_name=run_name))
    assert (str(sae.hookpoint), str(sae.target_hookpoint)) == ("mlp_in.7", "mlp_out.7")
    model = None if repo == "my-copy" else "Qwen/Qwen3-14B"
    assert sae.metadata.get("base_model") == model


def test_names_are_read_in_either_case_and_a_card_s_keys_are_known(tmp_path):
    run = RUN | {"act_fn": {"value": "ReLU"}}
    sae = load(write(tmp_path, draw(), QWEN | {"tags": ["x"], "language": "en"}, run))
    assert isinstance(sae.activation, ReLU)


def test_the_top_k_that_circuit_tracer_has_in_its_code(tmp_path):
    config = QWEN | {"activation": "topk"}
    root = write(tmp_path / "crv-8b-instruct-transcoders", draw(n=130), config)
    sae = load(root)
    assert isinstance(sae.activation, TopK)
    assert sae.activation.k == 128
    assert "negative values" in sae.metadata["note"]
    with pytest.raises(FormatError, match="k is None"):
        load(write(tmp_path / "another", draw(), config))


def test_several_layers_share_a_config_above_them(tmp_path):
    for layer in (0, 11):
        write(tmp_path / "sets" / "big", draw(), layer=layer)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(QWEN))
    (tmp_path / "README.md").write_text("words")
    found = load_all(tmp_path)
    assert {at: str(sae.target_hookpoint) for at, sae in found.items()} == {
        "mlp_in.0": "mlp_out.0", "mlp_in.11": "mlp_out.11",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "run", "change", "message"),
    [
        (None, None, {}, "no config.yaml"),
        (QWEN | {"model_kind": "cross_layer_transcoder"}, None, {}, "cross-layer"),
        (QWEN | {"scale": 2}, None, {}, r"unknown keys \['scale'\]"),
        ({"model_name": "x"}, None, {}, "missing keys"),
        (QWEN, RUN | {"d_model": {"value": D + 1}}, {}, "d_model"),
        (QWEN, RUN | {"act_fn": {"value": "gelu"}}, {}, "activation 'gelu'"),
        (None, RUN | {"act_fn": {"value": "topk"}}, {}, "no config.yaml says of how many"),
        (QWEN | {"feature_input_hook": "mlp"}, None, {}, "feature_input_hook is 'mlp'"),
        (QWEN | {"feature_output_hook": None}, None, {}, "feature_output_hook is None"),
        (QWEN | {"activation": "relu"}, None, {THRESHOLD: torch.ones(N)}, "activation 'relu'"),
        (QWEN | {"activation": "jumprelu"}, None, {}, "threshold is missing"),
        (QWEN | {"feature_output_hook": "hook_nowhere"}, None, {}, "a transcoder that writes"),
        (QWEN, None, {"b_enc": None}, "missing"),
        (QWEN, None, {"W_gate": torch.ones(1)}, "unknown"),
        (QWEN, None, {"W_enc": normal(D, N)}, "W_dec is"),
        (QWEN, None, {"W_dec": normal(D, N)}, "W_dec is"),
        (QWEN, None, {"W_skip": normal(D, D + 1)}, "W_skip is"),
        (QWEN, None, {THRESHOLD: torch.ones(N + 1)}, "threshold is"),
    ],
)
def test_circuit_tracer_refuses(tmp_path, config, run, change, message):
    tensors = {k: t for k, t in (draw() | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        load(write(tmp_path, tensors, config, run))


# -- OpenSAE -------------------------------------------------------------------------------------

OPEN = dict(
    architectures=["OpenSae"], model_type="", transformers_version="4.44.2", torch_dtype="bfloat16",
    hidden_size=D, feature_size=N, input_normalize=True, normalize_shift_back=True,
    input_normalize_eps=0.01, input_hookpoint="layers.8", output_hookpoint="layers.8",
    model_name="meta-llama/meta-llama-3.1-8b", activation="topk", k=K, normalize_decoder=True,
    multi_topk=None, decoder_impl="triton", auxk_alpha=0.03, l1_coef=None,
)  # fmt: skip


def open_sae(folder: Path, config: Config, n: int = N, name: str = "model.safetensors",
             **change: Tensor | None) -> Path:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {names.get(k, k): t for k, t in draw(n).items()} | change
    tensors = {k: t for k, t in tensors.items() if t is not None}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(t: Tensors, config: Config, x: Tensor) -> tuple[Tensor, Tensor]:
    """OpenSAE's encode and decode, token by token in float64, always shifted back."""
    t = {name: value.double() for name, value in t.items()}
    latents, output = [], []
    for token in x.double():
        mean, scale = torch.zeros(()), torch.ones(())
        if config["input_normalize"]:
            mean = token.sum() / D
            variance = ((token - mean) ** 2).sum() / (D - 1)
            scale = variance.sqrt() + config["input_normalize_eps"]
        pre = t["W_enc"] @ ((token - mean) / scale - t["b_dec"]) + t["b_enc"]
        level = config.get("jumprelu_theta", 0)
        if config["activation"] == "topk":
            level = max(pre.sort(descending=True).values[config["k"]], torch.zeros(()))
        latents.append(torch.where(pre > level, pre, 0))
        output.append((t["W_dec"].T @ latents[-1] + t["b_dec"]) * scale + mean)
    return torch.stack(latents), torch.stack(output)


@pytest.mark.parametrize("n", [N, D])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "change",
    [{}, {"normalize_shift_back": False}, {"input_normalize": False},
     {"activation": "jumprelu", "jumprelu_theta": 0.4}],
)  # fmt: skip
def test_open_sae_computes_its_equations(tmp_path, change, name, n):
    config = OPEN | change | {"feature_size": n}
    sae = load(open_sae(tmp_path, config, n, name))
    x = 0.1 * inputs(D) + 0.3  # so small that eps matters
    agrees(sae, x, *opened(draw(n), config, x))
    assert str(sae.hookpoint) == "layers.8"
    assert not sae.is_transcoder
    assert sae.metadata["base_model"] == "meta-llama/meta-llama-3.1-8b"
    noted = "normalize_shift_back is false" in sae.metadata.get("note", "")
    assert noted == (config["input_normalize"] and not config["normalize_shift_back"])


def test_open_sae_survives_saving(tmp_path):
    sae, x = load(open_sae(tmp_path / "a", OPEN)), 0.1 * inputs(D)
    save(sae, tmp_path / "b")
    assert load(tmp_path / "b")(x).equal(sae(x))


def test_an_open_transcoder_writes_as_it_decodes(tmp_path):
    hooks = {"output_hookpoint": "layers.9", "normalize_shift_back": False}
    sae, x = load(open_sae(tmp_path, OPEN | hooks)), inputs(D)
    assert str(sae.target_hookpoint) == "layers.9"
    latents, _ = opened(draw(), OPEN, x)
    agrees(sae, x, latents, latents @ draw()["W_dec"].double() + draw()["b_dec"])
    with pytest.raises(FormatError, match="mean and std"):
        load(open_sae(tmp_path, OPEN | {"output_hookpoint": "layers.9"}))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"num_experts": 4}, {"router.weight": normal(4, D)}, "num_experts is 4"),
        ({}, {"router.weight": normal(4, D)}, "unknown"),
        ({}, {"encoder.bias": None}, "missing"),
        ({}, {"W_dec": normal(D, N)}, "W_dec is"),
        ({}, {"encoder.weight": normal(D, N)}, "expected"),
        ({"activation": "relu"}, {}, "activation is 'relu'"),
        ({"k": None}, {}, "k is None"),
        ({"activation": "jumprelu"}, {}, "jumprelu_theta is None"),
        ({"hidden_size": D + 1}, {}, "hidden_size"),
        ({"feature_size": N + 1}, {}, "feature_size"),
        ({"input_normalize_eps": "small"}, {}, "input_normalize_eps"),
        ({"rescale": True}, {}, "unknown keys"),
        ({"input_hookpoint": None}, {}, "it reads None"),
        ({"output_hookpoint": 8}, {}, "writes 8, expected names"),
        ({"output_hookpoint": "resid_past.8"}, {}, "did you mean resid_post"),
    ],
)
def test_open_sae_refuses(tmp_path, config, change, message):
    with pytest.raises(FormatError, match=message):
        load(open_sae(tmp_path, OPEN | config, **change))


def test_open_sae_without_an_output_hookpoint_writes_what_it_reads(tmp_path):
    sae = load(open_sae(tmp_path, OPEN | {"output_hookpoint": None}))
    assert str(sae.hookpoint) == "layers.8"
    assert not sae.is_transcoder
    assert sae.metadata["hook_name"] == "layers.8"


def test_a_sharded_open_sae_says_so(tmp_path):
    for number in (1, 2):
        open_sae(tmp_path, OPEN, name=f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(FormatError, match=r"sharded.*max_shard_size"):
        load(tmp_path)


def test_a_language_model_is_no_sae(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"wte.weight": normal(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"wte\.weight.*none of: OpenSAE"):
        load(tmp_path)


# -- recognised, to be refused -------------------------------------------------------------------


def test_cross_layer_transcoders_say_what_they_are(tmp_path):
    for layer in (0, 1):
        save_file({f"W_enc_{layer}": normal(N, D)}, tmp_path / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": normal(N, 2, D)}, tmp_path / f"W_dec_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(QWEN))
    with pytest.raises(FormatError, match="the sum of its decoders reconstructs no layer"):
        load(tmp_path, "W_enc_1.safetensors")
    with pytest.raises(FileNotFoundError, match="no SAE at 'W_dec_1.safetensors'"):
        load(tmp_path, "W_dec_1.safetensors")


def test_temporal_saes_say_what_they_are(tmp_path):
    (tmp_path / "conf.yaml").write_text("sae: {exp_factor: 4}")
    save_file({"D": normal(N, D), "E": normal(N, D)}, tmp_path / "latest_ckpt.safetensors")
    with pytest.raises(FormatError, match="temporal SAE"):
        load(tmp_path)
