"""Llama Scope (2024): `Llama3_1-8B-Base-L15R-8x/{hyperparams.json,checkpoints/final.safetensors}`.

    encoder.weight [num_latents, d_in], encoder.bias, decoder.weight [d_out, num_latents],
    decoder.bias

The equations are openmoss.py's. `jump_relu_threshold` is in the units of the raw output: the
release code folds scales and decoder norms into the weights before it compares, so θ · s_out is the
threshold of normalised scores. `top_k` is a training option except where act_fn says topk.
"""

from __future__ import annotations

import math
from typing import Any

from saert.activations import Activation, JumpReLU
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.openmoss import (
    KEYS,
    LINEAR,
    assemble,
    average_norms,
    check_kind,
    plain_activation,
    tensor_names,
)
from saert.sae import SAE

CONFIG, MODEL = "hyperparams.json", "lm_config.json"
NEEDED = {
    "hook_point_in", "act_fn", "norm_activation", "apply_decoder_bias_to_pre_encoder",
    "sparsity_include_decoder_norm",
}  # fmt: skip


def read(c: Checkpoint) -> SAE:
    """An SAE or, where hook_point_out is another hook, a transcoder.

    Option `latents`: "normalised" (default), or "raw" as OpenMOSS' inference shows them.
    """
    config = c.expect_keys(CONFIG, NEEDED, KEYS)
    check_kind(c, CONFIG)
    c.expect_tensors(tensor_names(c, CONFIG, LINEAR))
    stored = config.get("dataset_average_activation_norm")
    norms = average_norms(c, CONFIG, stored if isinstance(stored, dict) else {})
    raw = c.option("latents", "normalised", "raw") == "raw"
    if raw and norms is None:
        raise c.error(
            f"latents='raw' is for dataset-wise norms; {CONFIG} says {config['norm_activation']!r}"
        )
    return assemble(
        c, CONFIG, LINEAR, _activation(c, norms), metadata=_metadata(c), norms=norms, raw=raw
    )


def _activation(c: Checkpoint, norms: tuple[float, float] | None) -> Activation:
    act_fn = str(c.configs[CONFIG]["act_fn"]).lower()
    if act_fn != "jumprelu":
        return plain_activation(c, CONFIG, act_fn)
    threshold = c.number(CONFIG, "jump_relu_threshold", least=0)
    s_out = 1.0 if norms is None else math.sqrt(c.matrix(LINEAR.W_dec)[0]) / norms[1]
    return JumpReLU(threshold * s_out)


def _metadata(c: Checkpoint) -> dict[str, Any]:
    metadata: dict[str, Any] = {"format": "Llama Scope"}
    model = c.configs.get(MODEL, {}).get("model_name")
    if model is None and search(r"Llama3_1-8B-Base", c.where):
        model = "meta-llama/Llama-3.1-8B"
    return metadata | ({"base_model": model} if isinstance(model, str) else {})


FAMILIES = (
    Family(
        "Llama Scope", r"checkpoints/final\.safetensors", read,
        needs=(CONFIG,), may=(MODEL,), options=frozenset({"latents"}),
    ),
)  # fmt: skip
