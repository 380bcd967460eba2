"""Measured numbers against what is declared, or against what is plausible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saert.activations import TopK
from saert.compat import check_model
from saert.hookpoint import Hookpoint
from saert.hub.verifying.declared import Tolerance
from saert.hub.verifying.diagnosis import MAX_CONSTANT, MAX_FVU, max_l0
from saert.hub.verifying.fit import Fit
from saert.hub.verifying.verification import Check
from saert.sae import SAE

DEAD_SLACK = 0.05  # other text wakes some
MAX_SILENT = 0.2  # limits where nothing is declared
NORM_RATIO = (0.5, 1.2)


def measured_checks(
    sae: SAE, own: Fit, everywhere: Fit, facts: Mapping[str, float], tolerance: Tolerance
) -> Iterator[Check]:
    yield _l0(sae, own, facts, tolerance)
    yield Check("l0, 5% to 95% of tokens", None, f"{own.l0_low:g} to {own.l0_high:g}")
    if not math.isnan(own.full):
        yield Check("tokens with all k active", None, own.full)
    hint = "their reconstruction is a constant: are thresholds or biases too high for the input?"
    silent = own.silent <= MAX_SILENT
    yield Check("tokens with no latent", None, own.silent, f"at most {MAX_SILENT:g}", silent, hint)
    yield _fvu(own, facts, tolerance)
    yield Check("fvu, all tokens", None, everywhere.fvu)
    low, high = NORM_RATIO
    ok = low <= own.norm_ratio <= high
    hint = "reconstructions have another size than what they stand for: a scale is missing?"
    yield Check("norm ratio", None, own.norm_ratio, f"{low:g} to {high:g}", ok, hint)
    ok = own.constant <= MAX_CONSTANT
    hint = "part of the error is one vector for all tokens: is b_dec missing, or another's?"
    yield Check("constant part of error", None, own.constant, f"at most {MAX_CONSTANT:g}", ok, hint)
    dead = facts.get("dead")
    ok = dead is None or own.idle >= dead - DEAD_SLACK
    hint = "latents that were dead in training are active: is this the same model and hookpoint?"
    said = "" if dead is None else f"at least {max(0.0, dead - DEAD_SLACK):.3g}"
    yield Check("latents idle here", dead, own.idle, said, ok, hint)


def _l0(sae: SAE, own: Fit, facts: Mapping[str, float], tolerance: Tolerance) -> Check:
    if "l0" in facts:
        low, high = tolerance.span("l0", facts["l0"])
        hint = (
            "more latents pass than declared: another activation, a larger k, lower thresholds, or "
            "text unlike that of the training"
            if own.l0 > high
            else "fewer latents pass than declared: a smaller k, higher thresholds, an input of "
            "another scale, or text unlike that of the training"
        )
        ok, wanted = low <= own.l0 <= high, f"{low:.3g} to {high:.3g}"
        return Check("l0", facts["l0"], own.l0, wanted, ok, hint, serious=True)
    if isinstance(sae.activation, TopK):
        k = sae.activation.k
        hint = f"few tokens have k = {k} positive scores: the input has another scale or place"
        return Check("l0", None, own.l0, f"{k / 2:g} to {k}", own.l0 >= k / 2, hint)
    most = max_l0(sae)
    hint = "the code is not sparse: thresholds dropped, or a TopK read as another activation?"
    return Check("l0", None, own.l0, f"at most {most:g}", own.l0 <= most, hint)


def _fvu(own: Fit, facts: Mapping[str, float], tolerance: Tolerance) -> Check:
    if "fvu" not in facts:
        hint = "the reconstruction is hardly better than the mean of all tokens, or worse"
        ok, worse = own.fvu <= MAX_FVU, not own.fvu <= 1
        return Check("fvu", None, own.fvu, f"at most {MAX_FVU:g}", ok, hint, serious=worse)
    low, high = tolerance.span("fvu", facts["fvu"])
    hint = (
        "much closer than declared: more latents than in training, or far easier text"
        if own.fvu < low
        else "the reconstruction is much worse than declared"
    )
    ok, wanted = low <= own.fvu <= high, f"{max(0.0, low):.3g} to {high:.3g}"
    return Check("fvu", facts["fvu"], own.fvu, wanted, ok, hint, serious=True)


def model_check(sae: SAE, model: Any, read: Hookpoint) -> Check:
    wanted = sae.metadata.get("base_model")
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    name = (Path(name).name if Path(name).exists() else name) or type(model).__name__
    said = None if wanted is None else str(wanted)
    try:
        check_model(model, sae, read, strict=True)
    except ValueError as refusal:
        hint = str(refusal).partition("; pass strict")[0]
        return Check("model", said, name, "the same", False, hint, serious=True)
    return Check("model", said, name)
