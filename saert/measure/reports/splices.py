"""The pass behind downstream losses: a model on rows of text, with hidden states replaced.

Losses are computed in float32 or wider, a slice of positions at a time, and summed in float64 for
each bucket of positions, so batches of any size give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import device_of, hooked
from saert.kernels.numerics import accumulation_dtype
from saert.measure.passes import Special, sites
from saert.measure.progress import tracked
from saert.measure.reports.reconstruction import (
    Reconstruction,
    check_rows,
    kept,
    membership,
    position_buckets,
    wide,
)
from saert.sae import SAE

LOGITS = 2**28  # logits of one forward pass, at most, unless a single row has more
SLICE = 2**24  # logits widened at once


class Effect:
    """Streams sums of (1, cross-entropy, KL, agreement) by bucket of positions, for one
    replacement: `sums`, float64 [buckets, 4]."""

    def __init__(self, buckets: Sequence[tuple[int, int]]) -> None:
        self.buckets = buckets
        self.sums = torch.zeros(len(buckets), 4, dtype=torch.float64)

    def add(self, losses: Tensor, scored: Tensor) -> None:
        """losses [rows, context − 1, 3]; scored: bool [rows, context − 1]."""
        scored, found = scored.cpu(), losses.cpu().double()
        positions = torch.arange(scored.shape[1]).expand_as(scored)[scored]
        member = membership(positions, self.buckets).double()
        found = found[scored]
        self.sums += member.T @ torch.cat([found.new_ones(len(found), 1), found], 1)


@dataclass(frozen=True)
class Outcome:
    """What one pass found out about one SAE, still as sums. `clean`, `zero` and `mean` are shared
    by SAEs that write to one place; `mean` is None if it was not asked for."""

    reconstruction: Reconstruction
    clean: Effect
    spliced: Effect
    zero: Effect
    mean: Effect | None


@torch.no_grad()
def splices(
    model: Any,
    saes: Sequence[SAE],
    rows: Tensor,
    *,
    means: Mapping[Hookpoint, Tensor] | None,
    batch: int = 16,
    special: Special | None = None,
    padding: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> list[Outcome]:
    """Forward passes of each batch: the model as it is, once with each SAE's reconstruction, and
    for each place that they write to once with zeros, and once with `means` if given.

    Arguments otherwise as `downstream_report`."""
    rows = check_rows(model, rows, context=2)
    spans = position_buckets(rows.shape[1], buckets)
    places = dict.fromkeys(place for sae in saes for place in sites(sae))
    kinds = ("zero",) if means is None else ("zero", "mean")
    bases = {sites(sae)[1]: {kind: Effect(spans) for kind in kinds} for sae in saes}
    clean, found = Effect(spans), list[Outcome]()
    for sae in saes:
        base = bases[sites(sae)[1]]
        new = Reconstruction(sae, spans), clean, Effect(spans), base["zero"], base.get("mean")
        found.append(Outcome(*new))
    device = device_of(model)
    for part in tracked(rows.split(rows_at_once(model, rows, batch)), "splicing", progress):
        used, positions = kept(part, either(special, padding))
        now = Pass(model, part.to(device), _scored(part, padding), places)
        now.count(clean, now.logits)
        mask = used.to(device)[:, None]
        for sae, one in zip(saes, found, strict=True):
            x, y = (now.hidden[place][mask[:, 0]].to(sae.device) for place in sites(sae))
            code = sae.encode(x)
            estimate = sae.decode(code, x)
            one.reconstruction.add(y, estimate, code, positions.to(sae.device))
            write = sites(sae)[1]
            state = now.hidden[write]
            new_state = state.masked_scatter(mask.to(state.device), estimate.to(state))
            now.replace(one.spliced, write, new_state)
        for place, effects in bases.items():
            state = now.hidden[place]
            here = mask.to(state.device)
            now.replace(effects["zero"], place, state.masked_fill(here, 0))
            if means is not None:
                mean = means[place].to(state.dtype).to(state.device)
                now.replace(effects["mean"], place, torch.where(here, mean, state))
    return found


class Pass:
    """A batch of rows, the model's logits [rows, context, vocabulary] on it, and the hidden states
    [tokens, d]."""

    def __init__(
        self, model: Any, rows: Tensor, scored: Tensor, places: Iterable[Hookpoint]
    ) -> None:
        self.model, self.rows, self.scored = model, rows, scored
        self.hidden: dict[Hookpoint, Tensor] = {}

        def keep(place: Hookpoint) -> Callable[[Tensor], None]:
            return lambda state: self.hidden.__setitem__(place, state.flatten(0, -2).clone())

        with ExitStack() as hooks:
            for place in places:
                hooks.enter_context(hooked(model, place, keep(place)))
            self.logits: Tensor = model(rows, use_cache=False).logits

    def replace(self, effect: Effect, place: Hookpoint, new: Tensor) -> None:
        """Run the model with the hidden state `new` [tokens, d] at a place."""
        with hooked(self.model, place, lambda state: new.view_as(state)):
            self.count(effect, self.model(self.rows, use_cache=False).logits)

    def count(self, effect: Effect, logits: Tensor) -> None:
        effect.add(compare(self.logits, logits, self.rows), self.scored)


def compare(clean: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """Logits [rows, context, vocabulary] of the model as it is and changed, and the token ids
    [rows, context] -> float64 [rows, context − 1, 3]: cross-entropy of the changed model,
    KL(clean ‖ changed), and whether both find the same token likeliest (1 or 0)."""
    step = max(1, SLICE // (clean.shape[0] * clean.shape[2]))
    found = []
    for i in range(0, clean.shape[1] - 1, step):
        at = slice(i, min(i + step, clean.shape[1] - 1))
        p, q = (t[:, at].to(accumulation_dtype(t.dtype)).log_softmax(-1) for t in (clean, new))
        target = rows[:, 1:][:, at]
        ce = -q.gather(-1, target[..., None]).squeeze(-1)
        # a token that the model rules out adds nothing
        kl = (p.exp() * (p - q)).masked_fill_(p == -torch.inf, 0)
        same = p.argmax(-1) == q.argmax(-1)
        found.append(torch.stack([wide(ce), wide(kl).sum(-1), wide(same)], -1))
    return torch.cat(found, 1)


@torch.no_grad()
def mean_states(
    model: Any,
    places: Sequence[Hookpoint],
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    progress: bool = True,
) -> dict[Hookpoint, Tensor]:
    """The mean hidden state [d] at each place over the rows, float64, on the CPU.

    Raises ValueError if every token is special."""
    rows = check_rows(model, rows)
    device = device_of(model)
    sums, count = dict.fromkeys(places, torch.zeros((), dtype=torch.float64)), 0
    for part in tracked(rows.split(batch), "mean activations", progress):
        used, _ = kept(part, special)
        hidden = capture(model, part.to(device), list(sums), batch=len(part))
        for place in sums:
            sums[place] = sums[place] + wide(hidden[place][used.to(device)]).sum(0).cpu()
        count += int(used.sum())
    if not count:
        raise ValueError("no token is left to measure: all are special")
    return {place: total / count for place, total in sums.items()}


def rows_at_once(model: Any, rows: Tensor, batch: int) -> int:
    """`batch`, or fewer where a pass would make more than LOGITS logits."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, min(batch, LOGITS // (rows.shape[1] * vocabulary)))


def either(a: Special | None, b: Special | None) -> Special | None:
    """Tokens that either of two rules names."""
    if a is None or b is None:
        return a or b
    return lambda rows: a(rows) | b(rows)


def _scored(rows: Tensor, padding: Special | None) -> Tensor:
    """bool [rows, context − 1]: predictions that are from text and of text."""
    if padding is None:
        return torch.ones_like(rows[:, 1:], dtype=torch.bool)
    text = ~padding(rows)
    return text[:, :-1] & text[:, 1:]
