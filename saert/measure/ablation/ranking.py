"""One token looked at closely: its active latents in order of effect, and what one of them does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saert.capture import capture
from saert.edits import ablate
from saert.hooks import device_of
from saert.kernels.numerics import accumulation_dtype
from saert.measure.ablation.ablate import ablation_effects
from saert.measure.ablation.table import AblationEffects
from saert.measure.attribution.attribute import attribute
from saert.measure.attribution.metric import next_token_loss, token_logit
from saert.measure.passes import sites
from saert.refine import strength
from saert.runtime import attach
from saert.sae import SAE
from saert.sparse import SparseCode

By = Literal["kl", "loss_change", "attributed_loss", "attributed_logit"]
CHUNK = 16  # ablations between two reports of progress


@dataclass(frozen=True, eq=False)
class Ranking:
    """The active latents at a token, the largest |effect| first. All on the CPU.

    Attributes:
        position: of the token, from 0.
        active: how many latents are active there; more than are listed, if `limit` cut them.
        latents, values: int64 and float32 [n], with their activations.
        scores: float64 [n], the effect that they are ranked by.
        effects: the true effects in the same order; None for attribution.
    """

    position: int
    active: int
    latents: Tensor
    values: Tensor
    scores: Tensor
    effects: AblationEffects | None


def rank_latents(
    model: Any,
    sae: SAE,
    ids: Tensor,
    position: int = -1,
    *,
    by: By = "kl",
    token: int | None = None,
    horizon: int = 16,
    limit: int = 64,
    strict: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank the latents active at one token by what ablating them there would change.

    Args:
        ids: int64 [1, tokens], without padding.
        position: of the token; negative ones count from the end.
        by: "kl" or "loss_change", true effects (`ablation_effects`), the means over the horizon.
            "attributed_loss" estimates the change of the loss summed over all tokens after it,
            "attributed_logit" that of the logit of `token` there (`attribute`, one backward pass).
        token: vocabulary entry; None is the one that the model finds likeliest after `position`.
        horizon: how many tokens true effects are measured over, the token's own prediction first;
            no more than the text has.
        limit: at most so many latents, the strongest, Σ f ‖W_dec‖.
        report: called with (done, of how many) while true effects are computed.

    Raises:
        ValueError, TypeError: a position that the text does not have, nothing active there, a loss
            asked for at the last token, after which nothing comes; and as `ablation_effects`.

    >>> rank_latents(model, sae, inputs["input_ids"], by="attributed_logit").latents[:3]
    """
    length = _one_text(ids)
    at = token_at(position, length)
    horizon = reach(horizon, at, length)
    if by in ("loss_change", "attributed_loss") and at == length - 1:
        raise ValueError(
            "nothing comes after the last token, so no loss depends on it: choose an earlier "
            "token, or rank by KL or by a token's logit"
        )
    found, values = _strongest(model, sae, ids, at)
    latents, values, active = found[:limit], values[:limit], len(found)
    if by in ("kl", "loss_change"):
        parts = []
        for i, chunk in enumerate(latents.split(CHUNK)):
            if report is not None:
                report(i * CHUNK, len(latents))
            parts.append(
                ablation_effects(
                    model, sae, ids, latents=chunk, positions=at, horizon=horizon, strict=strict,
                    progress=False,
                )
            )  # fmt: skip
        table = AblationEffects.cat(parts)
        table = table[getattr(table, by).abs().argsort(descending=True, stable=True)]
        return Ranking(at, active, table.latents, table.values, getattr(table, by), table)
    if by == "attributed_loss":
        metric = next_token_loss(ids)
    elif by == "attributed_logit":
        metric = token_logit(ids, likeliest(model, ids, at) if token is None else token, at)
    else:
        raise ValueError(f"by: found {by!r}, expected kl, loss_change, attributed_loss or _logit")
    effects = attribute(model, sae, ids, metric, strict=strict, progress=False)
    same = torch.full_like(latents, 0), torch.full_like(latents, at)
    scores = effects.at(sites(sae)[1], *same, latents).detach().cpu().double()
    order = scores.abs().argsort(descending=True, stable=True)
    return Ranking(at, active, latents[order], values[order], scores[order], None)


@torch.no_grad()
def logit_changes(
    model: Any,
    sae: SAE,
    ids: Tensor,
    position: int,
    latents: int | Sequence[int],
    *,
    horizon: int = 16,
    strict: bool = True,
) -> Tensor:
    """What ablating latents together at one token does to each logit from there on.

    float32 or wider [T, vocabulary] on the CPU, T = horizon or fewer at the end of the text: the
    change of each logit, less the token's median over the vocabulary, as a constant changes no
    prediction. Latents promote what this lowers, and suppress what it raises. From two whole
    passes; summed over T, its extremes are `AblationEffects.top_promoted` and `top_suppressed`.

    >>> logit_changes(model, sae, inputs["input_ids"], -1, 912).shape
    torch.Size([1, 2048])
    """
    at = token_at(position, _one_text(ids))
    seen = slice(at, at + reach(horizon, at, ids.shape[1]))
    ids = ids.to(device_of(model))
    before = _logits(model, ids)[seen]
    with attach(model, sae, ablate(latents, positions=at), record=False, strict=strict):
        after = _logits(model, ids)[seen]
    wide = accumulation_dtype(before.dtype)
    changed = torch.where(after == before, 0, after.to(wide) - before.to(wide))  # −inf stays −inf
    return (changed - changed.median(-1, keepdim=True).values).cpu()


@torch.no_grad()
def likeliest(model: Any, ids: Tensor, position: int) -> int:
    """The vocabulary entry that the model finds likeliest after a token."""
    return int(_logits(model, ids.to(device_of(model)))[position].argmax())


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[tokens, vocabulary]. The mask says that none is padding, or BOS may look like it."""
    logits: Tensor = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits


def _strongest(model: Any, sae: SAE, ids: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The latents active at a token and their activations, the strongest first, on the CPU."""
    read = sites(sae)[0]
    x = capture(model, ids, (read,), batch=1)[read].to(sae.device)
    code = sae.encode(x)  # all tokens, as ablation_effects does: the same rounding
    used = code.values[at] != 0
    latents, values = code.indices[at][used], code.values[at][used]
    if not len(latents):
        raise ValueError(f"no latent is active at token {at}: choose another token")
    each = SparseCode(latents[:, None], values[:, None].abs(), code.num_latents)
    order = strength(sae, each).argsort(descending=True, stable=True)
    return latents[order].cpu(), values[order].float().cpu()


def _one_text(ids: Tensor) -> int:
    if ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"ids are {list(ids.shape)}, expected one text, [1, tokens]")
    return ids.shape[1]


def token_at(position: int, length: int) -> int:
    """A position from 0, given one that may count from the end. TypeError, ValueError for none."""
    at = _whole("position", position)
    if not -length <= at < length:
        raise ValueError(
            f"position {position} is outside a text of {length} tokens; they count from 0"
        )
    return at % length


def reach(horizon: int, position: int, length: int) -> int:
    """How many tokens an effect at `position` is followed over: `horizon`, or what the text has.

    TypeError for what is no whole number, ValueError for less than 1.
    """
    if _whole("horizon", horizon) < 1:
        raise ValueError(f"horizon is {horizon}, expected at least 1")
    return min(horizon, length - position)


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: found {value!r}, expected a whole number")
    return operator.index(value)
