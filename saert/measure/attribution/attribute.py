"""Attribution: what each active latent does to a metric, estimated from gradients.

    IE_j = ∂m/∂f_j · (f'_j − f_j),   ∂m/∂f_j = s · ⟨g, W_dec[j]⟩,   g = ∂m/∂y
    IE_ε = ⟨g, ε' − ε⟩,              ε = y − SAE(x)

y is the hidden state where the SAE writes, s the scale of its input transform at the token, m the
metric, and the patch (f', ε') what the nodes would be: zero, or what they are on other inputs
(Marks et al. 2024, "Sparse feature circuits"). The error node is kept, so y has the model's own
value, and the paper's pass-through gradient (none flows through an SAE to what lies upstream) makes
g the model's own gradient: no SAE enters the forward pass, and one backward pass serves all sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from saert.hookpoint import Hookpoint, HookpointError
from saert.kernels.decode import gather_dot
from saert.kernels.numerics import no_autocast
from saert.measure.attribution.metric import Inputs, Metric
from saert.measure.attribution.nodes import Call, Move, Site, evaluating, move, sites_of
from saert.measure.passes import check_ready
from saert.measure.progress import tracked
from saert.sae import SAE
from saert.sparse import SparseCode

T = TypeVar("T")


class ByHookpoint(Mapping[Hookpoint, T], Generic[T]):
    """A mapping from hookpoints that takes every spelling of one as its key."""

    def __init__(self, found: Mapping[Hookpoint, T]) -> None:
        self._found = dict(found)

    def __getitem__(self, key: Hookpoint | str) -> T:
        try:
            return self._found[Hookpoint.parse(key)]
        except (KeyError, HookpointError):
            raise KeyError(f"{key}: found {', '.join(map(str, self._found))}") from None

    def __iter__(self) -> Iterator[Hookpoint]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class Attribution(ByHookpoint[SparseCode]):
    """Effects of the active latents by hookpoint (a transcoder's: where it writes).

    `attribution[hookpoint]` is a SparseCode [rows, tokens, k] whose values are indirect effects in
    the metric's units; empty at padding.

    Attributes:
        codes: by hookpoint, the clean activations in the same slots [rows, tokens, k].
        errors: by hookpoint, the effects of the error nodes [rows, tokens].
        metric: the metric on the clean inputs, [rows] or a scalar.
    """

    def __init__(
        self,
        effects: Mapping[Hookpoint, SparseCode],
        codes: Mapping[Hookpoint, SparseCode],
        errors: Mapping[Hookpoint, Tensor],
        metric: Tensor,
    ) -> None:
        super().__init__(effects)
        self.codes, self.errors = ByHookpoint(codes), ByHookpoint(errors)
        self.metric = metric

    def at(
        self, hookpoint: Hookpoint | str, rows: Tensor, positions: Tensor, latents: Tensor
    ) -> Tensor:
        """Effects of single latents: three int64 [N] -> floating [N]; 0 where one is not active.

        positions: columns of [rows, tokens], padding counted. Raises ValueError out of range.
        """
        effects = self[hookpoint]
        limits = (*effects.shape[:2], effects.num_latents)
        names = ("rows", "positions", "latents")
        for name, given, limit in zip(names, (rows, positions, latents), limits, strict=True):
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < limit:
                raise ValueError(
                    f"Attribution.at: {name} are {int(given.min())} to {int(given.max())}, "
                    f"expected 0 to {limit - 1}"
                )
        device = effects.indices.device
        token = (rows.to(device), positions.to(device))
        same = effects.indices[token] == latents.to(device).unsqueeze(-1)
        return (effects.values[token] * same).sum(-1)

    def top(self, hookpoint: Hookpoint | str, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The n largest effects of each row, by magnitude: rows, positions, latents, int64 [N].

        Row by row, the largest first; latents without any effect are left out.
        """
        effects = self[hookpoint]
        rows, _, k = effects.shape
        values = effects.values.reshape(rows, -1).abs()
        size, slot = values.sort(dim=-1, descending=True, stable=True)
        row, rank = (size[:, :n] > 0).nonzero(as_tuple=True)
        slot = slot[row, rank]
        return row, slot // k, effects.indices.reshape(rows, -1)[row, slot]

    def __repr__(self) -> str:
        places = ", ".join(f"{at}: {effects!r}" for at, effects in self.items())
        return f"Attribution({places})"


@torch.enable_grad()
def attribute(
    model: Any,
    saes: SAE | Sequence[SAE] | Mapping[Any, SAE],
    inputs: Inputs,
    metric: Metric,
    *,
    method: Literal["atp", "ig"] = "atp",
    steps: int = 10,
    patch: Inputs | None = None,
    strict: bool = True,
    progress: bool = True,
) -> Attribution:
    """The effect of patching each active latent on a metric, to first order.

    Args:
        saes: an SAE, a sequence, or {where it reads: SAE}; each writes to a place of its own.
        inputs: ids int64 [rows, tokens], or a tokenizer's mapping; the graph of one pass holds
            all rows. Rows padded on the left get the positions that `generate` would give them.
        metric: logits [rows, tokens, vocabulary] -> [rows] or scalar, differentiable; a metric per
            row gives each row the gradient of its own. See `next_token_loss`, `logit_difference`.
        method: "atp", attribution patching: the gradient at the clean inputs, one backward pass for
            all SAEs together. "ig", integrated gradients: the mean gradient at the nodes
            (1 − α)·clean + α·patch for α = 0, 1/steps, …, (steps − 1)/steps (left Riemann sum, so
            without α = 1), latents and error of one SAE moved together at all tokens, nothing
            held at the other SAEs. It costs steps − 1 passes more for each SAE; one step is "atp".
        patch: other inputs of the same shape and padding, or None: all nodes zero, so an effect is
            the predicted change of the metric if the latent were ablated. With inputs, latents
            active on either have an effect: the change of the metric if they were set to the
            patch's activation (as `clamp` sets it, at the clean token's scale); the error node
            is what else has to change for the hidden state to become the patch's.
        strict: refuse an SAE whose metadata names another model.
        progress: whether "ig" shows a bar on standard error.

    The model is run in eval mode and left as it was: modes, gradients, hooks.

    Raises:
        RuntimeError: inside torch.inference_mode, where there are no gradients.
        HookpointError, ValueError, TypeError: places the model does not have, widths and shapes
            that do not fit, a metric that is not finite or not differentiable.

    >>> from saert.measure import next_token_loss
    >>> effects = attribute(model, sae, inputs, next_token_loss(inputs))
    >>> effects["resid_post.2"]
    SparseCode(1x5 tokens, k=16, num_latents=1024)
    """
    _check(model, method, steps)
    sites = sites_of(model, saes, strict)
    clean, other = Call.of(model, inputs), None if patch is None else Call.of(model, patch)
    if other is not None and not torch.equal(other.real, clean.real):
        raise ValueError(
            f"patch: {list(other.real.shape)} tokens, {int(other.real.sum())} of them real; "
            f"expected the inputs' {list(clean.real.shape)}, and padding where they have it"
        )
    with evaluating(model):
        check_ready(model)
        places = [place for site in sites for place in (site.read, site.at)]
        patched = None if other is None else other.states(places)
        seen, gradients, value = clean.gradients(sites, metric)
        moves = {site.at: move(site, seen, patched, clean.real) for site in sites}
        if method == "ig":
            points = [(site, j / steps) for site in sites for j in range(1, steps)]
            for site, alpha in tracked(points, "integrating gradients", progress):
                moved = clean.gradients([site], metric, moves[site.at].whole * alpha)[1]
                gradients[site.at] += moved[site.at]
            gradients = {at: g / steps for at, g in gradients.items()}
    found = {s.at: _effects(s, gradients[s.at], moves[s.at], clean.real) for s in sites}
    return Attribution(
        {at: effects for at, (effects, _) in found.items()},
        {at: moved.code for at, moved in moves.items()},
        {at: errors for at, (_, errors) in found.items()},
        value,
    )


@torch.no_grad()
def _effects(site: Site, gradient: Tensor, move: Move, real: Tensor) -> tuple[SparseCode, Tensor]:
    """Effects of the latents [rows, tokens, k] and of the error node [rows, tokens]."""
    indices, change = move.change.indices, move.change.values
    g = gradient.to(move.error).view_as(move.error)
    g = g.where(real.to(g.device).unsqueeze(-1), 0)  # it may be anything at padding
    if not bool(g.isfinite().all()):
        row, column = (int(i) for i in (~g.isfinite().all(-1)).nonzero()[0])
        raise ValueError(
            f"{site.at}: the metric's gradient contains NaN or inf, first in row {row} at column "
            f"{column}; a half-precision model may overflow: scale the metric down"
        )
    with no_autocast(g):
        dots = gather_dot(g.flatten(0, 1), indices.flatten(0, 1), site.sae.W_dec)
    effects = SparseCode(indices, dots.view_as(change) * change, move.change.num_latents)
    return effects, (g * move.error).sum(-1)


def _check(model: nn.Module, method: str, steps: int) -> None:
    if method not in ("atp", "ig"):
        raise ValueError(f"method: found {method!r}, expected 'atp' or 'ig'")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: found {steps!r}, expected an integer of at least 1")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise RuntimeError(
            "attribute needs gradients: call it, and load the model, outside torch.inference_mode"
        )
