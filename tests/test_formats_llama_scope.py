"""OpenMOSS' checkpoints (Llama Scope, R1-Distill, llamascopium): their equations, or a refusal."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scope_cases import agrees, inputs, is_as_its_makers_say, normal
from torch import Tensor

from saert.activations import BatchTopK, ReLU, TopK
from saert.hub.format import FormatError
from saert.hub.load import load, load_all
from saert.sae import SAE

D, N = 12, 40
NORMS = {"in": 6.0, "out": 6.0}
READS = "blocks.15.hook_resid_post"
Tensors = dict[str, Tensor]
Config = dict[str, Any]


def draw(n: int = N, d_out: int = D) -> Tensors:
    """W [n, d_in], b, V [n, d_out] with rows far from unit norm, c; log_θ [n]."""
    return {
        "W": normal(n, D, by=D**-0.5), "b": normal(n) / 5,
        "V": normal(n, d_out, seed=1) * (0.2 + normal(n, 1, seed=2).abs()),
        "c": normal(d_out, seed=3), "log_θ": normal(n, seed=4) / 4 - 1.5,
    }  # fmt: skip


def openmoss(t: Tensors, config: Config, x: Tensor, norms: Config) -> tuple[Tensor, Tensor]:
    """Latents and output of FORMATS section 4, token by token, in float64."""
    t, x = {name: value.double() for name, value in t.items()}, x.double()
    s_in = s_out = unit = torch.ones(len(x), dtype=torch.float64)
    if config["norm_activation"] == "dataset-wise":
        s_in = s_in * math.sqrt(D) / norms["in"]
        unit = s_out = s_out * math.sqrt(t["V"].shape[1]) / norms["out"]  # of the 2024 θ
    elif config["norm_activation"] == "token-wise":
        s_in = s_out = math.sqrt(D) / x.norm(dim=-1)
    latents, output = [], []
    length = t["V"].norm(dim=1) if config["sparsity_include_decoder_norm"] else torch.ones(1)
    for token, a, z, θ_unit in zip(x, s_in, s_out, unit, strict=True):
        read = token * a
        if config["apply_decoder_bias_to_pre_encoder"]:
            read = read - t["c"]
        pre = t["W"] @ read + t["b"]
        score = pre * length
        if config["act_fn"] == "relu":
            keep = pre > 0
        elif config["act_fn"] == "topk":
            keep = (score >= score.sort().values[-config["top_k"]]) & (pre > 0)
        else:
            per_latent = "log_θ" in t and "jump_relu_threshold" not in config
            θ = t["log_θ"].exp() if per_latent else config["jump_relu_threshold"] * θ_unit
            keep = score > θ
        latents.append(torch.where(keep, pre, 0))
        output.append((t["V"].T @ latents[-1] + t["c"]) / z)
    return torch.stack(latents), torch.stack(output)


BASE: Config = dict(
    hook_point_in=READS, hook_point_out=READS, use_decoder_bias=True,
    apply_decoder_bias_to_pre_encoder=False, d_model=D, act_fn="jumprelu",
    norm_activation="dataset-wise", sparsity_include_decoder_norm=True, use_glu_encoder=False,
    top_k=7, dtype="torch.bfloat16", device="cuda:0",
)  # fmt: skip
TRANSCODES = dict(hook_point_in="blocks.8.mlp.hook_in", hook_point_out="blocks.8.hook_mlp_out")
VARIANTS: list[Config] = [
    {},
    {"sparsity_include_decoder_norm": False},
    {"apply_decoder_bias_to_pre_encoder": True},
    {"act_fn": "relu"},
    {"act_fn": "topk"},
    {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    {"norm_activation": "inference"},
    {"norm_activation": "token-wise"},
    TRANSCODES,
    TRANSCODES | {"sparsity_include_decoder_norm": False},
    TRANSCODES | {"apply_decoder_bias_to_pre_encoder": True},
    TRANSCODES | {"act_fn": "topk"},
    TRANSCODES | {"act_fn": "relu", "norm_activation": "inference"},
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(str(one) for one in v.values()) or "plain"
)


def norms_of(variant: Config) -> dict[str, float]:
    return {"in": 5.0, "out": 2.5} if "hook_point_out" in variant else NORMS


# -- 2024 ----------------------------------------------------------------------------------------

PLAIN = BASE | dict(
    jump_relu_threshold=0.3, dataset_average_activation_norm=NORMS, d_sae=N, expansion_factor=8,
    lp=1, tp_size=1,
)  # fmt: skip
FOLDER = "Llama3_1-8B-Base-L15R-8x"


def write(root: Path, config: Config, tensors: Tensors, folder: str = FOLDER) -> Path:
    (root / folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    names = {"W": "encoder.weight", "b": "encoder.bias", "V": "decoder.weight", "c": "decoder.bias"}
    stored = {
        names.get(k, k): (t.T if k == "V" else t).contiguous()
        for k, t in tensors.items() if k != "log_θ"
    }  # fmt: skip
    save_file(stored, root / folder / "checkpoints" / "final.safetensors")
    (root / folder / "hyperparams.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("latents", ["normalised", "raw"])
def test_the_case_is_read_as_its_makers_say(shared, dtype, latents):
    expected = "latents_openmoss_inference" if latents == "raw" else "latents"
    sae = is_as_its_makers_say(
        shared, "llama_scope_lxr_decnorm", expected, dtype=dtype, latents=latents
    )
    assert (str(sae.hookpoint), sae.metadata["base_model"]) == (
        "resid_post.15",
        "meta-llama/Llama-3.1-8B",
    )


@variants
@pytest.mark.parametrize("n", [N, D])
def test_llama_scope_computes_its_equations(tmp_path, variant, n):
    norms = norms_of(variant)
    config = PLAIN | variant | {"dataset_average_activation_norm": norms, "d_sae": n}
    tensors = draw(n)
    sae = load(write(tmp_path, config, tensors))
    x = 2 * inputs(D)
    agrees(sae, x, *openmoss(tensors, config, x, norms))


def release(config: Config, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """The release code's own way: scales and decoder norms go into the weights, then θ compares."""
    t = {name: value.double() for name, value in tensors.items()}
    norms = config["dataset_average_activation_norm"]
    s_in, s_out = (math.sqrt(D) / norms[side] for side in ("in", "out"))
    W, b, V, c = t["W"], t["b"] / s_in, t["V"] * s_in / s_out, t["c"] / s_out
    norm = V.norm(dim=1)
    pre = x.double() @ (W * norm[:, None]).T + b * norm
    latents = pre * (pre > config["jump_relu_threshold"])
    return latents, latents @ (V / norm[:, None]) + c


@pytest.mark.parametrize("variant", [{}, TRANSCODES])
def test_raw_latents_are_the_release_codes(tmp_path, variant):
    config = PLAIN | variant | {"dataset_average_activation_norm": norms_of(variant)}
    root, x = write(tmp_path, config, draw()), 2 * inputs(D)
    latents, output = release(config, draw(), x)
    raw = load(root, latents="raw")
    agrees(raw, x, latents, output)
    assert raw.is_transcoder == bool(variant)
    agrees(load(root), x, openmoss(draw(), config, x, norms_of(variant))[0], output)


@pytest.mark.parametrize("act_fn", ["relu", "topk"])
def test_raw_latents_of_other_activations(tmp_path, act_fn):
    config = PLAIN | {"act_fn": act_fn}
    x = 2 * inputs(D)
    latents, output = openmoss(draw(), config, x, NORMS)
    scale = draw()["V"].double().norm(dim=1) * NORMS["out"] / math.sqrt(D)
    agrees(load(write(tmp_path, config, draw()), latents="raw"), x, latents * scale, output)


def test_raw_latents_of_an_unweighted_gate(tmp_path):
    config = PLAIN | {"sparsity_include_decoder_norm": False}
    x = 2 * inputs(D)
    latents, output = openmoss(draw(), config, x, NORMS)
    scale = draw()["V"].double().norm(dim=1) * NORMS["out"] / math.sqrt(D)
    agrees(load(write(tmp_path, config, draw()), latents="raw"), x, latents * scale, output)


def test_a_latent_that_writes_nothing_never_fires(tmp_path):
    tensors = draw()
    tensors["V"][3] = 0
    tensors["b"][3] = 50.0
    root, x = write(tmp_path, PLAIN, tensors), 2 * inputs(D)
    for latents in ("normalised", "raw"):
        found = load(root, latents=latents).encode(x).to_dense()
        assert found.isfinite().all()
        assert not found[:, 3].any()


def test_one_hook_with_two_norms(tmp_path):
    norms = {"in": 6.0, "out": 4.0}
    config = PLAIN | {"dataset_average_activation_norm": norms}
    x = 2 * inputs(D)
    agrees(load(write(tmp_path, config, draw())), x, *openmoss(draw(), config, x, norms))


def test_a_transcoder_may_change_the_width(tmp_path):
    config = PLAIN | TRANSCODES | {"dataset_average_activation_norm": norms_of(TRANSCODES)}
    tensors, x = draw(d_out=D - 4), 2 * inputs(D)
    sae = load(write(tmp_path, config, tensors))
    agrees(sae, x, *openmoss(tensors, config, x, norms_of(TRANSCODES)))
    assert (str(sae.hookpoint), str(sae.target_hookpoint)) == ("mlp_in.8", "mlp_out.8")


@pytest.mark.parametrize("variant", [{}, TRANSCODES])
def test_stored_dtypes_are_kept_where_nothing_is_rescaled(tmp_path, variant):
    config = PLAIN | variant | {"dataset_average_activation_norm": norms_of(variant)}
    tensors = {k: t.bfloat16() for k, t in draw().items()}
    root, x = write(tmp_path, config, tensors), 2 * inputs(D)
    sae = load(root)
    assert {p.dtype for p in sae.parameters()} == {torch.float32 if variant else torch.bfloat16}
    agrees(sae, x, *openmoss(tensors, config, x, norms_of(variant)))
    assert {p.dtype for p in load(root, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_transcoder_that_reads_the_unweighted_norm_says_so(tmp_path):
    hooks = TRANSCODES | {"hook_point_in": "blocks.8.ln2.hook_normalized"}
    sae = load(write(tmp_path, PLAIN | hooks, draw()))
    assert sae.hookpoint is None
    assert str(sae.target_hookpoint) == "mlp_out.8"
    assert "resid_mid.8 over its own RMS" in sae.metadata["note"]


def test_the_model_is_in_lm_config_or_in_the_name(tmp_path):
    root = write(tmp_path, PLAIN, draw())
    assert load(root).metadata["base_model"] == "meta-llama/Llama-3.1-8B"
    (root / FOLDER / "lm_config.json").write_text('{"model_name": "my/model"}')
    assert load(root).metadata["base_model"] == "my/model"
    write(tmp_path / "b", PLAIN, draw(), "one")
    assert "base_model" not in load(tmp_path / "b").metadata


def test_several_are_listed_among_other_files(tmp_path):
    for layer in (3, 15):
        hooks = {key: f"blocks.{layer}.hook_mlp_out" for key in ("hook_point_in", "hook_point_out")}
        write(tmp_path, PLAIN | hooks, draw(), f"Llama3_1-8B-Base-L{layer}M-8x")
    (tmp_path / "README.md").write_text("words")
    assert sorted(load_all(tmp_path)) == ["mlp_out.15", "mlp_out.3"]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"use_glu_encoder": True}, {}, "gated linear encoder"),
        ({}, {"encoder_glu.weight": normal(N, D)}, "gated linear encoder"),
        ({"act_fn": "batchtopk"}, {}, "act_fn 'batchtopk'"),
        ({"norm_activation": "batch-wise"}, {}, "whatever batch"),
        ({"norm_activation": "layer"}, {}, "norm_activation"),
        (TRANSCODES | {"norm_activation": "token-wise"}, {}, "target's own norm"),
        ({"dataset_average_activation_norm": {}}, {}, "average norms"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}}, {}, "average norms"),
        (TRANSCODES | {"dataset_average_activation_norm": {"in": 2.0}}, {}, "average norms"),
        ({"jump_relu_threshold": -0.5}, {}, "jump_relu_threshold"),
        ({"jump_relu_threshold": None}, {}, "jump_relu_threshold"),
        ({"act_fn": "topk", "top_k": 0}, {}, "top_k"),
        ({"sparsity_include_decoder_norm": "yes"}, {}, "sparsity_include_decoder_norm"),
        ({"temperature": 2}, {}, r"unknown keys \['temperature'\]"),
        ({"d_sae": N + 1}, {}, "d_sae"),
        ({"d_model": D + 1}, {}, "d_model"),
        ({}, {"b": None}, "missing"),
        ({"use_decoder_bias": False}, {}, "unknown"),
        ({}, {"extra": torch.ones(1)}, "unknown"),
        ({}, {"W": normal(D, N)}, "disagree"),
        ({}, {"V": normal(D, N)}, "disagree"),
        ({}, {"b": torch.ones(D)}, "encoder.bias is"),
        ({}, {"V": normal(N, D - 1), "c": normal(D - 1)}, "reads width"),
        ({"hook_point_out": "blocks.15.hook_nowhere"}, {}, "a transcoder that writes"),
        ({"hook_point_in": 3}, {}, "names of hooks"),
    ],
)
def test_llama_scope_refuses(tmp_path, config, change, message):
    tensors = {k: t for k, t in (draw() | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        load(write(tmp_path, PLAIN | config, tensors))


@pytest.mark.parametrize("key", ["act_fn", "norm_activation", "sparsity_include_decoder_norm"])
def test_llama_scope_guesses_nothing_that_is_missing(tmp_path, key):
    config = {name: value for name, value in PLAIN.items() if name != key}
    with pytest.raises(FormatError, match=rf"missing keys \['{key}'\]"):
        load(write(tmp_path, config, draw()))


def test_raw_latents_need_a_dataset_wise_norm(tmp_path):
    with pytest.raises(FormatError, match="'token-wise'"):
        load(write(tmp_path, PLAIN | {"norm_activation": "token-wise"}, draw()), latents="raw")
    with pytest.raises(ValueError, match="latents='other'"):
        load(write(tmp_path, PLAIN, draw()), latents="other")
    plain = {"act_fn": "topk", "sparsity_include_decoder_norm": False}
    with pytest.raises(FormatError, match="no equivalent"):
        load(write(tmp_path, PLAIN | plain, draw()), latents="raw")


# -- R1-Distill and llamascopium -----------------------------------------------------------------

LEARNED = BASE | dict(sae_type="sae", strict_loading=True)
KINDS = {
    "Llama Scope R1": (
        {"W": "encoder.weight", "b": "encoder.bias", "V": "decoder.weight", "c": "decoder.bias",
         "log_θ": "log_jumprelu_threshold"},
        "V",
    ),
    "llamascopium": (
        {"W": "W_E", "b": "b_E", "V": "W_D", "c": "b_D",
         "log_θ": "activation_function.log_jumprelu_threshold"},
        "W",
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def store(
    folder: Path, kind: str, config: Config, tensors: Tensors, norms: dict[str, float]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names, transposed = KINDS[kind]
    kept = {k: t for k, t in tensors.items() if k != "log_θ" or config.get("act_fn") == "jumprelu"}
    stored = {
        names.get(k, k): (t.T if k == transposed else t).contiguous() for k, t in kept.items()
    }
    for side, norm in norms.items():
        stored[f"dataset_average_activation_norm.{config[f'hook_point_{side}']}"] = torch.tensor(
            norm
        )
    save_file(stored, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@kinds
@variants
@pytest.mark.parametrize("n", [N, D])
def test_learned_thresholds_are_in_normalised_units(tmp_path, kind, variant, n):
    norms = norms_of(variant)
    config = LEARNED | variant | {"expansion_factor": n / D}
    tensors, x = draw(n), 2 * inputs(D)
    sae = load(store(tmp_path, kind, config, tensors, norms))
    agrees(sae, x, *openmoss(tensors, config, x, norms))
    assert sae.metadata["format"] == kind


def place(sae: SAE) -> tuple[str, str | None, Any]:
    target = None if sae.target_hookpoint is None else str(sae.target_hookpoint)
    return str(sae.hookpoint), target, sae.metadata.get("base_model")


def test_they_are_placed_by_config_and_repo(tmp_path):
    r1 = tmp_path / "Llama-Scope-R1-Distill"
    store(r1 / "800M-Slimpajama-0-OpenR1-Math-220k/L15R", "Llama Scope R1", LEARNED, draw(), NORMS)
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert place(load(r1)) == ("resid_post.15", None, model)
    two = tmp_path / "Llama-Scope-2-Qwen3-1.7B"
    config = LEARNED | TRANSCODES
    store(two / "transcoder/8x/k128/layer8", "llamascopium", config, draw(), norms_of(TRANSCODES))
    assert place(load(two)) == ("mlp_in.8", "mlp_out.8", "Qwen/Qwen3-1.7B")


def test_a_batchtopk_dictionary_needs_a_threshold(tmp_path):
    config = LEARNED | {"act_fn": "batchtopk"}
    folder = store(tmp_path, "llamascopium", config, draw(), NORMS)
    with pytest.raises(FormatError, match="threshold=0.5"):
        load(folder)
    sae, x = load(folder, threshold=0.25), 2 * inputs(D)
    assert isinstance(sae.activation, BatchTopK)
    same = LEARNED | {"norm_activation": "dataset-wise"}
    constant = draw() | {"log_θ": torch.full((N,), 0.25).log()}
    agrees(sae, x, *openmoss(constant, same, x, NORMS))


@pytest.mark.parametrize("kind", ["clt", "crosscoder", "lorsa", "molt", "mixcoder"])
def test_other_dictionaries_say_what_they_are(tmp_path, kind):
    store(tmp_path, "llamascopium", LEARNED | {"sae_type": kind}, draw(), NORMS)
    with pytest.raises(FormatError, match=f"sae_type '{kind}'"):
        load(tmp_path)
    save_file({"W_Q": normal(3, D)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=f"sae_type '{kind}'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "config", "change", "message"),
    [
        ("llamascopium", {}, {"W_E_glu": normal(D, N)}, "gated linear encoder"),
        ("llamascopium", {"act_fn": "layertopk"}, {}, "act_fn 'layertopk'"),
        ("llamascopium", {"expansion_factor": 2}, {}, "expansion_factor"),
        ("llamascopium", {"expansion_factor": "big"}, {}, "expansion_factor"),
        ("llamascopium", {"new": 1}, {}, "unknown keys"),
        ("llamascopium", {"norm_activation": "batch-wise"}, {}, "whatever batch"),
        ("llamascopium", {}, {"log_θ": None}, "missing"),
        ("llamascopium", {}, {"log_θ": torch.zeros(N - 1)}, "log_jumprelu_threshold is"),
        ("llamascopium", {"act_fn": "relu"}, {"W": normal(D, N)}, "disagree"),
        ("Llama Scope R1", {}, {"V": normal(D, N)}, "disagree"),
        ("Llama Scope R1", {}, {"log_θ": None}, "missing"),
        ("Llama Scope R1", {}, {"extra": torch.ones(1)}, "unknown"),
        ("Llama Scope R1", {"sae_type": "crosscoder"}, {}, "several activations"),
        ("Llama Scope R1", {"new": 1}, {}, "unknown keys"),
    ],
)
def test_they_refuse(tmp_path, kind, config, change, message):
    tensors = {k: t for k, t in (draw() | change).items() if t is not None}
    with pytest.raises(FormatError, match=message):
        load(store(tmp_path, kind, LEARNED | config, tensors, NORMS))


@kinds
def test_a_dataset_wise_norm_has_to_be_there(tmp_path, kind):
    with pytest.raises(FormatError, match="average norms"):
        load(store(tmp_path, kind, LEARNED, draw(), {}))
    plain = load(store(tmp_path, kind, LEARNED | {"norm_activation": "inference"}, draw(), NORMS))
    assert not plain.input_transform.needs_input  # a norm that is stored, and not used


def test_plain_activations(tmp_path):
    root = store(tmp_path, "llamascopium", LEARNED | {"act_fn": "topk"}, draw(), NORMS)
    sae = load(root)
    assert isinstance(sae.activation, TopK)
    assert sae.activation.k == 7
    assert sae.select_by_decoder_norm
    root = store(tmp_path, "llamascopium", LEARNED | {"act_fn": "relu"}, draw(), NORMS)
    assert isinstance(load(root).activation, ReLU)
