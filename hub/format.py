"""Directory ⇄ SAE: which layout a folder holds, and writing one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from saert.hub.formats import saelens
from saert.hub.formats.saelens import FormatError
from saert.sae import SAE

__all__ = ["FormatError", "read", "save"]


def read(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """The SAE in a folder, whatever layout it holds.

    Raises FormatError naming the files that were found, if no layout is recognised.
    """
    if (folder / saelens.CONFIG).is_file() and (folder / saelens.WEIGHTS).is_file():
        try:
            return saelens.read(folder, device, dtype)
        except SafetensorError as error:
            raise FormatError(f"{folder.name}/{saelens.WEIGHTS}: {error}") from error
        except ValueError as error:
            raise FormatError(f"{folder.name}: {error}") from error
    found = sorted(path.name for path in folder.iterdir())[:10]
    raise FormatError(
        f"{folder.name}: no SAE found; expected {saelens.CONFIG} and {saelens.WEIGHTS}, "
        f"found {found}"
    )


def save(sae: SAE, folder: str | Path, *, format: str = "saelens") -> None:
    """Write an SAE into a folder, as `cfg.json` and `sae_weights.safetensors`.

    >>> save(sae, "my-saes/resid_post.6")
    """
    if format != "saelens":
        raise ValueError(f"save: format {format!r}, expected 'saelens'")
    saelens.write(sae, Path(folder))
