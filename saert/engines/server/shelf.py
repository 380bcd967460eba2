"""The SAEs that are served, as clients know them: by hookpoint, latents by number or label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from saert.engines.directive import Attached, find
from saert.hub.session import Loaded
from saert.hub.sources.address import is_url
from saert.hub.sources.source import is_here
from saert.measure.features.direction import direction
from saert.measure.features.index import FeatureIndex
from saert.sae import SAE


class Unknown(ValueError):
    """There is no such SAE or latent."""


class Shelf:
    """Served SAEs.

    Args:
        loaded: one for each hookpoint.
        model, tokenizer: for the logit lens; the model must have no hooks, a `saert.twin` say.
        indices: feature indices by hookpoint, for the latents' cards.
        slots: how many edits (and clamping monitors) of one SAE a request may have.

    Raises ValueError: two SAEs at one hookpoint.
    """

    def __init__(
        self,
        loaded: Sequence[Loaded],
        model: Any,
        tokenizer: Any,
        indices: Mapping[str, FeatureIndex] | None = None,
        slots: int = 16,
    ) -> None:
        self._model, self._tokenizer, self._indices = model, tokenizer, indices or {}
        self._loaded = {one.name: one for one in loaded}
        if len(self._loaded) < len(loaded):
            names = [one.name for one in loaded]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two SAEs read {twice}; a server holds one for each hookpoint")
        self.attached = {
            name: Attached(_shown(one.source), one.sae.num_latents, slots)
            for name, one in self._loaded.items()
        }
        self._by_label = {
            name: _by_label(one, self._indices.get(name)) for name, one in self._loaded.items()
        }

    @property
    def saes(self) -> dict[str, SAE]:
        """By hookpoint."""
        return {name: one.sae for name, one in self._loaded.items()}

    def name(self, given: object) -> str:
        """The hookpoint of an SAE, by hookpoint or source; None: of the only one."""
        if given is None:
            if len(self._loaded) == 1:
                return next(iter(self._loaded))
            raise Unknown(f"which SAE? Say sae: one of {', '.join(self._loaded) or 'none'}")
        if not isinstance(given, str):
            raise Unknown(f"sae: found {type(given).__name__}, expected a hookpoint")
        try:
            return find(given, self.attached)
        except ValueError as error:
            raise Unknown(str(error)) from None

    def latent(self, name: str, given: object) -> int:
        """A latent's number, of a number or a label."""
        there = self.attached[name].num_latents
        if isinstance(given, int) and not isinstance(given, bool):
            if not 0 <= given < there:
                raise Unknown(f"latent {given} does not exist; {name} has 0 to {there - 1}")
            return given
        if not isinstance(given, str):
            raise Unknown(f"latent: found {type(given).__name__}, expected a number or a label")
        numbers = self._by_label[name].get(given.strip().lower(), [])
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise Unknown(f"{given!r} is the label of several latents of {name}: {numbers[:8]}")
        close = get_close_matches(given.lower(), self._by_label[name], 3, 0.4)
        near = f"; nearest: {', '.join(close)}" if close else ""
        raise Unknown(f"no latent of {name} is labelled {given[:80]!r}{near}")

    def label(self, name: str, latent: int) -> str | None:
        """What a latent stands for, if somebody said so."""
        own = self._loaded[name].label(latent)
        index = self._indices.get(name)
        return own if own is not None or index is None else index.labels.get(latent)

    def describe(self) -> list[dict[str, Any]]:
        """Every SAE."""
        return [self._describe(name) for name in self._loaded]

    def _describe(self, name: str) -> dict[str, Any]:
        sae, target = self._loaded[name].sae, self._loaded[name].sae.target_hookpoint
        return {
            "id": name,
            "object": "saert.source",
            "source": self.attached[name].source,
            "hookpoint": name,
            "target_hookpoint": None if target is None else str(target),
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "num_latents": sae.num_latents,
            "activation": repr(sae.activation),
            "labelled": sum(map(len, self._by_label[name].values())),
            "cards": name in self._indices,
        }

    def feature(self, given: str) -> dict[str, Any]:
        """A latent, by HOOKPOINT/LATENT, or LATENT if there is one SAE; a number or a label."""
        head, slash, rest = given.partition("/")
        name, what = (self.name(head), rest) if slash else (self.name(None), head)
        latent = self.latent(name, int(what) if what.isascii() and what.isdigit() else what)
        one = self._loaded[name]
        weights = direction(self._model, self._tokenizer, one.sae, latent)
        index = self._indices.get(name)
        return {
            "id": f"{name}/{latent}",
            "object": "saert.feature",
            "sae": name,
            "latent": latent,
            "label": self.label(name, latent),
            "known": dict(one.labels.get(latent, {})),
            "decoder_norm": float(one.sae.W_dec[latent].norm()),
            "promoted": [{"token": t.string, "logit": t.value} for t in weights.promoted],
            "suppressed": [{"token": t.string, "logit": t.value} for t in weights.suppressed],
            "neighbours": [{"latent": i, "cosine": cosine} for i, cosine in weights.neighbours],
            "card": None if index is None else index.card(latent).as_dict(),
        }


def _by_label(one: Loaded, index: FeatureIndex | None) -> dict[str, list[int]]:
    numbers = {*one.labels, *(() if index is None else index.labels)}
    found: dict[str, list[int]] = {}
    for latent in sorted(numbers):
        label = one.label(latent) or (None if index is None else index.labels.get(latent))
        if label:
            found.setdefault(label.strip().lower(), []).append(latent)
    return found


def _shown(source: str) -> str:
    """A source without this machine's folders."""
    if is_url(source) or not is_here(source):
        return source
    return Path(source).name
