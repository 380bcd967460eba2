"""SAELens' layout, which is also saert's own: `cfg.json` + `sae_weights.safetensors` in a folder.

    W_enc [d_in, num_latents] (transposed), W_dec [num_latents, d_out], b_enc, b_dec,
    threshold | b_gate, b_mag, r_mag | W_skip [d_out, d_in]

What SAELens can express is written as SAELens 6 writes it, so its users can read what we publish.
What it cannot (a top-k transcoder, mean-centring, decoder-norm-weighted selection) is written as
architecture "saert", which SAELens refuses instead of computing something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saert.activations import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from saert.hookpoint import TRANSFORMER_LENS, Hookpoint, HookpointError
from saert.kernels.numerics import accumulation_dtype
from saert.sae import SAE
from saert.transforms import (
    DatasetScale,
    InputTransform,
    LayerNorm,
    MeanCentre,
    NoTransform,
    UnitNorm,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT_VERSION = "6.0.0"  # the first SAELens release with this layout
_COLUMNS = 4096  # W_enc is transposed this many latents at a time, to bound the copy

TRANSFORMS: dict[str, type[InputTransform]] = {
    "none": NoTransform,
    "layer_norm": LayerNorm,
    "constant_norm_rescale": UnitNorm,
}
OWN_TRANSFORMS: dict[str, type[InputTransform]] = {
    **TRANSFORMS,
    "mean_centre": MeanCentre,
    "dataset_scale": DatasetScale,
}
COMMON = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "metadata",
}  # fmt: skip
TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
EXTRA_KEYS = {
    "standard": set[str](),
    "topk": {"k", "rescale_acts_by_decoder_norm"},
    "jumprelu": set[str](),
    "gated": set[str](),
    **{name: {"d_out"} for name in TRANSCODERS},
    "saert": {"saert", "d_out"},
}
TENSORS = {
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
}


class FormatError(ValueError):
    """A checkpoint that cannot be read without guessing; says what was found and expected."""


# -- reading -----------------------------------------------------------------------------------


def read(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """An SAE from a folder with `cfg.json` and `sae_weights.safetensors`.

    Weights keep their stored dtype unless `dtype` is given. Raises FormatError for an unknown
    architecture or key, a missing or extra tensor, or a shape that contradicts the config.
    """
    config = _read_config(folder / CONFIG)
    architecture = config["architecture"]
    own = config.get("saert", {}) if architecture == "saert" else None
    kind, has_skip = TRANSCODERS.get(architecture, (architecture, False))
    if own is not None:
        kind, has_skip = _own_kind(own), bool(own.get("W_skip", False))
    tensors = _read_tensors(folder / WEIGHTS, kind, has_skip, own, device, dtype)
    _check_sizes(config, tensors, folder)
    metadata = dict(config.get("metadata") or {})
    transcodes = architecture in TRANSCODERS or "hook_name_out" in metadata
    read_at = _hookpoint(metadata, "hook_name")
    write_at = _target(metadata) if transcodes else None
    if "model_name" in metadata:
        metadata.setdefault("base_model", metadata["model_name"])
    rescale = bool(config.get("rescale_acts_by_decoder_norm", False))
    if rescale:  # their latents keep the factor and their decoder divides it out: fold it in
        norm = tensors["W_dec"].norm(dim=-1)
        tensors["W_enc"] *= norm[:, None]
        tensors["W_dec"] /= norm[:, None]
        if "b_enc" in tensors:
            tensors["b_enc"] *= norm
    return SAE.from_weights(
        tensors["W_enc"],
        tensors["W_dec"],
        tensors.get("b_enc"),
        tensors.get("b_dec"),
        activation=_activation(kind, config, own, tensors, metadata),
        hookpoint=read_at,
        target_hookpoint=write_at,
        input_transform=_transform(config, own),
        # SAELens writes the key for its transcoders too, and does not act on it
        subtract_b_dec=bool(config["apply_b_dec_to_input"]) and (own is not None or not transcodes),
        W_skip=tensors.get("W_skip"),
        select_by_decoder_norm=bool(own and own.get("select_by_decoder_norm")),
        metadata=metadata,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path.name}: found a {type(config).__name__}, expected an object")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        found = type(metadata).__name__
        raise FormatError(f"{path.name}: metadata is a {found}, expected an object")
    version = str(metadata.get("sae_lens_version") or config.get("sae_lens_version") or "0")
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) < 6:
        raise FormatError(
            f"{path.name}: written by SAELens {version if version != '0' else 'before 6'}; this "
            "version of saert reads the layout of SAELens 6 and later"
        )
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in EXTRA_KEYS:
        known = ", ".join(sorted(EXTRA_KEYS))
        raise FormatError(f"{path.name}: architecture {architecture!r}, expected one of {known}")
    allowed = COMMON | EXTRA_KEYS[architecture] | {"sae_lens_version"}
    if unknown := sorted(set(config) - allowed):
        raise FormatError(
            f"{path.name}: unknown keys {unknown} for architecture {architecture!r}; ignoring them "
            "could change the numbers"
        )
    if missing := sorted({"d_in", "d_sae", "apply_b_dec_to_input"} - set(config)):
        raise FormatError(f"{path.name}: missing keys {missing}")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise FormatError(f"{path.name}: reshape_activations {config['reshape_activations']!r}")
    return config


def _read_tensors(
    path: Path,
    kind: str,
    has_skip: bool,
    own: Mapping[str, Any] | None,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    wanted = {"W_enc", "W_dec"} | TENSORS[kind]
    wanted |= {"W_skip"} if has_skip else set()
    optional = {"b_dec", "b_enc"} if own is not None else set()
    wanted = (wanted - optional) if own is not None else wanted | {"b_dec"}
    with safe_open(path, framework="pt", device=str(device)) as file:
        found = set(file.keys())
        if found - wanted - optional or wanted - found:
            raise FormatError(
                f"{path.name}: found tensors {sorted(found)}, expected {sorted(wanted)}"
            )
        tensors = {name: file.get_tensor(name) for name in found if name != "W_enc"}
        stored = file.get_slice("W_enc")
        shape = stored.get_shape()
        if len(shape) != 2:
            raise FormatError(f"{path.name}: W_enc is {shape}, expected [d_in, num_latents]")
        stored_dtype = stored[:, :0].dtype
        W_enc = torch.empty(shape[1], shape[0], dtype=stored_dtype, device=device)
        for start in range(0, shape[1], _COLUMNS):
            W_enc[start : start + _COLUMNS] = stored[:, start : start + _COLUMNS].T
    tensors["W_enc"] = W_enc
    if dtype is None:
        return tensors
    # thresholds and gates are compared with float32 scores: rounding them would move latents
    exact = {"threshold", "b_gate", "b_mag", "r_mag"}
    wide = accumulation_dtype(dtype)
    return {name: t.to(wide if name in exact else dtype) for name, t in tensors.items()}


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    declared = [config["d_sae"], config["d_in"]]
    if (found := list(tensors["W_enc"].shape)) != declared:
        raise FormatError(
            f"{folder.name}/{CONFIG} declares d_sae, d_in = {declared}, but W_enc holds {found}"
        )
    d_out = config.get("d_out", config["d_in"])
    if tensors["W_dec"].shape[-1] != d_out:
        raise FormatError(
            f"{folder.name}/{CONFIG} declares an output width of {d_out}, but W_dec holds "
            f"{list(tensors['W_dec'].shape)}"
        )


def _hookpoint(metadata: Mapping[str, Any], key: str) -> Hookpoint | None:
    """The hookpoint, or None where the name is one that no transformers module answers to.

    The name stays in the metadata; `attach` then asks for a hookpoint, and says why.
    """
    name = metadata.get(key)
    if not name:
        return None
    try:
        return Hookpoint.parse(str(name))
    except HookpointError:
        return None


def _target(metadata: Mapping[str, Any]) -> Hookpoint:
    """Where a transcoder writes. Without it a square one could pass for an SAE: refuse."""
    name = metadata.get("hook_name_out")
    if not name:
        raise FormatError(f"{CONFIG}: a transcoder without metadata.hook_name_out, where it writes")
    try:
        return Hookpoint.parse(str(name))
    except HookpointError as error:
        raise FormatError(f"{CONFIG}: metadata.hook_name_out: {error}") from None


def _activation(
    kind: str,
    config: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, Any],
) -> Activation:
    if kind == "topk":
        k = config.get("k") if own is None else own.get("k")
        if not isinstance(k, int):
            raise FormatError(f"{CONFIG}: k is {k!r}, expected an integer")
        return TopK(k)
    if kind == "jumprelu":
        threshold = tensors.pop("threshold")
        constant = bool((threshold == threshold.flatten()[0]).all())
        batch = "batchtopk" in str(metadata.get("training_architecture", ""))
        return BatchTopK(threshold.flatten()[0]) if batch and constant else JumpReLU(threshold)
    if kind == "gated":
        return Gated(*(tensors.pop(name) for name in ("b_gate", "b_mag", "r_mag")))
    return ReLU()


def _transform(config: Mapping[str, Any], own: Mapping[str, Any] | None) -> InputTransform:
    name = config.get("normalize_activations", "none") or "none"
    options: dict[str, Any] = {}
    if own is not None:
        options = dict(own.get("input_transform", {"kind": "none"}))
        name = options.pop("kind", "none")
    if name == "expected_average_only_in":
        return NoTransform()  # a training-time scale, folded into the weights before they are saved
    known = TRANSFORMS if own is None else OWN_TRANSFORMS
    if name not in known:
        raise FormatError(
            f"{CONFIG}: normalize_activations {name!r}, expected one of {', '.join(known)}"
        )
    try:
        return known[name](**options)
    except TypeError:
        raise FormatError(f"{CONFIG}: unknown options {sorted(options)} of {name}") from None


def _own_kind(own: Mapping[str, Any]) -> str:
    kind = own.get("activation")
    allowed = {"activation", "k", "W_skip", "input_transform", "select_by_decoder_norm"}
    if kind not in TENSORS or set(own) - allowed:
        raise FormatError(
            f"{CONFIG}: found activation {kind!r} and keys {sorted(own)}, expected one of "
            f"{sorted(TENSORS)} and keys {sorted(allowed)}"
        )
    return str(kind)


# -- writing -----------------------------------------------------------------------------------


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
    if not _expressible(sae):
        transform = {"kind": _name(sae.input_transform, OWN_TRANSFORMS)} | vars(sae.input_transform)
        config |= {
            "architecture": "saert",
            "d_out": sae.d_out,
            "saert": {
                "activation": kind,
                "W_skip": sae.W_skip is not None,
                "input_transform": transform,
                "select_by_decoder_norm": sae.select_by_decoder_norm,
                **({"k": extra["k"]} if kind == "topk" else {}),
            },
        }
        for key in ("k", "rescale_acts_by_decoder_norm"):
            config.pop(key, None)
        return config, tensors
    # SAELens has no SAE without biases
    if kind != "gated":
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
    if isinstance(activation, TopK):
        return "topk", {"k": activation.k, "rescale_acts_by_decoder_norm": False}, {}
    if isinstance(activation, JumpReLU):
        return "jumprelu", {}, {"threshold": activation.threshold.expand(num_latents)}
    if isinstance(activation, Gated):
        names = ("b_gate", "b_mag", "r_mag")
        return "gated", {}, {name: getattr(activation, name) for name in names}
    return "standard", {}, {}


def _expressible(sae: SAE) -> bool:
    plain_transform = sae.input_transform in (NoTransform(), LayerNorm(), UnitNorm())
    if not plain_transform or sae.select_by_decoder_norm:
        return False
    if sae.is_transcoder:
        return not sae.subtract_b_dec and isinstance(sae.activation, ReLU | JumpReLU)
    return sae.W_skip is None


def _metadata(sae: SAE) -> dict[str, Any]:
    metadata = dict(sae.metadata)
    metadata.setdefault("sae_lens_version", LAYOUT_VERSION)
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
