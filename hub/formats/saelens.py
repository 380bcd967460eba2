"""SAELens' layout, which is also saert's own: `cfg.json` + `sae_weights.safetensors` in a folder.

    W_enc [d_in, num_latents] (transposed), W_dec [num_latents, d_out], b_enc, b_dec,
    threshold | b_gate, b_mag, r_mag | W_skip [d_out, d_in]

What SAELens can express is written as SAELens 6 writes it, so its users can read what we publish.
What it cannot (a top-k transcoder, mean-centring, decoder-norm-weighted selection) is written as
architecture "saert", which SAELens refuses instead of computing something else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

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
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint
from saert.hub.formats.hooks import module_hook
from saert.model_names import hub_id
from saert.pursuit import MatchingPursuit
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
    "normalize_activations", "reshape_activations", "metadata", "sae_lens_version",
}  # fmt: skip
TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
RESCALE = "rescale_acts_by_decoder_norm"
PURSUIT = {"residual_threshold", "max_iterations", "stop_on_duplicate_support"}
EXTRA_KEYS = {
    "standard": set[str](),
    "topk": {"k", RESCALE},
    "abstopk": {"k", RESCALE},
    "jumprelu": set[str](),
    "gated": set[str](),
    "matching_pursuit": PURSUIT,
    **{name: {"d_out"} for name in TRANSCODERS},
    "saert": {"saert", "d_out"},
}
LOSS = {"decoder_init_norm", "l1_coefficient", "l1_warm_up_steps"}
TOPK_LOSS = {"decoder_init_norm", "aux_loss_coefficient", "use_sparse_activations"}
TRAINING_KEYS = {  # of SAELens' checkpoints of a run under way; they shape its loss alone
    "standard": LOSS | {"lp_norm"},
    "gated": LOSS,
    "topk": TOPK_LOSS,
    "abstopk": TOPK_LOSS,
    "jumprelu": {
        "decoder_init_norm", "jumprelu_init_threshold", "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "jumprelu_ste_to_input",
        "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "target_l0",
    },
    "matching_pursuit": {"decoder_init_norm"},
}  # fmt: skip
TENSORS = {  # of an activation, beside W_enc, W_dec and b_dec
    "standard": {"b_enc"},
    "topk": {"b_enc"},
    "abstopk": {"b_enc"},
    "groupmax": {"b_enc"},
    "jumprelu": {"b_enc", "threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
    "matching_pursuit": set[str](),
}
OWN_SETTINGS = {
    "topk": {"k"}, "abstopk": {"k"}, "groupmax": {"k"}, "matching_pursuit": PURSUIT,
}  # fmt: skip
WRITTEN = {"embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"}
RMS_NORMS = r"(meta-|tiny)?(gemma|llama|mistral|mixtral|qwen|phi-[34]|olmo-[23]|deepseek|gpt-oss)"
UNREADABLE = {
    "temporal": "its code of a token depends on the tokens before it (attn_layers), and an SAE "
    "here encodes every token by itself: that would need an encoder of sequences",
    "batchtopk": "a training checkpoint: write it with SAELens' save_inference_model",
    "matryoshka_batchtopk": "a training checkpoint: write it with SAELens' save_inference_model",
}


def is_version_6(c: Checkpoint) -> bool:
    """Whether a config says that SAELens 6 or later wrote it."""
    return is_6(version(c.configs[CONFIG]))


def is_6(name: str) -> bool:
    """Whether a SAELens version is 6 or later."""
    major = name.partition(".")[0]
    return major.isdigit() and int(major) >= 6


def version(config: Mapping[str, Any]) -> str:
    """The SAELens version that a config names, "" if none."""
    metadata = config.get("metadata")
    inner = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    return str(config.get("sae_lens_version") or inner or "")


def read(c: Checkpoint) -> SAE:
    """SAELens 6 and saert's own extension of it.

    Refuses an unknown architecture or key, a missing or extra tensor, and a shape that contradicts
    the config.
    """
    config = c.configs[CONFIG]
    found = config.get("metadata") or {}
    if not isinstance(found, dict):
        raise c.error(f"{CONFIG}: metadata is a {type(found).__name__}, expected an object")
    name = "saert" if config.get("architecture") == "saert" else "SAELens"
    return build(c, facts(found) | {"format": name})


def facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in SAELens' words, and what saert calls the same."""
    known = dict(metadata)
    if model := known.get("model_name"):
        known.setdefault("base_model", hub_id(str(model)))
    if dataset := known.get("dataset_path"):
        known.setdefault("dataset", dataset)
    return known


def build(c: Checkpoint, metadata: dict[str, Any], ignored: frozenset[str] = frozenset()) -> SAE:
    """The SAE of a config in the words of SAELens 6; tensors that are `ignored` may be there."""
    config, architecture = c.configs[CONFIG], _architecture(c)
    own: Mapping[str, Any] | None = config.get("saert", {}) if architecture == "saert" else None
    kind, has_skip = TRANSCODERS.get(architecture, (architecture, False))
    if own is not None:
        kind, has_skip = _own_kind(c, own), bool(own.get("W_skip", False))
    tensors = _tensors(c, kind, has_skip, own is not None, ignored)
    transcodes = architecture in TRANSCODERS or "hook_name_out" in metadata
    hookpoint = _hookpoint(metadata)
    if _reads_centred(metadata, hookpoint):
        metadata["reads_centred"] = True
    subtract = bool(config["apply_b_dec_to_input"])
    if kind == "matching_pursuit" and own is None:
        tensors["W_enc"] = tensors["W_dec"]
        if not subtract:
            tensors.pop("b_dec")  # neither subtracted nor added
    return SAE.from_weights(
        tensors["W_enc"],
        tensors["W_dec"],
        tensors.get("b_enc"),
        tensors.get("b_dec"),
        activation=_activation(config if own is None else own, kind, tensors, metadata),
        hookpoint=hookpoint,
        target_hookpoint=_target(c, metadata, tensors["W_dec"]) if transcodes else None,
        input_transform=_transform(c, config, own),
        # SAELens writes the key for its transcoders too, and does not act on it
        subtract_b_dec=subtract and (own is not None or not transcodes),
        W_skip=tensors.get("W_skip"),
        select_by_decoder_norm=bool(own and own.get("select_by_decoder_norm")),
        metadata=metadata,
    )


def _architecture(c: Checkpoint) -> str:
    """Refuse an architecture that is not read, and keys that do not belong to it."""
    name = c.configs[CONFIG].get("architecture")
    if isinstance(name, str) and name in UNREADABLE:
        raise c.error(f"{CONFIG}: architecture {name!r}: {UNREADABLE[name]}")
    if not isinstance(name, str) or name not in EXTRA_KEYS:
        names = ", ".join(sorted(EXTRA_KEYS))
        raise c.error(f"{CONFIG}: architecture {name!r}, expected one of {names}")
    known = COMMON | EXTRA_KEYS[name] | TRAINING_KEYS.get(name, set())
    c.expect_keys(CONFIG, {"d_in", "d_sae", "apply_b_dec_to_input"}, known)
    c.expect_value(CONFIG, "apply_b_dec_to_input", True, False)
    c.expect_value(CONFIG, "reshape_activations", "none", "hook_z", default="none")
    if RESCALE in c.configs[CONFIG]:
        c.expect_value(CONFIG, RESCALE, True, False)
    if "k" in EXTRA_KEYS[name]:
        c.integer(CONFIG, "k")
    return name


def _own_kind(c: Checkpoint, own: Mapping[str, Any]) -> str:
    kind = own.get("activation")
    allowed = {"activation", "W_skip", "input_transform", "select_by_decoder_norm"}
    allowed |= OWN_SETTINGS.get(str(kind), set())
    if kind not in TENSORS or set(own) - allowed:
        raise c.error(
            f"{CONFIG}: found activation {kind!r} and keys {sorted(own)}, expected one of "
            f"{sorted(TENSORS)} and keys {sorted(allowed)}"
        )
    return str(kind)


def _tensors(
    c: Checkpoint, kind: str, has_skip: bool, own: bool, ignored: frozenset[str]
) -> dict[str, Tensor]:
    needed = {"W_enc", "W_dec", "b_dec"} | TENSORS[kind] | ({"W_skip"} if has_skip else set())
    if kind == "matching_pursuit" and not own:
        needed -= {"W_enc"}
    optional = {"b_dec", "b_enc"} if own else set()
    c.expect_tensors(needed - optional, optional | ignored)
    d_in, num_latents = c.matrix("W_enc") if "W_enc" in needed else c.matrix("W_dec")[::-1]
    c.expect_size(CONFIG, "d_in", d_in)
    c.expect_size(CONFIG, "d_sae", num_latents)
    c.expect_shape("W_dec", num_latents, c.configs[CONFIG].get("d_out", d_in))
    if c.configs[CONFIG].get(RESCALE, False):
        c.expect_shape("b_enc", num_latents)  # it is rescaled before `SAE` looks at it
        return _folded(c)
    compared = {"threshold", "b_gate", "b_mag", "r_mag"}
    return {
        name: c.tensors.get(name, transpose=name == "W_enc", compared=name in compared)
        for name in c.tensors.names - ignored
    }


def _folded(c: Checkpoint) -> dict[str, Tensor]:
    """Their latents keep the norm of their decoder row, and their decoder divides it out: the same
    with rows of norm 1 and an encoder that is as much longer."""
    norm = c.tensors.row_norms("W_dec")
    return {
        "W_enc": c.tensors.scaled("W_enc", norm, transpose=True),
        "W_dec": c.tensors.scaled("W_dec", 1 / norm.where(norm > 0, 1)),
        "b_enc": c.tensors.cast(c.tensors.get("b_enc", exact=True) * norm),
        "b_dec": c.tensors.cast(c.tensors.get("b_dec", exact=True)),
    }


def _hookpoint(metadata: Mapping[str, Any], suffix: str = "") -> Hookpoint | None:
    """Where it reads (or writes: "_out"), by TransformerLens' name or else by transformers'."""
    if metadata.get(f"hook_head_index{suffix}") is not None:
        return None  # one head of many: no module's input or output
    theirs = metadata.get(f"hf_hook_name{suffix}")
    return parse_hookpoint(metadata.get(f"hook_name{suffix}")) or parse_hookpoint(
        module_hook(theirs) if isinstance(theirs, str) else None
    )


def _reads_centred(metadata: Mapping[str, Any], at: Hookpoint | None) -> bool:
    """Whether TransformerLens had taken the mean out of what the model writes to this place."""
    options = metadata.get("model_from_pretrained_kwargs")
    if not isinstance(options, dict) or options.get("center_writing_weights") is not True:
        return False
    model = str(metadata.get("base_model")).rpartition("/")[2].lower()
    if re.match(RMS_NORMS, model):  # models without LayerNorm it leaves as they are
        return False
    return at is not None and at.site in WRITTEN


def _target(c: Checkpoint, metadata: Mapping[str, Any], W_dec: Tensor) -> Hookpoint | None:
    """Where a transcoder writes. Without it a square one could pass for an SAE: refuse."""
    target = _hookpoint(metadata, "_out")
    if target is None and W_dec.shape[1] == c.tensors.shape("W_enc")[0]:
        raise c.error(
            f"{CONFIG}: a transcoder whose metadata.hook_name_out, where it writes, is "
            f"{metadata.get('hook_name_out')!r}, expected a name that a module answers to"
        )
    return target


def _activation(
    config: Mapping[str, Any], kind: str, tensors: dict[str, Tensor], metadata: Mapping[str, Any]
) -> Activation:
    match kind:
        case "topk":
            return TopK(config["k"])
        case "abstopk":
            return AbsTopK(config["k"])
        case "groupmax":
            return GroupMax(config["k"])
        case "gated":
            return Gated(*(tensors.pop(name) for name in ("b_gate", "b_mag", "r_mag")))
        case "matching_pursuit":
            names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
            return MatchingPursuit(
                **{name.removesuffix("_support"): config[name] for name in names if name in config}
            )
        case "jumprelu":
            threshold = tensors.pop("threshold")
            constant = bool((threshold == threshold.flatten()[0]).all())
            batch = "batchtopk" in str(metadata.get("training_architecture", ""))
            return BatchTopK(threshold.flatten()[0]) if batch and constant else JumpReLU(threshold)
    return ReLU()


def _transform(
    c: Checkpoint, config: Mapping[str, Any], own: Mapping[str, Any] | None
) -> InputTransform:
    name = config.get("normalize_activations") or "none"
    options: dict[str, Any] = {}
    if own is not None:
        options = dict(own.get("input_transform", {"kind": "none"}))
        name = options.pop("kind", "none")
    if name == "expected_average_only_in":
        warnings.warn(
            f"{c.where}: {CONFIG}: normalize_activations 'expected_average_only_in': trained on "
            "activations scaled by one number, which the checkpoint does not hold; read as if the "
            "weights had absorbed it, as SAELens does. If reconstructions are poor, set "
            "sae.input_transform = saert.transforms.DatasetScale(√d_in / mean ‖x‖)",
            UserWarning,
            stacklevel=2,
        )
        return NoTransform()
    if name == "covariance_whitening":
        raise c.error(
            f"{CONFIG}: normalize_activations 'covariance_whitening': a whitening that has not "
            "been folded into the weights; SAELens' fold_activation_whitening does that"
        )
    known = TRANSFORMS if own is None else OWN_TRANSFORMS
    if name not in known:
        raise c.error(f"{CONFIG}: normalize_activations {name!r}, expected one of {list(known)}")
    try:
        return known[name](**options)
    except TypeError:
        raise c.error(f"{CONFIG}: unknown options {sorted(options)} of {name}") from None


FAMILIES = (Family("SAELens", WEIGHTS, read, is_version_6, needs=(CONFIG,)),)
