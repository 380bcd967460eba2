"""Whole rows of text for objectives that run the model on what the SAE reconstructs.

Unlike `stream`, tokens stay where they are in their rows: the KL of a splice needs the context.
The first position of each row stays as the model made it, if special tokens are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.train.downstream import Downstream
from saert.train.mesh import Mesh
from saert.train.rows import RowSource
from saert.train.stream import Served, StreamConfig


class RowStream:
    """Batches of `batch_tokens / context` rows; the same interface as `ActivationStream`."""

    def __init__(
        self,
        model: Callable[[], Any],
        rows: RowSource,
        sites: Sequence[Hookpoint],
        context: int,
        config: StreamConfig,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self.rows, self.sites, self.context = model, rows, tuple(sites), context
        self.config, self.mesh = config, mesh or Mesh()
        self.count = config.batch_tokens // context
        if self.count == 0 or self.count % self.mesh.replicas:
            raise ValueError(
                f"stream: batch_tokens {config.batch_tokens} are {self.count} rows of {context}; "
                f"expected a positive multiple of the {self.mesh.replicas} replicas"
            )

    def next(self) -> Served:
        """The next rows: x of their tokens in order, and the splice."""
        return self._serve(self.rows.take(self.count))

    def sample(self, tokens: int) -> dict[Hookpoint, Tensor]:
        """Tokens of the rows to come, the same on every rank, without moving on."""
        before = self.rows.state_dict()
        rows = self.rows.take(-(-tokens // self.context))
        self.rows.load_state_dict(before)
        used = self._used(rows)
        found = capture(self.model(), rows.to(self._device), self.sites, self.config.forward_rows)
        return {site: x[used.flatten().to(x.device)][:tokens] for site, x in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])

    def _serve(self, rows: Tensor) -> Served:
        rows = rows.chunk(self.mesh.replicas)[self.mesh.replica].to(self._device)
        used = self._used(rows).to(rows.device)
        model = self.model()
        found = capture(model, rows, self.sites, self.config.forward_rows)
        splice = Downstream(model, rows, self.config.forward_rows)
        positions = self.count * (self.context - 1)  # of all replicas
        mask = used.flatten()

        def downstream(site: Hookpoint, reconstruction: Tensor) -> Tensor:
            empty = reconstruction.new_zeros(rows.numel(), reconstruction.shape[-1])
            whole = empty.masked_scatter(mask[:, None], reconstruction)
            return splice(site, whole, mask) / positions

        return Served({site: x[mask] for site, x in found.items()}, downstream=downstream)

    def _used(self, rows: Tensor) -> Tensor:
        used = torch.ones_like(rows, dtype=torch.bool)
        if self.config.exclude_special:
            used[:, 0] = False  # equally many in each row: replicas must have equal batches
        return used

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.model().parameters()).device
        return device
