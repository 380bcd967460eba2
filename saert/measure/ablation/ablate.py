"""Ablation effects: take one latent away at one token, and see what the model then predicts.

Gao et al. 2024, section 4.5. For a latent i active at a token, with the SAE's error kept,

    x′ = x − f_i · W_dec[i]          or, without it,    x̂′ = x̂ − f_i · W_dec[i]

(scaled back by the SAE's input transform), and the effect is measured on the logits of the tokens
from there on (`effects.py` beside this). One pass of the rows is kept; each ablation then runs only
what lies behind it, many of them at a time (`replay.py`).

`direction_effects` takes away what the hidden state has along single channels, or along random
directions, instead: the paper's baselines.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.compat import check_model
from saert.edits import Positions
from saert.hookpoint import Hookpoint
from saert.measure.ablation.run import Pairs, Plan, measure
from saert.measure.ablation.table import AblationEffects
from saert.measure.attribution.attribute import attribute
from saert.measure.attribution.metric import Inputs, next_token_loss
from saert.measure.passes import Special, sites
from saert.sae import SAE


@torch.no_grad()
def ablation_effects(
    model: Any,
    sae: SAE,
    inputs: Inputs,
    *,
    latents: str | int | Sequence[int] | Tensor = "active",
    positions: Positions = None,
    horizon: int = 16,
    keep_error: bool = True,
    top: int = 10,
    special: Special | None = None,
    batch_size: int | None = None,
    strict: bool = True,
    progress: bool = True,
) -> AblationEffects:
    """The effect of ablating latents, each alone and at one token.

    Args:
        sae: changes the model where it writes (a transcoder at its target).
        inputs: ids int64 [rows, tokens], or a tokenizer's mapping; padding is left out.
        latents: "active", every latent at every token where it is active; latents by number, where
            they are active; or "attributed:N", for each row the N (token, latent) pairs with the
            largest attribution to its next-token loss (`attribute`), over the chosen positions.
        positions: an int, ints or a slice of each row's real tokens, counted from 0, negative from
            its end; None is all of them.
        horizon: how many tokens are looked at, the ablated one first.
        keep_error: False measures on a model with the SAE's reconstruction spliced in everywhere.
        top: how many promoted and suppressed tokens to keep.
        special: ids -> bool of the same shape, tokens where nothing is ablated (BOS, say).
        batch_size: ablations per pass; by default as many as 512 MiB allow.
        strict: refuse an SAE whose metadata names another model.

    Raises:
        ValueError, TypeError, HookpointError: an SAE that does not fit, a position that a row does
            not have, a latent out of range, a model in training mode or with SAEs attached.

    Where a model cannot be replayed (Mamba's state, keys shared between blocks) this warns, and
    runs it as a whole for each ablation.

    >>> effects = ablation_effects(model, sae, inputs["input_ids"], positions=-1)
    >>> effects.sort("kl")[:3].top_promoted.shape
    torch.Size([3, 10])
    """
    read, write = sites(sae)
    check_model(model, sae, read, strict)
    wanted, attributed = _wanted(latents, sae.num_latents)

    def plan(ids: Tensor) -> Plan:
        hidden = capture(model, ids, (read, write), batch=len(ids))
        x = hidden[read].view(*ids.shape, -1).to(sae.device)
        code = sae.encode(x)
        used = _used(ids, positions, special).to(sae.device)
        active = (code.values != 0) & used.unsqueeze(-1)
        if wanted is not None:
            active &= torch.isin(code.indices, wanted.to(code.indices.device))
        rows, at, _ = active.nonzero(as_tuple=True)
        pairs = Pairs(rows, at, code.indices[active], code.values[active])
        if attributed is not None and ids.shape[1] == 1:
            pairs = pairs[rows[:0]]  # a row of one token has no next-token loss
        elif attributed is not None and len(rows):
            loss = next_token_loss(ids)
            scores = attribute(model, sae, ids, loss, strict=strict, progress=False)
            pairs = _largest(pairs, scores.at(write, rows, at, pairs.latents), attributed)

        def change(some: Pairs) -> Tensor:
            away = -some.values.unsqueeze(-1) * sae.directions(some.latents).to(some.values.dtype)
            return sae.rescale(away, x[some.rows, some.positions])

        return pairs, change, None if keep_error else sae.decode(code, x)

    what = "ablating latents" if progress else ""
    return measure(model, write, inputs, plan, horizon, top, batch_size, what)


@torch.no_grad()
def direction_effects(
    model: Any,
    hookpoint: str | Hookpoint,
    inputs: Inputs,
    directions: str | Tensor = "channels",
    *,
    positions: Positions = None,
    horizon: int = 16,
    top: int = 10,
    special: Special | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> AblationEffects:
    """The effect of removing the hidden state's part along a direction: x′ = x − (x·u) u.

    Args:
        directions: "channels", each channel of the hidden state set to 0; "channels:N", N of them
            drawn with `seed`; "random:N", N Gaussian directions drawn with `seed`; or [n, d_in],
            which are normalised. Column `latents` of the result holds their numbers (for channels
            the channel), `values` the projection x·u.

    The other arguments, the result and the errors are those of `ablation_effects`.

    >>> ids = inputs["input_ids"]
    >>> len(direction_effects(model, "resid_post.2", ids, "random:4", positions=-1))
    4
    """
    site = Hookpoint.parse(hookpoint)

    def plan(ids: Tensor) -> Plan:
        x = capture(model, ids, (site,), batch=len(ids))[site].view(*ids.shape, -1)
        names, u = _directions(directions, x.shape[-1], seed)
        u = u.to(x.device, torch.promote_types(x.dtype, torch.float32))
        rows, at = _used(ids, positions, special).to(x.device).nonzero(as_tuple=True)
        values = x[rows, at].to(u.dtype) @ u.T  # [tokens, n]

        def direction(some: Tensor) -> Tensor:
            return u[torch.searchsorted(names.to(some.device), some)]

        def change(some: Pairs) -> Tensor:
            return -some.values.unsqueeze(-1) * direction(some.latents)

        count = len(u)
        name = names.to(x.device).repeat(len(rows))
        each = (rows.repeat_interleave(count), at.repeat_interleave(count))
        pairs = Pairs(*each, name, values.flatten())

        return pairs, change, None

    what = "ablating directions" if progress else ""
    return measure(model, site, inputs, plan, horizon, top, batch_size, what)


# -- the rows and their ablations ---------------------------------------------------------------


def _wanted(
    latents: str | int | Sequence[int] | Tensor, num_latents: int
) -> tuple[Tensor | None, int | None]:
    """Latents by number, or how many of the largest attribution; neither for "active"."""
    if isinstance(latents, str):
        kind, _, count = latents.partition(":")
        if latents == "active":
            return None, None
        if kind == "attributed" and count.isdigit() and int(count):
            return None, int(count)
        raise ValueError(
            f'latents: found {latents!r}, expected "active", "attributed:100" or numbers'
        )
    wanted = torch.as_tensor(latents).reshape(-1)
    if wanted.is_floating_point() or wanted.dtype == torch.bool or not len(wanted):
        raise TypeError(f"latents: found {latents!r}, expected at least one latent's number")
    wanted = wanted.long()
    if not 0 <= int(wanted.min()) <= int(wanted.max()) < num_latents:
        raise ValueError(
            f"latents: found {int(wanted.min())} to {int(wanted.max())}, expected 0 to "
            f"{num_latents - 1}"
        )
    return wanted, None


def _used(ids: Tensor, positions: Positions, special: Special | None) -> Tensor:
    """bool [rows, tokens]: where latents are ablated."""
    tokens = ids.shape[1]
    used = torch.zeros(tokens, dtype=torch.bool, device=ids.device)
    if positions is None or isinstance(positions, slice):
        used[list(range(tokens)[positions or slice(None)])] = True
    else:
        several = positions if isinstance(positions, Iterable) else [positions]
        for position in map(operator.index, several):
            if not -tokens <= position < tokens:
                raise ValueError(f"positions: {position} is outside a row of {tokens} tokens")
            used[position] = True
    used = used.expand(ids.shape)
    return used if special is None else used & ~special(ids).to(ids.device)


def _largest(pairs: Pairs, scores: Tensor, count: int) -> Pairs:
    """Of every row, the `count` with the largest |score|."""
    order = scores.abs().argsort(descending=True, stable=True)
    order = order[pairs.rows[order].argsort(stable=True)]
    rows = pairs.rows[order]
    first = torch.searchsorted(rows, rows)  # where the row's begin
    rank = torch.arange(len(rows), device=rows.device) - first
    return pairs[order[rank < count]]


def _directions(spec: str | Tensor, d_in: int, seed: int) -> tuple[Tensor, Tensor]:
    """Their numbers [n] and unit vectors [n, d_in]."""
    if isinstance(spec, Tensor):
        if spec.dim() != 2 or spec.shape[1] != d_in or not spec.isfinite().all():
            raise ValueError(f"directions: found {list(spec.shape)}, expected finite [n, {d_in}]")
        norms = spec.norm(dim=-1, keepdim=True)
        if not norms.all():
            raise ValueError("directions: one has length 0")
        return torch.arange(len(spec)), spec / norms
    kind, _, text = spec.partition(":")
    count = int(text) if text.isdigit() else d_in if kind == "channels" and not text else 0
    if kind not in ("channels", "random") or not count:
        raise ValueError(
            f'directions: found {spec!r}, expected "channels[:N]", "random:N" or a tensor'
        )
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        u = torch.randn(count, d_in, generator=generator)
        return torch.arange(count), u / u.norm(dim=-1, keepdim=True)
    if count > d_in:
        raise ValueError(f"directions: {count} channels of {d_in}")
    drawn = torch.randperm(d_in, generator=generator)[:count].sort().values
    return drawn, torch.eye(d_in)[drawn]
