"""Do two training runs find the same latents?

PW-MCC (Song et al.): unit decoder rows, signed cosines, the one-to-one matching π that maximises
their sum; the mean matched cosine, averaged over all pairs of runs.

Shared latents (Paulo and Belrose): match decoders and encoders separately;

    paper:     π_enc(i) = π_dec(i), and both cosines ≥ 0.7
    notebook:  both cosines > 0.7, whether or not the partners agree

The paper's figures (42% for Pythia 160M) are of the first kind; the looser second one comes from
the notebook beside it. Dictionaries of different sizes cannot be matched one to one; for them
`feature_splitting` says which latents of the small one several of the large one stand beside.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saert.measure.matching.assignment import Matching, match, nearest
from saert.sae import SAE


@dataclass(frozen=True)
class Pair:
    """Two runs side by side.

    Attributes:
        a, b: their names.
        decoder: the matching of the decoder rows; encoder: of the encoder rows, or None.
        same_counterpart: share of latents whose two partners are one latent.
        shared: share of latents that are shared by the paper's definition.
        shared_notebook: the same by the notebook's. All three None without encoders.
    """

    a: str
    b: str
    decoder: Matching
    encoder: Matching | None
    same_counterpart: float | None
    shared: float | None
    shared_notebook: float | None

    @property
    def pw_mcc(self) -> float:
        """The mean cosine of matched decoder rows."""
        return self.decoder.mean

    def histogram(self, bins: int = 10) -> list[int]:
        """Matched decoder cosines from 0 to 1 in `bins`; those below 0 are in the first."""
        clipped = self.decoder.cosines.clamp(0, 1)
        return [int(count) for count in torch.histc(clipped, bins, 0, 1)]

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON and tables."""
        return {
            "a": self.a,
            "b": self.b,
            "num_latents": len(self.decoder.partner),
            "pw_mcc": self.pw_mcc,
            "pw_mcc_bound": self.decoder.bound,
            "mean_max_cosine": float(self.decoder.nearest.double().mean()),
            "mean_max_cosine_back": float(self.decoder.nearest_back.double().mean()),
            "encoder_mcc": None if self.encoder is None else self.encoder.mean,
            "same_counterpart": self.same_counterpart,
            "shared": self.shared,
            "shared_notebook": self.shared_notebook,
        }


@dataclass(frozen=True)
class Consistency:
    """All pairs of several runs; `threshold` is the cosine from which a latent counts as shared."""

    pairs: tuple[Pair, ...]
    threshold: float

    @property
    def pw_mcc(self) -> float:
        """The mean over pairs."""
        return statistics.fmean(pair.pw_mcc for pair in self.pairs)

    @property
    def pw_mcc_std(self) -> float:
        """The standard deviation over pairs (of the population, as numpy's); 0 for a single one."""
        return statistics.pstdev(pair.pw_mcc for pair in self.pairs)

    @property
    def shared(self) -> float | None:
        """The mean share of shared latents, the paper's definition."""
        found = [pair.shared for pair in self.pairs if pair.shared is not None]
        return statistics.fmean(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "pw_mcc": self.pw_mcc,
            "pw_mcc_std": self.pw_mcc_std,
            "shared": self.shared,
            "threshold": self.threshold,
            "pairs": [pair.as_dict() for pair in self.pairs],
        }

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each pair."""
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas() needs pandas: pip install 'saert[measure]'") from None
        return pandas.DataFrame([pair.as_dict() for pair in self.pairs])

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = [f"PW-MCC {self.pw_mcc:.4f} ± {self.pw_mcc_std:.4f}, {len(self.pairs)} pair(s)"]
        for p in self.pairs:
            lines.append(
                f"{p.a} | {p.b}: PW-MCC {p.pw_mcc:.4f} (at most {p.decoder.bound:.4f})"
                + ("" if p.shared is None else f", shared {p.shared:.1%}")
            )
        return "\n".join(lines)


def consistency(
    *runs: SAE | Tensor,
    names: Sequence[str] | None = None,
    threshold: float = 0.7,
    candidates: int = 32,
    tolerance: float = 1e-6,
    max_rounds: int = 20,
    progress: bool = False,
) -> Consistency:
    """PW-MCC and shared latents of every pair of two or more runs.

    Args:
        runs: SAEs, or decoders [num_latents, d] (which have no encoder to compare), all of one
            size.
        names: what to call them; default: their places, "0", "1", …
        threshold: see the module.
        candidates, tolerance, max_rounds: of the matching, which is exact to `tolerance` unless
            `max_rounds` cuts it short; then `pw_mcc_bound` says by how much it can be off. See
            `saert.measure.matching.assignment`.

    Raises ValueError for sizes that differ, or NaN.
    """
    if len(runs) < 2:
        raise ValueError(f"consistency: {len(runs)} run(s), expected two or more")
    called = [str(at) for at in range(len(runs))] if names is None else list(names)
    if len(called) != len(runs):
        raise ValueError(f"consistency: {len(called)} names for {len(runs)} runs")
    settings: dict[str, Any] = {
        "candidates": candidates,
        "tolerance": tolerance,
        "max_rounds": max_rounds,
        "progress": progress,
    }
    pairs = []
    for i, j in combinations(range(len(runs)), 2):
        _check_pair(runs[i], runs[j], called[i], called[j])
        if len(_decoder(runs[i])) != len(_decoder(runs[j])):
            raise ValueError(
                f"consistency: {called[i]} has {len(_decoder(runs[i]))} latents and {called[j]} "
                f"{len(_decoder(runs[j]))}; they cannot be matched one to one: feature_splitting() "
                "compares different sizes"
            )
        pairs.append(_pair(runs[i], runs[j], called[i], called[j], threshold, settings))
    return Consistency(tuple(pairs), threshold)


def _pair(
    a: SAE | Tensor, b: SAE | Tensor, name_a: str, name_b: str, threshold: float, settings: Any
) -> Pair:
    decoder = match(_unit(_decoder(a), name_a), _unit(_decoder(b), name_b), **settings)
    if not isinstance(a, SAE) or not isinstance(b, SAE):
        return Pair(name_a, name_b, decoder, None, None, None, None)
    encoder = match(_unit(a.W_enc, name_a), _unit(b.W_enc, name_b), **settings)
    same = decoder.partner == encoder.partner
    near = (decoder.cosines >= threshold) & (encoder.cosines >= threshold)
    above = (decoder.cosines > threshold) & (encoder.cosines > threshold)
    shares = (float(t.double().mean()) for t in (same, same & near, above))
    return Pair(name_a, name_b, decoder, encoder, *shares)


@dataclass(frozen=True)
class FeatureSplitting:
    """A small dictionary beside a large one on the same hidden states.

    Attributes:
        threshold: the cosine from which two latents count as the same direction.
        neighbours, neighbour_cosines: int64 and float32 [small, top], the latents of the large
            dictionary nearest to each of the small one, the nearest first.
        parent, parent_cosine: int64 and float32 [large], the latent of the small dictionary
            nearest to each of the large one.
    """

    threshold: float
    neighbours: Tensor
    neighbour_cosines: Tensor
    parent: Tensor
    parent_cosine: Tensor

    @property
    def children(self) -> Tensor:
        """int64 [small]: latents of the large dictionary whose parent each is."""
        return torch.bincount(self.parent, minlength=len(self.neighbours))

    @property
    def close_children(self) -> Tensor:
        """int64 [small]: those of them at the threshold or above."""
        close = self.parent[self.parent_cosine >= self.threshold]
        return torch.bincount(close, minlength=len(self.neighbours))

    def as_dict(self) -> dict[str, Any]:
        """The figures. found: latents of the small one with a near neighbour in the large one;
        split: those with two close children or more; new: latents of the large one whose parent
        is below the threshold. Shares of the small, small and large dictionary."""
        return {
            "small": len(self.neighbours),
            "large": len(self.parent),
            "threshold": self.threshold,
            "found": _share(self.neighbour_cosines[:, 0] >= self.threshold),
            "split": _share(self.close_children >= 2),
            "new": _share(self.parent_cosine < self.threshold),
            "mean_children": float(self.children.double().mean()),
            "max_children": int(self.children.max()),
            "mean_max_cosine": float(self.neighbour_cosines[:, 0].double().mean()),
            "mean_max_cosine_back": float(self.parent_cosine.double().mean()),
        }


def feature_splitting(
    small: SAE | Tensor,
    large: SAE | Tensor,
    threshold: float = 0.7,
    *,
    names: Sequence[str] = ("small", "large"),
    top: int = 5,
    progress: bool = False,
) -> FeatureSplitting:
    """Which decoder directions of a small dictionary a large one has, splits or adds.

    `top` nearest neighbours are kept for each of the small one; `names` are for errors. Raises
    ValueError if `large` has fewer latents than `small`, for other widths, or NaN.
    """
    _check_pair(small, large, *names)
    a, b = _unit(_decoder(small), names[0]), _unit(_decoder(large), names[1])
    if len(a) > len(b):
        raise ValueError(
            f"feature_splitting: {names[0]} has {len(a)} latents and {names[1]} {len(b)}: the "
            "small one comes first"
        )
    cosines, neighbours = nearest(a, b, min(top, len(b)), progress=progress)
    parent_cosine, parent = nearest(b, a, 1, progress=progress)
    return FeatureSplitting(threshold, neighbours, cosines, parent[:, 0], parent_cosine[:, 0])


def _decoder(run: SAE | Tensor) -> Tensor:
    return run.W_dec if isinstance(run, SAE) else run


def _unit(rows: Tensor, name: str) -> Tensor:
    """Rows of length 1 in float32; a row of zeros stays one."""
    if not rows.isfinite().all():
        raise ValueError(f"{name}: the weights contain NaN or inf")
    rows = rows.detach().double()
    length = rows.norm(dim=-1, keepdim=True)
    unit: Tensor = rows / length.where(length > 0, 1.0)
    return unit.float()


def _check_pair(a: SAE | Tensor, b: SAE | Tensor, name_a: str, name_b: str) -> None:
    for run, name in ((a, name_a), (b, name_b)):
        shape = list(_decoder(run).shape)
        if len(shape) != 2 or not math.prod(shape):
            raise ValueError(f"{name}: the decoder is {shape}, expected [num_latents, d]")
    if _decoder(a).shape[1] != _decoder(b).shape[1]:
        raise ValueError(
            f"{name_a} writes width {_decoder(a).shape[1]} and {name_b} {_decoder(b).shape[1]}: "
            "latents of different spaces cannot be compared"
        )
    if isinstance(a, SAE) and isinstance(b, SAE):
        if a.is_transcoder != b.is_transcoder:
            which = name_a if a.is_transcoder else name_b
            raise ValueError(
                f"{which} is a transcoder and the other is not: compare like with like"
            )
        if a.d_in != b.d_in:
            raise ValueError(
                f"{name_a} reads width {a.d_in} and {name_b} {b.d_in}: their encoders cannot be "
                "compared"
            )


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
