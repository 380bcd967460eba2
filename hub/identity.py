"""What an SAE is in plain data, and a hash of it: which measurements belong to which SAE."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from saert.sae import SAE


def describe_sae(sae: SAE) -> dict[str, Any]:
    """Ready for JSON."""
    target = sae.target_hookpoint
    return {
        "hookpoint": str(sae.hookpoint),
        "target_hookpoint": None if target is None else str(target),
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "num_latents": sae.num_latents,
        "activation": f"{type(sae.activation).__name__}({sae.activation.extra_repr()})",
        "input_transform": repr(sae.input_transform),
        "dtype": str(sae.dtype).removeprefix("torch."),
    }


def fingerprint(sae: SAE) -> str:
    """sha256 of an SAE's weights and of all that decides what they mean."""
    facts: dict[str, Any] = {"source": None, "revision": None} | describe_sae(sae)
    facts |= {"subtract": sae.subtract_b_dec, "by_norm": sae.select_by_decoder_norm}
    return hashlib.sha256((json.dumps(facts) + digest(sae)).encode()).hexdigest()


def digest(module: nn.Module, most: int | None = None) -> str:
    """sha256 of a module's tensors; with `most`, of that many entries of each, evenly spread."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            step = 1 if most is None else max(1, len(flat) // most)
            found.update(bytes_of(flat[::step][:most]))
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's bytes, in order."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
