"""What a hidden state does to a language model's predictions: its gradient, and a splice's KL.

    gradients:   ∇_h Σ over positions of −log p(next token), for each hidden state h
    Downstream:  Σ over positions of KL(model ‖ model with h replaced)

A position counts if its row holds the token that it predicts, so each row's last does not. The
model should be in eval mode. Its parameters get no gradient, whether or not they are frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saert.hookpoint import Hookpoint
from saert.hooks import hooked
from saert.kernels.numerics import accumulation_dtype


@torch.enable_grad()
def gradients(
    model: Any, rows: Tensor, hookpoints: Sequence[Hookpoint], batch: int = 16
) -> dict[Hookpoint, tuple[Tensor, Tensor]]:
    """rows int64 [rows, context] -> per hookpoint (activations, gradients), each
    [rows · context, d], in token order. All hookpoints share a pass, `batch` rows at a time.

    A gradient is that of the whole path from there on, later hookpoints included.
    """
    found: dict[Hookpoint, tuple[list[Tensor], list[Tensor]]] = {h: ([], []) for h in hookpoints}
    for part in rows.split(batch):
        hidden: dict[Hookpoint, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(_differentiable(model))
            for hookpoint in found:
                act = partial(_keep, hidden, hookpoint)
                hooks.enter_context(hooked(model, hookpoint, act))
            log_p = _log_probabilities(model, part)
        loss = F.nll_loss(log_p.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        for (hookpoint, h), g in zip(
            hidden.items(), torch.autograd.grad(loss, list(hidden.values())), strict=True
        ):
            found[hookpoint][0].append(h.detach().flatten(0, -2))
            found[hookpoint][1].append(g.flatten(0, -2))
    return {hookpoint: (torch.cat(x), torch.cat(g)) for hookpoint, (x, g) in found.items()}


def _keep(hidden: dict[Hookpoint, Tensor], hookpoint: Hookpoint, state: Tensor) -> Tensor:
    """Keeps the hidden state and passes a copy on: some models go on adding to it in place."""
    hidden[hookpoint] = state
    return state.clone()


class Downstream:
    """A block of rows with the model's own predictions, to compare splices with.

    >>> block = Downstream(model, rows)
    >>> share = block(Hookpoint.parse("resid_post.2"), reconstruction) / positions_of_the_batch
    """

    @torch.no_grad()
    def __init__(self, model: Any, rows: Tensor, batch: int = 16) -> None:
        """rows: int64 [rows, context], run `batch` at a time. Their log-probabilities are kept."""
        self.model, self.parts = model, rows.split(batch)
        self.clean = [_log_probabilities(model, part) for part in self.parts]

    def __call__(
        self, hookpoint: Hookpoint, reconstruction: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Σ KL in nats over the block's positions, with `reconstruction` [rows · context, d], in
        the model's units, spliced in at a hookpoint. Differentiable in it, once.

        `mask`: bool [rows · context]; where false the hidden state stays as it was.
        """
        sizes = [part.numel() for part in self.parts]
        pieces = reconstruction.split(sizes)
        masks = [None] * len(sizes) if mask is None else mask.split(sizes)
        return torch.stack(
            [
                self._spliced(i, hookpoint, piece, used)
                for i, (piece, used) in enumerate(zip(pieces, masks, strict=True))
            ]
        ).sum()

    def _spliced(self, i: int, at: Hookpoint, new: Tensor, mask: Tensor | None) -> Tensor:
        differentiable = torch.is_grad_enabled() and new.requires_grad
        leaf = new.detach().requires_grad_(differentiable)

        def splice(hidden: Tensor) -> Tensor:
            flat = hidden.flatten(0, -2)
            inside = leaf.to(flat.dtype)
            inside = inside if mask is None else torch.where(mask[:, None], inside, flat)
            return inside.view_as(hidden)

        with torch.set_grad_enabled(differentiable), hooked(self.model, at, splice):
            log_q = _log_probabilities(self.model, self.parts[i])
            kl = F.kl_div(log_q, self.clean[i], reduction="sum", log_target=True)
        if not differentiable:
            return kl
        # The gradient now, and a term that is 0 and has it: the graphs of the parts never exist
        # together, and the backward pass of training never reaches the model's parameters.
        (gradient,) = torch.autograd.grad(kl, leaf)
        return kl.detach() + ((new - new.detach()) * gradient).sum()


def _log_probabilities(model: Any, rows: Tensor) -> Tensor:
    """[rows, context − 1, vocabulary]: of each row's second token, and so on to its last."""
    logits: Tensor = model(rows, use_cache=False).logits[:, :-1]
    return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Everything after the embedding carries a gradient, though the parameters may be frozen."""

    def begin(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        # cloned, because a leaf could not be changed in place
        return None if out.requires_grad else out.requires_grad_().clone()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        yield
    finally:
        handle.remove()
