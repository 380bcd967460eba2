"""Gemma Scope 1: `layer_12/width_16k/average_l0_82/params.npz`, and no config file at all.

    W_enc [d_in, num_latents], W_dec [num_latents, d_out], b_enc, b_dec, threshold [num_latents]

    f = relu(pre) · 1[pre > threshold],  pre = x W_enc + b_enc;  b_dec is not subtracted

The model and the site are in the repo's name (google/gemma-scope-2b-pt-res), the layer and the
measured L0 in the path. A copy without those names loads too, without a hookpoint.
"""

from __future__ import annotations

import re
from typing import Any

from saert.activations import JumpReLU
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.hooks import places
from saert.sae import SAE

REPO = r"gemma-scope-(?P<size>\d+b)-(?P<kind>pt|it)-(?P<site>res|mlp|att|transcoders)\b"
HOOKS = {
    "res": ("blocks.{layer}.hook_resid_post",) * 2,
    "mlp": ("blocks.{layer}.hook_mlp_out",) * 2,
    "att": ("blocks.{layer}.attn.hook_z",) * 2,  # the input of o_proj
    "transcoders": ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"),
}
EMBEDDING_NOTE = (
    "trained on embeddings before the factor √d: W_enc was divided and W_dec multiplied by √d, so "
    "that it reads what transformers 5 and TransformerLens call the embedding; b_dec was left as "
    "it is stored, as SAELens leaves it"
)


def read(c: Checkpoint) -> SAE:
    """Sizes from the tensors: the width in the path is a rounded name."""
    upper = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    stored = upper | {name: name.lower() for name in upper if name.lower() in c.tensors.names}
    c.expect_tensors(stored.values())
    d_in, num_latents = c.matrix(stored["W_enc"])
    d_out = c.matrix(stored["W_dec"])[1]
    c.expect_shape(stored["W_dec"], num_latents, d_out)
    for name in ("b_enc", "threshold"):
        c.expect_shape(name, num_latents)
    c.expect_shape("b_dec", d_out)
    is_embedding = re.search(r"(^|/)embedding(/|$)", c.path or c.where) is not None
    metadata, hookpoint, target = _named(c, is_embedding)
    if d_in != d_out and target is None:
        raise c.error(
            f"it reads width {d_in} and writes width {d_out}, so it is a transcoder, but its path "
            "does not say where it writes; keep the repo's name in the path"
        )
    if is_embedding:
        W_enc = c.tensors.scaled(stored["W_enc"], d_in**-0.5, transpose=True)
        W_dec = c.tensors.scaled(stored["W_dec"], d_in**0.5)
    else:
        W_enc = c.tensors.get(stored["W_enc"], transpose=True)
        W_dec = c.tensors.get(stored["W_dec"])
    return SAE.from_weights(
        W_enc,
        W_dec,
        c.tensors.get("b_enc"),
        c.tensors.get("b_dec"),
        activation=JumpReLU(c.tensors.get("threshold", compared=True)),
        hookpoint=hookpoint,
        target_hookpoint=target,
        subtract_b_dec=False,
        metadata=metadata,
    )


def _named(
    c: Checkpoint, is_embedding: bool
) -> tuple[dict[str, Any], Hookpoint | None, Hookpoint | None]:
    """What the names say: metadata, hookpoint, target."""
    metadata: dict[str, Any] = {"format": "Gemma Scope"}
    if l0 := search(r"average_l0_(\d+)", c.where):
        metadata["declared"] = {"l0": float(l0[1])}
    repo, layer = search(REPO, c.where), search(r"layer_(\d+)(?=/|$)", c.where)
    if repo is not None:
        suffix = "-it" if repo["kind"] == "it" else ""
        metadata["base_model"] = f"google/gemma-2-{repo['size']}{suffix}"
    if is_embedding:
        metadata |= {"hook_name": "hook_embed", "note": EMBEDDING_NOTE}
        return metadata, Hookpoint(site="embed"), None
    if repo is None or layer is None:
        return metadata, None, None
    reads, writes = (hook.format(layer=layer[1]) for hook in HOOKS[repo["site"]])
    return metadata, *places(c, reads, writes, metadata)


FAMILIES = (Family("Gemma Scope", r"params\.npz", read),)
