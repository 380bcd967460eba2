"""Gemma Scope 2: `resid_post/layer_17_width_16k_l0_big/{params.safetensors,config.json}`.

    w_enc [d_in, num_latents], w_dec [num_latents, d_out], b_enc, b_dec, threshold [num_latents]
    affine_skip_connection [d_in, d_out]: y += x A (transcoders)

    f = relu(pre) · 1[pre > threshold],  pre = x w_enc + b_enc;  b_dec is not subtracted

Some folders have no config.json; their path then says the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from saert.activations import JumpReLU
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.hooks import module_hook, places
from saert.sae import SAE

CONFIG, SKIP = "config.json", "affine_skip_connection"
KEYS = {
    "architecture", "hf_hook_point_in", "hf_hook_point_out", "width", "model_name", "l0",
    "affine_connection", "type",
}  # fmt: skip
NORM_IN, NORM_OUT = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
FOLDERS = {  # what the folders read and write, below model.layers.L
    "resid_post": ("output",) * 2,
    "attn_out": ("self_attn.o_proj.input",) * 2,
    "mlp_out": (NORM_OUT,) * 2,
    "transcoder": (NORM_IN, NORM_OUT),
}
UNSUPPORTED = {
    "clt": "a cross-layer transcoder, whose latents write at many layers",
    "crosscoder": "a crosscoder, which reads several layers at once",
}


def read(c: Checkpoint) -> SAE:
    """One SAE or transcoder. Refuses cross-layer ones, and a config that the tensors contradict."""
    if CONFIG in c.configs:  # null says no more than a missing key
        given = {key: value for key, value in c.configs[CONFIG].items() if value is not None}
        c = replace(c, configs={CONFIG: given})
    facts = _config(c) if CONFIG in c.configs else _from_path(c)
    reads, writes = facts["hf_hook_point_in"], facts["hf_hook_point_out"]
    kind = facts.get("type", "sae" if reads == writes else "transcoder")
    if kind in UNSUPPORTED:
        raise c.error(f"{UNSUPPORTED[kind]}; saert reads single-layer SAEs and transcoders")
    if kind != ("sae" if reads == writes else "transcoder"):
        raise c.error(f"type {kind!r}, but it reads {reads!r} and writes {writes!r}")
    skips = SKIP in c.tensors.names
    if skips != facts.get("affine_connection", skips):
        raise c.error(
            f"affine_connection is {not skips}, but {SKIP} is {'there' if skips else 'missing'}"
        )
    needed = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    c.expect_tensors(needed, (SKIP,) if kind == "transcoder" else ())
    d_in, num_latents = c.matrix("w_enc")
    d_out = c.matrix("w_dec")[1]
    c.expect_shape("w_dec", num_latents, d_in if kind == "sae" else d_out)
    for name in ("b_enc", "threshold"):
        c.expect_shape(name, num_latents)
    c.expect_shape("b_dec", d_out)
    if skips:
        c.expect_shape(SKIP, d_in, d_out)
    if facts.get("width", num_latents) != num_latents:
        raise c.error(f"{CONFIG} declares width {facts['width']!r}, w_enc holds {num_latents}")
    metadata: dict[str, Any] = {"format": "Gemma Scope 2"}
    if isinstance(model := facts.get("model_name"), str):
        metadata["base_model"] = _model(model)
    if "l0" in facts:
        metadata["declared"] = {"l0": c.number(CONFIG, "l0", least=0)}
    hookpoint, target = places(c, module_hook(reads), module_hook(writes), metadata)
    metadata |= {"hook_name": reads} | ({"hook_name_out": writes} if target else {})
    return SAE.from_weights(
        c.tensors.get("w_enc", transpose=True),
        c.tensors.get("w_dec"),
        c.tensors.get("b_enc"),
        c.tensors.get("b_dec"),
        activation=JumpReLU(c.tensors.get("threshold", compared=True)),
        hookpoint=hookpoint,
        target_hookpoint=target,
        subtract_b_dec=False,
        W_skip=c.tensors.get(SKIP, transpose=True) if skips else None,
        metadata=metadata,
    )


def _config(c: Checkpoint) -> dict[str, Any]:
    config = dict(c.expect_keys(CONFIG, {"architecture", "hf_hook_point_in"}, KEYS))
    c.expect_value(CONFIG, "architecture", "jump_relu")
    c.expect_value(CONFIG, "type", "sae", "transcoder", *UNSUPPORTED, default="sae")
    c.expect_value(CONFIG, "affine_connection", True, False, default=False)
    config.setdefault("hf_hook_point_out", config["hf_hook_point_in"])
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        if not isinstance(config[key], str):
            raise c.error(f"{CONFIG}: {key} is {config[key]!r}, expected a name")
    return config


def _from_path(c: Checkpoint) -> dict[str, Any]:
    """The same facts without a config: folder, layer and repo name."""
    names = "|".join((*FOLDERS, *UNSUPPORTED))
    folder = search(rf"(?:^|/)({names})(?:_all)?/", c.where)
    layer = search(r"layer_(\d+)_", PurePosixPath(c.path or c.where).name)
    if folder is None or layer is None:
        raise c.error(
            f"no {CONFIG}, and the path does not say what it reads; expected one such as "
            "resid_post/layer_17_width_16k_l0_big"
        )
    if folder[1] in UNSUPPORTED:
        return {"hf_hook_point_in": "", "hf_hook_point_out": "", "type": folder[1]}
    reads, writes = (f"model.layers.{layer[1]}.{name}" for name in FOLDERS[folder[1]])
    facts: dict[str, Any] = {"hf_hook_point_in": reads, "hf_hook_point_out": writes}
    if repo := search(r"gemma-scope-2-(\w+)-(pt|it)", c.where):
        facts["model_name"] = f"google/gemma-3-{repo[1]}-{repo[2]}"
    return facts


def _model(name: str) -> str:
    """The model's id on the Hub: the smallest base model has no suffix there."""
    name = name.replace("-v3", "-3")
    name = name if "/" in name else f"google/{name}"
    return name.replace("-270m-pt", "-270m")


FAMILIES = (
    Family(
        "Gemma Scope 2", r"params\.safetensors", read,
        lambda c: "w_enc" in c.tensors.names, may=(CONFIG,),
    ),
)  # fmt: skip
