"""Activations as training wants them: shuffled, the same tokens at every hookpoint, from one pass.

A buffer of rows of text runs through the model once; its tokens are shuffled and served in batches.
Row r belongs to lane r mod `lanes`, and every batch takes equally many tokens from each lane. A
replica runs and serves its own lanes only, so a batch holds the same tokens whatever the number of
processes, and activations never travel between replicas. What a batch holds depends on the text and
the seed alone: a resumed run sees what the stopped one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import device_of
from saert.train.cache import Cache
from saert.train.downstream import gradients
from saert.train.mesh import Mesh
from saert.train.rows import RowSource


@dataclass(frozen=True)
class StreamConfig:
    """What a batch is made of."""

    batch_tokens: int = 4096
    buffer_tokens: int = 131_072  # shuffled together, so that a batch is not a few documents
    exclude_special: bool = True  # leave out BOS, EOS and other special tokens
    max_norm: float | None = None  # leave out tokens longer than this times the buffer's median
    forward_rows: int = 16  # rows in one forward pass of the model
    lanes: int = 8  # replicas must divide it

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.forward_rows < 1:
            raise ValueError(
                f"stream: lanes {self.lanes} and forward_rows {self.forward_rows} must be at least "
                "1"
            )
        if self.batch_tokens < self.lanes or self.batch_tokens % self.lanes:
            raise ValueError(
                f"stream: {self.lanes} lanes do not divide batch_tokens {self.batch_tokens}"
            )
        if self.max_norm is not None and self.max_norm <= 1:
            raise ValueError(f"stream: max_norm is {self.max_norm}, expected above 1")
        if self.buffer_tokens < 2 * self.batch_tokens:
            raise ValueError(
                f"stream: buffer_tokens {self.buffer_tokens} must be at least two batches of "
                f"{self.batch_tokens}"
            )


@dataclass(frozen=True)
class Served:
    """One batch: x and gradients [T, d] by hookpoint, this replica's tokens, in the model's dtype.

    `downstream`: (hookpoint, reconstruction [T, d]) -> this replica's share of the mean KL."""

    x: Mapping[Hookpoint, Tensor]
    gradient: Mapping[Hookpoint, Tensor] = field(default_factory=dict)
    downstream: Callable[[Hookpoint, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Buffer:
    """This replica's part of a buffer. `lanes`: per own lane, the tokens that may be served, as
    numbers into the tensors; every lane of every replica serves `batches` batches."""

    tensors: Mapping[str, Tensor]
    lanes: Sequence[Tensor]
    batches: int


def rows_per_buffer(config: StreamConfig, context: int) -> int:
    """Enough that the special tokens left out do not cost a buffer its last batch."""
    served = 0.98 * (context - 1) if config.exclude_special else context
    return math.ceil(config.buffer_tokens / (served * config.lanes)) * config.lanes


class ActivationStream:
    """Batches of activations at several hookpoints.

    Args:
        model: () -> the language model; called when activations are first computed, so that
            training from a complete cache never loads it.
        special: rows -> bool mask of special tokens.
        wants_gradient: also serve ∇ of the model's loss.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        rows: RowSource,
        sites: Sequence[Hookpoint],
        context: int,
        config: StreamConfig,
        *,
        special: Callable[[Tensor], Tensor],
        mesh: Mesh | None = None,
        seed: int = 0,
        wants_gradient: bool = False,
        cache: Cache | None = None,
    ) -> None:
        self.model, self.rows, self.sites, self.context = model, rows, tuple(sites), context
        self.config, self.special, self.mesh, self.seed = config, special, mesh or Mesh(), seed
        self.wants_gradient, self.cache = wants_gradient, cache
        if config.lanes % self.mesh.replicas:
            raise ValueError(
                f"{self.mesh.replicas} replicas do not divide {config.lanes} lanes; set "
                "stream.lanes to a multiple of the replicas"
            )
        lanes = config.lanes
        self.buffer_rows = rows_per_buffer(config, context)
        own = lanes // self.mesh.replicas
        self.own = range(self.mesh.replica * own, (self.mesh.replica + 1) * own)
        self.number, self.batch = 0, 0
        self.before: dict[str, Any] = rows.state_dict()
        self.buffer: Buffer | None = None
        self.order: list[Tensor] = []

    def next(self) -> Served:
        """The next batch. Raises ValueError if a buffer holds too few tokens for one batch."""
        buffer = self._current()
        each = self.config.batch_tokens // self.config.lanes
        part = slice(self.batch * each, (self.batch + 1) * each)
        chosen = torch.cat([order[part] for order in self.order])
        at = {name: t[chosen.to(t.device)] for name, t in buffer.tensors.items()}
        self.batch += 1
        if self.batch == buffer.batches:
            # now, so that a position at the end of a buffer, which nobody could see, is never saved
            self.buffer = None
            self.number, self.batch = self.number + 1, 0
            self.before = self.rows.state_dict()
        return Served(
            {site: at[str(site)] for site in self.sites},
            {site: at[f"{site}.gradient"] for site in self.sites} if self.wants_gradient else {},
        )

    def sample(self, tokens: int) -> dict[Hookpoint, Tensor]:
        """About the first `tokens` of the current buffer by hookpoint [T, d], the same on every
        rank, without moving on."""
        buffer = self._current()
        each = -(-tokens // self.config.lanes)
        least = self.mesh.least(min(len(order) for order in self.order))
        chosen = torch.cat([order[: min(each, least)] for order in self.order])
        found = {}
        for site in self.sites:
            here = buffer.tensors[str(site)]
            found[site] = self.mesh.gather_tokens(self._exchangeable(here[chosen.to(here.device)]))
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON: where the rows stood before the current buffer, and how far it was served."""
        return {"rows": self.before, "buffer": self.number, "batch": self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.before, self.number, self.batch = state["rows"], state["buffer"], state["batch"]
        self.buffer = None

    # -- buffers -----------------------------------------------------------------------------------

    def _current(self) -> Buffer:
        if self.buffer is None:
            self.buffer = self._fill()
            self.order = [
                tokens[torch.randperm(len(tokens), generator=self._generator(lane))]
                for lane, tokens in zip(self.own, self.buffer.lanes, strict=True)
            ]
        return self.buffer

    def _generator(self, lane: int) -> torch.Generator:
        seed = (self.seed * 1_000_003 + self.number) * 1009 + lane
        return torch.Generator().manual_seed(seed % 2**63)

    def _fill(self) -> Buffer:
        cached = None if self.cache is None else self.cache.get(self.number, self.own)
        if self.mesh.any(cached is None):  # all ranks together, or none
            tensors = self._compute()
            if self.cache is not None:
                self.cache.put(self.number, self.own, tensors, self.rows.state_dict(), self.mesh)
        else:
            assert cached is not None
            tensors, after = cached
            self.rows.load_state_dict(after)
        served = tensors.pop("served")
        numbers = torch.arange(len(served)).view(-1, len(self.own), self.context)
        usable = served.view_as(numbers)
        lanes = [numbers[:, i][usable[:, i]] for i in range(len(self.own))]
        each = self.config.batch_tokens // self.config.lanes
        batches = self.mesh.least(min(len(lane) for lane in lanes) // each)
        if batches == 0:
            raise ValueError(
                f"stream: buffer {self.number} has {min(map(len, lanes))} usable tokens in a lane, "
                f"but a batch takes {each} from each; raise buffer_tokens or lower batch_tokens"
            )
        return Buffer(tensors, lanes, batches)

    def _compute(self) -> dict[str, Tensor]:
        """Activations of this replica's rows, and `served`, bool: the tokens to train on."""
        rows = self.rows.take(self.buffer_rows)
        own = rows.view(-1, self.config.lanes, self.context)[:, self.own.start : self.own.stop]
        own = own.reshape(-1, self.context)
        tensors = self._run(own)
        served = torch.ones(own.numel(), dtype=torch.bool)
        if self.config.exclude_special:
            served &= ~self.special(own).flatten()
        if self.config.max_norm is not None:
            served &= self._ordinary(tensors, served)
        return {**tensors, "served": served}

    def _run(self, own: Tensor) -> dict[str, Tensor]:
        """The shards of a replica need the same activations: each runs some of the rows."""
        mesh = self.mesh
        split = mesh.shards if len(own) % mesh.shards == 0 else 1
        part = own.chunk(split)[mesh.shard] if split > 1 else own
        model, found = self.model(), dict[str, Tensor]()
        part = part.to(device_of(model))
        if self.wants_gradient:
            pairs = gradients(model, part, self.sites, self.config.forward_rows)
            for site, (x, gradient) in pairs.items():
                found |= {str(site): x, f"{site}.gradient": gradient}
        else:
            hidden = capture(model, part, self.sites, self.config.forward_rows)
            found = {str(site): x for site, x in hidden.items()}
        if split == 1:
            return found
        return {name: mesh.gather_latents(t, 0) for name, t in found.items()}

    def _ordinary(self, tensors: Mapping[str, Tensor], served: Tensor) -> Tensor:
        """Tokens that are nowhere longer than `max_norm` times the median of the whole buffer."""
        assert self.config.max_norm is not None
        ordinary = torch.ones_like(served)
        for site in self.sites:
            norms = tensors[str(site)].float().norm(dim=-1).cpu()
            own = self._exchangeable(torch.where(served, norms, torch.nan))
            median = self.mesh.gather_tokens(own).nanmedian().cpu()
            ordinary &= norms <= self.config.max_norm * median
        return ordinary

    def _exchangeable(self, t: Tensor) -> Tensor:
        """Where the collectives reach it: NCCL has none on the CPU, where a cache is read to."""
        return t if self.mesh.replicas == 1 else t.to(self.mesh.device)
