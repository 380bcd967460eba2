"""The result of `ablation_effects`: columns of equal length, one entry per ablation."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "saert-ablation-effects-1"


@dataclass(frozen=True, eq=False)
class AblationEffects:
    """What each of n ablations changed. All columns are on the CPU.

    Attributes:
        rows, positions: int64 [n], the token whose latent was ablated; positions count the row's
            real tokens from 0.
        latents: int64 [n]; of `direction_effects`, the number of the direction.
        values: float32 [n], the activation that was taken away (of a direction, the projection).
        sparsity: float64 [n], the share s of logits that the ablation reaches, in (0, 1]; NaN where
            nothing changed (`saert.measure.ablation.effects` has the formulas).
        kl, loss_change: float64 [n], mean over the tokens of the horizon of KL(model ‖ ablated)
            and of the rise of the next token's loss, in nats; NaN without a token to measure at.
        kl_by_token, loss_change_by_token: float64 [n, horizon], from the ablated token on; NaN past
            the end of the row.
        top_promoted, top_suppressed: int64 [n, top], the vocabulary entries that the latent
            promotes and suppresses most: whose logits, less the median over the vocabulary and
            summed over the horizon, fall and rise most when it is ablated.
        method: "replay" or "brute force".
    """

    rows: Tensor
    positions: Tensor
    latents: Tensor
    values: Tensor
    sparsity: Tensor
    kl: Tensor
    loss_change: Tensor
    kl_by_token: Tensor
    loss_change_by_token: Tensor
    top_promoted: Tensor
    top_suppressed: Tensor
    method: str = "replay"

    @classmethod
    def empty(cls, horizon: int, top: int) -> AblationEffects:
        """A table without entries."""
        whole, real = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        columns: dict[str, Any] = {name: real for name in ("sparsity", "kl", "loss_change")}
        columns |= {f"{name}_by_token": real.view(0, horizon) for name in ("kl", "loss_change")}
        columns |= {name: whole for name in ("rows", "positions", "latents")}
        columns |= {name: whole.view(0, top) for name in ("top_promoted", "top_suppressed")}
        return cls(**columns, values=real.float())

    @classmethod
    def cat(cls, parts: Sequence[AblationEffects]) -> AblationEffects:
        """Tables under each other. Raises ValueError if their horizons or tops differ."""
        shapes = {tuple(getattr(part, name).shape[1:] for name in COLUMNS) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"AblationEffects.cat: {len(shapes)} different horizons or tops")
        method = "replay" if all(part.method == "replay" for part in parts) else "brute force"
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        return cls(**columns, method=method)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, which: int | slice | Tensor | Sequence[int]) -> AblationEffects:
        """Some of the ablations: one by its number, a slice, a mask bool [n], or numbers."""
        if not isinstance(which, slice) and getattr(which, "ndim", 0) == 0 and _is_int(which):
            number = range(len(self))[operator.index(which)]  # type: ignore[arg-type]
            which = slice(number, number + 1)
        return replace(self, **{name: getattr(self, name)[which] for name in COLUMNS})

    def sort(self, by: str = "kl", descending: bool = True) -> AblationEffects:
        """Ordered by a 1-D column; NaN comes last. Raises ValueError for another name."""
        column = getattr(self, by) if by in COLUMNS else None
        if column is None or column.dim() != 1:
            names = ", ".join(name for name in COLUMNS if getattr(self, name).dim() == 1)
            raise ValueError(f"sort by {by!r}: expected one of {names}")
        key = column.double() if descending else -column.double()
        key = key.masked_fill(key.isnan(), -torch.inf)
        return self[key.argsort(descending=True, stable=True)]

    def summary(self) -> dict[str, float]:
        """Count, and the means of sparsity, |value|, KL and loss change where they are defined."""
        means = {name: _mean(getattr(self, name)) for name in ("sparsity", "kl", "loss_change")}
        return {"count": len(self), "value": _mean(self.values.abs()), **means}

    def to_pandas(self) -> Any:
        """A DataFrame with a row per ablation; columns with two dimensions hold lists."""
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("to_pandas needs pandas: pip install 'saert[measure]'") from None
        return pd.DataFrame({name: _plain(getattr(self, name)) for name in COLUMNS})

    def save(self, path: str | Path) -> None:
        """One safetensors file with the columns."""
        columns = {name: getattr(self, name).contiguous() for name in COLUMNS}
        about = {"format": FORMAT, "saert": json.dumps({"method": self.method})}
        save_file(columns, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> AblationEffects:
        """What `save` wrote. Raises ValueError for another file."""
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT or {*file.keys()} != {*COLUMNS}:
                raise ValueError(f"{path}: expected {FORMAT}, found {about.get('format')!r}")
            columns = {name: file.get_tensor(name) for name in COLUMNS}
        return cls(**columns, method=json.loads(about["saert"])["method"])

    def __repr__(self) -> str:
        """The ten strongest by KL."""
        facts = self.summary()
        head = (
            f"AblationEffects({len(self)} ablations by {self.method}; "
            f"mean sparsity {facts['sparsity']:.1%}, KL {facts['kl']:.3g}, "
            f"loss change {facts['loss_change']:+.3g})"
        )
        names = ("rows", "positions", "latents", "values", "sparsity", "kl", "loss_change")
        lines = [head, "".join(f"{name:>12}" for name in names)]
        strongest = self.sort("kl")[:10]
        for i in range(len(strongest)):
            cells = (getattr(strongest, name)[i].item() for name in names)
            lines.append(
                "".join(f"{c:>12}" if isinstance(c, int) else f"{c:>12.4g}" for c in cells)
            )
        return "\n".join(lines + ["…"] * (len(self) > len(strongest)))


COLUMNS = tuple(f.name for f in fields(AblationEffects) if f.name != "method")


def _is_int(which: Any) -> bool:
    try:
        operator.index(which)
    except TypeError:
        return False
    return True


def _mean(column: Tensor) -> float:
    return column.double().nanmean().item()


def _plain(column: Tensor) -> Any:
    return column.numpy() if column.dim() == 1 else column.tolist()
