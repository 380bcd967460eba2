"""What an attached SAE saw: its codes, and running statistics of how well it explains them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.sparse import SparseCode

_EVENTS = 256  # CUDA timings in flight before finished ones are summed up
_SMALL, _WAITING = 64, 512  # tokens: passes of at most so many wait until so many can be summed


@dataclass(frozen=True)
class SAEReport:
    """Statistics over the tokens that one attached SAE has seen, padding left out.

    Attributes:
        tokens: how many; l0: mean active latents per token; fvu: fraction of variance unexplained;
        error_norm: mean over tokens of ‖y - ŷ‖₂, in the model's units; milliseconds: time spent in
        this SAE's hook. l0, fvu and error_norm are None if nothing was recorded.
    """

    tokens: int
    l0: float | None
    fvu: float | None
    error_norm: float | None
    milliseconds: float

    def __str__(self) -> str:
        l0 = "-" if self.l0 is None else f"{self.l0:.1f}"
        fvu = "-" if self.fvu is None else f"{self.fvu:.3f}"
        return f"{self.tokens} tokens, L0 {l0}, FVU {fvu}, {self.milliseconds:.1f} ms"


class Recorder:
    """Keeps codes as asked, and sums in float64 on the device, without waiting for it."""

    def __init__(self, sae: SAE, record: Literal[False, "last", "all"]) -> None:
        self._sae, self._record = sae, record
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._passes: list[SparseCode | Tensor] = []
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # L0s, errors and y of tokens
        self._tokens_waiting = 0
        self._sums: dict[str, Tensor] = {}
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def observe(self, code: SparseCode | None, x: Tensor, y: Tensor, real: Tensor | None) -> None:
        """Note a pass: x [rows, T, d_in] read, y [rows, T, d_out] to be explained.

        The sums of short passes (generation) are made for many at a time: a dozen small operators
        cost more than the decoder.

        Without a code (a compiled graph cannot hold one of data-dependent width) the activations
        are kept dense until somebody asks.
        """
        seen: SparseCode | Tensor
        if code is None:
            seen = self._sae.activations(x)
            reconstruction = self._sae(x)
            l0 = (seen != 0).sum(-1)
        else:
            code = code.detach()
            seen, reconstruction, l0 = code, self._sae.decode(code, x), code.l0()
        mask = None if real is None else real.to(y.device)
        if mask is not None:
            seen = _blank(seen, mask)
        if self._record == "last":
            self._passes = [seen]
        else:
            self._passes.append(seen)
        y = y.to(reconstruction.dtype)
        error = y - reconstruction
        if mask is None and l0.numel() <= _SMALL and not torch.compiler.is_compiling():
            self._wait(l0, error, y)
        else:
            self._count(l0, error, y, mask)

    def _wait(self, l0: Tensor, error: Tensor, y: Tensor) -> None:
        if self._waiting and self._waiting[0][0].device != l0.device:
            self._catch_up()
        d = y.shape[-1]
        # a copy: the model may write into its hidden state
        self._waiting.append((l0.flatten(), error.reshape(-1, d), y.reshape(-1, d).clone()))
        self._tokens_waiting += l0.numel()
        if self._tokens_waiting >= _WAITING:
            self._catch_up()

    def _catch_up(self) -> None:
        """Sum what waits."""
        waiting, self._waiting, self._tokens_waiting = self._waiting, [], 0
        if waiting:
            l0, error, y = (torch.cat(parts)[None] for parts in zip(*waiting, strict=True))
            self._count(l0, error, y, None)

    def _count(self, l0: Tensor, error: Tensor, y: Tensor, mask: Tensor | None) -> None:
        error = error.square().sum(-1)
        power = y.square().sum(-1)
        ones = torch.ones_like(error)
        if mask is not None:
            ones = mask.to(error.dtype)
            error, power = error.where(mask, 0), power.where(mask, 0)
            l0, y = l0.where(mask, 0), y.where(mask.unsqueeze(-1), 0)
        wide = torch.float64 if y.device.type != "mps" else torch.float32
        flat = (0, 1)
        counted = (ones, l0, error, error.sqrt(), power)
        self._add(torch.stack([t.to(wide).sum() for t in counted]), y.sum(flat, dtype=wide))

    def _add(self, scalars: Tensor, mean: Tensor) -> None:
        if not self._sums:
            self._sums = {"scalars": scalars, "mean": mean}
        else:
            self._sums = {
                "scalars": self._sums["scalars"].to(mean.device) + scalars,
                "mean": self._sums["mean"].to(mean.device) + mean,
            }

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time of a block: wall clock, or CUDA events that are read when reported."""
        if torch.compiler.is_compiling():
            yield
            return
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            while len(self._events) > _EVENTS and self._events[0][1].query():
                self._settle(*self._events.pop(0))
            return
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun

    def _settle(self, start: Any, end: Any) -> None:
        end.synchronize()
        self._seconds += start.elapsed_time(end) / 1000

    def report(self) -> SAEReport:
        """The statistics so far."""
        while self._events:
            self._settle(*self._events.pop(0))
        with torch.no_grad():
            self._catch_up()
        if not self._sums:
            return SAEReport(0, None, None, None, self._seconds * 1000)
        tokens, l0, error, norm, power = self._sums["scalars"].tolist()
        spread = power - float(self._sums["mean"].square().sum()) / max(tokens, 1)
        return SAEReport(
            tokens=int(tokens),
            l0=l0 / tokens if tokens else None,
            fvu=error / spread if spread > 0 else None,
            error_norm=norm / tokens if tokens else None,
            milliseconds=self._seconds * 1000,
        )

    def code(self) -> SparseCode | None:
        """The recorded code: of the latest pass, or of all passes joined along the sequence."""
        if not self._passes:
            return None
        codes = [c if isinstance(c, SparseCode) else SparseCode.from_dense(c) for c in self._passes]
        rows = {code.shape[0] for code in codes}
        if len(rows) > 1:
            raise ValueError(
                f"the recorded passes have {sorted(rows)} rows, and cannot be joined along the "
                "sequence; call clear() between batches, or use record='last'"
            )
        joined = codes[0] if len(codes) == 1 else SparseCode.cat(codes, dim=1)
        if len(codes) > 1:
            self._passes = [joined]  # joining again would copy everything again
        return joined


class Codes(Mapping[str, SparseCode]):
    """Recorded codes by hookpoint, in any spelling, or by SAE object."""

    def __init__(
        self,
        places: list[Hookpoint],
        find: Callable[[str | Hookpoint | SAE], list[Recorder]],
    ) -> None:
        self._places, self._find = places, find

    def __getitem__(self, key: str | Hookpoint | SAE) -> SparseCode:
        try:
            found = self._find(key)
        except ValueError as error:
            raise KeyError(str(error)) from None
        if len(found) > 1:
            how = "codes[hookpoint]" if isinstance(key, SAE) else "codes[sae]"
            raise KeyError(f"{len(found)} attached SAEs are meant: ask with {how}")
        code = found[0].code()
        if code is None:
            raise KeyError(f"no code recorded at {key}: no forward pass yet, or record=False")
        return code

    def __iter__(self) -> Iterator[str]:
        return (str(at) for at in dict.fromkeys(self._places))

    def __len__(self) -> int:
        return len(set(self._places))


def _blank(seen: SparseCode | Tensor, mask: Tensor) -> SparseCode | Tensor:
    """Nothing is active at padding."""
    if isinstance(seen, Tensor):
        return seen.where(mask.unsqueeze(-1), 0)
    return SparseCode(seen.indices, seen.values.where(mask.unsqueeze(-1), 0), seen.num_latents)
