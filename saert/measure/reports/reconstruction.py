"""How well an SAE reconstructs what it reads (a transcoder: what it should write), on rows of text.

    FVU = Σ‖y − ŷ‖² / Σ‖y − ȳ‖²,     Σ‖y − ȳ‖² = Σ‖y‖² − ‖Σy‖²/N

with ȳ the mean over all N tokens (Gao et al. 2024, ALGORITHMS.md 1.7). Sums are streamed in
float64 for each bucket of positions; the total is the sum over buckets, so batches of any size give
the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saert.capture import capture
from saert.hooks import device_of
from saert.measure.passes import Special, check_ready, sites
from saert.measure.progress import tracked
from saert.sae import SAE
from saert.sparse import SparseCode

DENSITY_EDGES = tuple(-6 + 0.5 * i for i in range(13))
"""log10 of the fraction of tokens at which a latent is active: the edges of `density`, to 0."""

ALIVE = 1e-3
"""A latent that never exceeds this is dead; a selected zero does not count (ALGORITHMS.md 1.5)."""

FIRST_BUCKET = 16  # positions; each further bucket reaches twice as far
TOKENS = 4096  # widened to float64 at once


@dataclass(frozen=True)
class Fidelity:
    """How close reconstructions are, over some tokens.

    Attributes:
        tokens: how many.
        fvu, explained_variance: the fraction of variance unexplained, and 1 − fvu. NaN where the
            targets do not vary.
        normalised_mse: mean of ‖y − ŷ‖² / ‖y‖², uncentred and token by token (the loss of
            openai/sparse_autoencoder). Not the FVU.
        cosine: mean cosine of y and ŷ.
        norm_ratio: mean of ‖ŷ‖ / ‖y‖.
        relative_bias: Σ‖ŷ‖² / Σ ŷ·y, below 1 where reconstructions shrink (Rajamanoharan et al.
            2024, Gated SAEs, section 4).
        l0: mean number of active latents.

    Tokens with y = 0 have no cosine, ratio or normalised_mse and are left out of those three.
    """

    tokens: int
    fvu: float
    explained_variance: float
    normalised_mse: float
    cosine: float
    norm_ratio: float
    relative_bias: float
    l0: float


@dataclass(frozen=True)
class FidelityAt(Fidelity):
    """At positions `start` to `stop` (exclusive) of the rows, the first token being 0.

    Its fvu divides by Σ‖y − ȳ‖² around the mean of *all* tokens: weighted with those, the buckets'
    FVUs add up to the total.
    """

    start: int
    stop: int


@dataclass(frozen=True)
class ReconstructionReport(Fidelity):
    """Fidelity over all tokens, and how the latents are used.

    Attributes:
        dead: the fraction of latents that never exceed 1e-3.
        l0_counts: l0_counts[i] tokens have exactly i active latents.
        density: latents per bin of DENSITY_EDGES; those that are never active are in none.
        positions: the same by position.
    """

    dead: float
    l0_counts: tuple[int, ...]
    density: tuple[int, ...]
    positions: tuple[FidelityAt, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Unexplained:
    """Streams FVU over batches of targets and reconstructions `[tokens, d]`."""

    def __init__(self) -> None:
        self.error, self.square, self.count = 0.0, 0.0, 0
        self.sum: Tensor | float = 0.0

    def add(self, target: Tensor, reconstruction: Tensor) -> None:
        y = target.double()
        self.error += (y - reconstruction.double()).square().sum().item()
        self.square += y.square().sum().item()
        self.sum = self.sum + y.sum(0)
        self.count += len(y)

    @property
    def fvu(self) -> float:
        centre = torch.as_tensor(self.sum).square().sum().item() / self.count
        return self.error / (self.square - centre)


class Reconstruction:
    """Streams a `ReconstructionReport` of one SAE."""

    def __init__(self, sae: SAE, buckets: Sequence[tuple[int, int]]) -> None:
        self.buckets, self.where = tuple(buckets), str(sites(sae)[1])
        self.sums = torch.zeros(len(buckets), 10, dtype=torch.float64)
        self.target = torch.zeros(len(buckets), sae.d_out, dtype=torch.float64)
        self.count = torch.zeros(sae.num_latents, dtype=torch.int64)
        self.fired = torch.zeros(sae.num_latents, dtype=torch.bool)
        self.l0_counts = torch.zeros(1, dtype=torch.int64)

    def add(self, y: Tensor, estimate: Tensor, code: SparseCode, positions: Tensor) -> None:
        """y and estimate [tokens, d_out], code [tokens, k], positions int64 [tokens]."""
        active = code.values != 0
        latents = code.indices[active].cpu()
        self.count += torch.bincount(latents, minlength=len(self.count))
        self.fired[code.indices[code.values.abs() > ALIVE].cpu()] = True
        l0 = active.sum(-1)
        found = torch.bincount(l0.cpu(), minlength=len(self.l0_counts))
        self.l0_counts = F.pad(self.l0_counts, (0, len(found) - len(self.l0_counts))) + found
        member = membership(positions, self.buckets)
        parts = (t.split(TOKENS) for t in (y, estimate, l0, member))
        for t, r, n, m in zip(*parts, strict=True):
            t, r, m = wide(t), wide(r), wide(m)
            self.sums += (m.T @ _columns(t, r, wide(n))).cpu()
            self.target += (m.T @ t).cpu()

    @property
    def mean(self) -> Tensor:
        """ȳ, float64 [d_out], on the CPU."""
        return self.target.sum(0) / self.sums[:, 0].sum()

    def report(self) -> ReconstructionReport:
        """Raises ValueError if no token was seen, or one that is NaN or inf."""
        tokens = int(self.sums[:, 0].sum())
        if not tokens:
            raise ValueError(f"no token is left to measure at {self.where}: all are special")
        if not self.sums.isfinite().all():
            raise ValueError(
                f"the hidden states or reconstructions at {self.where} have NaN or inf"
            )
        density = (self.count[self.count > 0].double() / tokens).log10()
        edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        histogram = torch.histogram(density.clamp(DENSITY_EDGES[0], 0), edges).hist
        mean = self.mean
        parts = zip(self.buckets, self.sums, self.target, strict=True)
        return ReconstructionReport(
            **_fidelity(self.sums.sum(0), self.target.sum(0), mean),
            dead=1 - self.fired.double().mean().item(),
            l0_counts=tuple(self.l0_counts.tolist()),
            density=tuple(int(n) for n in histogram),
            positions=tuple(
                FidelityAt(**_fidelity(sums, total, mean), start=start, stop=stop)
                for (start, stop), sums, total in parts
                if sums[0]
            ),
        )


def reconstruction_report(
    model: Any,
    sae: SAE,
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """How well an SAE reconstructs the hidden states of a model on rows of text.

    The model runs no further than the SAE's hookpoints.

    Args:
        rows: int64 [rows, context], token ids. They go to the model's device.
        batch: rows at a time; the numbers do not depend on it.
        special: rows -> bool of the same shape, tokens that are not looked at (BOS, padding).
        buckets: positions at which the buckets of positions begin, from 0. Default: 0, 16, 32,
            64, … up to the context.

    Raises:
        TypeError, ValueError: rows that are no token ids of this model, an SAE without a
            hookpoint or of another width, no token left, NaN or inf anywhere.
    """
    many = reconstruction_reports(
        model, [sae], rows, batch=batch, special=special, buckets=buckets, progress=progress
    )
    return many[0]


@torch.no_grad()
def reconstruction_reports(
    model: Any,
    saes: Sequence[SAE],
    rows: Tensor,
    *,
    batch: int = 16,
    special: Special | None = None,
    buckets: Sequence[int] | None = None,
    progress: bool = True,
) -> list[ReconstructionReport]:
    """`reconstruction_report` of several SAEs, from one pass of the model."""
    rows = check_rows(model, rows)
    found = [Reconstruction(sae, position_buckets(rows.shape[1], buckets)) for sae in saes]
    places = list(dict.fromkeys(place for sae in saes for place in sites(sae)))
    device = device_of(model)
    for part in tracked(rows.split(batch), "reconstructing", progress):
        used, positions = kept(part, special)
        hidden = capture(model, part.to(device), places, batch=len(part))
        for sae, one in zip(saes, found, strict=True):
            x, y = (hidden[place][used.to(device)].to(sae.device) for place in sites(sae))
            code = sae.encode(x)
            one.add(y, sae.decode(code, x), code, positions.to(sae.device))
    return [one.report() for one in found]


def check_rows(model: Any, rows: Tensor, context: int = 1) -> Tensor:
    """The rows as int64; TypeError or ValueError unless they are token ids of this model, in rows
    of at least `context`."""
    if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.dtype == torch.bool:
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows are {kind}, expected token ids: an int64 tensor [rows, context]")
    if rows.dim() != 2 or not rows.numel() or rows.shape[1] < context:
        least = f", {context} tokens or more in each" if context > 1 else ""
        raise ValueError(f"rows are {list(rows.shape)}, expected [rows, context]{least}")
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"rows hold the token id {wrong}, but the model knows 0 to {size - 1}; were they made "
            "with its tokenizer?"
        )
    if rows.shape[1] > (most := positions_of(model)):
        raise ValueError(
            f"rows are {rows.shape[1]} tokens long, but the model has a table of {most} positions: "
            "make them shorter"
        )
    check_ready(model)
    return rows.long()


def positions_of(model: Any) -> float:
    """The longest row that a model with a table of positions takes; inf where it has none (rotary
    models go beyond the context that they were trained on)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most: int | None = getattr(text, "max_position_embeddings", None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        table = tensor.dim() == 2 and ("position" in name or "wpe" in name)
        if most and table and most <= len(tensor) < most + 8:  # OPT's begins with two for padding
            return most
    return math.inf


def position_buckets(
    context: int, starts: Sequence[int] | None = None
) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each bucket of positions; `starts` None: 0, 16, 32, 64, … up to `context`.

    >>> position_buckets(100)
    ((0, 16), (16, 32), (32, 64), (64, 100))
    """
    chosen = list(_doubling(context)) if starts is None else list(starts)
    rising = all(a < b for a, b in zip(chosen, chosen[1:], strict=False))
    if not chosen or chosen[0] != 0 or not rising or chosen[-1] >= context:
        raise ValueError(
            f"buckets begin at {chosen}, expected rising positions from 0 to below the context, "
            f"{context}"
        )
    return tuple(zip(chosen, [*chosen[1:], context], strict=True))


def _doubling(context: int) -> Iterator[int]:
    yield 0
    start = FIRST_BUCKET
    while start < context:
        yield start
        start *= 2


def membership(positions: Tensor, buckets: Sequence[tuple[int, int]]) -> Tensor:
    """positions int64 [tokens] -> bool [tokens, buckets]."""
    starts = torch.tensor([start for start, _ in buckets], device=positions.device)
    stops = torch.tensor([stop for _, stop in buckets], device=positions.device)
    return (positions[:, None] >= starts) & (positions[:, None] < stops)


def kept(rows: Tensor, special: Special | None) -> tuple[Tensor, Tensor]:
    """Which tokens of rows [rows, context] to look at: bool [rows · context], and the position of
    each that is kept, int64 [tokens]."""
    used = torch.ones_like(rows, dtype=torch.bool) if special is None else ~special(rows)
    if used.shape != rows.shape:
        raise ValueError(f"special: found {list(used.shape)}, expected {list(rows.shape)} as rows")
    positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return used.flatten(), positions[used]


def wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _columns(y: Tensor, r: Tensor, l0: Tensor) -> Tensor:
    """[tokens, 10]: what `_fidelity` divides, token by token."""
    error, power, written = ((t * t).sum(-1) for t in (y - r, y, r))
    dot, some = (y * r).sum(-1), power > 0
    norm, length = power.sqrt(), written.sqrt()
    cosine = dot / torch.where(some & (length > 0), norm * length, 1)
    relative = torch.where(some, error / torch.where(some, power, 1), 0)
    ratio = torch.where(some, length / torch.where(some, norm, 1), 0)
    one = torch.ones_like(error)
    counts = (one, error, power, written, dot, l0, some.to(one.dtype))
    return torch.stack([*counts, relative, cosine, ratio], -1)


def _fidelity(sums: Tensor, target: Tensor, mean: Tensor) -> dict[str, Any]:
    """The fields of `Fidelity` from sums [10] and Σy [d_out] over tokens, around `mean`."""
    tokens, error, power, written, dot, l0, some, relative, cosine, ratio = sums.tolist()
    spread = power - 2 * float(target @ mean) + tokens * float(mean @ mean)
    # what rounding leaves of a difference is no variance
    fvu = error / spread if spread > 1e-13 * power else float("nan")
    return {
        "tokens": int(tokens),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "normalised_mse": _over(relative, some),
        "cosine": _over(cosine, some),
        "norm_ratio": _over(ratio, some),
        "relative_bias": _over(written, dot),
        "l0": l0 / tokens,
    }


def _over(a: float, b: float) -> float:
    return a / b if b else float("nan")
