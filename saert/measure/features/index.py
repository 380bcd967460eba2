"""`FeatureIndex`: a folder that `feature_index` made, read a latent at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saert.hookpoint import Hookpoint
from saert.measure.features.cards import Card, Examples, Logit, Selection
from saert.measure.features.files import Arrays, Damaged, read
from saert.measure.features.look import check_latent
from saert.measure.features.searching import Found, firing_on, occurrences, saying_most
from saert.measure.features.store import OURS, Entries, Range, ranges
from saert.sparse import SparseCode

STANDARD = Selection()
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # in each byte


class FeatureIndex:
    """Where every latent of an SAE fires in a text. Reading a card reads that latent's part only.

    Attributes:
        place: the hookpoint's folder; config: its `config.json`.
        hookpoint: where the SAE reads; num_latents, context.
        counts: int64 [num_latents], tokens at which each latent fires.
        tokens_seen: tokens that were looked at, special ones left out.
    """

    def __init__(self, place: Path, config: dict[str, Any]) -> None:
        about = config["saert"]
        self.place, self.config = place, config
        self.hookpoint = Hookpoint.parse(about["sae"]["hookpoint"])
        self.num_latents, self.context = int(about["num_latents"]), int(about["context"])
        self._ranges = ranges(self.num_latents, int(about["splits"]))
        self._stops = np.array([at.stop for at in self._ranges])
        try:
            self._files = [read(place / at.name) for at in self._ranges]
        except (FileNotFoundError, Damaged) as error:
            raise ValueError(
                f"{place} is not finished, or damaged ({error}); run the same feature_index again"
            ) from error
        rows = {len(arrays["tokens"]) for arrays in self._files}
        if len(rows) > 1:
            raise ValueError(
                f"{place} is not finished: its files hold {sorted(rows)} rows; run the same "
                "feature_index again"
            )
        self._directions: dict[Range, Arrays] = {}
        self._tokens, self._used = self._files[0]["tokens"], self._files[0]["used"]
        self.counts = torch.from_numpy(
            np.concatenate([np.diff(arrays["offsets"]) for arrays in self._files])
        )
        self.tokens_seen = int(np.bincount(self._used.ravel(), minlength=256) @ BITS)

    @classmethod
    def open(cls, folder: str | Path, hookpoint: str | None = None) -> FeatureIndex:
        """The index in a folder, or a hookpoint's own folder; with several in it, say which.

        Raises FileNotFoundError if there is none, ValueError if it is not finished.
        """
        folder = Path(folder)
        name = "*" if hookpoint is None else str(Hookpoint.parse(hookpoint))
        own = folder / "config.json"
        places = [folder] if own.is_file() and name in ("*", _hookpoint(own)) else []
        if not places:
            places = [path.parent for path in sorted(folder.glob(f"{name}/config.json"))]
        if not places:
            there = [path.name for path in folder.iterdir()] if folder.is_dir() else "no folder"
            raise FileNotFoundError(f"{folder}: no feature index; found {there}")
        if len(places) > 1:
            names = ", ".join(path.name for path in places)
            raise ValueError(f"{folder} holds the indices of {names}: say which, hookpoint=…")
        config = json.loads((places[0] / "config.json").read_text("utf-8"))
        if "saert" not in config:
            raise ValueError(f"{places[0]} is a cache that saert did not make")
        return cls(places[0], config)

    # -- all latents -----------------------------------------------------------------------------

    @property
    def densities(self) -> Tensor:
        """float64 [num_latents]: the part of the tokens at which each latent fires."""
        return self.counts.double() / max(1, self.tokens_seen)

    @property
    def largest(self) -> Tensor:
        """float32 [num_latents]: the largest activation of each latent, 0 if it is dead."""
        return torch.from_numpy(np.concatenate([arrays["largest"] for arrays in self._files]))

    @property
    def dead(self) -> Tensor:
        """int64: latents that never fire."""
        return (self.counts == 0).nonzero().flatten()

    @property
    def rows(self) -> Tensor:
        """int64 [rows, context]: the text, for feature_index(torch.cat([index.rows, more]))."""
        return torch.from_numpy(self._tokens.astype(np.int64))

    @cached_property
    def labels(self) -> dict[int, str]:
        """What latents stand for, as far as feature_index was told."""
        file = self.place / OURS / "labels.json"
        known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        plain = {i: one.get("label") if isinstance(one, dict) else one for i, one in known.items()}
        return {int(i): str(label) for i, label in plain.items() if label is not None}

    @cached_property
    def vocabulary(self) -> list[str]:
        """The string of every token; empty if feature_index was given no tokenizer."""
        file = self.place / OURS / "vocabulary.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else []

    def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Token ids as text; an id outside the vocabulary as `<id>`."""
        known = self.vocabulary
        return tuple(known[i] if i < len(known) else f"<{i}>" for i in ids) if known else ()

    def __len__(self) -> int:
        return self.num_latents

    def __iter__(self) -> Iterator[Card]:
        """The cards of all latents, dead ones included, in order."""
        return (self.card(latent) for latent in range(self.num_latents))

    def __repr__(self) -> str:
        return (
            f"FeatureIndex({self.hookpoint}, {self.num_latents} latents, "
            f"{self.tokens_seen:,} tokens)"
        )

    # -- one latent ------------------------------------------------------------------------------

    def _find(self, latent: int) -> tuple[Range, Arrays, int, slice]:
        check_latent(latent, self.num_latents, "the index")
        i = int(np.searchsorted(self._stops, latent, "right"))
        at, arrays = self._ranges[i], self._files[i]
        j = latent - at.start
        return at, arrays, j, slice(int(arrays["offsets"][j]), int(arrays["offsets"][j + 1]))

    def entries(self, latent: int) -> Entries:
        """Every token at which a latent fires: rows, positions (int64 [n]), activations (float32).

        Sorted by row and position.
        """
        _, arrays, _, part = self._find(latent)
        where = arrays["locations"][part].astype(np.int64)
        return where[:, 0], where[:, 1], arrays["activations"][part].astype(np.float32)

    def tokens_at(self, rows: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token ids at some places of the text."""
        return self._tokens[rows, positions].astype(np.int64)

    def card(self, latent: int, selection: Selection = STANDARD) -> Card:
        """What one latent looks like. ValueError if there is no such latent."""
        at, arrays, j, _ = self._find(latent)
        entries = self.entries(latent)
        count, largest = len(entries[2]), float(arrays["largest"][j])
        sums = arrays["moments"][j]
        examples = Examples(entries, self._tokens, self._used_in, self.strings, selection)
        heights, _ = np.histogram(entries[2], selection.bins, (0.0, largest or 1.0))
        lens = self._lens(at)
        seen = max(1, self.tokens_seen)

        def logits(which: str) -> tuple[Logit, ...]:
            if which not in lens:
                return ()
            ids = lens[which][j].tolist()
            strings = self.strings(ids) or ("",) * len(ids)
            values = lens[f"{which}_logits"][j].tolist()
            return tuple(map(Logit, ids, strings, values))

        near = zip(lens["neighbours"][j].tolist(), lens["cosines"][j].tolist(), strict=True)
        span = lens["logit_span"][j].tolist() if "logit_span" in lens else (0.0, 0.0)
        return Card(
            latent=latent,
            label=self.labels.get(latent),
            count=count,
            density=count / seen,
            mean=float(sums[0]) / max(1, count),
            largest=largest,
            moments=(sums[0] / seen, sums[1] / seen, sums[2] / seen, sums[3] / seen),
            heights=heights,
            top=examples.top(),
            bands=examples.bands(latent),
            promoted=logits("promoted"),
            suppressed=logits("suppressed"),
            neighbours=tuple(near),
            logit_heights=np.array(lens["logit_heights"][j] if "promoted" in lens else []),
            logit_span=(span[0], span[1]),
        )

    def _lens(self, at: Range) -> Arrays:
        if at not in self._directions:
            self._directions[at] = read(self.place / OURS / "directions" / at.name)
        return self._directions[at]

    def _used_in(self, row: int) -> NDArray[np.bool_]:
        return np.unpackbits(self._used[row], count=self.context).astype(bool)

    # -- search ----------------------------------------------------------------------------------

    def search(self, tokens: int | Sequence[int] | str, top: int = 10) -> list[Found]:
        """The latents that fire where the text says `tokens`.

        That is a token id, several in a row, or the spelling of one token, which is looked for
        with and without a space before it. ValueError if no token is spelt so.

        Ordered by coverage · share: the part of these tokens that the latent fires at, times the
        part of its activation that falls on them. It reads the whole index, a piece at a time.
        """
        if isinstance(tokens, str):
            spelt = (tokens, f" {tokens}")
            ways = [[i] for i, string in enumerate(self.vocabulary) if string in spelt]
            if not ways:
                raise ValueError(f"no token is spelt {tokens!r}: try a shorter word, or token ids")
        else:
            ways = [[tokens] if isinstance(tokens, int) else list(tokens)]
        used = np.unpackbits(self._used, axis=1, count=self.context).astype(bool)
        on = occurrences(self._tokens, used, ways)
        parts = zip(self._ranges, self._files, strict=True)
        return firing_on(on, parts, self.labels, top)

    @torch.no_grad()
    def rank(self, code: SparseCode, top: int = 10) -> list[Found]:
        """The latents that say most about a text, from the code an SAE gives it: [*tokens, k].

        Ordered by how near each comes to its own largest activation in the index, weighted by
        rarity (-log density), so that latents which always fire come last.
        """
        if code.num_latents != self.num_latents:
            raise ValueError(f"the code has {code.num_latents} latents, the index {len(self)}")
        rarity = -(self.densities.clamp(min=0.5 / max(1, self.tokens_seen)).log())
        sums = [arrays["moments"][:, 0] for arrays in self._files]
        return saying_most(
            code, self.largest, rarity, torch.from_numpy(np.concatenate(sums)), self.labels, top
        )


def _hookpoint(config: Path) -> str | None:
    """Of which hookpoint an index is, by its `config.json`; None if saert did not make it."""
    about = json.loads(config.read_text("utf-8")).get("saert", {})
    return str(about["sae"]["hookpoint"]) if about else None
