"""Random weights, and what a checkpoint's numbers are compared with, for the families that keep
theirs in safetensors and npz files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from saert.hub.load import load
from saert.sae import SAE


def normal(*shape: int, seed: int = 0, by: float = 1.0) -> Tensor:
    return by * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 97 * seed))


def inputs(d: int, tokens: int = 40) -> Tensor:
    return normal(tokens, d, seed=9)


def agrees(sae: SAE, x: Tensor, latents: Tensor, output: Tensor, within: float = 1e-5) -> None:
    """The same support, and numbers within a part of the largest."""
    found = {"latents": sae.encode(x).to_dense(), "output": sae(x)}
    assert 0.02 < (latents != 0).float().mean() < 0.98, "the reference selects nothing, or all"
    assert (found["latents"] != 0).equal(latents != 0)
    for name, wanted in (("latents", latents), ("output", output)):
        torch.testing.assert_close(
            found[name].double(), wanted.double(), rtol=0, atol=within * wanted.abs().max().item()
        )


def is_as_its_makers_say(shared: Path, name: str, key: str = "latents", **options: Any) -> SAE:
    """A case of ../shared gives the numbers of the library that wrote it; `key`: which latents."""
    folder = shared / "cases" / name
    path = json.loads((folder / "case.json").read_text())["path"]
    sae = load(folder / "repo", path, **options)
    expected = load_file(folder / "expected.safetensors")
    agrees(sae, expected["x"], expected[key], expected["recon"], within=1e-4)
    return sae
