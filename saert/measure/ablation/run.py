"""Runs planned ablations: rows share base passes, and ablations of one position share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.measure.ablation.effects import effects
from saert.measure.ablation.replay import Replay, Runner, choose_runner
from saert.measure.ablation.table import AblationEffects
from saert.measure.attribution.metric import Inputs, tokens_of
from saert.measure.passes import check_ready
from saert.measure.progress import bar

CHUNK_TOKENS = 2048
"""Rows share a base pass up to about so many tokens: their keys, values and streams are kept."""
BATCH_BYTES = 2**29
"""What the logits of a batch and the keys and values of one block may take, by default."""


@dataclass(frozen=True)
class Pairs:
    """Ablations within rows [rows, tokens]: int64 [n] each, and what each takes away [n]."""

    rows: Tensor
    positions: Tensor
    latents: Tensor
    values: Tensor

    def __getitem__(self, which: Tensor | slice) -> Pairs:
        return Pairs(*(getattr(self, field.name)[which] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.rows)


class NothingToAblate(ValueError):
    """No ablation is left to do."""


Plan = tuple[Pairs, Callable[[Pairs], Tensor], Tensor | None]
"""The ablations of some rows, the change [n, d] that each makes, and what to splice in."""


def measure(
    model: Any,
    site: Hookpoint,
    inputs: Inputs,
    plan: Callable[[Tensor], Plan],
    horizon: int,
    top: int,
    batch_size: int | None,
    what: str,
) -> AblationEffects:
    """All ablations that `plan` wants, given ids [rows, tokens] without padding. `what` is the
    progress bar's text; without one there is no bar."""
    ids, real = tokens_of(inputs)
    for name, value in (("horizon", horizon), ("top", top), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    check_ready(model)
    device = device_of(model)
    chunks = list(_chunks(real))
    tables: list[AblationEffects] = []
    kind: type[Runner] | None = None
    with bar(what, bool(what)) as show:
        for i, rows in enumerate(chunks):
            chunk = torch.stack([ids[row][real[row]] for row in rows]).to(device)
            pairs, change, splice = plan(chunk)
            if not len(pairs):
                continue
            run = choose_runner(model, site, chunk, splice, horizon, kind)
            kind = type(run)
            done = 0
            for part in _batches(pairs, batch_size or _batch_size(model, run, horizon)):
                found = _ablate(run, part, change, horizon, top)
                row = torch.tensor(rows)[found.rows]
                tables.append(AblationEffects(**vars(found) | {"rows": row}))
                done += len(part)
                show(len(chunks) * done + i * len(pairs), len(chunks) * len(pairs))
    if not tables:
        raise NothingToAblate("no such latent is active at the chosen positions")
    whole = AblationEffects.cat(tables)
    order = whole.positions.argsort(stable=True)
    return whole[order[whole.rows[order].argsort(stable=True)]]


def _chunks(real: Tensor) -> Iterator[list[int]]:
    """Rows of equal length, the longest first, together as long as their tokens stay within the
    limit."""
    lengths = real.sum(-1).tolist()
    for length in sorted(set(lengths), reverse=True):
        same = [row for row, other in enumerate(lengths) if other == length]
        several = max(1, CHUNK_TOKENS // length)
        yield from (same[i : i + several] for i in range(0, len(same), several))


def _batches(pairs: Pairs, size: int) -> Iterator[Pairs]:
    """At most `size` ablations of one position."""
    for position in pairs.positions.unique().tolist():
        here = (pairs.positions == position).nonzero().squeeze(-1)
        yield from (pairs[some] for some in here.split(size))


def _batch_size(model: Any, run: Runner, horizon: int) -> int:
    config = model.config.get_text_config()
    tokens = run.ids.shape[1]
    length = min(horizon, tokens)
    passed = length if isinstance(run, Replay) else tokens
    # logits in the model's dtype, a token's worth of them three times in float32, keys and values
    logits = 4 * config.vocab_size * (passed + 3)
    keys = 8 * (tokens + length) * config.hidden_size
    return max(1, min(128, BATCH_BYTES // int(logits + keys)))


def _ablate(
    run: Runner, pairs: Pairs, change: Callable[[Pairs], Tensor], horizon: int, top: int
) -> AblationEffects:
    """Ablations of one position. Every row's prediction without one comes from the same batch, so
    that both have the same rounding."""
    position = int(pairs.positions[0])
    tokens = run.ids.shape[1]
    length = min(horizon, tokens - position)
    device = run.ids.device
    pairs = pairs[pairs.rows.argsort(stable=True)]
    rows = pairs.rows.to(device)
    plain, counts = rows.unique(return_counts=True)  # in ascending order, as the rows now are
    changes = change(pairs).to(device)
    nothing = changes.new_zeros(len(plain), changes.shape[1])
    logits = run.logits(torch.cat([plain, rows]), position, torch.cat([nothing, changes]), length)
    following = torch.nn.functional.pad(run.ids, (0, 1), value=-1)
    following = following[:, position + 1 : position + 1 + length]
    parts, begin = [], 0
    for i, (row, count) in enumerate(zip(plain.tolist(), counts.tolist(), strict=True)):
        mine = slice(begin, begin := begin + count)  # a view: these logits are large
        found = effects(logits[i], logits[len(plain) :][mine], following[row], top)
        ours = pairs[mine]
        parts.append(
            AblationEffects(
                rows=ours.rows.cpu(),
                positions=ours.positions.cpu(),
                latents=ours.latents.cpu(),
                values=ours.values.float().cpu(),
                sparsity=found.sparsity.cpu(),
                kl=found.kl.mean(-1).cpu(),
                loss_change=found.loss_change.nanmean(-1).cpu(),
                kl_by_token=_wide(found.kl, horizon),
                loss_change_by_token=_wide(found.loss_change, horizon),
                top_promoted=found.lowered.cpu(),
                top_suppressed=found.raised.cpu(),
                method="replay" if isinstance(run, Replay) else "brute force",
            )
        )
    return AblationEffects.cat(parts)


def _wide(by_token: Tensor, horizon: int) -> Tensor:
    missing = horizon - by_token.shape[1]
    return torch.nn.functional.pad(by_token, (0, missing), value=torch.nan).cpu()
