"""An SAE of a base model, on a fine-tuned version of it: is it still an SAE of that model?

Llama Scope (He et al. 2024) tests its base SAEs this way on the Instruct model (ALGORITHMS.md 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from saert.measure.passes import Special
from saert.measure.reports.downstream import Losses, Measured, measure
from saert.measure.reports.reconstruction import Fidelity
from saert.sae import SAE


@dataclass(frozen=True)
class TransferReport:
    """Both reports on each of two models.

    A small difference in FVU says that the dictionary still explains the hidden states; one in
    `delta_ce` and KL says what that is worth to the model's predictions.
    """

    base: Measured
    tuned: Measured

    @property
    def difference(self) -> dict[str, float]:
        """tuned − base of every number but the token counts, by its name in the reports."""
        found = dict[str, float]()
        for kind, part in ((Fidelity, "reconstruction"), (Losses, "downstream")):
            before, after = (getattr(one, part) for one in (self.base, self.tuned))
            names = [field.name for field in fields(kind) if field.name != "tokens"]
            found |= {name: getattr(after, name) - getattr(before, name) for name in names}
        dead = (one.reconstruction.dead for one in (self.tuned, self.base))
        return found | {"dead": next(dead) - next(dead)}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the difference included."""
        return asdict(self) | {"difference": self.difference}


def transfer_report(
    base: Any,
    tuned: Any,
    sae: SAE,
    rows: Tensor,
    *,
    tuned_rows: Tensor | None = None,
    batch: int = 16,
    special: Special | None = None,
    padding: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> TransferReport:
    """An SAE of the model `base`, measured on it and on `tuned`.

    Args:
        rows: int64 [rows, context], for both models unless `tuned_rows` gives the second its own
            text, such as chats.
        batch, special, padding, buckets, progress: as in `downstream_report`.

    Raises:
        TypeError, ValueError: what `reconstruction_report` and `downstream_report` raise, which
            includes a tuned model of another width, or without the SAE's hookpoint.
    """

    def on(model: Any, text: Tensor) -> Measured:
        (found,) = measure(
            model,
            [sae],
            text,
            batch=batch,
            special=special,
            padding=padding,
            buckets=buckets,
            progress=progress,
        )
        return found

    return TransferReport(on(base, rows), on(tuned, rows if tuned_rows is None else tuned_rows))
