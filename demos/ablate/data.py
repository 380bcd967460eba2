"""What the Ablate tab shows, as plain data: the same for the browser and for `gradio_client`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast, get_args

from saert.demos.pieces import ids_of, number, numbers
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.ablation.ablate import ablation_effects
from saert.measure.ablation.ranking import (
    By,
    likeliest,
    logit_changes,
    rank_latents,
    reach,
    token_at,
)
from saert.measure.features.vocabulary import vocabulary
from saert.measure.steering.spec import choice, whole

SHOWN = 8  # promoted and suppressed tokens


def ablation(
    bench: Workbench,
    source: str,
    text: str,
    position: int = -1,
    by: str = "kl",
    horizon: int = 8,
    token: str = "",
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The active latents at a token, ranked (`rank_latents`)."""
    choice("by", by, get_args(By))
    began, ids = time.perf_counter(), ids_of(bench, text)
    at = token_at(position, ids.shape[1])
    horizon = reach(horizon, at, ids.shape[1])
    one, model = bench.sae(source), bench.model()
    target = None
    if by == "attributed_logit":
        target = token_id(bench, token) if token.strip() else likeliest(model, ids, at)
    found = rank_latents(
        model, one.sae, ids, at, by=cast(By, by), token=target, horizon=horizon,
        strict=bench.session.strict, report=report,
    )  # fmt: skip
    true = found.effects
    columns = ("kl", "loss_change", "sparsity")
    latents = [
        {
            "latent": latent,
            "label": bench.label(source, latent),
            "activation": activation,
            "score": number(score),
            **{name: None if true is None else number(float(getattr(true, name)[i]))
               for name in columns},
        }
        for i, (latent, activation, score) in enumerate(
            zip(found.latents.tolist(), found.values.tolist(), found.scores.tolist(), strict=True)
        )
    ]  # fmt: skip
    return {
        "source": source,
        "text": text,
        "tokens": bench.session.text(ids[0].tolist()),
        "position": at,
        "by": by,
        "horizon": horizon,
        "target": None if target is None else bench.session.text([target])[0],
        "active": found.active,
        "method": "attribution" if true is None else true.method,
        "seconds": time.perf_counter() - began,
        "latents": latents,
    }


def effect(
    bench: Workbench, source: str, text: str, latent: int, position: int = -1, horizon: int = 8
) -> dict[str, Any]:
    """What ablating one latent at one token does (`ablation_effects`, `logit_changes`)."""
    began, ids = time.perf_counter(), ids_of(bench, text)
    at = token_at(position, ids.shape[1])
    horizon = reach(horizon, at, ids.shape[1])
    one, model, strict = bench.sae(source), bench.model(), bench.session.strict
    latent = whole("latent", latent, 0, one.sae.num_latents - 1)
    found = ablation_effects(
        model, one.sae, ids, latents=latent, positions=at, horizon=horizon, strict=strict,
        progress=False,
    )  # fmt: skip
    changes = logit_changes(model, one.sae, ids, at, latent, horizon=horizon, strict=strict)
    length = len(changes)
    mean = -changes.mean(0)  # the latent's own doing: what its ablation takes away
    ends = {"promoted": mean.topk(SHOWN), "suppressed": mean.topk(SHOWN, largest=False)}
    return {
        "latent": latent,
        "label": bench.label(source, latent),
        "activation": float(found.values[0]),
        "kl": number(float(found.kl[0])),
        "loss_change": number(float(found.loss_change[0])),
        "sparsity": number(float(found.sparsity[0])),
        "logits": changes.numel(),
        "tokens": bench.session.text(ids[0, at : at + length].tolist()),
        "kl_by_token": numbers(found.kl_by_token[0, :length]),
        "loss_change_by_token": numbers(found.loss_change_by_token[0, :length]),
        **{
            name: [
                {"token": text, "change": change}
                for text, change in zip(
                    vocabulary(bench.tokenizer, end.indices.tolist()),
                    end.values.tolist(),
                    strict=True,
                )
            ]
            for name, end in ends.items()
        },
        "seconds": time.perf_counter() - began,
    }


def token_id(bench: Workbench, text: str) -> int:
    """The vocabulary entry that a text is: a word with a space before it, if that is one."""
    if not (text := text[:200]).strip():  # no token is longer
        raise UserError("which next token? Write one")
    spaced = " " + text.strip()
    for spelling in (spaced, text) if text[0].isalnum() else (text, spaced):
        ids = bench.tokenizer(spelling, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return int(ids[0])
    raise UserError(f"{text!r} is {len(ids)} tokens of this model; name a single one")
