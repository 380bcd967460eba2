"""Qwen Scope: `layer5.sae.pt` … beside one `config.json`, in SAE-Res-<model>-W32K-L0_50.

    W_enc [num_latents, d], W_dec [d, num_latents], b_enc, b_dec

SAELens' names with both matrices transposed; b_dec is not subtracted. Qwen's own demo keeps the k
largest whatever their sign; here, as in SAELens, a negative one among them counts as inactive.
"""

from __future__ import annotations

from saert.activations import TopK
from saert.hub.checkpoint import Checkpoint, Family, parse_hookpoint, search
from saert.hub.formats.torch_files import expect_entries, known, read_weights
from saert.sae import SAE

CONFIG = "config.json"
KNOWN = {
    "model_type", "base_model", "d_model", "d_sae", "k", "num_layers", "hook_point", "dtype",
}  # fmt: skip
NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def read(c: Checkpoint) -> SAE:
    """k, model and site come from config.json; without one from the repository's name."""
    expect_entries(c, NAMES.values())
    weights = read_weights(c, NAMES, linear=True)
    named = search(r"SAE-Res-([^/]+)-W\d+K-L0_(\d+)", c.where)
    if CONFIG in c.configs:
        config = c.expect_keys(CONFIG, {"k"}, KNOWN)
        c.expect_value(CONFIG, "model_type", "topk_sae", default="topk_sae")
        k = c.integer(CONFIG, "k")
        c.expect_size(CONFIG, "d_sae", weights[0].shape[0])
        c.expect_size(CONFIG, "d_model", weights[0].shape[1])
    elif named is not None:
        config, k = {}, int(named[2])
    else:
        raise c.error("no config.json, and no -L0_… in the repository's name: k is unknown")
    layer = search(r"layer(\d+)\.sae\.pt$", c.weights)
    hook_name = f"{config.get('hook_point', 'resid_post')}.{layer and layer[1]}"
    return SAE.from_weights(
        *weights,
        activation=TopK(k),
        hookpoint=parse_hookpoint(hook_name),
        subtract_b_dec=False,
        metadata=known(
            format="Qwen Scope",
            base_model=config.get("base_model", named and f"Qwen/{named[1]}"),
            hook_name=hook_name,
            declared={"l0": float(k)},
        ),
    )


FAMILIES = (Family("Qwen Scope", r"layer\d+\.sae\.pt", read, may=(CONFIG,), is_file=True),)
