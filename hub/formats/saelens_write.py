"""Writing SAELens' layout; what SAELens cannot express, it will refuse (see saelens.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from saert.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from saert.hookpoint import TRANSFORMER_LENS, Hookpoint
from saert.hub.formats.saelens import (
    CONFIG,
    LAYOUT_VERSION,
    OWN_SETTINGS,
    OWN_TRANSFORMS,
    RESCALE,
    TRANSCODERS,
    TRANSFORMS,
    WEIGHTS,
    is_6,
)
from saert.pursuit import MatchingPursuit
from saert.sae import SAE
from saert.transforms import InputTransform, LayerNorm, NoTransform, UnitNorm


def write(sae: SAE, folder: Path) -> None:
    """`cfg.json` and `sae_weights.safetensors` into a folder, made if it is missing."""
    config, tensors = _describe(sae)
    text = json.dumps(config, indent=2, ensure_ascii=False)  # may refuse the metadata: so first
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS
    )
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _describe(sae: SAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind, extra, tensors = _describe_activation(sae.activation, sae.num_latents)
    tensors |= {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec}
    optional = {"b_enc": sae.b_enc, "b_dec": sae.b_dec, "W_skip": sae.W_skip}
    tensors |= {name: t for name, t in optional.items() if t is not None}
    config = {
        "architecture": kind,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": _name(sae.input_transform, TRANSFORMS) or "none",
        "reshape_activations": "hook_z" if _reads_heads(sae) else "none",
        **extra,
        "metadata": _metadata(sae),
    }
    if not saelens_can_read(sae):
        transform = {"kind": _name(sae.input_transform, OWN_TRANSFORMS)} | vars(sae.input_transform)
        config |= {
            "architecture": "saert",
            "d_out": sae.d_out,
            "saert": {
                "activation": kind,
                "W_skip": sae.W_skip is not None,
                "input_transform": transform,
                "select_by_decoder_norm": sae.select_by_decoder_norm,
                **{key: extra[key] for key in sorted(OWN_SETTINGS.get(kind, ()))},
            },
        }
        for key in extra:
            config.pop(key)
        return config, tensors
    # SAELens has no SAE without biases
    if kind == "matching_pursuit":
        tensors.pop("W_enc")
    elif kind != "gated":
        tensors.setdefault("b_enc", sae.W_enc.new_zeros(sae.num_latents))
    tensors.setdefault("b_dec", sae.W_dec.new_zeros(sae.d_out))
    if sae.is_transcoder:
        skip = sae.W_skip is not None
        names = {value: name for name, value in TRANSCODERS.items()}
        config |= {"architecture": names[kind, skip], "d_out": sae.d_out}
    return config, tensors


def _describe_activation(
    activation: Activation, num_latents: int
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    by_rank = {TopK: "topk", AbsTopK: "abstopk", GroupMax: "groupmax"}
    for cls, name in by_rank.items():
        if isinstance(activation, cls):
            return name, {"k": activation.k} | ({} if name == "groupmax" else {RESCALE: False}), {}
    if isinstance(activation, MatchingPursuit):
        settings = {
            "residual_threshold": activation.residual_threshold,
            "max_iterations": activation.max_iterations,
            "stop_on_duplicate_support": activation.stop_on_duplicate,
        }
        return "matching_pursuit", settings, {}
    if isinstance(activation, JumpReLU):
        return "jumprelu", {}, {"threshold": activation.threshold.expand(num_latents)}
    if isinstance(activation, Gated):
        names = ("b_gate", "b_mag", "r_mag")
        return "gated", {}, {name: getattr(activation, name) for name in names}
    return "standard", {}, {}


def saelens_can_read(sae: SAE) -> bool:
    """Whether SAELens has all that this SAE does; what it lacks is written so that it refuses."""
    plain_transform = sae.input_transform in (NoTransform(), LayerNorm(), UnitNorm())
    if not plain_transform or sae.select_by_decoder_norm or isinstance(sae.activation, GroupMax):
        return False
    if sae.is_transcoder:
        return not sae.subtract_b_dec and isinstance(sae.activation, ReLU | JumpReLU)
    if isinstance(sae.activation, MatchingPursuit):  # tied, and with b_dec on both sides or neither
        tied = sae.W_enc.equal(sae.W_dec) and sae.subtract_b_dec == (sae.b_dec is not None)
        return tied and sae.W_skip is None
    return sae.W_skip is None


def _metadata(sae: SAE) -> dict[str, Any]:
    metadata = dict(sae.metadata)
    if not is_6(str(metadata.get("sae_lens_version"))):  # it may have come from an older file
        metadata["sae_lens_version"] = LAYOUT_VERSION
    if "base_model" in metadata:
        metadata.setdefault("model_name", metadata["base_model"])
    if sae.hookpoint is not None:
        metadata["hook_name"] = _transformer_lens_name(sae.hookpoint)
    if sae.target_hookpoint is not None:
        metadata["hook_name_out"] = _transformer_lens_name(sae.target_hookpoint)
    if isinstance(sae.activation, BatchTopK):
        metadata["training_architecture"] = "batchtopk"
    return metadata


def _reads_heads(sae: SAE) -> bool:
    """TransformerLens keeps attn_z as [heads, head_dim]: SAELens has to be told to flatten it."""
    return sae.hookpoint is not None and sae.hookpoint.site == "attn_z"


def _transformer_lens_name(at: Hookpoint) -> str:
    names = {site: hook for hook, site in TRANSFORMER_LENS.items()}
    return f"blocks.{at.layer}.{names[at.site]}" if at.site in names else str(at)


def _name(transform: InputTransform, table: Mapping[str, Callable[..., Any]]) -> str | None:
    return next((name for name, kind in table.items() if type(transform) is kind), None)
