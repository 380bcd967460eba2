"""What a published repo says of one SAE: a line of its `saes.json`, from which the card is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from saert.hub.identity import describe_sae
from saert.sae import SAE

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NUMBERS = (
    "fvu", "l0", "dead", "ce", "ce_spliced", "ce_zero", "ce_recovered", "kl_spliced", "kl_zero",
    "kl_recovered", "tokens",
)  # fmt: skip
BOUNDS = {"fvu": (0, math.inf), "l0": (0, math.inf), "dead": (0, 1), "tokens": (1, math.inf)}
SETTINGS = ("objective", "optimiser", "sae", "stream", "tokens", "seed")


@dataclass(frozen=True)
class Entry:
    """Attributes:
    layout: "saelens", "sparsify", or "saert" (SAELens' files, in what SAELens cannot express).
    dataset: what it was trained on, a Hub id.
    measured_on: the text of the metrics, in words.
    metrics: numbers measured on an SAE (the keys of `saert.measure`'s Metrics); None: none were.
    training: the settings that decided it, as far as they are known.
    weights, config: sha256 of its weights file, and of its config without metadata.
    """

    hookpoint: str
    target_hookpoint: str | None
    d_in: int
    d_out: int
    num_latents: int
    activation: str
    dtype: str
    base_model: str
    layout: str
    dataset: str | None = None
    measured_on: str | None = None
    metrics: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    weights: str | None = None
    config: str | None = None

    @classmethod
    def of(
        cls,
        sae: SAE,
        layout: str,
        metrics: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> Entry:
        """Args:
        sae: its metadata name its base model.
        metrics: what `evaluate` measured; "text", if it is there, says on what.
        record: the `training.json` beside an SAE that saert trained.
        """
        record = record or {}
        config, data = record.get("config"), record.get("data")
        training = sae.metadata.get("training")
        if isinstance(config, Mapping):
            training = {key: config[key] for key in SETTINGS if key in config}
        dataset = data.get("dataset") if isinstance(data, Mapping) else None
        held_out = f"{dataset}, held out" if dataset else None
        dataset = dataset or sae.metadata.get("dataset")
        known = {key: value for key, value in describe_sae(sae).items() if key != "input_transform"}
        return cls(
            **known,
            base_model=str(sae.metadata["base_model"]),
            layout=layout,
            dataset=dataset if isinstance(dataset, str) and HUB_ID.fullmatch(dataset) else None,
            measured_on=None if metrics is None else metrics.get("text") or held_out,
            metrics=None if metrics is None else dict(metrics),
            training=dict(training) if isinstance(training, Mapping) else None,
        )

    @classmethod
    def from_dict(cls, found: Any, where: str) -> Entry:
        """Raises ValueError unless it is what `asdict` gives."""
        names = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            raise ValueError(f"{where}: expected an object with exactly the keys {sorted(names)}")
        entry = cls(**found)
        sizes = (entry.d_in, entry.d_out, entry.num_latents)
        words = (entry.hookpoint, entry.activation, entry.dtype, entry.base_model, entry.layout)
        maybe = (entry.target_hookpoint, entry.dataset, entry.measured_on, entry.weights)
        objects = (entry.metrics, entry.training)
        if not (
            all(type(one) is int for one in sizes)
            and all(isinstance(one, str) for one in words)
            and all(isinstance(one, str | None) for one in (*maybe, entry.config))
            and all(isinstance(one, dict | None) for one in objects)
        ):
            raise ValueError(f"{where}: a value of the wrong type")
        check_metrics(entry.metrics, where)
        return entry

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def number(self, key: str) -> float | None:
        """A measured number, None where it is not known."""
        return (self.metrics or {}).get(key)


def check_metrics(metrics: Mapping[str, Any] | None, where: str) -> None:
    """Raise ValueError for numbers that nobody can have measured. null stands for "not known"."""
    text = (metrics or {}).get("text")
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: text is a {type(text).__name__}, expected words, or null")
    for key in NUMBERS:
        value = (metrics or {}).get(key)
        if value is None:
            continue
        low, high = BOUNDS.get(key, (-math.inf, math.inf))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(
                f"{where}: {key} is {value!r}, expected a number from {low} to {high}, or null"
            )
