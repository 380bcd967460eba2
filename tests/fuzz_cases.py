"""Small valid checkpoints of every family, and ways to break files, configs and tensors."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

D, N, K = 6, 12, 3
Files = dict[str, Any]  # path -> a config, or tensors and what a .pt holds beside them


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


W, V, B, C, THETA = normal(N, D), normal(N, D) + 0.1, normal(N), normal(D), normal(N).abs()
LOG = THETA.log()
ROWS = {"encoder.weight": W, "encoder.bias": B, "W_dec": V, "b_dec": C}
COLUMNS = {"W_enc": W.T, "W_dec": V, "b_enc": B, "b_dec": C}
LINEAR = {"encoder.weight": W, "encoder.bias": B, "decoder.weight": V.T}
OPENMOSS = dict(
    hook_point_in="blocks.5.hook_resid_post", hook_point_out="blocks.5.hook_resid_post",
    use_decoder_bias=True, apply_decoder_bias_to_pre_encoder=False, d_model=D, act_fn="jumprelu",
    sparsity_include_decoder_norm=True, use_glu_encoder=False, top_k=K, dtype="torch.bfloat16",
    norm_activation="dataset-wise",
)  # fmt: skip
NORM = "dataset_average_activation_norm"
MEASURED = {f"{NORM}.blocks.5.hook_resid_post": torch.tensor(6.0)}
LEARNED = OPENMOSS | dict(sae_type="sae", expansion_factor=N / D)


def saelens(architecture: str, **more: Any) -> dict[str, Any]:
    metadata = dict(
        sae_lens_version="6.54.12", model_name="gpt2-small", hook_name="blocks.6.hook_resid_post"
    )
    return dict(
        architecture=architecture, d_in=D, d_sae=N, dtype="float32", device="cpu",
        apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
        metadata=metadata,
    ) | more  # fmt: skip


def trainer(kind: str) -> dict[str, Any]:
    settings = dict(
        dict_class=kind,
        activation_dim=D,
        dict_size=N,
        k=K,
        layer=12,
        lm_name="google/gemma-2-2b",
        submodule_name="resid_post_layer_12",
    )
    return {"trainer": settings, "buffer": {"d_submodule": D, "io": "out"}}


# family, and where names say something -> the repo's name and its files
SEEDS: dict[str, tuple[str, Files]] = {
    "SAELens": ("saes", {
        "a/cfg.json": saelens("jumprelu"),
        "a/sae_weights.safetensors": COLUMNS | {"threshold": THETA},
    }),
    "SAELens, topk": ("saes", {
        "cfg.json": saelens("topk", k=K, rescale_acts_by_decoder_norm=True),
        "sae_weights.safetensors": COLUMNS,
    }),
    "SAELens, own": ("saes", {
        "cfg.json": saelens("saert", d_out=D, saert=dict(
            activation="topk", k=K, W_skip=False, input_transform={"kind": "mean_centre"},
            select_by_decoder_norm=True,
        )),
        "sae_weights.safetensors": COLUMNS,
    }),
    "SAELens before 6": ("GPT2-Small-SAEs", {
        "blocks.6.hook_resid_pre/cfg.json": dict(
            d_in=D, d_sae=N, hook_point="blocks.6.hook_resid_pre", hook_point_layer=6,
            model_name="gpt2-small", context_size=128, dtype="torch.float32",
        ),
        "blocks.6.hook_resid_pre/sae_weights.safetensors": COLUMNS,
    }),
    "sparsify": ("sae-pythia-70m-32k", {
        "layers.3/cfg.json": dict(
            activation="topk", expansion_factor=2, normalize_decoder=True, num_latents=0, k=K,
            multi_topk=False, skip_connection=False, transcode=False, d_in=D,
        ),
        "layers.3/sae.safetensors": ROWS,
        "config.json": {"model": "EleutherAI/pythia-70m"},
    }),
    "dictionary_learning": ("saes", {
        "resid_post_layer_12/trainer_0/ae.pt": LINEAR
        | {"b_dec": C, "k": torch.tensor(K), "threshold": torch.tensor(0.5)},
        "resid_post_layer_12/trainer_0/config.json": trainer("BatchTopKSAE"),
    }),
    "dictionary_learning, gated": ("saes", {
        "t/ae.pt": {"encoder.weight": W, "decoder.weight": V.T, "decoder_bias": C, "r_mag": B,
                    "gate_bias": B, "mag_bias": LOG},
        "t/config.json": trainer("GatedAutoEncoder"),
    }),
    "BatchTopK": ("run", {
        "sae.pt": COLUMNS,
        "config.json": dict(
            sae_type="topk", act_size=D, dict_size=N, top_k=K, input_unit_norm=True,
            model_name="gpt2-small", hook_point="blocks.8.hook_resid_pre", layer=8,
        ),
    }),
    "Qwen Scope": ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", {
        "layer5.sae.pt": {"W_enc": W, "W_dec": V.T, "b_enc": B, "b_dec": C},
        "config.json": {"k": K, "hook_point": "resid_post"},
    }),
    "ckkissane": ("attn-saes", {
        "gpt2_L9.pt": COLUMNS,
        "gpt2_L9_cfg.json": dict(
            act_name="blocks.9.attn.hook_z", act_size=D, dict_size=N, model_name="gpt2-small",
            site="z", layer=9, concat_heads=True, head="cat",
        ),
    }),
    "OpenAI": ("openai", {
        "resid_post_mlp_v5_32k/autoencoders/6.pt": {
            "encoder.weight": W, "decoder.weight": V.T, "latent_bias": B, "pre_bias": C,
            "stats_last_nonzero": torch.ones(N).long(), "activation": "TopK",
            "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
        },
    }),
    "Goodfire": ("Goodfire", {
        "Llama-3.1-8B-Instruct-SAE-l19.pth": {
            "encoder_linear.weight": W, "encoder_linear.bias": B,
            "decoder_linear.weight": V.T, "decoder_linear.bias": C,
        },
    }),
    "qresearch": ("qresearch", {
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": LINEAR | {"decoder.bias": C},
    }),
    "Gemma Scope": ("gemma-scope-2b-pt-res", {
        "layer_12/width_16k/average_l0_82/params.npz": COLUMNS | {"threshold": THETA},
    }),
    "Gemma Scope 2": ("gemma-scope-2-4b-pt", {
        "resid_post/layer_17_width_16k_l0_big/params.safetensors": {
            "w_enc": W.T, "w_dec": V, "b_enc": B, "b_dec": C, "threshold": THETA,
        },
        "resid_post/layer_17_width_16k_l0_big/config.json": dict(
            hf_hook_point_in="model.layers.17.output", hf_hook_point_out="model.layers.17.output",
            width=N, model_name="google/gemma-3-4b-pt", architecture="jump_relu", l0=150,
            affine_connection=False, type="sae",
        ),
    }),
    "Llama Scope": ("Llama3_1-8B-Base-LXR-8x", {
        "Llama3_1-8B-Base-L5R-8x/checkpoints/final.safetensors": LINEAR | {"decoder.bias": C},
        "Llama3_1-8B-Base-L5R-8x/hyperparams.json": OPENMOSS
        | {"jump_relu_threshold": 0.3, NORM: {"in": 6.0, "out": 6.0}, "d_sae": N},
    }),
    "Llama Scope R1": ("Llama-Scope-R1-Distill", {
        "L5R/sae_weights.safetensors": LINEAR
        | {"decoder.bias": C, "log_jumprelu_threshold": LOG} | MEASURED,
        "L5R/config.json": LEARNED,
    }),
    "llamascopium": ("Llama-Scope-2-Qwen3-1.7B", {
        "8x/layer5/sae_weights.safetensors": {
            "W_E": W.T, "b_E": B, "W_D": V, "b_D": C,
            "activation_function.log_jumprelu_threshold": LOG,
        } | MEASURED,
        "8x/layer5/config.json": LEARNED,
    }),
    "circuit-tracer": ("qwen3-4b-transcoders", {
        "layer_7.safetensors": {
            "W_enc": W, "W_dec": V, "b_enc": B, "b_dec": C, "W_skip": normal(D, D),
            "activation_function.threshold": THETA,
        },
        "config.yaml": dict(
            model_name="Qwen/Qwen3-4B", feature_input_hook="mlp.hook_in",
            feature_output_hook="mlp.hook_out",
        ),
    }),
    "OpenSAE": ("OpenSAE-LLaMA-3.1-Layer_08", {
        "model.safetensors": ROWS,
        "config.json": dict(
            hidden_size=D, feature_size=N, input_normalize=True, normalize_shift_back=True,
            input_normalize_eps=1e-5, input_hookpoint="layers.8", output_hookpoint="layers.8",
            model_name="meta-llama/Llama-3.1-8B", activation="topk", k=K,
        ),
    }),
}  # fmt: skip
REFUSED: dict[str, tuple[str, Files]] = {
    "circuit-tracer CLT": ("clt", {
        "W_enc_0.safetensors": {"W_enc_0": W, "b_enc_0": B, "b_dec_0": C},
    }),
    "Gemma Scope 2 CLT": ("clt", {
        "clt/params_layer_0.safetensors": {"w_enc": W.T, "w_dec": V[:, None], "b_enc": B},
        "clt/config.json": {"type": "clt"},
    }),
    "OpenSAE in parts": ("OpenSAE-LLaMA-3.1-Layer_08", {
        "model-00001-of-00002.safetensors": ROWS,
        "config.json": SEEDS["OpenSAE"][1]["config.json"],
    }),
    "temporal SAE": ("temporal", {
        "latest_ckpt.safetensors": {"D": W, "E": W.T, "b": B}, "conf.yaml": {"llm": {"name": "x"}},
    }),
}  # fmt: skip


def content(name: str, value: Any) -> bytes:
    """A file as its writers write it."""
    if name.endswith(".json"):
        return json.dumps(value).encode()
    if name.endswith(".yaml"):
        return yaml.safe_dump(value).encode()
    buffer = io.BytesIO()
    if name.endswith(".safetensors"):
        return save({key: one.contiguous() for key, one in value.items()})
    if name.endswith(".npz"):
        np.savez(buffer, **{key: one.float().numpy() for key, one in value.items()})
    else:
        torch.save(value, buffer)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    for name, bytes_ in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes_)
    return root


# -- breaking things -----------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.0, -0.5, 1e308, 1e400, float("nan"),
    "", "x", "1", "6.0.0", "relu", "topk", "blocks.1.hook_resid_post", "../../x", "\ud800",
    "é" * 50, [], [0], [[]], {}, {"a": 1}, {"kind": []}, {"in": 0, "out": -1}, {"in": "x"},
]  # fmt: skip
SIZES = [
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\1" + b"\0" * 7,
]


@dataclass(frozen=True)
class Cut:
    """One change of some bytes: what, where (a part of the length), how far, and with what."""

    how: str
    at: float
    length: int
    value: int


cuts = st.lists(
    st.builds(
        Cut,
        st.sampled_from(["flip", "set", "drop", "repeat", "insert", "end", "size"]),
        st.floats(0, 1),
        st.integers(1, 40),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=3,
)


def broken(content: bytes, changes: list[Cut]) -> bytes:
    for change in changes:
        raw = bytearray(content)
        at = min(int(change.at * len(raw)), max(0, len(raw) - 1))
        stop = at + change.length
        if change.how == "flip" and raw:
            raw[at] ^= 1 << change.value % 8
        elif change.how == "set":
            raw[at:stop] = bytes([change.value]) * len(raw[at:stop])
        elif change.how == "drop":
            del raw[at:stop]
        elif change.how == "repeat":
            raw[at:at] = raw[at:stop] * (1 + change.value % 5)
        elif change.how == "insert":
            raw[at:at] = bytes([change.value]) * change.length
        elif change.how == "end":
            del raw[at:]
        elif change.how == "size":
            word = SIZES[change.value % len(SIZES)]
            raw[at : at + len(word)] = word
        content = bytes(raw)
    return content


@dataclass(frozen=True)
class Edit:
    """One change of a value or a tensor: which (modulo how many there are), what, with what."""

    file: int
    key: int
    how: int
    value: int


edits = st.lists(
    st.builds(Edit, *(st.integers(0, top) for top in (3, 60, 9, len(ODD) - 1))),
    min_size=1,
    max_size=3,
)


def edited(files: Files, changes: list[Edit]) -> Files:
    """Configs with other values and keys, tensors with other shapes, dtypes and numbers."""
    for change in changes:
        name = sorted(files)[change.file % len(files)]
        files = files | {name: _edited(files[name], change)}
    return files


def _edited(value: Any, change: Edit) -> Any:
    if not isinstance(value, dict) or not value:
        return ODD[change.value]
    key, left = sorted(value)[change.key % len(value)], change.key // len(value)
    inner = value[key]
    if isinstance(inner, torch.Tensor):
        found = _changed(inner, change)
        return {k: v for k, v in value.items() if k != key} | (
            {} if found is None else {key: found}
        )
    if isinstance(inner, dict) and inner and left:
        return value | {key: _edited(inner, Edit(0, left - 1, change.how, change.value))}
    if change.how == 0:
        return {k: v for k, v in value.items() if k != key}
    if change.how == 1:
        return value | {f"{key}_2": ODD[change.value]}
    return value | {key: ODD[change.value]}


def _changed(tensor: torch.Tensor, change: Edit) -> torch.Tensor | None:
    poisoned = tensor.clone().float()
    poisoned.reshape(-1)[change.value % tensor.numel()] = (torch.nan, torch.inf)[change.value % 2]
    return [
        None,
        tensor.reshape(tensor.shape[::-1]),
        tensor.reshape(-1),
        tensor[:-1] if tensor.dim() else tensor.reshape(1),
        tensor[:0] if tensor.dim() else tensor,
        tensor.reshape(-1)[0],
        poisoned,
        tensor.to([torch.int64, torch.bool, torch.float16, torch.float64][change.value % 4]),
        tensor.float() * [0.0, 1e38, -1.0, 1e-42][change.value % 4],
        tensor[None],
    ][change.how]
