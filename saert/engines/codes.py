"""Codes that a worker keeps until their request's caller asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from saert.sparse import SparseCode


@dataclass(frozen=True, eq=False)
class Chunk:
    """Codes of some tokens of one request: positions int64 [T], and their code [T, k]."""

    positions: Tensor
    code: SparseCode


class CodeStore:
    """Codes by request and hookpoint, at most `limit` tokens of them; the oldest requests go first.

    A request that nobody comes for (its client went away) is forgotten in time.
    """

    def __init__(self, limit: int = 1_000_000) -> None:
        self.limit = limit
        self.tokens = 0
        self._chunks: OrderedDict[str, dict[str, list[Chunk]]] = OrderedDict()

    def add(self, key: str, name: str, chunk: Chunk) -> None:
        """Keep the codes of some tokens: a copy, since slices would keep all of their pass."""
        code = chunk.code
        own = SparseCode(code.indices.clone(), code.values.clone(), code.num_latents)
        chunk = Chunk(chunk.positions.clone(), own)
        self._chunks.setdefault(key, {}).setdefault(name, []).append(chunk)
        self.tokens += len(chunk.positions)
        while self.tokens > self.limit and len(self._chunks) > 1:
            self._forget(next(iter(self._chunks)))

    def add_all(
        self, name: str, positions: Tensor, code: SparseCode, spans: Iterable[tuple[str, int, int]]
    ) -> None:
        """Keep the code of a pass; `spans` say whose tokens are where: (key, first, last)."""
        for key, first, last in spans:
            some = slice(first, last)  # much cheaper than code[some]
            mine = SparseCode(code.indices[some], code.values[some], code.num_latents)
            self.add(key, name, Chunk(positions[some], mine))

    def take(self, key: str) -> dict[str, bytes]:
        """All codes of one request, by hookpoint, packed; they are kept no longer."""
        packed = {n: pack(joined(chunks)) for n, chunks in self._chunks.get(key, {}).items()}
        self._forget(key)
        return packed

    def _forget(self, key: str) -> None:
        chunks = self._chunks.pop(key, {})
        self.tokens -= sum(len(c.positions) for part in chunks.values() for c in part)


def joined(chunks: Iterable[Chunk]) -> Chunk:
    """Chunks in the order of their positions; of a position that ran twice, the later code."""
    parts = list(chunks)
    positions = torch.cat([part.positions for part in parts])
    code = SparseCode.cat([part.code for part in parts], dim=0)
    last = {int(position): token for token, position in enumerate(positions)}
    order = torch.tensor([last[position] for position in sorted(last)])
    return Chunk(positions[order], code[order])


def pack(chunk: Chunk) -> bytes:
    """As safetensors, for another process."""
    return save(
        {
            "positions": chunk.positions.contiguous(),
            "indices": chunk.code.indices.contiguous(),
            "values": chunk.code.values.contiguous(),
            "num_latents": torch.tensor([chunk.code.num_latents]),
        }
    )


def unpack(packed: bytes) -> Chunk:
    """What `pack` wrote."""
    tensors = load(packed)
    code = SparseCode(tensors["indices"], tensors["values"], int(tensors["num_latents"]))
    return Chunk(tensors["positions"], code)
