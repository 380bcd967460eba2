"""Llama Scope R1-Distill: `<mixture>/L15R/{config.json,sae_weights.safetensors}`.

    encoder.weight [num_latents, d_in], encoder.bias, decoder.weight [d_out, num_latents],
    decoder.bias, log_jumprelu_threshold [num_latents], dataset_average_activation_norm.<hook> []

The equations are openmoss.py's; θ = exp(log_jumprelu_threshold) is in normalised units.
"""

from __future__ import annotations

from typing import Any

from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.openmoss import (
    KEYS,
    LINEAR,
    assemble,
    average_norms,
    check_kind,
    learned_threshold,
    norm_names,
    plain_activation,
    stored_norms,
    tensor_names,
)
from saert.sae import SAE

CONFIG, MODEL, THRESHOLD = "config.json", "lm_config.json", "log_jumprelu_threshold"


def read(c: Checkpoint) -> SAE:
    """An SAE or, where hook_point_out is another hook, a transcoder."""
    config = c.expect_keys(CONFIG, {"hook_point_in"}, KEYS)
    check_kind(c, CONFIG)
    stated = "jumprelu" if THRESHOLD in c.tensors.names else None
    act_fn = str(config.get("act_fn", stated)).lower()
    jumps = act_fn == "jumprelu"
    needed = tensor_names(c, CONFIG, LINEAR) | ({THRESHOLD} if jumps else set())
    c.expect_tensors(needed, norm_names(c))
    return assemble(
        c, CONFIG, LINEAR,
        learned_threshold(c, THRESHOLD, c.matrix(LINEAR.W_enc)[0])
        if jumps else plain_activation(c, CONFIG, act_fn),
        metadata=_metadata(c), norms=average_norms(c, CONFIG, stored_norms(c, CONFIG)),
    )  # fmt: skip


def _metadata(c: Checkpoint) -> dict[str, Any]:
    metadata: dict[str, Any] = {"format": "Llama Scope R1"}
    model = c.configs.get(MODEL, {}).get("model_name")
    if model is None and search(r"Llama-Scope-R1-Distill", c.where):
        model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return metadata | ({"base_model": model} if isinstance(model, str) else {})


FAMILIES = (
    Family(
        "Llama Scope R1", r"sae_weights\.safetensors", read,
        lambda c: {LINEAR.W_enc, LINEAR.W_dec} <= c.tensors.names,
        needs=(CONFIG,), may=(MODEL,),
    ),
)  # fmt: skip
