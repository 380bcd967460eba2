"""The TopK objective of Gao et al. 2024 (ALGORITHMS.md 1.2 and 1.5).

    L = FVU(x̂, x) + α · FVU(ê, x − x̂)        ê = W_dec · ReLU(TopK_{k_aux}(scores of dead latents))

Both terms are a squared error over the batch's variance, so α means the same at every scale. The
residual is detached: AuxK moves dead latents towards what is missing, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saert.kernels.decode import sparse_decode
from saert.kernels.encode import encode_topk
from saert.sae import SAE

ALIVE = 1e-3  # an activation counts as firing above this; a selected zero does not


@dataclass(frozen=True)
class Loss:
    """`total` carries the gradient. `fired` bool [num_latents]; `l0` active latents per token."""

    total: Tensor
    fvu: Tensor
    aux: Tensor
    fired: Tensor
    l0: Tensor


def topk_loss(
    sae: SAE, x: Tensor, target: Tensor, dead: Tensor, k_aux: int, coefficient: float
) -> Loss:
    """x [tokens, d_in], target [tokens, d_out] (x for an autoencoder), dead [num_latents]."""
    code = sae.encode(x)
    reconstruction = sae.decode(code, x)
    fvu = fraction_unexplained(reconstruction, target)
    aux = aux_loss(sae, x, (target - reconstruction).detach(), dead, k_aux)
    fired = torch.zeros_like(dead)
    fired[code.indices[code.values > ALIVE]] = True
    l0 = code.l0().double().mean()
    return Loss(fvu + coefficient * aux, fvu.detach(), aux.detach(), fired, l0)


def aux_loss(sae: SAE, x: Tensor, residual: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """How badly the `k_aux` strongest dead latents explain the residual; 0 if no latent is dead.

    Only the dead latents are scored, and the gradient reaches their encoder rows.
    """
    latents = dead.nonzero().squeeze(-1)
    if latents.numel() == 0:
        return residual.new_zeros(())
    b_dec = sae.b_dec if sae.subtract_b_dec else None
    x = sae.transform(x).x
    code = encode_topk(x, sae.W_enc, sae.b_enc, k_aux, b_dec=b_dec, latents=latents)
    return fraction_unexplained(sparse_decode(code.indices, code.values, sae.W_dec), residual)


def fraction_unexplained(estimate: Tensor, target: Tensor) -> Tensor:
    """Σ‖target − estimate‖² / Σ‖target − mean target‖² over a batch `[tokens, d]`."""
    variance = (target - target.mean(0)).square().sum()
    # A constant target has nothing to explain; dividing by its zero variance would give inf or NaN.
    return (target - estimate).square().sum() / variance.clamp_min(torch.finfo(target.dtype).tiny)
