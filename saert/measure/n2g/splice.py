"""Explanation reconstruction: how well a model does on what its explanations predict.

Each explained latent is replaced by its N2G prediction, the code is decoded, and the reconstruction
stands in for the hidden state (Gao et al. 2024, section 4.4). What that costs is set against the
same splice with the true activations:

    recovered = (CE_empty − CE_explained) / (CE_empty − CE_true)

where "empty" predicts nothing. 1: as good as the truth; 0: no better than silence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saert.hooks import device_of
from saert.measure.n2g.explain import behind
from saert.measure.n2g.explanations import Explanations
from saert.measure.passes import Special, check_ready, masked, sites
from saert.measure.progress import tracked
from saert.measure.reports.reconstruction import Unexplained
from saert.measure.reports.splices import Effect, Pass
from saert.sae import SAE
from saert.sparse import SparseCode

Others = Literal["drop", "keep"]


@dataclass(frozen=True)
class SpliceLoss:
    """Of one kind of code spliced in.

    Attributes:
        ce: next-token cross-entropy, nats per token.
        kl: KL(model ‖ spliced model), nats per token.
        fvu: Σ‖y − ŷ‖² / Σ‖y − ȳ‖² of the reconstruction, above 1 where it is worse than the mean.
    """

    ce: float
    kl: float
    fvu: float


@dataclass(frozen=True)
class ExplanationLoss:
    """Explanation reconstruction of one SAE on some rows.

    Attributes:
        ce: cross-entropy of the model as it is, nats per token.
        spliced: with the true code of all latents.
        true: with the true activations of the explained latents. Other latents: as `others` says.
        explained: the same with predicted activations; empty: with none.
        others: "drop", latents without an explanation are silent; "keep", they are as they are.
        latents: how many are explained.
        tokens: predictions of next tokens that the means are over.
    """

    ce: float
    spliced: SpliceLoss
    true: SpliceLoss
    explained: SpliceLoss
    empty: SpliceLoss
    others: Others
    latents: int
    tokens: int

    @property
    def recovered(self) -> float:
        """(CE_empty − CE_explained) / (CE_empty − CE_true); NaN where the truth gains nothing."""
        gain = self.empty.ce - self.true.ce
        return (self.empty.ce - self.explained.ce) / gain if gain else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Everything, with `recovered`."""
        return asdict(self) | {"recovered": self.recovered}


@torch.no_grad()
def explanation_loss(
    model: Any,
    sae: SAE,
    explanations: Explanations,
    rows: Tensor,
    *,
    others: Others = "drop",
    special: Special | None = None,
    batch: int = 8,
    progress: bool = True,
) -> ExplanationLoss:
    """Splice in what the explanations predict, and measure.

    With every latent explained, as in the paper, `others` makes no difference. For a part of them,
    "drop" asks what the explanations alone are worth, and "keep" what is lost by them.

    Args:
        rows: int64 [rows, context], best not those that the explanations were made from.
        special: rows -> bool, positions that no splice touches and no mean counts. The BOS that the
            explanations were made behind is not touched either.
        batch: rows at a time; their logits are held twice.

    Raises:
        ValueError: another `others`, an SAE of another size, rows with nothing to predict.
    """
    if others not in ("drop", "keep"):
        raise ValueError(f"explanation_loss: others is {others!r}, expected 'drop' or 'keep'")
    if explanations.settings["num_latents"] != sae.num_latents:
        raise ValueError(
            f"explanation_loss: the explanations are of {explanations.settings['num_latents']} "
            f"latents, the SAE has {sae.num_latents}"
        )
    if rows.dim() != 2 or rows.shape[1] < 2:
        raise ValueError(f"rows are {list(rows.shape)}, expected [rows, context], 2 tokens or more")
    check_ready(model)
    left_out = behind(special, int(explanations.settings["bos"] is not None))
    chosen = torch.zeros(sae.num_latents, dtype=torch.bool)
    chosen[explanations.latents] = True
    device = device_of(model)
    read, write = sites(sae)
    whole = ((0, rows.shape[1]),)
    bare, effects = Effect(whole), {name: Effect(whole) for name in KINDS}
    errors = {name: Unexplained() for name in KINDS}
    for part in tracked(rows.split(batch), "Explanation reconstruction", progress):
        aside, part = left_out(part), part.to(device)
        scored = (torch.zeros_like(aside) if special is None else special(part.cpu()))[:, 1:]
        now = Pass(model, part, ~scored, dict.fromkeys((read, write)))
        now.count(bare, now.logits)
        used = ~aside.to(sae.device)
        x, y = (now.hidden[at].view(*part.shape, -1).to(sae.device) for at in (read, write))
        code = masked(sae.encode(x), used)
        predicted = masked(explanations.predict(part.cpu()).to(sae.device), used)
        for name, variant in _codes(code, predicted, chosen.to(sae.device), others).items():
            new = sae.decode(variant, x)
            errors[name].add(y[used], new[used])
            new = torch.where(used.unsqueeze(-1), new.to(y.dtype), y)
            new = new.to(now.hidden[write].device)
            now.replace(effects[name], write, new)
    count = bare.sums[0, 0].item()
    if not count:
        raise ValueError("explanation_loss: the rows leave no next token to predict")
    losses = {
        name: SpliceLoss(ce=ce / count, kl=kl / count, fvu=errors[name].fvu)
        for name, (ce, kl) in ((n, one.sums[0, 1:3].tolist()) for n, one in effects.items())
    }
    return ExplanationLoss(
        ce=bare.sums[0, 1].item() / count,
        **losses,
        others=others,
        latents=len(explanations),
        tokens=int(count),
    )


KINDS = ("spliced", "true", "explained", "empty")


def _codes(
    code: SparseCode, predicted: SparseCode, chosen: Tensor, others: Others
) -> dict[str, SparseCode]:
    """What is spliced in: the true code, and three that differ in the explained latents."""

    def only(mask: Tensor) -> SparseCode:
        return SparseCode(code.indices, code.values * mask[code.indices], code.num_latents)

    nothing = only(torch.zeros_like(chosen))
    rest = only(~chosen) if others == "keep" else nothing
    made = SparseCode(
        torch.cat([rest.indices, predicted.indices], -1),
        torch.cat([rest.values, predicted.values.to(rest.values.dtype)], -1),
        code.num_latents,
    )
    true = code if others == "keep" else only(chosen)
    return dict(zip(KINDS, (code, true, made, rest), strict=True))
