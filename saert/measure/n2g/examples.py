"""Random activations of many latents from one pass over text, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saert.measure.passes import Encoded

Array = np.ndarray[Any, Any]
ENTRY = np.dtype([("latent", "i8"), ("key", "u8"), ("token", "i8"), ("value", "f8")])
WAITING = 2**18  # entries that may wait before they are merged


class Sampler:
    """At most `size` random activations of each latent, every one of them equally likely.

    Kept are those with the smallest keys, and a key is a hash of (seed, latent, token): so a
    latent's sample depends on the text and the seed alone, not on the other latents, the batch
    size, or whether the work was stopped in between. Tokens count through the flattened rows.

    Attributes:
        counts: int64 [num_latents], how often each latent is active, sampled or not.
        tokens: how many tokens were looked at.
    """

    def __init__(self, num_latents: int, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.counts = torch.zeros(num_latents, dtype=torch.int64)
        self.tokens = 0
        self._bound = np.full(num_latents, np.iinfo(np.uint64).max, dtype=np.uint64)
        self._kept = np.empty(0, ENTRY)
        self._parts: list[Array] = []

    def read(self, batches: Iterable[Encoded], wanted: Tensor | None = None) -> Sampler:
        """Take in a pass over text. `wanted`: bool [num_latents], whom to sample; None: all."""
        before = 0
        for seen in batches:
            latents, tokens, values = active(seen)
            self.tokens += int(seen.used.sum())
            self.counts += torch.bincount(latents, minlength=len(self.counts))
            chosen = slice(None) if wanted is None else wanted[latents]
            self._add(*(t[chosen].numpy() for t in (latents, tokens + before, values)))
            before += seen.rows.numel()
        self._merge()
        return self

    def of(self, latent: int) -> tuple[list[int], list[float]]:
        """The sample of a latent, in random order: tokens and activations."""
        low, high = np.searchsorted(self._kept["latent"], [latent, latent + 1])
        mine = self._kept[low:high]
        return mine["token"].tolist(), mine["value"].tolist()

    def _add(self, latents: Array, tokens: Array, values: Array) -> None:
        keys = random_keys(self.seed, latents, tokens)
        new = np.empty(len(latents), ENTRY)
        new["latent"], new["key"], new["token"], new["value"] = latents, keys, tokens, values
        self._parts.append(new[keys <= self._bound[latents]])
        if sum(map(len, self._parts)) > max(WAITING, len(self._kept)):
            self._merge()

    def _merge(self) -> None:
        every = np.concatenate([self._kept, *self._parts])
        every = every[np.lexsort((every["key"], every["latent"]))]
        rank = np.arange(len(every)) - np.searchsorted(every["latent"], every["latent"])
        last = every[rank == self.size - 1]
        self._bound[last["latent"]] = last["key"]
        self._kept, self._parts = every[rank < self.size], []


def active(seen: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, tokens (in the flattened batch) and float64 values of what fires, on the CPU."""
    values = seen.code.values.flatten(0, -2).cpu().double()
    token, slot = values.nonzero(as_tuple=True)
    return seen.code.indices.flatten(0, -2).cpu()[token, slot], token, values[token, slot]


def random_keys(seed: int, latents: Array, tokens: Array) -> Array:
    """uint64 keys that look random: a hash of (seed, latent, token), the same on every machine."""
    start = np.full(1, seed % 2**64, np.uint64)
    return _mix(_mix(_mix(start) + latents.astype(np.uint64)) + tokens.astype(np.uint64))


def _mix(x: Array) -> Array:
    """splitmix64 (Steele, Lea and Flood 2014), modulo 2⁶⁴."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed
