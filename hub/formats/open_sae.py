"""OpenSAE (THU-KEG/OpenSAE-LLaMA-3.1-Layer_XX): a transformers folder, `config.json` and weights.

    encoder.weight [num_latents, d_in], encoder.bias, W_dec [num_latents, d_in], b_dec

    x' = (x - μ) / (σ + ε) per token, σ with Bessel's correction        (input_normalize)
    f  = the k largest relu(pre)  |  relu(pre) · 1[pre > θ],  pre = (x' - b_dec) W_enc + b_enc
    y  = (f W_dec + b_dec) · (σ + ε) + μ

OpenSAE leaves out the last factor and shift unless `normalize_shift_back`, and then splices
normalised units into the model; saert's reconstructions are always in the model's units.
"""

from __future__ import annotations

from typing import Any

from saert.activations import Activation, JumpReLU, TopK
from saert.hub.checkpoint import Checkpoint, Family
from saert.hub.formats.hooks import note, places
from saert.sae import SAE
from saert.transforms import InputTransform, LayerNorm, NoTransform

CONFIG = "config.json"
TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
TRANSFORMERS_KEYS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
}  # fmt: skip
TRAINING_KEYS = {
    "normalize_decoder", "decoder_impl", "multi_topk", "multi_topk_multiplier", "auxk_alpha",
    "l1_coef", "k_experts", "moe_loss_coef", "router_z_loss_coef",
}  # fmt: skip
KEYS = TRANSFORMERS_KEYS | TRAINING_KEYS | {
    "hidden_size", "feature_size", "input_normalize", "normalize_shift_back", "input_normalize_eps",
    "input_hookpoint", "output_hookpoint", "model_name", "activation", "k", "jumprelu_theta",
    "num_experts",
}  # fmt: skip
SHIFT_NOTE = (
    "normalize_shift_back is false: OpenSAE's own output stays in units of the normalised input, "
    "where saert's is scaled back"
)
JUMP_NOTE = "OpenSAE keeps the largest latent of a token where none exceeds the threshold"


def read(c: Checkpoint) -> SAE:
    """An autoencoder; refuses mixtures of experts and normalised transcoders."""
    config = c.expect_keys(CONFIG, {"feature_size", "activation", "input_hookpoint"}, KEYS)
    c.expect_value(CONFIG, "num_experts", 1, default=1)
    c.expect_tensors(TENSORS)
    num_latents, d_in = c.matrix("encoder.weight")
    d_out = c.matrix("W_dec")[1]
    c.expect_shape("encoder.bias", num_latents)
    c.expect_shape("W_dec", num_latents, d_in)
    c.expect_shape("b_dec", d_out)
    c.expect_size(CONFIG, "hidden_size", d_in)
    c.expect_size(CONFIG, "feature_size", num_latents)
    reads, writes = config["input_hookpoint"], config.get("output_hookpoint")
    metadata: dict[str, Any] = {"format": "OpenSAE"}
    hookpoint, target = places(c, reads, reads if writes is None else writes, metadata)
    if isinstance(model := config.get("model_name"), str):
        metadata["base_model"] = model
    transform = _transform(c, metadata, transcodes=target is not None)
    return SAE.from_weights(
        c.tensors.get("encoder.weight"),
        c.tensors.get("W_dec"),
        c.tensors.get("encoder.bias"),
        c.tensors.get("b_dec"),
        activation=_activation(c, metadata),
        hookpoint=hookpoint,
        target_hookpoint=target,
        input_transform=transform,
        subtract_b_dec=True,  # a transcoder's too
        metadata=metadata,
    )


def _transform(c: Checkpoint, metadata: dict[str, Any], *, transcodes: bool) -> InputTransform:
    if not c.expect_value(CONFIG, "input_normalize", True, False, default=True):
        return NoTransform()
    restored = c.expect_value(CONFIG, "normalize_shift_back", True, False, default=False)
    if restored and transcodes:
        raise c.error(
            f"{CONFIG}: a transcoder with normalize_shift_back adds its input's mean and std to "
            "its output, which saert's transcoders do not"
        )
    if not restored and not transcodes:
        note(metadata, SHIFT_NOTE)
    eps = c.number(CONFIG, "input_normalize_eps", least=0, default=1e-5)
    return LayerNorm(eps, eps_on_return=True)


def _activation(c: Checkpoint, metadata: dict[str, Any]) -> Activation:
    if c.expect_value(CONFIG, "activation", "topk", "jumprelu") == "topk":
        return TopK(c.integer(CONFIG, "k"))
    note(metadata, JUMP_NOTE)
    return JumpReLU(c.number(CONFIG, "jumprelu_theta", least=0))


FAMILIES = (
    Family(
        "OpenSAE", r"model\.safetensors|pytorch_model\.bin", read,
        lambda c: "feature_size" in c.configs[CONFIG] or c.tensors.names >= TENSORS,
        needs=(CONFIG,), loose=True,
    ),
)  # fmt: skip
