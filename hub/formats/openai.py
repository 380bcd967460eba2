"""OpenAI's GPT-2 small autoencoders (Gao et al. 2024): `<location>_v5_32k/autoencoders/<layer>.pt`.

    pre_bias [d], latent_bias [num_latents], encoder.weight [num_latents, d],
    decoder.weight [d, num_latents]; beside them `activation` and `activation_state_dict`

Versions 1 and 4 are ReLU autoencoders of the activations as they are. Version 5 is TopK, and its
inputs are layer-normed: no flag says so, the activation does (openai/sparse_autoencoder, model.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from saert.activations import Activation, ReLU, TopK
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.torch_files import (
    SINGLE_FILE,
    expect_count,
    expect_entries,
    known,
    read_scalar,
    read_weights,
)
from saert.sae import SAE
from saert.transforms import LayerNorm, NoTransform

NAMES = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_enc": "latent_bias",
    "b_dec": "pre_bias",
}
STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
# `state_dict()` of their class writes the activation's entries a second time, under a prefix
AGAIN = {"activation.k", "activation.postact_fn"}
LOCATIONS = {
    "resid_delta_attn": "attn_out",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_post_mlp": "resid_post",
    "mlp_post_act": "mlp_act",
}


def read(c: Checkpoint) -> SAE:
    """Versions 1, 4 and 5. Refuses activations other than ReLU and TopK followed by ReLU."""
    expect_entries(
        c,
        NAMES.values(),
        optional=STATISTICS | AGAIN,
        beside={"activation", "activation_state_dict"} | AGAIN,
    )
    activation = _activation(c)
    top_k = isinstance(activation, TopK)
    location = search("|".join(LOCATIONS), c.where)
    return SAE.from_weights(
        *read_weights(c, NAMES, linear=True),
        activation=activation,
        hookpoint=_hookpoint(c, location and location[0]),
        input_transform=LayerNorm() if top_k else NoTransform(),
        subtract_b_dec=True,
        metadata=known(
            format="OpenAI",
            base_model="gpt2",
            hook_name=location and location[0],
            declared={"l0": float(activation.k)} if isinstance(activation, TopK) else None,
        ),
    )


def _activation(c: Checkpoint) -> Activation:
    kind = c.tensors.extras.get("activation", "ReLU")
    state = c.tensors.extras.get("activation_state_dict", {})
    if not isinstance(state, Mapping) or set(state) - {"k", "postact_fn"}:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise c.error(f"activation_state_dict holds {found}, expected k and postact_fn")
    for name, value in state.items():
        if not isinstance(value, int | float | str | None):
            raise c.error(
                f"activation_state_dict: {name} is a tensor or another object, expected a plain "
                f"value: save the file again with {name}.item() for it"
            )
    after = {state.get("postact_fn"), c.tensors.extras.get("activation.postact_fn")} - {None}
    if kind == "TopK" and after <= {"ReLU"}:
        return TopK(expect_count(c, "k", state.get("k"), read_scalar(c, "activation.k")))
    if kind == "ReLU" and not state:
        return ReLU()
    raise c.error(
        f"activation {kind!r} with {dict(state)}, expected 'ReLU', or 'TopK' followed by 'ReLU'"
    )


def _hookpoint(c: Checkpoint, location: str | None) -> Hookpoint | None:
    layer = search(r"(\d+)\.pth?$", c.weights)
    if location is None or layer is None:
        return None
    return Hookpoint(site=LOCATIONS[location], layer=int(layer[1]))


FAMILIES = (
    Family(
        "OpenAI",
        SINGLE_FILE,
        read,
        lambda c: NAMES["b_dec"] in c.tensors.names,
        is_file=True,
        loose=True,
    ),
)
