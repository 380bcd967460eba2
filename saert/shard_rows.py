"""Which latents each shard of an SAE gets, and the SAE that these latents are by themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saert.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from saert.sae import SAE


def placed(tensor: Tensor | None, place: torch.device) -> nn.Parameter | None:
    """A copy, in memory of its own also where it is there already."""
    if tensor is None:
        return None
    return nn.Parameter(tensor.detach().to(place, copy=True), requires_grad=False)


def part(sae: SAE, rows: slice, place: torch.device) -> SAE:
    """The rows of an SAE as an SAE of their own."""
    W_enc, W_dec = placed(sae.W_enc[rows], place), placed(sae.W_dec[rows], place)
    assert W_enc is not None and W_dec is not None
    one = SAE(
        W_enc,
        W_dec,
        None if sae.b_enc is None else placed(sae.b_enc[rows], place),
        placed(sae.b_dec, place) if sae.subtract_b_dec else None,
        activation=_activation(sae, rows),
        hookpoint=sae.hookpoint,
        target_hookpoint=sae.target_hookpoint,
        input_transform=sae.input_transform,
        subtract_b_dec=sae.subtract_b_dec,
        W_skip=None,
        select_by_decoder_norm=sae.select_by_decoder_norm,
        metadata={},
    )
    one.activation.to(place)
    return one.requires_grad_(False)


def _activation(sae: SAE, rows: slice) -> Activation:
    """The activation of some rows; those that compare latents still have to be compared."""
    whole = sae.activation
    kind = type(whole)
    if isinstance(whole, TopK | AbsTopK) and kind in (TopK, AbsTopK):
        return kind(whole.k)
    if isinstance(whole, GroupMax) and kind is GroupMax:
        return GroupMax((rows.stop - rows.start) * whole.k // sae.num_latents)
    if isinstance(whole, JumpReLU) and kind in (JumpReLU, BatchTopK):
        return kind(whole.threshold[rows] if whole.threshold.dim() else whole.threshold)
    if kind is ReLU:
        return ReLU()
    if isinstance(whole, Gated) and kind is Gated:
        return Gated(whole.b_gate[rows], whole.b_mag[rows], whole.r_mag[rows])
    raise ValueError(
        f"shard: {kind.__name__} cannot be sharded, as what it does to a latent may depend on all "
        "others; TopK, AbsTopK, GroupMax, BatchTopK, JumpReLU, ReLU and Gated can"
    )


def bounds_of(sae: SAE, shards: int) -> list[int]:
    """Where shards begin and end: [shards + 1]."""
    units, name = sae.num_latents, "latents"
    if isinstance(sae.activation, GroupMax):
        units, name = sae.activation.k, "groups of GroupMax"
    if shards > units:
        raise ValueError(
            f"shard: found {shards} shards for {units} {name}, expected at most {units}"
        )
    few, more = divmod(units, shards)
    unit = sae.num_latents // units
    return [unit * (i * few + min(i, more)) for i in range(shards + 1)]


def owned(latents: Tensor, start: int, one: SAE) -> tuple[Tensor, Tensor]:
    """Which latents a shard has, and their rows there (0 for the others)."""
    own = (latents >= start) & (latents < start + one.num_latents)
    return own, (latents - start).where(own, 0)


def identity(sae: SAE) -> tuple[object, ...]:
    """What tells SAEs apart, without reading all of their weights."""
    corners = (sae.W_enc[0, :4].tolist(), sae.W_dec[-1, :4].tolist())
    return sae.extra_repr(), repr(sae.activation), repr(sae.input_transform), corners
