"""What refinement gains, in reconstruction and in the model's loss (Gao et al. 2024, section 5.1).

One pass over text: the model as it is, with the SAE's reconstruction spliced in, and with the
reconstruction from refined activations (`saert.refine`). The refined loss is what the SAE's choice
of latents is worth; the difference to the spliced one is what its encoder loses beside that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.hooks import device_of, hooked
from saert.measure.passes import Special, sites
from saert.measure.progress import tracked
from saert.measure.reports.reconstruction import Reconstruction, check_rows, kept
from saert.measure.reports.splices import compare, rows_at_once
from saert.refine import MAX_STEPS, TOL, refit, strength
from saert.sae import SAE
from saert.sparse import SparseCode


@dataclass(frozen=True)
class RefinementReport:
    """Before and after refinement, over rows of text.

    Attributes:
        tokens: how many were encoded and refined.
        shrinkage: the mean relative change of active values, weighted by their strength (see
            `saert.refine.Refinement`); above 0, the encoder's are too small. NaN if none is active.
        fvu, fvu_refined: fraction of variance unexplained.
        l0, l0_refined: active latents per token; refinement silences some.
        ce, ce_spliced, ce_refined: next-token cross-entropy in nats, of the model as it is and with
            either reconstruction in place of the hidden state.
        kl_spliced, kl_refined: KL divergence from the model as it is, in nats per token.
        residual: the largest violation of the optimum that is left on a token.
        unfinished: tokens on which it exceeds `tol`.
    """

    tokens: int
    shrinkage: float
    fvu: float
    fvu_refined: float
    l0: float
    l0_refined: float
    ce: float
    ce_spliced: float
    ce_refined: float
    kl_spliced: float
    kl_refined: float
    residual: float
    unfinished: int

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@torch.no_grad()
def refinement_report(
    model: Any,
    sae: SAE,
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    max_steps: int = MAX_STEPS,
    tol: float = TOL,
    progress: bool = True,
) -> RefinementReport:
    """Refine an SAE's activations on rows of text, and splice both reconstructions into the model.

    Args:
        rows: int64 [rows, context], token ids; they go to the model's device.
        batch: rows at a time, at most; the numbers do not depend on it.
        special: rows -> bool of the same shape, tokens that are not measured and whose hidden state
            stays as it is; what they predict, and their prediction, still count.
        max_steps, tol: as in `saert.refine`.

    Raises:
        TypeError, ValueError: rows that are no token ids of this model, an SAE without a hookpoint
            or of another width, no token left, NaN or inf.
    """
    rows = check_rows(model, rows, context=2)
    read, write = sites(sae)
    device = device_of(model)
    whole = [(0, rows.shape[1])]
    before, after = Reconstruction(sae, whole), Reconstruction(sae, whole)
    losses = torch.zeros(3, 2, dtype=torch.float64)  # bare, spliced, refined: cross-entropy and KL
    strengths = torch.zeros(2, dtype=torch.float64)
    worst, unfinished = 0.0, 0
    for part in tracked(rows.split(rows_at_once(model, rows, batch)), "refining", progress):
        used, positions = kept(part, special)
        ids, mask = part.to(device), used.to(device)[:, None]
        clean, hidden = one_pass(model, ids, (read, write))
        x, y = (hidden[place][mask[:, 0]].to(sae.device) for place in (read, write))
        code = sae.encode(x)
        found = refit(sae, code, x, y, max_steps, tol)
        refined = SparseCode(code.indices, found.values, code.num_latents)
        losses[0] += _losses(clean, clean, ids)
        for i, (seen, one) in enumerate(((before, code), (after, refined))):
            estimate = sae.decode(one, x)
            seen.add(y, estimate, one, positions.to(sae.device))
            state = hidden[write]
            new = state.masked_scatter(mask.to(state.device), estimate.to(state))
            with hooked(model, write, lambda old, new=new: new.view_as(old)):  # type: ignore[misc]
                losses[i + 1] += _losses(clean, model(ids, use_cache=False).logits, ids)
            strengths[i] += strength(sae, one).cpu().double().sum()
        worst = max(worst, float(found.residual.max())) if len(x) else worst
        unfinished += int((found.residual > tol).sum())
    first, second = before.report(), after.report()
    (ce, _), (ce_spliced, kl_spliced), (ce_refined, kl_refined) = (
        losses / (rows.shape[0] * (rows.shape[1] - 1))
    ).tolist()
    return RefinementReport(
        tokens=first.tokens,
        shrinkage=float(strengths[1] / strengths[0] - 1),
        fvu=first.fvu,
        fvu_refined=second.fvu,
        l0=first.l0,
        l0_refined=second.l0,
        ce=ce,
        ce_spliced=ce_spliced,
        ce_refined=ce_refined,
        kl_spliced=kl_spliced,
        kl_refined=kl_refined,
        residual=worst,
        unfinished=unfinished,
    )


def one_pass(
    model: Any, ids: Tensor, places: tuple[Hookpoint, ...]
) -> tuple[Tensor, dict[Hookpoint, Tensor]]:
    """Logits [rows, context, vocabulary] and hidden states [tokens, d], from one pass."""
    hidden: dict[Hookpoint, Tensor] = {}

    def keep(place: Hookpoint) -> Callable[[Tensor], None]:
        return lambda state: hidden.__setitem__(place, state.flatten(0, -2).clone())

    with ExitStack() as hooks:
        for place in dict.fromkeys(places):
            hooks.enter_context(hooked(model, place, keep(place)))
        return model(ids, use_cache=False).logits, hidden


def _losses(clean: Tensor, new: Tensor, ids: Tensor) -> Tensor:
    """Summed cross-entropy and KL of changed logits: float64 [2], on the CPU."""
    return compare(clean, new, ids)[..., :2].sum((0, 1)).cpu()
