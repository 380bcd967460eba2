"""qresearch's DeepSeek-R1 SAE: one file, `DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt`.

    encoder.weight [num_latents, d], encoder.bias, decoder.weight [d, num_latents], decoder.bias

f = relu(encoder(x)), y = decoder(f), on a block's output; only the name says of which model's.
"""

from __future__ import annotations

from saert.activations import ReLU
from saert.hookpoint import Hookpoint
from saert.hub.checkpoint import Checkpoint, Family, search
from saert.hub.formats.torch_files import SINGLE_FILE, expect_entries, known, read_weights
from saert.sae import SAE

NAMES = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_enc": "encoder.bias",
    "b_dec": "decoder.bias",
}


def read(c: Checkpoint) -> SAE:
    """Two linear layers with a ReLU between; b_dec is not subtracted."""
    expect_entries(c, NAMES.values())
    named = search(r"(DeepSeek-R1-[\w.-]+?)-SAE-l(\d+)", c.where)
    return SAE.from_weights(
        *read_weights(c, NAMES, linear=True),
        activation=ReLU(),
        hookpoint=named and Hookpoint(site="resid_post", layer=int(named[2])),
        subtract_b_dec=False,
        metadata=known(format="qresearch", base_model=named and f"deepseek-ai/{named[1]}"),
    )


FAMILIES = (
    Family(
        "qresearch",
        SINGLE_FILE,
        read,
        lambda c: set(NAMES.values()) <= c.tensors.names,
        is_file=True,
        loose=True,
    ),
)
