"""A recorder for compiled models: codes and sums go into buffers that never move.

A graph that is replayed (CUDA graphs) writes to the same addresses each time, and cannot take its
last run's output as an input; so the sums are added to in place, and the latest code is copied out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saert.kernels.numerics import accumulation_dtype
from saert.record import Recorder
from saert.sae import SAE
from saert.sparse import SparseCode

TOKENS = 8192  # of one compiled pass: at k = 64, buffers of 6 MB


class StaticRecorder(Recorder):
    """Keeps the latest code and the sums of every pass, also of those inside a graph.

    Raises ValueError for record="all", whose memory grows with each pass, and for codes of variable
    width, which no buffer fits.
    """

    def __init__(self, sae: SAE, record: Literal[False, "last", "all"]) -> None:
        if record == "all":
            raise ValueError(
                'compiled=True keeps the latest pass: expected record="last" or False, found "all"'
            )
        if record and sae.activation.per_latent:
            raise ValueError(
                f"compiled=True records codes of a fixed width, as TopK's, and those of "
                f"{type(sae.activation).__name__} have none; pass record=False (edits work)"
            )
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._in_buffers: tuple[int, int] | None = None  # rows and length of the code in there
        super().__init__(sae, record)

    def settle_in(self) -> None:
        """Make the buffers, where the SAE is now. The sums so far are kept."""
        if not self._record:
            return
        self._catch_up()
        sae, device = self._sae, self._sae.device
        wide = torch.float64 if device.type != "mps" else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            k = sae.encode(torch.zeros(1, sae.d_in, device=device)).k
            values = torch.zeros(TOKENS, k, dtype=accumulation_dtype(sae.dtype), device=device)
            self._buffers = still(torch.zeros_like(values, dtype=torch.int64)), still(values)
            sums = {
                "scalars": torch.zeros(5, dtype=wide),
                "mean": torch.zeros(sae.d_out, dtype=wide),
            }
            sums |= self._sums
            self._sums = {name: still(total.to(device)) for name, total in sums.items()}
        self._in_buffers = None

    def clear(self) -> None:
        """Forget everything."""
        sums = getattr(self, "_sums", {})
        super().clear()
        self._in_buffers = None
        for total in sums.values():
            total.zero_()
        self._sums = sums

    def observe(self, code: SparseCode | None, x: Tensor, y: Tensor, real: Tensor | None) -> None:
        """Note a pass, as `Recorder.observe`."""
        super().observe(code, x, y, real)
        self._in_buffers = None
        if not torch.compiler.is_compiling():
            return
        seen = self._passes.pop()
        assert isinstance(seen, SparseCode) and self._buffers is not None
        rows, length, k = seen.shape
        if rows * length > TOKENS:  # torch.compile runs a frame that raises uncompiled
            raise NotImplementedError(
                f"a compiled pass of {rows}x{length} tokens: at most {TOKENS} are recorded; pass "
                "record=False, or fewer at a time"
            )
        for buffer, new in zip(self._buffers, (seen.indices, seen.values), strict=True):
            buffer[: rows * length].copy_(new.reshape(rows * length, k))
        self._in_buffers = rows, length

    def _add(self, scalars: Tensor, mean: Tensor) -> None:
        self._sums["scalars"].add_(scalars)
        self._sums["mean"].add_(mean)

    def code(self) -> SparseCode | None:
        """The code of the latest pass; a copy of it, if a graph wrote it."""
        if self._in_buffers is None or self._buffers is None:
            return super().code()
        rows, length = self._in_buffers
        indices, values = (b[: rows * length].view(rows, length, -1).clone() for b in self._buffers)
        return SparseCode(indices, values, self._sae.num_latents)


def still(tensor: Tensor) -> Tensor:
    """The tensor, with a promise to the compiler that it stays where it is."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
