"""Refinement on one text, token by token: activations, errors, and what the model then predicts.

The same three runs as `refinement_report`, which sums over many rows: the model as it is, with the
SAE's reconstruction spliced in, and with the reconstruction from refined activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saert.hooks import device_of, hooked
from saert.kernels.numerics import accumulation_dtype
from saert.measure.passes import Special, sites
from saert.measure.reports.reconstruction import check_rows, kept, wide
from saert.measure.reports.refinement import one_pass
from saert.measure.reports.splices import compare
from saert.refine import MAX_STEPS, TOL, refine, strength
from saert.sae import SAE
from saert.sparse import SparseCode


@dataclass(frozen=True, eq=False)
class Run:
    """A run of the model over one text; all on the CPU, float64 but for ids.

    Attributes:
        error: [tokens], ‖y − ŷ‖ in the model's units; 0 for the model as it is, NaN at tokens left
            out.
        fvu_by_token: [tokens], ‖y − ŷ‖² / mean ‖y − ȳ‖², whose mean is the fraction of variance
            unexplained; NaN where that is.
        ce: [tokens − 1], cross-entropy of predicting the next token, in nats.
        kl: [tokens], KL(model ‖ this) of the predictions, in nats.
        top, top_p: int64 and float64 [tokens, top], the likeliest next tokens, with probabilities.
    """

    error: Tensor
    fvu_by_token: Tensor
    ce: Tensor
    kl: Tensor
    top: Tensor
    top_p: Tensor

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN where the hidden states do not vary."""
        return float(self.fvu_by_token.nanmean())


@dataclass(frozen=True, eq=False)
class RefinedText:
    """Before and after refinement, on one text.

    Attributes:
        ids: int64 [tokens].
        code, refined: SparseCode [tokens, k] in the same slots, empty at tokens left out.
        model, spliced, respliced: the model as it is, with the reconstruction in place of the
            hidden state, and with that from refined activations.
        shrinkage_by_token: float64 [tokens], and `shrinkage`, over all of them: the mean relative
            change of active values, weighted by their strength (`saert.refine.Refinement`); NaN
            where none is active.
        converged: whether every token is at its optimum.
    """

    ids: Tensor
    code: SparseCode
    refined: SparseCode
    model: Run
    spliced: Run
    respliced: Run
    shrinkage_by_token: Tensor
    shrinkage: float
    converged: bool

    def latents(self, position: int) -> list[tuple[int, float, float]]:
        """(latent, before, after) of those active at a token, the strongest before first."""
        slots = zip(
            self.code.indices[position].tolist(),
            self.code.values[position].tolist(),
            self.refined.values[position].tolist(),
            strict=True,
        )
        return sorted((slot for slot in slots if slot[1] != 0), key=lambda slot: -slot[1])


@torch.no_grad()
def refined_text(
    model: Any,
    sae: SAE,
    ids: Tensor,
    *,
    top: int = 5,
    special: Special | None = None,
    max_steps: int = MAX_STEPS,
    tol: float = TOL,
) -> RefinedText:
    """Refine an SAE's activations on one text, and splice both reconstructions into the model.

    Args:
        ids: int64 [tokens] or [1, tokens].
        top: how many predicted tokens to keep at each position.
        special: rows -> bool of the same shape, tokens that are neither encoded nor replaced (BOS,
            say); what they predict, and their prediction, still count.
        max_steps, tol: as in `saert.refine`.

    Raises:
        TypeError, ValueError: ids that are no tokens of this model, an SAE without a hookpoint, of
            another width or with signed activations, no token left, NaN or inf.

    >>> found = refined_text(model, sae, inputs["input_ids"])
    >>> found.spliced.fvu, found.respliced.fvu, found.shrinkage
    """
    rows = check_rows(model, ids.reshape(1, -1) if ids.dim() == 1 else ids)
    if len(rows) != 1:
        raise ValueError(f"refined_text: found {len(rows)} rows, expected the ids of one text")
    if top < 1:
        raise ValueError(f"refined_text: top is {top}, expected at least 1")
    used, _ = kept(rows, special)
    if not used.any():
        raise ValueError("no token is left to refine: all are special")
    read, write = sites(sae)
    ids = rows.to(device_of(model))
    clean, hidden = one_pass(model, ids, (read, write))
    x, y = (hidden[place][used.to(device_of(model))].to(sae.device) for place in (read, write))
    code = sae.encode(x)
    target = y if sae.is_transcoder else None
    found = refine(sae, x, code, target=target, max_steps=max_steps, tol=tol)
    mask, state = used.to(hidden[write].device)[:, None], hidden[write]
    spread = wide(y - y.mean(0)).square().sum(-1).mean().cpu()
    runs = [_run(clean, clean, ids, torch.zeros(len(used)), spread, top)]
    for one in (code, found.code):
        estimate = sae.decode(one, x)
        new = state.masked_scatter(mask, estimate.to(state))
        with hooked(model, write, lambda old, new=new: new.view_as(old)):  # type: ignore[misc]
            logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        error = _filled(wide(y - estimate).norm(dim=-1), used, torch.nan)
        runs.append(_run(clean, logits, ids, error, spread, top))
    before, after = (_filled(strength(sae, one), used, 0.0) for one in (code, found.code))
    return RefinedText(
        ids=rows[0].cpu(),
        code=_whole(code, used),
        refined=_whole(found.code, used),
        model=runs[0],
        spliced=runs[1],
        respliced=runs[2],
        shrinkage_by_token=after / before - 1,
        shrinkage=found.shrinkage,
        converged=found.converged,
    )


def _run(
    clean: Tensor, logits: Tensor, ids: Tensor, error: Tensor, spread: Tensor, top: int
) -> Run:
    """Of logits [1, tokens, vocabulary], beside those of the model as it is."""
    after, before = (torch.cat([some, some[:, -1:]], 1) for some in (logits, clean))
    # one position more, so that the last token's KL is there; its cross-entropy means nothing
    losses = compare(before, after, torch.cat([ids, ids[:, -1:]], 1))[0].cpu()
    p = logits[0].to(accumulation_dtype(logits.dtype)).softmax(-1)
    likeliest = p.topk(min(top, p.shape[-1]), dim=-1)
    error = error.double()
    return Run(
        error=error,
        fvu_by_token=error.square() / spread if spread > 0 else torch.full_like(error, torch.nan),
        ce=losses[:-1, 0],
        kl=losses[:, 1],
        top=likeliest.indices.cpu(),
        top_p=likeliest.values.cpu().double(),
    )


def _filled(values: Tensor, used: Tensor, empty: float) -> Tensor:
    """Values of the tokens that are used, float64 [tokens], with `empty` at the others."""
    whole = torch.full(used.shape, empty, dtype=torch.float64)
    return whole.masked_scatter(used.cpu(), values.cpu().double())


def _whole(code: SparseCode, used: Tensor) -> SparseCode:
    """A code of the tokens that are used, [tokens, k] on the CPU, empty at the others."""
    indices = torch.zeros(len(used), code.k, dtype=torch.int64)
    values = torch.zeros(len(used), code.k, dtype=code.values.dtype)
    indices[used.cpu()], values[used.cpu()] = code.indices.cpu(), code.values.cpu()
    return SparseCode(indices, values, code.num_latents)
