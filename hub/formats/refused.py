"""Layouts that are recognised only to say what they are: no single-layer SAE holds what they do."""

from __future__ import annotations

from collections.abc import Callable

from saert.hub.checkpoint import Checkpoint, Family
from saert.sae import SAE


def refuse(what: str, expected: str) -> Callable[[Checkpoint], SAE]:
    def read(c: Checkpoint) -> SAE:
        raise c.error(f"found {what}, with tensors {sorted(c.tensors.names)[:8]}; {expected}")

    return read


ONE_LAYER = "saert reads SAEs and transcoders that read one layer and write at one"
ACROSS = (
    "a cross-layer transcoder ({}), whose latents write at every later layer: the sum of its "
    "decoders reconstructs no layer"
)
FAMILIES = (
    Family(
        "circuit-tracer CLT", r"W_enc_\d+\.safetensors",
        refuse(ACROSS.format("circuit-tracer's W_enc_i, W_dec_i"), ONE_LAYER),
        may=("^config.yaml",), is_file=True,
    ),
    Family(
        "Gemma Scope 2 CLT", r"params_layer_\d+\.safetensors",
        refuse(ACROSS.format("Gemma Scope 2's params_layer_i"), ONE_LAYER),
        may=("config.json",), is_file=True,
    ),
    Family(
        "OpenSAE in parts", r"(?:model|pytorch_model)-0*1-of-\d+\.(?:safetensors|bin)",
        refuse(
            "the first of several files that an OpenSAE's weights are sharded into",
            "expected one file: save it again with save_pretrained(…, max_shard_size='100GB')",
        ),
        lambda c: "feature_size" in c.configs.get("config.json", {}),
        needs=("config.json",), loose=True,
    ),
    Family(
        "temporal SAE", r"latest_ckpt\.safetensors",
        refuse(
            "a temporal SAE (canrager/temporalSAEs): its attention layers predict part of every "
            "code from the tokens before, which needs whole sequences",
            ONE_LAYER,
        ),
        needs=("conf.yaml",),
    ),
)  # fmt: skip
