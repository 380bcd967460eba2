"""circuit-tracer's per-layer transcoders: `layer_7.safetensors` beside one `config.yaml`.

    W_enc [num_latents, d_in], W_dec [num_latents, d_out], b_enc, b_dec, W_skip [d_out, d_in],
    activation_function.threshold [num_latents]

    f = relu(pre)  |  relu(pre) · 1[pre > threshold]  |  the k largest pre;  pre = x W_enc + b_enc
    y = f W_dec + b_dec (+ x W_skip)

mwhanna/qwen3-*-transcoders, mntss/transcoder-Llama-3.2-1B, facebook/crv-8b-instruct-transcoders.
mwhanna's also have the training run's `wandb-config.yaml`, whose hooks are always the MLP's.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from saert.activations import Activation, JumpReLU, ReLU, TopK
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.hooks import note, places
from saert.sae import SAE

CONFIG, RUNS = "config.yaml", ("wandb-config.yaml", "wanb-config.yaml")  # the latter as published
KEYS = {
    "model_kind", "model_name", "feature_input_hook", "feature_output_hook", "scan", "activation",
    "k", "repo_id", "revision", "subfolder", "transcoders", "dtype",
    # of a model card
    "license", "description", "tags", "library_name", "pipeline_tag", "base_model", "datasets",
    "language", "name", "author", "authors", "url", "citation", "version",
}  # fmt: skip
MLP_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
QWEN = r"qwen3-([\d.]+)b-transcoders"
CRV = ("crv-8b-instruct-transcoders", 128)  # circuit-tracer has this k in its code
THRESHOLD = "activation_function.threshold"
BOS_NOTE = (
    "circuit-tracer zeroes the latents of the first token (of the first four, for Gemma 3 "
    "instruction-tuned models) before it decodes; saert does not"
)
TOPK_NOTE = "circuit-tracer keeps negative values among the k largest, saert never does"


def read(c: Checkpoint) -> SAE:
    """The transcoder of one layer; its hooks come from `config.yaml`, its layer from its name."""
    config, run = _config(c), _run(c)
    c.expect_tensors({"W_enc", "W_dec", "b_enc", "b_dec"}, {"W_skip", THRESHOLD})
    num_latents, d_in = c.matrix("W_enc")
    d_out = c.matrix("W_dec")[1]
    c.expect_shape("W_dec", num_latents, d_out)
    c.expect_shape("b_enc", num_latents)
    c.expect_shape("b_dec", d_out)
    skips = "W_skip" in c.tensors.names
    if skips:
        c.expect_shape("W_skip", d_out, d_in)
    for key, size in (("d_model", d_in), ("d_feature", num_latents)):
        if run.get(key, size) != size:
            raise c.error(f"the training run's {key} is {run[key]!r}, but the tensors hold {size}")
    metadata: dict[str, Any] = {"format": "circuit-tracer", "note": BOS_NOTE}
    if isinstance(model := config.get("model_name"), str):
        metadata["base_model"] = model
    activation = _activation(c, config, run, num_latents)
    if isinstance(activation, TopK):
        note(metadata, TOPK_NOTE)
    hookpoint, target = places(
        c, _hook(c, config, "feature_input_hook"), _hook(c, config, "feature_output_hook"), metadata
    )
    return SAE.from_weights(
        c.tensors.get("W_enc"),
        c.tensors.get("W_dec"),
        c.tensors.get("b_enc"),
        c.tensors.get("b_dec"),
        activation=activation,
        hookpoint=hookpoint,
        target_hookpoint=target,
        subtract_b_dec=False,
        W_skip=c.tensors.get("W_skip") if skips else None,
        metadata=metadata,
    )


def _config(c: Checkpoint) -> dict[str, Any]:
    """config.yaml, or what mwhanna's repos without one (14b) leave to be known."""
    if CONFIG in c.configs:
        config = dict(c.expect_keys(CONFIG, MLP_HOOKS, KEYS))
        kind = c.expect_value(
            CONFIG, "model_kind", "transcoder_set", "cross_layer_transcoder",
            default="transcoder_set",
        )  # fmt: skip
        if kind != "transcoder_set":
            raise c.error(f"{CONFIG}: a cross-layer transcoder; saert reads single-layer ones")
        return config
    size = search(QWEN, c.where)
    if size is None and not any(name in c.configs for name in RUNS):
        raise c.error(f"no {CONFIG} says which hooks it reads and writes")
    return MLP_HOOKS | ({} if size is None else {"model_name": f"Qwen/Qwen3-{size[1]}B"})


def _run(c: Checkpoint) -> dict[str, Any]:
    """The training run's options, out of W&B's `{option: {value: …}}`."""
    stored = next((c.configs[name] for name in RUNS if name in c.configs), {})
    return {k: v["value"] for k, v in stored.items() if isinstance(v, dict) and "value" in v}


def _activation(
    c: Checkpoint, config: dict[str, Any], run: dict[str, Any], num_latents: int
) -> Activation:
    jumps = THRESHOLD in c.tensors.names
    name = config.get("activation")
    if name is None:
        name = "jumprelu" if jumps else run.get("act_fn", "relu")
    name = name.lower() if isinstance(name, str) else name
    if jumps != (name == "jumprelu"):
        raise c.error(f"activation {name!r}, but {THRESHOLD} is {'there' if jumps else 'missing'}")
    if jumps:
        c.expect_shape(THRESHOLD, num_latents)
        return JumpReLU(c.tensors.get(THRESHOLD, compared=True))
    if name == "relu":
        return ReLU()
    if name != "topk":
        raise c.error(f"activation {name!r}, expected relu, topk or jumprelu")
    if "k" not in config and CRV[0] in c.where:
        return TopK(CRV[1])
    if CONFIG not in c.configs:
        raise c.error(f"activation 'topk', and no {CONFIG} says of how many")
    return TopK(c.integer(CONFIG, "k"))


def _hook(c: Checkpoint, config: dict[str, Any], key: str) -> str:
    """`mlp.hook_out` of layer 7 -> the name of its tensor.

    TransformerLens calls a block's contribution hook_mlp_out; in Gemma that is not the MLP's own
    output, which is what mlp.hook_out says.
    """
    layer = re.sub(r"\D", "", PurePosixPath(c.weights).stem)
    name = config[key]
    if not isinstance(name, str) or "hook_" not in name:
        raise c.error(f"{CONFIG}: {key} is {name!r}, expected a hook of TransformerLens")
    if name == "mlp.hook_out":
        is_gemma = "gemma" in str(config.get("model_name", "")).lower()
        return f"layers.{layer}.mlp" if is_gemma else f"blocks.{layer}.hook_mlp_out"
    return f"blocks.{layer}.{name}"


FAMILIES = (
    Family(
        "circuit-tracer", r"layer_\d+\.safetensors", read,
        may=tuple(f"^{name}" for name in (CONFIG, *RUNS)), is_file=True,
    ),
)  # fmt: skip
