"""Explanations of latents: graphs with the figures that say how far to trust them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saert.measure.n2g.graph import ANY, Graph, Matcher, Pattern, Show
from saert.sparse import SparseCode


@dataclass(frozen=True)
class Explanation:
    """One latent: its graph, and how the graph's predictions compare with the truth.

    Attributes:
        latent: its number.
        graph: patterns and predictions; empty for a latent that never fired.
        active, tokens: at how many of how many tokens of the rows it fires.
        train, heldout: activations that the graph was built from, and others kept for `recall`.
        recalled: held-out activations that are predicted to be nonzero.
        predicted: tokens of the evaluation set that are predicted to be nonzero.
        correct: those of them that are.
        correlation: Pearson's, predicted against true activation over all tokens of the evaluation
            set; NaN if one of the two never varies.
    """

    latent: int
    graph: Graph
    active: int
    tokens: int
    train: int
    heldout: int
    recalled: int
    predicted: int
    correct: int
    correlation: float

    @property
    def density(self) -> float:
        """The fraction of tokens at which the latent fires."""
        return _ratio(self.active, self.tokens)

    @property
    def recall(self) -> float:
        """The fraction of held-out activations that are predicted; NaN if none were held out."""
        return _ratio(self.recalled, self.heldout)

    @property
    def precision(self) -> float:
        """The fraction of predictions that are right; NaN if nothing was predicted."""
        return _ratio(self.correct, self.predicted)

    def lines(self, tokenizer: Any = None) -> list[str]:
        """The graph's patterns to read, strongest first; token ids without a tokenizer."""
        return self.graph.lines(str if tokenizer is None else shown_by(tokenizer))

    def to_dict(self) -> dict[str, Any]:
        """All of it in terms of JSON; a wildcard is null."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return {
            "latent": self.latent,
            **counts,
            **{name: _finite(getattr(self, name)) for name in RATIOS},
            "patterns": [
                {
                    "tokens": [None if t == ANY else t for t in pattern.tokens],
                    "at_start": pattern.at_start,
                    "value": pattern.value,
                }
                for pattern in self.graph.patterns
            ],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Explanation:
        """What `to_dict` wrote."""
        patterns = [
            Pattern(
                tuple(ANY if t is None else int(t) for t in one["tokens"]),
                bool(one["at_start"]),
                float(one["value"]),
            )
            for one in saved["patterns"]
        ]
        correlation = saved["correlation"]
        return cls(
            latent=int(saved["latent"]),
            graph=Graph(patterns),
            correlation=math.nan if correlation is None else float(correlation),
            **{name: int(saved[name]) for name in COUNTS},
        )


COUNTS = ("active", "tokens", "train", "heldout", "recalled", "predicted", "correct")
RATIOS = ("density", "recall", "precision", "correlation")


@dataclass(frozen=True)
class Explanations(Sequence[Explanation]):
    """Explanations of several latents of one SAE, in order; `of(latent)` finds one.

    Attributes:
        explanations: one per latent.
        settings: what they were made with: the SAE, a digest of the text, the seed, the padding
            token, … Explanations with equal settings can be joined.
    """

    explanations: tuple[Explanation, ...]
    settings: Mapping[str, Any]

    def __getitem__(self, index: Any) -> Any:
        return self.explanations[index]

    def __len__(self) -> int:
        return len(self.explanations)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.explanations)

    @property
    def latents(self) -> list[int]:
        """Which latents are explained."""
        return [one.latent for one in self]

    def of(self, latent: int) -> Explanation:
        """The explanation of a latent; KeyError if it has none here."""
        return self._by_latent[latent]

    @cached_property
    def _by_latent(self) -> dict[int, Explanation]:
        return {one.latent: one for one in self}

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher([one.graph for one in self])

    def predict(self, rows: Tensor) -> SparseCode:
        """Predicted activations of the explained latents: rows int64 [rows, context] ->
        SparseCode [rows, context, k], float32, on the CPU; empty at a BOS that begins every row
        if the graphs were made behind one."""
        bos = self.settings["bos"]
        if bos is not None and bool((rows[:, 0] != bos).any()):
            raise ValueError(
                f"explanations: the graphs were made behind token {bos}, which has to begin every "
                f"row; found {rows[:, 0].unique().tolist()[:5]}"
            )
        found = self._matcher(rows, first=int(bos is not None))
        tokens, order = found.tokens.sort(stable=True)
        count = torch.bincount(tokens, minlength=rows.numel())
        slot = torch.arange(len(tokens)) - (count.cumsum(0) - count)[tokens]
        k = max(1, int(count.max()) if count.numel() else 1)
        indices = torch.zeros(rows.numel(), k, dtype=torch.int64)
        values = torch.zeros(rows.numel(), k)
        indices[tokens, slot] = torch.tensor(self.latents)[found.graphs[order]]
        values[tokens, slot] = found.values[order].float()
        code = SparseCode(indices, values, int(self.settings["num_latents"]))
        return code[torch.arange(rows.numel()).view(rows.shape)]

    def summary(self) -> dict[str, Any]:
        """Means over the latents where a figure is defined, over all and by decade of density;
        `wild` counts the graphs that predict nearly every token (`Graph.wild`)."""
        decades: dict[str, list[Explanation]] = {}
        for one in sorted(self, key=lambda e: -e.density):
            # 1 itself belongs to the densest decade
            power = min(math.floor(math.log10(one.density)), -1) if one.active else None
            name = "never active" if power is None else f"1e{power} to 1e{power + 1}"
            decades.setdefault(name, []).append(one)
        return _means(self.explanations) | {
            "by_density": {name: _means(group) for name, group in decades.items()}
        }

    def to_pandas(self) -> Any:
        """A DataFrame with a row per latent. Raises ImportError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install 'saert[measure]'") from error
        columns = ("latent", *RATIOS, *COUNTS)
        table = {name: [getattr(one, name) for one in self] for name in columns}
        return pd.DataFrame(table | {"patterns": [len(one.graph.patterns) for one in self]})

    def to_json(self) -> str:
        """One JSON object: settings, summary and explanations."""
        summary = _clean(self.summary())
        latents = [one.to_dict() for one in self]
        return json.dumps(
            {"settings": dict(self.settings), "summary": summary, "explanations": latents},
            ensure_ascii=False,
        )

    def save(self, path: str | Path) -> None:
        """JSON lines: the settings, then one line per latent. `explain(out=…)` writes the same."""
        lines = [
            json.dumps({"n2g": dict(self.settings)}),
            *(json.dumps(one.to_dict()) for one in self),
        ]
        whole = Path(f"{path}.tmp")  # so that a stop in between leaves the old file
        whole.write_text("\n".join(lines) + "\n", "utf-8")
        whole.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Explanations:
        """What `save` wrote, or `explain(out=…)`, finished or not. Raises ValueError on any other
        file."""
        first, *rest = Path(path).read_text("utf-8").splitlines() or [""]
        try:
            settings = json.loads(first)["n2g"]
            return cls(tuple(map(Explanation.from_dict, _whole(rest))), settings)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} begins with {first[:60]!r}; expected explanations that "
                "saert.measure.explain saved, all lines whole but the last"
            ) from None

    def __repr__(self) -> str:
        mean = _means(self.explanations)
        figures = ", ".join(f"{name} {mean[name]:.3f}" for name in ("recall", "precision"))
        return f"Explanations({len(self)} latents: mean {figures})"


def resume(path: str | Path | None, settings: Mapping[str, Any]) -> dict[int, Explanation]:
    """What the file at `path` holds already; a new file is begun if there is none.

    Raises ValueError if it holds something else, or explanations of other settings.
    """
    if path is None:
        return {}
    path = Path(path)
    if not path.exists():
        Explanations((), settings).save(path)
        return {}
    saved = Explanations.load(path)
    for name, value in settings.items():
        if saved.settings.get(name) != value:
            raise ValueError(
                f"{path} was made with {name}={saved.settings.get(name)!r}, found {value!r}; go on "
                "with the same settings, or choose another file"
            )
    saved.save(path)  # without a last line that was cut short
    return {one.latent: one for one in saved}


def append(path: str | Path | None, explanations: Iterable[Explanation]) -> None:
    """Add to the file at `path`, if there is one."""
    if path is not None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one.to_dict()) + "\n" for one in explanations)


def _whole(lines: Sequence[str]) -> list[Any]:
    """Lines of JSON; the last may have been cut short."""
    try:
        last = [json.loads(lines[-1])] if lines else []
    except ValueError:
        last = []
    return [json.loads(line) for line in lines[:-1]] + last


def shown_by(tokenizer: Any) -> Show:
    """Token ids as text, with white space visible; quoted where it could be taken for a mark."""

    def show(token: int) -> str:
        text = str(tokenizer.decode([token]))
        plain = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
        return repr(plain) if plain in ("", "*", "|", "[START]") or "|" in plain else plain

    return show


def _means(group: Sequence[Explanation]) -> dict[str, Any]:
    def mean(values: list[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    return {
        "latents": len(group),
        **{name: mean([getattr(one, name) for one in group]) for name in RATIOS},
        "patterns": mean([float(len(one.graph.patterns)) for one in group]),
        "wild": sum(one.graph.wild for one in group),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    return _finite(value) if isinstance(value, float) else value
