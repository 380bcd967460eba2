"""From fits of many readings to the probable cause of a bad one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from saert.hub.verifying.declared import Tolerance
from saert.hub.verifying.fit import Fit, reconstructed
from saert.hub.verifying.static_checks import alignment
from saert.refine import refine
from saert.sae import SAE

MAX_FVU = 0.9  # above it a reconstruction is hardly better than the mean
MAX_CONSTANT = 0.25  # part of the error that is one vector for all tokens
SCALED = 1.1  # a factor that no shrinkage explains
MORE, FEWER = 1.25, 0.55  # factors of L0: as many latents; half of them
TIED = 1.01  # factor of FVU between readings that fit alike
WORSE = 1.03  # factor of FVU that half the latents may cost
REFINED = 64  # tokens, with as many active latents each as can be refitted quickly
UNRELATED = 0.05  # mean cosine of encoder and decoder rows


@dataclass(frozen=True)
class Tried:
    """One other way to read the weights, and how well it fits. `kind` as in `Reading`."""

    kind: str
    what: str
    fit: Fit


@dataclass(frozen=True)
class Cause:
    """In words; the reading that undoes it, if one of those tried does; whether that reading is all
    that was wanted; whether it is certain enough to refuse."""

    what: str
    reading: Tried | None = None
    solves: bool = False
    certain: bool = True


def max_l0(sae: SAE) -> float:
    """A code with more active latents than this is not sparse, over the width or the dictionary."""
    return min(sae.d_in, sae.num_latents / 4)


def find_cause(
    sae: SAE,
    own: Fit,
    tried: Sequence[Tried],
    facts: Mapping[str, float],
    tolerance: Tolerance,
    *,
    wrong: bool,
) -> Cause | None:
    """The reading that probably is the right one, or None if none explains more than `own` does.

    `own` is how the SAE fits as it is; `wrong` says that this contradicts what is declared. Then a
    reading that gives what is declared comes first.
    """
    said = {fact: facts[fact] for fact in ("l0", "fvu") if fact in facts}
    agreeing = [one for one in tried if said and wrong and _agrees(one.fit, said, tolerance)]
    settled = "l0" in said and not wrong  # as many latents are active as should be
    better = [
        one
        for one in tried
        if _is_better(sae, own, one, tolerance) and not (settled and one.kind == "activation")
    ]
    chosen = agreeing or better
    if not chosen:
        return None
    lowest = min(one.fit.fvu for one in chosen)
    best = next(one for one in chosen if one.fit.fvu <= TIED * lowest)  # the plainest comes first
    return Cause(
        f"{best.what} fits: FVU {best.fit.fvu:.3g} and L0 {best.fit.l0:.3g}, as loaded "
        f"{own.fvu:.3g} and {own.l0:.3g}",
        best,
        solves=bool(agreeing) or (not said and best.fit.fvu <= _good(own, facts, tolerance)),
        certain=bool(agreeing) or best.fit.fvu <= tolerance.better * own.fvu,
    )


def explain(
    sae: SAE,
    own: Fit,
    x: Tensor,
    y: Tensor,
    facts: Mapping[str, float],
    tolerance: Tolerance,
) -> Cause | None:
    """What is wrong with the weights themselves: an offset, strengths, the order of latents.

    x [tokens, d_in] and y [tokens, d_out] are what is read and what should be written.
    """
    good = _good(own, facts, tolerance)
    if own.constant > MAX_CONSTANT and own.fvu * (1 - own.constant) <= good < own.fvu:
        return Cause(
            f"{own.constant:.0%} of the error is one vector for all tokens: b_dec is missing, or "
            "belongs to another place"
        )
    if not 1 / SCALED < own.gain < SCALED and own.affine_fvu <= good < own.fvu:
        return Cause(
            f"the reconstruction is {1 / own.gain:.3g} times too large around its mean (FVU "
            f"{own.affine_fvu:.3g} without that factor): a scale was forgotten or applied twice, "
            "or decoder rows were normalised alone"
        )
    cosine = alignment(sae)
    if abs(cosine) < UNRELATED:
        return Cause(
            f"encoder and decoder do not belong together (mean cosine of their rows {cosine:.2f}): "
            "one of them is shuffled, transposed or from another SAE"
        )
    if own.l0 <= max_l0(sae) and (found := _refined(sae, x, y)) <= good < own.fvu:
        return Cause(
            "the right latents are chosen, with the wrong strengths: with the best ones the FVU is "
            f"{found:.3g}; decoder rows were normalised or rescaled alone"
        )
    return None


def unexplained(own: Fit) -> Cause:
    """Where nothing is left to try."""
    text = "" if own.fvu > MAX_FVU else "text unlike that of the training, "
    return Cause(
        f"no other place, transform or activation explains it: {text}another model or revision, or "
        "weights that are not this SAE's"
    )


def _agrees(fit: Fit, said: Mapping[str, float], tolerance: Tolerance) -> bool:
    spans = {fact: tolerance.span(fact, value) for fact, value in said.items()}
    return all(low <= getattr(fit, fact) <= high for fact, (low, high) in spans.items())


def _is_better(sae: SAE, own: Fit, one: Tried, tolerance: Tolerance) -> bool:
    """A much lower FVU with as many latents; of another activation, as low a one with half of them:
    with as many, ranking a threshold SAE's latents may well fit better than its thresholds do."""
    if one.fit.fvu > MAX_FVU:
        return False
    if one.kind == "activation":
        return one.fit.l0 <= FEWER * own.l0 and one.fit.fvu <= WORSE * own.fvu
    most = own.l0 * MORE + 0.5 if own.fvu <= MAX_FVU else max_l0(sae)
    return one.fit.fvu <= tolerance.better * own.fvu and one.fit.l0 <= most


def _good(own: Fit, facts: Mapping[str, float], tolerance: Tolerance) -> float:
    """An FVU that explains a bad one: as declared, or far below."""
    return tolerance.span("fvu", facts["fvu"])[1] if "fvu" in facts else min(0.5, own.fvu / 2)


def _refined(sae: SAE, x: Tensor, y: Tensor) -> float:
    x, y = x[:REFINED], y[:REFINED]
    (_, code, _), *_ = reconstructed(sae, x)
    if (code.values < 0).any():  # a signed code is not refitted
        return math.inf
    found = refine(sae, x[: len(code.values)], code, target=y if sae.is_transcoder else None)
    return found.fvu_after
