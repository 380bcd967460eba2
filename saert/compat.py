"""Does this SAE belong to this model? Compares what its metadata says with the model's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from saert.hookpoint import Hookpoint, unwrap
from saert.model_names import ALIASES
from saert.sae import SAE
from saert.transforms import NoTransform

CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def check_model(model: nn.Module, sae: SAE, at: Hookpoint, strict: bool) -> None:
    """Raise ValueError if the SAE's metadata names another model; with strict=False, never.

    Compared as far as both sides say something: the model's name (the last part of a Hub id, lower
    case), and the config facts that saert writes into the SAEs it trains.
    """
    if not strict:
        return
    _check_reading(sae, at)
    config = getattr(unwrap(model)[1], "config", None)
    if config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    expected: dict[str, Any] = dict(sae.metadata.get("base_model_config") or {})
    differing = [
        f"{key} {getattr(text, key, None)!r} instead of {expected[key]!r}"
        for key in CONFIG_KEYS
        if key in expected and getattr(text, key, None) != expected[key]
    ]
    if differing:
        raise ValueError(_refusal(sae, at, "the model has " + ", ".join(differing)))
    wanted, found = sae.metadata.get("base_model"), getattr(config, "_name_or_path", "")
    if not wanted or not found or Path(str(found)).exists():
        return  # a local folder's name says nothing
    if _plain(str(wanted)) != _plain(str(found)):
        raise ValueError(_refusal(sae, at, f"the model is {found!r}"))


def _check_reading(sae: SAE, at: Hookpoint) -> None:
    """An SAE whose files leave out how its input is transformed would give other numbers."""
    if not isinstance(sae.input_transform, NoTransform):
        return
    if name := sae.metadata.get("load_as"):
        raise ValueError(
            f"the SAE at {at} reads another tensor than its files say: load it by its short name, "
            f"{name}, or pass strict=False to attach it as it is"
        )
    if sae.metadata.get("reads_centred"):
        raise ValueError(
            f"the SAE at {at} was trained on a residual stream without its mean (TransformerLens' "
            "centred writing weights): set sae.input_transform = MeanCentre(), or pass "
            "strict=False to attach it as it is"
        )


def _refusal(sae: SAE, at: Hookpoint, found: str) -> str:
    name = sae.metadata.get("base_model", "another model")
    return (
        f"the SAE at {at} was trained on {name!r}, but {found}; "
        "pass strict=False to attach it all the same"
    )


def _plain(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return ALIASES.get(last, last).rpartition("/")[2].lower()
