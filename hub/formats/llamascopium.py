"""llamascopium (OpenMOSS, Llama Scope 2): `transcoder/8x/k128/layer12_transcoder_8x_k128/`
`{config.json,sae_weights.safetensors}`.

    W_E [d_in, num_latents], b_E, W_D [num_latents, d_out], b_D,
    activation_function.log_jumprelu_threshold [num_latents], dataset_average_activation_norm.<hook>

The equations are openmoss.py's: scores are weighted by the decoder norm, latents are not.
"""

from __future__ import annotations

from typing import Any

from saert.activations import Activation, BatchTopK
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.openmoss import (
    KEYS,
    UNSUPPORTED,
    Layout,
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

CONFIG, MODEL = "config.json", "lm_config.json"
THRESHOLD = "activation_function.log_jumprelu_threshold"
LAYOUT = Layout("W_E", "b_E", "W_D", "b_D", W_enc_transposed=True, W_dec_transposed=False)
COUNTERS = {"tokens_since_last_activation", "is_dead"}  # of training


def read(c: Checkpoint) -> SAE:
    """An SAE or, where hook_point_out is another hook, a transcoder.

    Option `threshold`: what a score must exceed in a batchtopk SAE, whose files hold no such
    number: OpenMOSS keeps the k · tokens largest scores of whatever batch comes along.
    """
    check_kind(c, CONFIG)
    config = c.expect_keys(CONFIG, {"hook_point_in", "act_fn"}, KEYS)
    act_fn = str(config["act_fn"]).lower()
    learned = {THRESHOLD} if act_fn == "jumprelu" else set()
    c.expect_tensors(tensor_names(c, CONFIG, LAYOUT) | learned, norm_names(c) | COUNTERS)
    return assemble(
        c, CONFIG, LAYOUT, _activation(c, act_fn),
        metadata=_metadata(c), norms=average_norms(c, CONFIG, stored_norms(c, CONFIG)),
    )  # fmt: skip


def _activation(c: Checkpoint, act_fn: str) -> Activation:
    if act_fn == "jumprelu":
        return learned_threshold(c, THRESHOLD, c.matrix(LAYOUT.W_enc)[1])
    if act_fn != "batchtopk":
        return plain_activation(c, CONFIG, act_fn)
    threshold = c.options.get("threshold")
    if not isinstance(threshold, float | int):
        raise c.error(
            f"{CONFIG}: act_fn 'batchtopk' keeps the largest scores of a whole batch, and its "
            "files hold no threshold for one token; give one, load(…, threshold=0.5)"
        )
    return BatchTopK(float(threshold))


def _metadata(c: Checkpoint) -> dict[str, Any]:
    metadata: dict[str, Any] = {"format": "llamascopium"}
    model = c.configs.get(MODEL, {}).get("model_name")
    if model is None and (repo := search(r"Llama-Scope-2-(Qwen3-[\d.]+B)", c.where)):
        model = f"Qwen/{repo[1]}"
    return metadata | ({"base_model": model} if isinstance(model, str) else {})


FAMILIES = (
    Family(
        "llamascopium", r"sae_weights\.safetensors", read,
        lambda c: "W_E" in c.tensors.names or c.configs[CONFIG].get("sae_type") in UNSUPPORTED,
        needs=(CONFIG,), may=(MODEL,), options=frozenset({"threshold"}),
    ),
)  # fmt: skip
