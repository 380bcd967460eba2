"""What the Refine tab shows, as plain data: the same for the browser and for `gradio_client`."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from saert.demos.pieces import ids_of, number, numbers
from saert.demos.workbench import Workbench
from saert.measure.features import specials
from saert.measure.reports.refined_text import RefinedText, refined_text

TOP = 5  # predicted tokens
RUNS = ("model", "spliced", "respliced")


def refinement(bench: Workbench, source: str, text: str) -> dict[str, Any]:
    """Before and after refinement, by token and over the text (`refined_text`).

    Special tokens, as BOS, are neither refined nor replaced: SAEs are not made for them.
    """
    began, ids = time.perf_counter(), ids_of(bench, text)
    one, left_out = bench.sae(source), specials(bench.tokenizer)
    found = refined_text(bench.model(), one.sae, ids, top=TOP, special=left_out)
    used = ~left_out(found.ids)
    return {
        "source": source,
        "tokens": bench.session.text(found.ids.tolist()),
        "left_out": (~used).tolist(),
        "shrinkage": number(found.shrinkage),
        "shrinkage_by_token": numbers(found.shrinkage_by_token),
        "l0": _l0(found, "code", used),
        "l0_refined": _l0(found, "refined", used),
        "converged": found.converged,
        **{name: _run(bench, found, name) for name in RUNS},
        "latents": [_latents(bench, source, found, i) for i in range(len(found.ids))],
        "seconds": time.perf_counter() - began,
    }


def _run(bench: Workbench, found: RefinedText, name: str) -> dict[str, Any]:
    run = getattr(found, name)
    return {
        "fvu": number(run.fvu),
        "error": number(float(run.error.nanmean())),
        "error_by_token": numbers(run.error),
        "fvu_by_token": numbers(run.fvu_by_token),
        "ce": number(float(run.ce.mean())),
        "ce_by_token": numbers(run.ce),
        "kl": number(float(run.kl[:-1].mean())),
        "kl_by_token": numbers(run.kl),
        "top": [
            [{"token": text, "p": p} for text, p in zip(bench.session.text(ids), ps, strict=True)]
            for ids, ps in zip(run.top.tolist(), run.top_p.tolist(), strict=True)
        ],
    }


def _latents(bench: Workbench, source: str, found: RefinedText, at: int) -> list[dict[str, Any]]:
    return [
        {
            "latent": latent,
            "label": bench.label(source, latent),
            "before": before,
            "after": after,
        }
        for latent, before, after in found.latents(at)
    ]


def _l0(found: RefinedText, which: str, used: Tensor) -> float | None:
    """Active latents per token that was encoded."""
    active = getattr(found, which).l0()[used].double()
    return number(float(active.mean()))
