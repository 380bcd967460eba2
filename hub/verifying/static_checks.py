"""What the weights of an SAE alone can contradict, cheaply enough for every load.

Rows are sampled, so the cost does not grow with the dictionary. Nothing here needs a model:
`saert.hub.verify` measures with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from saert.activations import BatchTopK, Gated, JumpReLU, TopK
from saert.hub.verifying.declared import declared
from saert.hub.verifying.verification import Check, Verification, act_on, name_of
from saert.sae import SAE
from saert.transforms import LayerNorm, UnitNorm

ROWS = 512  # of each matrix, evenly spread
LEAST_WIDTH = 32  # of a square matrix whose cosines say something
UNIT = 0.02  # how far from 1 a row of a decoder may be that is declared to have unit rows


@torch.no_grad()
def static_checks(sae: SAE) -> tuple[Check, ...]:
    """Facts about the weights of an SAE, those that fail among them.

    A declared unit-norm decoder that is none, latents that cannot fire whatever is read and
    matrices of zeros are serious; the rest is implausible.
    """
    count = min(ROWS, sae.num_latents)
    rows = torch.linspace(0, sae.num_latents - 1, count, device=sae.device).long()
    reads, writes = _take(sae.W_enc, rows), _take(sae.W_dec, rows)
    return (
        *_norms(sae, writes),
        *_zero_rows(reads, writes),
        *_thresholds(sae),
        *_reach(sae, rows, reads, writes),
        *_orientation(sae, reads, writes),
    )


def check_weights(sae: SAE, verify: bool | str) -> SAE:
    """The SAE, its static checks passed.

    What `load(verify=)` does: True refuses what the weights contradict and warns of what is
    implausible, "warn" warns of both, False looks at nothing.
    """
    if verify is not False:
        found = Verification(name_of(sae), static_checks(sae))
        act_on(found, "refuse" if verify is True else "warn", stacklevel=4)
    return sae


def check_option(verify: object) -> None:
    """ValueError for a value that `check_weights` does not know."""
    if verify not in (True, False, "warn") or isinstance(verify, int) != isinstance(verify, bool):
        raise ValueError(f"verify is {verify!r}, expected True, False or 'warn'")


def alignment(sae: SAE) -> float:
    """Mean cosine of sampled encoder and decoder rows, near 0 where they do not belong together.

    Training starts them equal and keeps them related; NaN for transcoders, which read and write
    different things.
    """
    if sae.is_transcoder:
        return math.nan
    rows = torch.linspace(0, sae.num_latents - 1, min(ROWS, sae.num_latents), device=sae.device)
    return _cosine(_take(sae.W_enc, rows.long()), _take(sae.W_dec, rows.long()))


def _norms(sae: SAE, writes: Tensor) -> Iterator[Check]:
    norms = writes.norm(dim=-1)
    norms = norms[norms > 0]
    if not len(norms):
        return
    low, high = norms.min().item(), norms.max().item()
    unit = max(abs(low - 1), abs(high - 1)) <= UNIT
    said = declared(sae).get("unit_norm_decoder")
    found = f"{low:.3g}" if high - low < 1e-3 else f"{low:.3g} to {high:.3g}"
    if said == 1:
        hint = (
            "the decoder is not the one that was trained, or its norms were folded into it: "
            "activations would be off by these factors"
        )
        yield Check("norm of W_dec rows", "1", found, f"1 ± {UNIT}", unit, hint, serious=True)
    else:
        yield Check("norm of W_dec rows", None, found)


def _zero_rows(reads: Tensor, writes: Tensor) -> Iterator[Check]:
    for name, matrix in (("W_enc", reads), ("W_dec", writes)):
        zero = (matrix == 0).all(-1).double().mean().item()
        hint = "was this part of the file ever written?"
        yield Check(
            f"zero rows of {name}", None, zero, "below half", zero < 0.5, hint, serious=zero == 1
        )


def _thresholds(sae: SAE) -> Iterator[Check]:
    activation = sae.activation
    if isinstance(activation, TopK):
        share = activation.k / sae.num_latents
        hint = f"k = {activation.k} of {sae.num_latents} latents is hardly sparse: is it k?"
        yield Check("k / num_latents", None, share, "at most 0.25", share <= 0.25, hint)
    if not isinstance(activation, JumpReLU):
        return
    theta = activation.threshold
    low, high = theta.min().item(), theta.max().item()
    found = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    negative = (theta < 0).double().mean().item()
    ok, hint = True, ""
    if isinstance(activation, BatchTopK) and negative:
        ok, hint = False, "it was never estimated: every positive pre-activation passes"
    elif negative > 0.5:
        ok, hint = False, "most are negative and do nothing: are they logarithms?"
    elif bool((theta == 0).all()):
        ok, hint = False, "this is a ReLU: were the thresholds dropped?"
    yield Check("thresholds", None, found, "positive", ok, hint)


def _reach(sae: SAE, rows: Tensor, reads: Tensor, writes: Tensor) -> Iterator[Check]:
    """|W_enc[i] · x'| ≤ ‖W_enc[i]‖ ‖x'‖, and a transform that fixes ‖x'‖ makes it a bound."""
    transform = sae.input_transform
    if isinstance(transform, UnitNorm):
        length = math.sqrt(sae.d_in) if transform.norm is None else transform.norm
    elif isinstance(transform, LayerNorm):
        length = math.sqrt(sae.d_in - 1)
    else:
        return
    if sae.subtract_b_dec and sae.b_dec is not None:
        length += sae.b_dec.float().norm().item()
    most = reads.norm(dim=-1) * length
    if sae.b_enc is not None:
        most = most + sae.b_enc[rows].float()
    threshold: Tensor | float = 0.0
    if isinstance(sae.activation, Gated):
        threshold = -sae.activation.b_gate[rows].float()
    elif isinstance(sae.activation, JumpReLU):
        theta = sae.activation.threshold.float()
        threshold = theta if theta.dim() == 0 else theta[rows]
        most = most * writes.norm(dim=-1) if sae.select_by_decoder_norm else most
    mute = (most <= threshold).double().mean().item()
    hint = (
        f"after {type(transform).__name__} no input is long enough for them: thresholds, biases or "
        "the transform are in other units"
    )
    yield Check(
        "latents out of reach", None, mute, "below half", mute < 0.5, hint, serious=mute == 1
    )


def _orientation(sae: SAE, reads: Tensor, writes: Tensor) -> Iterator[Check]:
    """A square matrix says nothing by its shape, but tied directions do by their cosines."""
    if sae.is_transcoder or sae.num_latents != sae.d_in or sae.d_in < LEAST_WIDTH:
        return
    rows = torch.linspace(0, sae.d_in - 1, len(reads), device=sae.device).long()
    across, down = _take(sae.W_enc.T, rows), _take(sae.W_dec.T, rows)
    aligned = _cosine(reads, writes)
    others = {
        "W_enc": _cosine(across, writes),
        "W_dec": _cosine(reads, down),
        "both": _cosine(across, down),
    }
    name = max(others, key=lambda one: others[one])
    chance = 6 / math.sqrt(sae.d_in * len(reads))  # standard deviations of unrelated rows
    wrong = others[name] > max(0.1, chance) and aligned < 0.5 * others[name]
    what = "W_enc and W_dec look" if name == "both" else f"{name} looks"
    hint = f"{what} transposed (mean cosine {others[name]:.2f} the other way round)"
    yield Check("cos(W_enc[i], W_dec[i])", None, aligned, "not near 0", not wrong, hint)


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


def _take(matrix: Tensor, rows: Tensor) -> Tensor:
    return matrix[rows].float()
