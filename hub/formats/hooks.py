"""Where an SAE reads and writes, from the names that checkpoints give its hooks."""

from __future__ import annotations

import re
from typing import Any

from saert.hookpoint import Hookpoint, HookpointError
from saert.hub.checkpoint import Checkpoint

UNWEIGHTED = (
    "it reads blocks.{0}.ln2.hook_normalized, the norm before the MLP before it is multiplied by "
    "its weight, which no transformers module exposes: resid_mid.{0} over its own RMS"
)

# below model.layers.L, in Google's words; sites find their module in the multimodal sizes too
SITES = {
    "": "resid_post",
    "self_attn.o_proj:in": "attn_z",
    "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm": "mlp_out",
}
TEXT_LAYER = r"(?:(?:model|language_model|text_model)\.)*layers\.(\d+)((?:\.[\w.]+)?)(:in)?"


def module_hook(name: str) -> str:
    """`model.layers.17.output` -> resid_post.17; any other module -> its path and side.

    A path is taken from the layers on, where it names the same module in a model of text alone and
    in a multimodal one.

    >>> module_hook("model.language_model.layers.17.mlp.down_proj.input")
    'layers.17.mlp.down_proj:in'
    """
    name = name.removesuffix(".output")
    if name.endswith(".input"):
        name = name.removesuffix(".input") + ":in"
    if (known := re.fullmatch(TEXT_LAYER, name)) is None:
        return name
    layer, module, side = known[1], known[2], known[3] or ""
    site = SITES.get(module.removeprefix(".") + side)
    return f"layers.{layer}{module}{side}" if site is None else f"{site}.{layer}"


def places(
    c: Checkpoint, reads: object, writes: object, metadata: dict[str, Any]
) -> tuple[Hookpoint | None, Hookpoint | None]:
    """The hookpoint, and the target of a transcoder (None where it writes what it reads).

    The raw names go into the metadata. A name that no transformers module answers to (the norm
    before its weight) leaves the hookpoint None and the reason in `metadata["note"]`: `attach` then
    asks where. A transcoder needs its target, without which it could pass for an SAE: FormatError.
    """
    if not (isinstance(reads, str) and isinstance(writes, str)):
        raise c.error(f"it reads {reads!r} and writes {writes!r}, expected names of hooks")
    metadata["hook_name"] = reads
    transcodes = writes != reads
    if transcodes:
        metadata["hook_name_out"] = writes
    try:
        hookpoint = Hookpoint.parse(reads)
    except HookpointError as error:
        hookpoint = None
        unweighted = re.fullmatch(r"blocks\.(\d+)\.ln2\.hook_normalized", reads)
        note(metadata, UNWEIGHTED.format(*unweighted.groups()) if unweighted else str(error))
    try:
        return hookpoint, Hookpoint.parse(writes) if transcodes else None
    except HookpointError as error:
        raise c.error(f"a transcoder that writes to {writes!r}: {error}") from None


def note(metadata: dict[str, Any], text: str) -> None:
    """Something a user should know, added to those already noted."""
    metadata["note"] = "; ".join(filter(None, (metadata.get("note"), text)))
