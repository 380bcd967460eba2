"""The recipe of the bundled model and its SAEs, as frozen data read from TOML."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saert.train.config import RECIPES, build, load_table

BUNDLED_RECIPE = RECIPES / "bundled.toml"


@dataclass(frozen=True)
class DataConfig:
    """The part of the text held out. A window sharing `shingle` characters with it is dropped."""

    holdout: float = 0.01
    shingle: int = 80
    seed: int = 0


@dataclass(frozen=True)
class LanguageModelConfig:
    """A GPT-2-architecture model. Its rate warms up, stays, and decays linearly to zero."""

    vocab_size: int = 2048
    context: int = 256
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 16  # rows of `context` tokens
    steps: int = 4000
    lr: float = 3e-3
    warmup: int = 100
    decay: float = 0.3  # the last part of the steps, in which the rate falls to zero
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class SAEConfig:
    """TopK SAEs trained together on one stream of activations (ALGORITHMS.md 1.2 to 1.5)."""

    hookpoints: tuple[str, ...] = ("resid_post.2",)
    transcoders: tuple[tuple[str, str], ...] = ()  # (hookpoint, target_hookpoint)
    num_latents: int = 1024
    k: int = 16
    transcoder_latents: int = 512  # an MLP writes less than a stream holds: more would die
    transcoder_k: int = 32
    tokens: int = 1_600_000
    batch_tokens: int = 2048
    buffer_tokens: int = 65_536  # shuffled together, so that a batch is not a few stories
    lr: float = 5e-4  # at 16,384 latents; scaled by 1/√num_latents
    warmup: float = 0.02
    decay: float = 0.3
    k_aux: int = 64  # a power of two close to d_in / 2
    aux_coefficient: float = 1 / 32
    dead_tokens: int = 200_000
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """One TOML file: `[data]`, `[language_model]`, `[sae]`."""

    name: str = "bundled"
    data: DataConfig = field(default_factory=DataConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_recipe(path: Path) -> Recipe:
    """Raises ConfigError for a key or value that no field knows."""
    return build(Recipe, load_table(path))
