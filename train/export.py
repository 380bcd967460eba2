"""From a dictionary in training to an SAE that attaches, saves and publishes like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train.training import Training
from saert.train.units import Units


@torch.no_grad()
def to_sae(
    training: Training,
    units: Units,
    hookpoint: Hookpoint,
    target: Hookpoint | None,
    metadata: Mapping[str, Any] | None = None,
) -> SAE:
    """The SAE in the model's units, float32 (float64 if trained so). Every rank has to call it.

    Decoder directions leave with unit norm: a free norm ν moves into the encoder, W_enc · ν and
    b_enc · ν, which multiplies activations by it and leaves the reconstruction as it was.
    """
    d, objective = training.dictionary, training.objective
    whole = d.whole(training.weights())
    norm = whole["W_dec"].norm(dim=-1)
    activation = objective.activation(whole | {"norm": norm})
    if not objective.unit_decoder:
        whole["W_enc"] = whole["W_enc"] * norm[:, None]
        whole["b_enc"] = whole["b_enc"] * norm
        whole["W_dec"] = whole["W_dec"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None]
    whole = units.fold(whole)
    return SAE.from_weights(
        whole["W_enc"],
        whole["W_dec"],
        whole["b_enc"] if objective.has_b_enc else None,
        whole["b_dec"],
        activation=units.fold_activation(activation),
        hookpoint=hookpoint,
        target_hookpoint=target,
        input_transform=units.transform,
        subtract_b_dec=d.subtract_b_dec,
        W_skip=whole.get("W_skip"),
        metadata=metadata,
    )
