"""Everything that decides a training run: frozen data, from a TOML recipe and dotted overrides.

Folders, logging and devices belong to the command line. A key that no field knows, or a value of
the wrong type, is an error: a misspelt setting can never be silently ignored.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from saert.hookpoint import Hookpoint
from saert.train.objectives import OBJECTIVES
from saert.train.objectives.base import Objective
from saert.train.objectives.topk import TopKObjective
from saert.train.stream import StreamConfig
from saert.train.text import DataConfig
from saert.train.training import OptimiserConfig
from saert.train.units import KINDS

T = TypeVar("T")

RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("fp32", "tf32", "bf16", "fp64")
ARROW = "->"  # mlp_in.6->mlp_out.6: a transcoder


class ConfigError(ValueError):
    """A setting that is unknown, missing, or of the wrong kind."""


@dataclass(frozen=True)
class ModelConfig:
    """The language model: a Hub id or a folder, its revision, and the dtype it runs in."""

    name: str
    revision: str | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class SAEConfig:
    """The dictionaries: one for each hookpoint."""

    hookpoints: tuple[str, ...]  # "resid_post.6"; "mlp_in.6->mlp_out.6" is a transcoder
    num_latents: int | None = None  # None: expansion · d_in
    expansion: float = 16.0
    skip: bool = False  # transcoders: a linear path beside the latents
    normalise: str = "auto"  # none, layer_norm, unit, sqrt_d; auto: as the objective was published
    precision: str = "fp32"  # tf32; bf16: products in bfloat16, scores and weights in float32; fp64
    init: str | None = None  # a saved SAE to go on from, "repo:path" or a folder

    def __post_init__(self) -> None:
        if not self.hookpoints:
            raise ConfigError("sae.hookpoints is empty; name at least one, such as resid_post.6")
        if self.normalise not in ("auto", *KINDS):
            raise ConfigError(
                f"sae.normalise is {self.normalise!r}, expected auto or one of {KINDS}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"sae.precision is {self.precision!r}, expected one of {PRECISIONS}")
        if self.skip and not all(target for _, target in self.pairs()):
            raise ConfigError(f"sae.skip needs transcoders, written as mlp_in.6{ARROW}mlp_out.6")

    def pairs(self) -> list[tuple[Hookpoint, Hookpoint | None]]:
        """(hookpoint, target) of every dictionary; ValueError for a name that is none."""
        found = []
        for text in self.hookpoints:
            read, _, write = (part.strip() for part in text.partition(ARROW))
            found.append((Hookpoint.parse(read), Hookpoint.parse(write) if write else None))
        return found


@dataclass(frozen=True)
class CheckpointConfig:
    """How often to save, in steps, and how many checkpoints to keep."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        _at_least(1, "checkpoint", every=self.every, keep=self.keep)


@dataclass(frozen=True)
class EvaluationConfig:
    """How often to evaluate, in steps (0: only at the end), and on how many held-out rows."""

    every: int = 0
    rows: int = 128

    def __post_init__(self) -> None:
        _at_least(0, "evaluation", every=self.every)
        _at_least(1, "evaluation", rows=self.rows)


@dataclass(frozen=True)
class TrainConfig:
    """One run: `saert train`, or a TOML file with these names as tables."""

    model: ModelConfig
    data: DataConfig
    sae: SAEConfig
    objective: Objective = field(default_factory=TopKObjective)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tokens: int = 100_000_000
    seed: int = 0
    shards: int = 1  # processes that share the latents; the others share the tokens

    def __post_init__(self) -> None:
        _at_least(self.stream.batch_tokens, "a run of at least one batch", tokens=self.tokens)
        _at_least(0, "a run", seed=self.seed)
        _at_least(1, "a run", shards=self.shards)

    @property
    def steps(self) -> int:
        return self.tokens // self.stream.batch_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_table` reads back."""
        found = asdict(self)
        found["objective"] = {"name": self.objective.name, **found["objective"]}
        return found


def _at_least(least: int, where: str, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{where}: {name} is {value}, expected at least {least}")


def from_table(table: Mapping[str, Any]) -> TrainConfig:
    """The configuration in nested tables. Raises ConfigError, naming the key."""
    return build(TrainConfig, table)


def load_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError if it is no TOML."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def recipe_names() -> list[str]:
    """The recipes that ship, by name."""
    return sorted(p.stem for p in RECIPES.glob("*.toml") if p.stem != "bundled")


def override(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of the tables with `key.sub=value` settings; a value is read as TOML, else as text."""
    found = {key: dict(v) if isinstance(v, Mapping) else v for key, v in table.items()}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"setting {setting!r}: expected KEY=VALUE, as in optimiser.lr=1e-4")
        *tables, key = path.strip().split(".")
        here = found
        for name in tables:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                raise ConfigError(f"setting {setting!r}: {name} is no table")
        here[key] = _value(text.strip())
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """The frozen dataclass `cls` from a table; lists become tuples, sub-tables dataclasses."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where or cls.__name__}: found {table!r}, expected a table")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {_at(where, key)}{hint} Known: {', '.join(known)}")
    required = {
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    }
    if missing := sorted(required - set(table)):
        raise ConfigError(f"missing: {_at(where, missing[0])}")
    hints = get_type_hints(cls)
    values = {key: _convert(hints[key], v, _at(where, key)) for key, v in table.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    if kind is Objective:
        return _objective(value, where)
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    try:
        return TypeAdapter(kind).validate_python(_freeze(value), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: found {value!r}; {problem}") from None


def _objective(value: Any, where: str) -> Objective:
    table = {"name": value} if isinstance(value, str) else dict(value)
    name = table.pop("name", "topk")
    if name not in OBJECTIVES:
        raise ConfigError(f"{where}.name is {name!r}, expected one of {', '.join(OBJECTIVES)}")
    return build(OBJECTIVES[name], table, where)


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
