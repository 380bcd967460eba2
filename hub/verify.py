"""verify: what an SAE declares about itself against a short run of the model it was made for.

A loader that takes a TopK for a ReLU, a neighbouring layer or a forgotten normalisation raises
nothing: its numbers are only wrong. Here the SAE is measured on a few thousand tokens, compared
with what is declared, and with what the same weights would give if they were read otherwise. If
another reading fits far better, that is the probable cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hub.verifying.declared import Tolerance, declared
from saert.hub.verifying.diagnosis import Cause, explain, find_cause, unexplained
from saert.hub.verifying.fit import fit
from saert.hub.verifying.measured import measure, sample_of, tried_on
from saert.hub.verifying.measured_checks import measured_checks, model_check
from saert.hub.verifying.readings import elsewhere, otherwise, places
from saert.hub.verifying.static_checks import static_checks
from saert.hub.verifying.verification import (
    Check,
    OnMismatch,
    Verification,
    act_on,
    check_action,
    name_of,
)
from saert.hub.verifying.verify_text import rows_of
from saert.sae import SAE
from saert.tracker import is_attached


@torch.no_grad()
def verify(
    sae: SAE,
    model: Any,
    inputs: Tensor | Mapping[str, Any] | Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    expect: Mapping[str, Any] | None = None,
    tolerance: Tolerance | None = None,
    on_mismatch: OnMismatch = "refuse",
    tokens: int = 4096,
) -> Verification:
    """Measure an SAE on the model it was made for, and compare with what it declares.

    Declared are `metadata["declared"]` (what its format or path says), `metadata["metrics"]` (what
    saert measured after training) and `expect`. Whatever is declared, the weights are also read in
    other ways: at neighbouring hookpoints, with other input transforms and activations, b_dec
    subtracted or not. A reading with a much lower FVU is a mismatch. Without anything declared, an
    implausible number is a warning.

    Padding, special tokens, the first token of each row and hidden states ten times as long as the
    median are left out; `fvu, all tokens` leaves out padding alone.

    Args:
        model: a causal language model, in eval mode.
        inputs: token ids [rows, context], what a tokenizer returns (padded on either side), or
            texts. None: the model writes its own.
        tokenizer: for texts, and for its special tokens; otherwise the model's config names them.
        expect: facts to compare with, before those of the metadata: `{"l0": 82, "fvu": 0.2}`.
        tolerance: how far a measured number may be off.
        on_mismatch: "refuse" raises, "warn" warns, "report" only returns. The first two also warn
            of what is implausible.
        tokens: how many to measure on; another pass looks at the first 512 more closely.

    Raises:
        VerificationError: a mismatch; its `verification` has everything.
        ValueError: inputs, facts or an SAE that cannot be measured at all.

    >>> verify(sae, model, tokens=500).ok
    True
    """
    if isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens is {tokens!r}, expected at least 1")
    check_action(on_mismatch)
    tolerance = tolerance or Tolerance()
    facts = declared(sae, expect)
    read, write = _sites(sae)
    _check_ready(model)
    text = rows_of(model, tokenizer, inputs, tokens)
    own, everywhere = measure(sae, model, text, read, write)
    checks = [
        *static_checks(sae),
        model_check(sae, model, read),
        *measured_checks(sae, own, everywhere, facts, tolerance),
    ]
    fvu = next(one for one in checks if one.fact == "fvu")
    wrong = not fvu.ok or any(not one.ok and one.serious for one in checks if one.fact == "l0")
    sample = sample_of(model, text, sae, places(model, read, write), read, write)
    here = fit(sae, sample.x, sample.y)
    tried = tried_on(sample, elsewhere(sae, sample.hidden, sample.pairs, read, write))
    tried += tried_on(sample, otherwise(sae, sample.x, here.l0, facts.get("l0"), read, write))
    cause = find_cause(sae, here, tried, facts, tolerance, wrong=wrong)
    if wrong or (cause is not None and cause.reading and cause.reading.kind == "place"):
        far = sample_of(model, text, sae, places(model, read, write, far=True), read, write)
        tried += tried_on(far, elsewhere(sae, far.hidden, far.pairs, read, write))
        cause = find_cause(sae, here, tried, facts, tolerance, wrong=wrong)
    worse = not fvu.ok and not own.fvu < facts.get("fvu", 0.0)
    if worse and (cause is None or not cause.solves):
        cause = explain(sae, here, sample.x, sample.y, facts, tolerance) or cause
        cause = cause or unexplained(here)
    if cause is not None and cause.reading is not None:
        checks.append(_reading(cause))
    tried.sort(key=lambda one: one.fit.fvu)
    verification = Verification(
        name=name_of(sae),
        checks=tuple(checks),
        tokens=own.tokens,
        cause=None if cause is None else cause.what,
        fits={one.what: (one.fit.fvu, one.fit.l0) for one in tried},
    )
    act_on(verification, on_mismatch, stacklevel=4)  # torch.no_grad is a frame of its own
    return verification


def _reading(cause: Cause) -> Check:
    assert cause.reading is not None
    return Check("reading", None, "as loaded", cause.reading.what, False, "", cause.certain)


def _sites(sae: SAE) -> tuple[Hookpoint, Hookpoint]:
    if sae.hookpoint is None:
        raise ValueError("the SAE does not say where it reads: set sae.hookpoint, as resid_post.6")
    return sae.hookpoint, sae.target_hookpoint or sae.hookpoint


def _check_ready(model: Any) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout is on: call model.eval()")
    if is_attached(model):
        raise ValueError("the model has SAEs attached, which would be measured with it: detach")
