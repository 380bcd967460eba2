"""Where a hookpoint lives in an engine's own modules, which differ from transformers'."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from saert.architecture import HookpointError, Location, blocks
from saert.hookpoint import Hookpoint

SHARDED = ("attn_z", "mlp_act")


def place(model: nn.Module, at: Hookpoint, *, shards: int = 1) -> Location:
    """The module side of a hookpoint, in an engine's native model or its transformers backend.

    Engines fuse the residual stream into (hidden, residual) pairs, so the input of a block is read
    as the output of the block before it.

    Args:
        shards: over how many processes tensor parallelism spreads the model.

    Raises HookpointError: one that the engine's modules do not expose; says which do.
    """
    if at.site == "resid_pre":
        if at.layer == 0:
            raise HookpointError(
                f"{at}: an engine's first block has no block before it to read from; use embed or "
                "resid_post.0"
            )
        at = replace(at, site="resid_post", layer=int(at.layer or 0) - 1)
    if at.site == "resid_mid":
        raise HookpointError(
            f"{at}: an engine keeps the stream between attention and MLP inside fused norms; use "
            f"resid_post.{at.layer}, attn_out.{at.layer} or mlp_in.{at.layer}"
        )
    if at.site in SHARDED and shards > 1:
        raise HookpointError(
            f"{at}: tensor parallelism over {shards} processes splits this tensor between them; "
            "use one process, or resid_post, attn_out, mlp_in or mlp_out"
        )
    location = at.resolve(model)
    if location.side == "in" and _is_block(model, location.module):
        raise HookpointError(
            f"{at}: the input of an engine's block is several tensors; name the output of the block"
            " before it"
        )
    return location


def _is_block(model: nn.Module, module: nn.Module) -> bool:
    try:
        return any(module is block for block in blocks(model)[1])
    except HookpointError:  # no config, no list of blocks
        return False
