"""Activation refinement: the best activations for the latents that an encoder chose.

Per token, in the SAE's own units (after its input transform), with S = {j: f_j > 0},

    minimise ‖t − Σ_{j ∈ S} z_j · W_dec[j]‖²   subject to z_j ≥ 0,    t = target − b_dec − W_skip x

(Gao et al. 2024, section 5.1). The decoder stays, no latent joins, and f is the start. The problem
is convex and S small, so the optimum is exact: non-negative least squares by `saert.kernels.refine`
where the paper takes steps of projected gradient. What refinement gains is what the encoder lost by
naming the right latents with the wrong strengths; an L1 penalty makes it lose much (shrinkage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saert.kernels.linear import linear_scores
from saert.kernels.numerics import accumulation_dtype
from saert.kernels.refine import Refined
from saert.kernels.refit import refit as _refit
from saert.sae import SAE
from saert.sparse import SparseCode

MAX_STEPS, TOL = 1000, 1e-5
"""The defaults of `refine`, and what `attach(refine=True)` uses."""


@dataclass(frozen=True, eq=False)
class Refinement:
    """What `refine` found.

    Attributes:
        code: SparseCode [*tokens, k], the same slots as before; a latent whose best activation is
            0 has value 0, which makes it inactive. float32, or float64 for float64 weights.
        fvu_before, fvu_after: Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over the tokens given (Gao et al. 2024), in the
            model's units; NaN where all tokens are the same, as a single one is.
        shrinkage: Σ z_j ‖W_dec[j]‖ / Σ f_j ‖W_dec[j]‖ − 1 over tokens and active latents: the mean
            relative change of an activation, each weighted by its strength. 0.2 says that refining
            raises activations by a fifth, so the encoder's were too small; below 0 they were too
            large. (Without weights, latents that are barely active decide: z / f has no bound.)
        residual: [*tokens], how far each token is from its optimum: the longest step that one
            latent would still take, as a part of ‖t‖ (`saert.kernels.refine`). 0 at the optimum.
        steps: int64 [*tokens], sweeps over the slots.
        converged: whether every residual is within `tol`.
    """

    code: SparseCode
    fvu_before: float
    fvu_after: float
    shrinkage: float
    residual: Tensor
    steps: Tensor
    converged: bool


@torch.no_grad()
def refine(
    sae: SAE,
    x: Tensor,
    code: SparseCode | None = None,
    *,
    target: Tensor | None = None,
    max_steps: int = MAX_STEPS,
    tol: float = TOL,
) -> Refinement:
    """Refit a code's activations to what the SAE should write, without adding latents.

    Args:
        x: [*tokens, d_in], what the SAE reads, in the model's units.
        code: SparseCode [*tokens, k] with values ≥ 0; None encodes x.
        target: [*tokens, d_out], what a transcoder should write, in the model's units: the hidden
            state at its `target_hookpoint`. Other SAEs should write x, and take none.
        max_steps: sweeps over a token's slots at most; `residual` says where they did not suffice.
        tol: residual at which a token is done.

    Raises:
        ValueError: shapes, devices or dictionaries that contradict each other, negative values, NaN
            or inf, an SAE with signed activations, a transcoder without a target, another SAE with
            one.

    >>> found = refine(sae, torch.randn(8, sae.d_in))
    >>> found.fvu_after <= found.fvu_before
    True
    """
    if max_steps < 0 or not tol >= 0:
        raise ValueError(
            f"refine: max_steps is {max_steps} and tol is {tol}, expected neither to be negative"
        )
    _refuse_signed(sae)
    y = _target(sae, x, target)
    code = sae.encode(x) if code is None else code
    _check_code(sae, x, code)
    found = refit(sae, code, x, y, max_steps, tol)
    after = SparseCode(code.indices, found.values, code.num_latents)
    return Refinement(
        code=after,
        fvu_before=_fvu(y, sae.decode(code, x)),
        fvu_after=_fvu(y, sae.decode(after, x)),
        shrinkage=float(_total(strength(sae, after)) / _total(strength(sae, code)) - 1),
        residual=found.residual,
        steps=found.steps,
        converged=bool((found.residual <= tol).all()),
    )


def refit(
    sae: SAE, code: SparseCode, x: Tensor, y: Tensor, max_steps: int = MAX_STEPS, tol: float = TOL
) -> Refined:
    """`refine` without its checks and statistics; it can be compiled.

    x [*tokens, d_in] is what was read, y [*tokens, d_out] what should be written. Not
    differentiable: a backward pass through the values raises RuntimeError.
    """
    _refuse_signed(sae)
    t = unexplained(sae, x, y)
    return _refit(code.indices, code.values, sae.W_dec, t, max_steps, tol)


def unexplained(sae: SAE, x: Tensor, y: Tensor) -> Tensor:
    """t: what is left for latents to write, [*tokens, d_out] in the SAE's units."""
    skip = None if sae.W_skip is None else linear_scores(x, sae.W_skip, None)
    t: Tensor
    if sae.is_transcoder:  # its target was never transformed
        t = y.to(accumulation_dtype(sae.dtype))
    else:
        t, _, scale = sae.transform(y)
        if skip is not None and scale is not None:  # a token of scale 0 is written without latents
            skip = torch.where(scale != 0, skip / scale, 0)
    t = t if skip is None else t - skip
    return t if sae.b_dec is None else t - sae.b_dec.to(t.dtype)


def strength(sae: SAE, code: SparseCode) -> Tensor:
    """Σ_j f_j ‖W_dec[j]‖ of each token, [*tokens]: activations in units of what is written,
    whichever way a dictionary shares its scale between encoder and decoder."""
    wide = accumulation_dtype(sae.dtype)
    norms: Tensor = torch.linalg.vector_norm(sae.W_dec, dim=-1, dtype=wide)
    return (code.values.to(wide) * norms[code.indices]).sum(-1)


def _fvu(y: Tensor, reconstruction: Tensor) -> float:
    wide = torch.float32 if y.device.type == "mps" else torch.float64
    y, estimate = (t.to(wide).reshape(-1, t.shape[-1]) for t in (y, reconstruction))
    centred = y - y[:1]  # exactly 0 where all tokens are the same
    spread = float((centred - centred.mean(0)).square().sum())
    return float((y - estimate).square().sum()) / spread if spread > 0 else float("nan")


def _total(x: Tensor) -> Tensor:
    return x.cpu().double().sum()


# -- what is refused -------------------------------------------------------------------------------


def _refuse_signed(sae: SAE) -> None:
    if sae.activation.signed:
        raise ValueError(
            f"refine: {type(sae.activation).__name__} gives signed activations, but refinement is "
            "defined for activations of at least 0"
        )


def _target(sae: SAE, x: Tensor, target: Tensor | None) -> Tensor:
    """y, after a look at x and the target."""
    _check_tensor("x", x, sae.d_in, sae)
    if not sae.is_transcoder:
        if target is not None:
            raise ValueError(
                "refine: target= is for transcoders; this SAE should write what it reads, x"
            )
        return x
    if target is None:
        where = sae.target_hookpoint or "where it writes"
        raise ValueError(
            f"refine: a transcoder's activations are refitted to the hidden state at {where}; "
            "pass it as target="
        )
    _check_tensor("target", target, sae.d_out, sae)
    if target.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"refine: x is {list(x.shape)} and target {list(target.shape)}, expected the same "
            "tokens"
        )
    return target


def _check_tensor(name: str, x: Tensor, width: int, sae: SAE) -> None:
    if not x.dim() or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(
            f"refine: {name} is {x.dtype} {list(x.shape)}, expected floating [*tokens, {width}]"
        )
    if x.device != sae.device:
        raise ValueError(f"refine: {name} is on {x.device}, but the SAE is on {sae.device}")
    if broken := int((~x.isfinite().all(-1)).sum()):
        tokens = x.shape[:-1].numel()
        raise ValueError(f"refine: {broken} of {tokens} tokens of {name} have a NaN or an infinity")


def _check_code(sae: SAE, x: Tensor, code: SparseCode) -> None:
    if code.num_latents != sae.num_latents or code.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"refine: {code!r} does not belong to x {list(x.shape)} and an SAE of "
            f"{sae.num_latents} latents; pass sae.encode(x)"
        )
    if code.values.device != sae.device:
        raise ValueError(
            f"refine: the code is on {code.values.device}, but the SAE is on {sae.device}"
        )
    if broken := int((~(code.values >= 0) | code.values.isinf()).sum()):
        raise ValueError(
            f"refine: {broken} of the code's values are negative, NaN or infinite, expected "
            "activations of at least 0, as encoders give them; edit after refining, not before"
        )
    if code.indices.numel() and not 0 <= int(code.indices.min()) <= int(code.indices.max()) < (
        code.num_latents
    ):
        raise ValueError(
            f"refine: the code names latents {int(code.indices.min())} to "
            f"{int(code.indices.max())}, expected 0 to {code.num_latents - 1}"
        )
