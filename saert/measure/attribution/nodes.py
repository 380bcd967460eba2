"""The nodes that attribution speaks of: latents and SAE errors, and the gradient where they write.

    y = s · Σ_j f_j W_dec[j] + (what the code does not touch) + ε
    y' − y = s · Σ_j (f'_j − f_j) W_dec[j] + (ε' − ε)

A `Call` runs the model with hooks that read hidden states and add a zero to them, whose gradient is
theirs; a `Move` is the way from one state of an SAE's nodes to another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saert.compat import check_model
from saert.hookpoint import Hookpoint, unwrap
from saert.hooks import Act, device_of, hooked
from saert.kernels.decode import sparse_decode
from saert.kernels.numerics import accumulation_dtype, no_autocast
from saert.measure.attribution.metric import Inputs, Metric, tokens_of
from saert.measure.passes import masked, sites
from saert.sae import SAE
from saert.sparse import SparseCode

States = dict[Hookpoint, Tensor]


@dataclass(frozen=True)
class Site:
    """An SAE, where it reads and where it writes (`at`)."""

    read: Hookpoint
    at: Hookpoint
    sae: SAE


def sites_of(
    model: nn.Module, saes: SAE | Sequence[SAE] | Mapping[Any, SAE], strict: bool
) -> list[Site]:
    """SAEs with their places; a mapping's keys say where they read.

    Raises TypeError, ValueError or HookpointError for what is no SAE, reads nowhere, is for another
    model (if `strict`), or writes where another one does.
    """
    if isinstance(saes, Mapping):
        listed = list(saes.items())
    else:
        listed = [(None, sae) for sae in ([saes] if isinstance(saes, SAE) else saes)]
    found: list[Site] = []
    for key, sae in listed:
        if not isinstance(sae, SAE):
            raise TypeError(f"saes: found {type(sae).__name__}, expected an SAE; see saert.load")
        read = sites(sae)[0] if key is None else Hookpoint.parse(key)
        found.append(Site(read, sae.target_hookpoint or read, sae))
    if not found:
        raise ValueError("saes: no SAE given")
    places = [site.at for site in found]
    for site in found:
        check_model(model, site.sae, site.read, strict)
        here, _ = (place.resolve(model) for place in (site.read, site.at))
        own, target = site.sae.hookpoint, site.sae.target_hookpoint
        if own is not None and target is not None and own.resolve(model) != here:
            raise ValueError(f"a transcoder from {own} to {target} cannot read at {site.read}")
        if places.count(site.at) > 1:
            raise ValueError(f"{places.count(site.at)} SAEs write to {site.at}: give one for each")
    return found


@dataclass(frozen=True)
class Call:
    """A call of a model: its arguments, and bool [rows, tokens], false at padding."""

    model: Any
    arguments: dict[str, Any]
    real: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Inputs) -> Call:
        """Of ids or a tokenizer's mapping, moved to the model's device. Rows with padding on the
        left get the positions that `generate` gives them, where the model takes positions."""
        ids, real = tokens_of(inputs)
        given = {"input_ids": ids} if isinstance(inputs, Tensor) else dict(inputs)
        takes = inspect.signature(unwrap(model)[1].forward).parameters
        if not bool(real[:, 0].all()) and "position_ids" in takes:
            given.setdefault("position_ids", (real.long().cumsum(-1) - 1).clamp_min(0))
        device = device_of(model)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        return cls(model, {"use_cache": False} | moved, real.to(device))

    def logits(self, acts: Mapping[Hookpoint, Act], seen: States) -> Tensor:
        """One pass with hooks, which fill `seen`: [rows, tokens, vocabulary]."""
        with ExitStack() as hooks:
            for at, act in acts.items():
                hooks.enter_context(hooked(self.model, at, act))
            out = self.model(**self.arguments)
        if missing := [str(at) for at in acts if at not in seen]:
            raise RuntimeError(f"{', '.join(missing)}: the forward pass never came there")
        logits = getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(self.model).__name__} returns {type(out).__name__} without logits; "
                "expected a language model with its head (AutoModelForCausalLM)"
            )
        return logits

    @torch.no_grad()
    def states(self, places: Sequence[Hookpoint]) -> States:
        """The hidden states at some places."""
        seen: States = {}
        self.logits({at: _keep(at, seen) for at in places}, seen)
        return seen

    def gradients(
        self, sites: Sequence[Site], metric: Metric, move: Tensor | None = None
    ) -> tuple[States, States, Tensor]:
        """Hidden states, the metric's gradient where each SAE writes, and the metric, in one pass.

        move: [rows, tokens, d], added to the hidden state where the (one) SAE writes.
        """
        seen: States = {}
        leaves: States = {}
        acts = {site.read: _keep(site.read, seen) for site in sites}
        acts |= {site.at: _keep(site.at, seen, leaves, move) for site in sites}
        value = _judged(metric, self.logits(acts, seen), len(self.real))
        found = torch.autograd.grad(
            value.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        wide = (g.to(accumulation_dtype(g.dtype)) for g in found)
        return seen, dict(zip(leaves, wide, strict=True)), value.detach()


def _keep(
    at: Hookpoint, seen: States, leaves: States | None = None, move: Tensor | None = None
) -> Act:
    """Copies the hidden state; with `leaves`, adds a zero whose gradient is the hidden state's.

    A copy, because some models go on adding to the tensor in place. The sum with zero leaves every
    value as it was, and begins the graph here, whatever is frozen.
    """

    def act(state: Tensor) -> Tensor | None:
        if at in seen:
            raise RuntimeError(f"{at} runs more than once in a forward pass: it is no single node")
        seen[at] = state.detach().clone()
        if leaves is None:
            return None
        if move is not None:  # nothing upstream is asked for
            state = (seen[at].to(move.dtype) + move.to(state.device).view_as(state)).to(state.dtype)
        leaves[at] = torch.zeros_like(state, requires_grad=True)
        return state + leaves[at]

    return act


def _judged(metric: Metric, logits: Tensor, rows: int) -> Tensor:
    """The metric, checked: [rows] or a scalar, finite and differentiable."""
    found = metric(logits)
    if not isinstance(found, Tensor) or found.shape not in ((), (rows,)):
        what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"metric: found {what}, expected a scalar tensor or one value for a row")
    if not found.requires_grad:
        raise ValueError("metric: its value has no gradient; compute it from the logits with torch")
    if not bool(found.isfinite().all()):
        raise ValueError(f"metric: found {found.detach().tolist()}, expected finite values")
    return found


@dataclass(frozen=True)
class Move:
    """From the clean nodes of one SAE to the patch, in the model's units; none at padding.

    code: clean activations; change: s · (f' − f) in the same slots, [rows, tokens, k];
    error: ε' − ε and whole: y' − y, [rows, tokens, d_out].
    """

    code: SparseCode
    change: SparseCode
    error: Tensor
    whole: Tensor


@torch.no_grad()
def move(site: Site, seen: States, patched: States | None, real: Tensor) -> Move:
    """From the states `seen` to those of the patch, or to zero latents and zero error."""
    sae, real = site.sae, real.to(site.sae.device)
    x, y = (_tokens(seen[at], real) for at in (site.read, site.at))
    if y.shape[-1] != sae.d_out:
        raise ValueError(f"{site.at} has width {y.shape[-1]}, but the SAE writes {sae.d_out}")
    with no_autocast(x):
        code = masked(sae.encode(x), real)
        y = y.to(code.values.dtype)
        if patched is None:
            change = sae.rescale(-code.values, x)
            latents = sparse_decode(code.indices, change, sae.W_dec)
            error = (sae.decode(code, x) - y).where(real.unsqueeze(-1), 0)
        else:
            x_patch, y_patch = (_tokens(patched[at], real) for at in (site.read, site.at))
            code, new = union(code, masked(sae.encode(x_patch), real))
            change = sae.rescale(new.values - code.values, x)
            latents = sparse_decode(code.indices, change, sae.W_dec)
            error = y_patch.to(y.dtype) - y - latents
    return Move(code, SparseCode(code.indices, change, code.num_latents), error, latents + error)


def _tokens(state: Tensor, real: Tensor) -> Tensor:
    """A hidden state as [rows, tokens, d], zero at padding, on the device of `real`."""
    if state.numel() != real.numel() * state.shape[-1]:
        raise ValueError(
            f"the hidden state is {list(state.shape)}, expected {list(real.shape)} tokens"
        )
    shaped = state.to(real.device).view(*real.shape, -1)
    return shaped.where(real.unsqueeze(-1), 0)


def union(first: SparseCode, second: SparseCode) -> tuple[SparseCode, SparseCode]:
    """Both codes in the same slots: the latents that either uses, lowest first."""
    n = first.num_latents
    used = torch.cat([first.values != 0, second.values != 0], -1)
    latents, order = torch.cat([first.indices, second.indices], -1).masked_fill(~used, n).sort(-1)
    # a latent that both use stands in two neighbouring slots, which become one
    again = torch.zeros_like(used)
    again[..., 1:] = (latents[..., 1:] == latents[..., :-1]) & (latents[..., 1:] < n)
    slot = (~again).cumsum(-1) - 1
    k = max(1, int((~again & (latents < n)).sum(-1).max()))
    indices = torch.full_like(latents, n).scatter(-1, slot, latents)[..., :k]
    indices = indices.masked_fill(indices == n, 0)
    empty = [torch.zeros_like(code.values) for code in (first, second)]
    both = torch.cat([first.values, empty[1]], -1), torch.cat([empty[0], second.values], -1)
    merged = (torch.zeros_like(v).scatter_add(-1, slot, v.gather(-1, order))[..., :k] for v in both)
    left, right = (SparseCode(indices, v, n) for v in merged)
    return left, right


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module then returns to its own."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
