"""The embedded default: a small story-telling model and its SAEs, trained by this project.

Made by `python -m saert.train bundled` (train/recipes/bundled.toml); see docs/bundled.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saert.hub.format import read
from saert.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "bundled"
BASE_MODEL = "saert/bundled-tinystories"
ROOT = Path(str(files("saert"))) / "bundled"
MODEL, SAES = ROOT / "model", ROOT / "saes"
HOOKPOINTS = tuple(sorted(path.parent.name for path in SAES.glob("*/cfg.json")))


@dataclass(frozen=True)
class Demo:
    """What `saert demo` shows unless told otherwise."""

    hookpoint: str
    prompt: str
    steer: tuple[int, float]
    ablate: int


DEMO = Demo(
    hookpoint="resid_post.2",
    prompt="Once upon a time, there was a little girl named Lily. One day, she",
    steer=(71, 9.0),  # food
    ablate=546,  # to the park
)


def model() -> PreTrainedModel:
    """The bundled GPT-2-architecture model, float32, in eval mode."""
    from transformers import AutoModelForCausalLM

    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    loaded.eval()
    return loaded


def tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    return loaded


def sae(hookpoint: str) -> SAE:
    """The bundled SAE at a hookpoint, one of `HOOKPOINTS`."""
    return read(SAES / hookpoint)


def labels(path: str) -> dict[int, dict[str, Any]]:
    """What the labelled latents of one bundled SAE stand for: {latent: {label, max_activation, …}}.

    Written by hand after reading each latent's top examples; empty for an SAE nobody labelled.
    """
    file = SAES / path / "labels.json"
    if not file.is_file():
        return {}
    return {int(i): entry for i, entry in json.loads(file.read_text(encoding="utf-8")).items()}
