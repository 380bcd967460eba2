"""What a probe found: one binary task, and a table of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saert.measure.probes.newton import LatentFits


@dataclass(frozen=True)
class Scores:
    """How a probe does on the test split. `loss` in nats; `auc` is NaN if it has one class only."""

    loss: float
    accuracy: float
    f1: float
    auc: float


@dataclass(frozen=True)
class Probe:
    """One binary task.

    Attributes:
        task, positive: its name, and the label (or labels) that count as positive.
        train, test: numbers of examples; skipped: those without a token.
        base_rate: share of positives in the train split.
        entropy: loss of the base rate on the train split, nats; what `score` starts from.
        majority: test accuracy of always saying the train split's majority class.
        latent, weight, bias: the best single latent and its probe; score: its train loss, nats.
        scores: of the best latent on the test split.
        k_sparse: {k: scores} of k latents fitted together; dense: of the hidden state, or None.
        unconverged: latents whose fit stopped early; they may look worse than they are.
        fits: the probe of every latent; None on results that were read from a file.
    """

    task: str
    positive: str
    train: int
    test: int
    base_rate: float
    entropy: float
    majority: float
    latent: int
    weight: float
    bias: float
    score: float
    scores: Scores
    k_sparse: Mapping[int, Scores] = field(default_factory=dict)
    dense: Scores | None = None
    skipped: int = 0
    unconverged: int = 0
    fits: LatentFits | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but `fits`, for JSON."""
        kept = {name: value for name, value in vars(self).items() if name != "fits"}
        kept["scores"] = _known(self.scores)
        kept["dense"] = None if self.dense is None else _known(self.dense)
        kept["k_sparse"] = {str(k): _known(scores) for k, scores in self.k_sparse.items()}
        return kept

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Probe:
        """The reverse of `as_dict`."""
        dense = found["dense"]
        return cls(
            **{k: v for k, v in found.items() if k not in ("scores", "dense", "k_sparse")},
            scores=_scores_of(found["scores"]),
            dense=None if dense is None else _scores_of(dense),
            k_sparse={int(k): _scores_of(s) for k, s in found["k_sparse"].items()},
        )

    def row(self) -> dict[str, Any]:
        """One flat row of a table."""
        kept = {
            name: value
            for name, value in vars(self).items()
            if name not in ("scores", "k_sparse", "dense", "fits")
        }
        kept |= {f"test_{name}": value for name, value in asdict(self.scores).items()}
        for prefix, scores in self._others():
            kept |= {f"{prefix}_{name}": value for name, value in asdict(scores).items()}
        return kept

    def _others(self) -> list[tuple[str, Scores]]:
        found = [(f"k{k}", scores) for k, scores in sorted(self.k_sparse.items())]
        return found if self.dense is None else [*found, ("dense", self.dense)]


@dataclass(frozen=True)
class Probes:
    """Probes of one or many tasks: iterable, printable, saved as JSON or CSV.

    Attributes:
        probes: one for each binary task.
        left_out: "task: class" of the classes that the train split has no example of.
    """

    probes: tuple[Probe, ...]
    left_out: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __len__(self) -> int:
        return len(self.probes)

    def __getitem__(self, at: int) -> Probe:
        return self.probes[at]

    @property
    def mean_score(self) -> float:
        """The mean of the tasks' scores, nats: the probe loss of Gao et al. 2024."""
        return math.fsum(probe.score for probe in self.probes) / max(len(self.probes), 1)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each probe."""
        try:
            import pandas
        except ImportError:
            raise ImportError("to_pandas() needs pandas: pip install 'saert[measure]'") from None
        return pandas.DataFrame([probe.row() for probe in self.probes])

    def save(self, path: str | Path) -> Path:
        """Write a .json (everything but `fits`) or a .csv (the table)."""
        path = Path(path)
        if path.suffix == ".csv":
            self.to_pandas().to_csv(path, index=False)
        elif path.suffix == ".json":
            rows = [probe.as_dict() for probe in self.probes]
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        else:
            raise ValueError(f"save: {path.name} ends in neither .json nor .csv")
        return path

    def cells(self) -> list[list[str]]:
        """The printed table: a row of headings, then one for each probe."""
        ks = sorted({k for probe in self.probes for k in probe.k_sparse})
        head = ["task", "positive", "latent", "entropy", "score", "test loss", "accuracy"]
        head += ["majority", "F1", "AUC", *(f"acc. k={k}" for k in ks), "acc. dense"]
        rows = [head]
        for p in self.probes:
            others = [p.k_sparse[k].accuracy if k in p.k_sparse else math.nan for k in ks]
            others += [math.nan if p.dense is None else p.dense.accuracy]
            s = p.scores
            numbers = [p.entropy, p.score, s.loss, s.accuracy, p.majority, s.f1, s.auc, *others]
            shown = ["-" if math.isnan(number) else f"{number:.3f}" for number in numbers]
            rows.append([p.task, p.positive, str(p.latent), *shown])
        return rows

    def __str__(self) -> str:
        rows = self.cells()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if at < 2 else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        if self.left_out:
            lines.append(self.said_of_left_out())
        return "\n".join([*lines, f"mean score {self.mean_score:.4f} nats"])

    def said_of_left_out(self) -> str:
        """A line for the reader; empty where nothing was left out."""
        if not self.left_out:
            return ""
        return f"left out, one class only in the train split: {', '.join(self.left_out)}"


def _known(scores: Scores) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(v) else v for name, v in asdict(scores).items()}


def _scores_of(found: Mapping[str, float | None]) -> Scores:
    return Scores(**{name: math.nan if v is None else v for name, v in found.items()})
