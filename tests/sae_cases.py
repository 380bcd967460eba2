"""Small SAEs of every kind, and their meaning as plain dense formulas that no saert code computes.

    z = (s·t(x) - b_dec) W_encᵀ + b_enc,   f = activation(z),   y = t⁻¹(f W_dec + b_dec) + x W_skipᵀ

All of it in float64. A transcoder's output is not scaled back (FORMATS sections 0 and 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
from saert.transforms import (
    DatasetScale,
    InputTransform,
    LayerNorm,
    MeanCentre,
    NoTransform,
    UnitNorm,
)

D_IN, D_OUT, LATENTS, K = 10, 7, 24, 5

ACTIVATIONS = ["relu", "jumprelu", "jumprelu_scalar", "topk", "batchtopk", "gated"]
RANKED = ["abstopk", "groupmax"]  # compared with other latents, as "topk" is
TRANSFORMS: dict[str, InputTransform] = {
    "none": NoTransform(),
    "layer_norm": LayerNorm(),
    "mean_centre": MeanCentre(),
    "unit_norm": UnitNorm(),
    "unit_norm_3": UnitNorm(3.0),
    "dataset_scale": DatasetScale(0.25),
}
KINDS: dict[str, dict] = {
    "sae": dict(subtract_b_dec=True),
    "sae_plain": dict(subtract_b_dec=False),
    "sae_skip": dict(subtract_b_dec=True, skip=True),
    "transcoder": dict(subtract_b_dec=False, d_out=D_OUT, target_hookpoint="mlp_out.0"),
    "transcoder_square": dict(subtract_b_dec=True, target_hookpoint="mlp_out.0"),
    "transcoder_skip": dict(
        subtract_b_dec=False, d_out=D_OUT, target_hookpoint="mlp_out.0", skip=True
    ),
}


def activation(name: str, n: int = LATENTS, dtype: torch.dtype = torch.float64) -> Activation:
    """A named activation whose parameters differ by latent where they can."""
    generator = torch.Generator().manual_seed(7)
    rand = torch.rand(4, n, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "relu": lambda: ReLU(),
        "jumprelu": lambda: JumpReLU(rand[0] * 0.8),
        "jumprelu_scalar": lambda: JumpReLU(torch.tensor(0.4, dtype=dtype)),
        "topk": lambda: TopK(min(K, n)),
        "abstopk": lambda: AbsTopK(min(K, n)),
        "groupmax": lambda: GroupMax(next(k for k in (4, 3, 2, 1) if n % k == 0)),
        "batchtopk": lambda: BatchTopK(torch.tensor(0.3, dtype=dtype)),
        "gated": lambda: Gated(rand[1] - 0.5, rand[2] - 0.3, rand[3] - 0.5),
    }[name]()


def make(
    act: str = "relu",
    transform: str = "none",
    kind: str = "sae",
    *,
    dtype: torch.dtype = torch.float64,
    d_in: int = D_IN,
    n: int = LATENTS,
    **options,
) -> SAE:
    """The same SAE for the same arguments, whatever the global seed."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        draw = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return draw.to(dtype)

    settings = dict(KINDS[kind])
    d_out = settings.pop("d_out", d_in)
    skip = settings.pop("skip", False)
    W_enc, W_dec = normal(n, d_in, scale=0.5), normal(n, d_out)
    b_enc, b_dec = normal(n, scale=0.3), normal(d_out, scale=0.5)
    W_skip = normal(d_out, d_in, scale=0.3) if skip else None
    return SAE.from_weights(
        W_enc,
        W_dec,
        None if act == "gated" else b_enc,
        b_dec,
        activation=activation(act, n, dtype),
        input_transform=TRANSFORMS[transform],
        W_skip=W_skip,
        **({"hookpoint": "resid_post.0"} | settings | options),
    )


def inputs(*tokens: int, d_in: int = D_IN, dtype: torch.dtype = torch.float64) -> Tensor:
    """Tokens away from zero mean and unit norm, so that no transform is a no-op."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(*tokens, d_in, generator=generator, dtype=torch.float64)
    return (1.7 * x + 0.4).to(dtype)


def transformed(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in the SAE's units, and the shift and scale that bring an output back."""
    x = x.double()
    d = x.shape[-1]
    zero, one = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
    mean = x.sum(-1, keepdim=True) / d
    match sae.input_transform:
        case LayerNorm(eps=eps):
            variance = ((x - mean) ** 2).sum(-1, keepdim=True) / (d - 1)
            return (x - mean) / (variance.sqrt() + eps), mean, variance.sqrt()
        case MeanCentre():
            return x - mean, mean, one
        case UnitNorm(norm=norm):
            length = (x * x).sum(-1, keepdim=True).sqrt()
            norm = math.sqrt(d) if norm is None else norm
            return x / length * norm, zero, length / norm
        case DatasetScale(factor=factor):
            return x * factor, zero, one / factor
        case NoTransform():
            return x, zero, one
    raise AssertionError(sae.input_transform)


def pre(sae: SAE, x: Tensor) -> Tensor:
    """Pre-activations [*tokens, num_latents] in float64."""
    z = transformed(sae, x)[0]
    if sae.subtract_b_dec:
        z = z - sae.b_dec.double()
    z = z @ sae.W_enc.double().T
    return z if sae.b_enc is None else z + sae.b_enc.double()


def activate(act: Activation, z: Tensor, norm: Tensor | None = None) -> Tensor:
    """Activations [*tokens, num_latents] of float64 pre-activations."""
    score = z if norm is None else z * norm
    zero = torch.zeros_like(z)
    match act:
        case TopK(k=k):
            kth = score.sort(-1, descending=True).values[..., k - 1, None]
            return torch.where((score >= kth) & (z > 0), z, zero)
        case AbsTopK(k=k):
            kth = score.abs().sort(-1, descending=True).values[..., k - 1, None]
            return torch.where(score.abs() >= kth, z, zero)
        case GroupMax(k=k):
            groups = score.reshape(*score.shape[:-1], k, -1)
            best = groups.amax(-1, keepdim=True).expand(groups.shape).reshape(score.shape)
            return torch.where((score == best) & (z > 0), z, zero)
        case JumpReLU():
            return torch.where((score > act.threshold.double()) & (z > 0), z, zero)
        case Gated():
            magnitude = z * torch.exp(act.r_mag.double()) + act.b_mag.double()
            return torch.where(z + act.b_gate.double() > 0, magnitude.clamp(min=0), zero)
        case ReLU():
            return torch.where(z > 0, z, zero)
    raise AssertionError(act)


def latents(sae: SAE, x: Tensor) -> Tensor:
    """Dense activations [*tokens, num_latents] in float64."""
    norm = (sae.W_dec.double() ** 2).sum(-1).sqrt() if sae.select_by_decoder_norm else None
    return activate(sae.activation, pre(sae, x), norm)


def reconstruct(sae: SAE, f: Tensor, x: Tensor) -> Tensor:
    """The output [*tokens, d_out] that dense activations f stand for, in float64."""
    _, shift, scale = transformed(sae, x)
    y = f.double() @ sae.W_dec.double()
    y = y if sae.b_dec is None else y + sae.b_dec.double()
    if not sae.is_transcoder:
        y = y * scale + shift
    return y if sae.W_skip is None else y + x.double() @ sae.W_skip.double().T
