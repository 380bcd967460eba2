"""Which model, SAE and tokenizer an index was made with, in a few bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from saert.pursuit import MatchingPursuit
from saert.sae import SAE

SAMPLE = 4096  # elements looked at in each tensor


def model_identity(model: Any, sae: SAE) -> dict[str, str]:
    """Its name, as the SAE has it if it does, and a fingerprint of architecture and weights."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    shape = {
        name: value
        for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        if (value := getattr(config, name, None)) is not None
    }
    own = getattr(model, "name_or_path", "") or type(model).__name__
    name = str(sae.metadata.get("base_model") or own)
    return {"name": name, "fingerprint": fingerprint(model, shape)}


def sae_identity(sae: SAE) -> dict[str, str]:
    """A fingerprint of its weights and of everything that changes what it says."""
    kind = {
        "activation": type(sae.activation).__name__,
        "k": getattr(sae.activation, "k", None),
        **({"steps": repr(sae.activation)} if isinstance(sae.activation, MatchingPursuit) else {}),
        "input_transform": repr(sae.input_transform),
        "subtract_b_dec": sae.subtract_b_dec,
        "select_by_decoder_norm": sae.select_by_decoder_norm,
        "target": str(sae.target_hookpoint or ""),
    }
    return {"hookpoint": str(sae.hookpoint), "fingerprint": fingerprint(sae, kind)}


def vocabulary_identity(strings: list[str]) -> str:
    """A fingerprint of what every token is."""
    return hashlib.sha256(json.dumps(strings).encode()).hexdigest()[:16]


@torch.no_grad()
def fingerprint(module: nn.Module, facts: dict[str, Any]) -> str:
    """A hash of the facts, and of names, shapes, dtypes and evenly spaced elements of the tensors.

    It reads at most 4,096 elements of each, so that it costs nothing for a large model; weights
    that were trained on differ everywhere.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor) or tensor.is_meta:  # quantisers' notes, offloaded weights
            continue
        flat = tensor.detach().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = flat[:: max(1, -(-flat.numel() // SAMPLE))]
        some = some.double() if some.is_floating_point() else some
        digest.update(some.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(held: Any, asked: Any, at: str = "") -> list[str]:
    """What differs between two JSON values, a line each: `sae.fingerprint: held 1f…, now 9a…`."""
    if isinstance(held, dict) and isinstance(asked, dict):
        return [
            line
            for key in sorted({*held, *asked})
            for line in differences(held.get(key), asked.get(key), f"{at}.{key}" if at else key)
        ]
    return [] if held == asked else [f"{at}: there {held}, now {asked}"]
