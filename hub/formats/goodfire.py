"""Goodfire's Llama SAEs: one file, `Llama-3.1-8B-Instruct-SAE-l19.pth`, and nothing beside it.

    encoder_linear.weight [num_latents, d], encoder_linear.bias,
    decoder_linear.weight [d, num_latents], decoder_linear.bias

f = relu(encoder(x)), y = decoder(f), on a block's output; only the name says of which model's.
"""

from __future__ import annotations

from saert.activations import ReLU
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.torch_files import SINGLE_FILE, expect_entries, known, read_weights
from saert.sae import SAE

NAMES = {
    "W_enc": "encoder_linear.weight",
    "W_dec": "decoder_linear.weight",
    "b_enc": "encoder_linear.bias",
    "b_dec": "decoder_linear.bias",
}


def read(c: Checkpoint) -> SAE:
    """Two linear layers with a ReLU between; b_dec is not subtracted."""
    expect_entries(c, NAMES.values())
    named = search(r"(Llama-[\w.-]+?)-SAE-l(\d+)", c.where)
    return SAE.from_weights(
        *read_weights(c, NAMES, linear=True),
        activation=ReLU(),
        hookpoint=named and Hookpoint(site="resid_post", layer=int(named[2])),
        subtract_b_dec=False,
        metadata=known(format="Goodfire", base_model=named and f"meta-llama/{named[1]}"),
    )


FAMILIES = (
    Family(
        "Goodfire",
        SINGLE_FILE,
        read,
        lambda c: NAMES["W_enc"] in c.tensors.names,
        is_file=True,
        loose=True,
    ),
)
