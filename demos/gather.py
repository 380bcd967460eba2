"""Feature indices made behind the visitors' backs, one at a time, so that no page waits for one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saert.hub.session import Loaded, UserError
from saert.measure.features import FeatureIndex
from saert.measure.features.names import automatic_name
from saert.measure.features.own import Told
from saert.measure.identity import sae_identity

log = logging.getLogger(__name__)
TURN = threading.Lock()  # a second one would only make both slower


class Gathering:
    """An index that a thread of its own makes.

    Attributes:
        index: once it is there; names: of its latents, as they are worked out.
        failed: why there will be none; part, what: how far it is, from 0 to 1, and at what.
    """

    def __init__(self, source: str, make: Callable[[Told], FeatureIndex]) -> None:
        self.index: FeatureIndex | None = None
        self.names: dict[int, str] = {}
        self.failed, self.part, self.what = "", 0.0, "waiting for other indices"
        self._source, self._make, self._ended = source, make, threading.Event()
        threading.Thread(target=self._run, daemon=True, name=f"index {source}").start()

    def _run(self) -> None:
        try:
            with TURN:
                self.index = self._make(self._told)
        except Exception as error:  # it ends this thread, and is told to whoever waits
            log.exception("no feature index of %s", self._source)
            self.failed = str(error) or type(error).__name__
        finally:
            self._ended.set()
        for latent in range(len(self.index or ())):
            self.name(latent)  # for searches

    def _told(self, part: float, what: str) -> None:
        self.part, self.what = part, what

    def pending(self, seconds: float) -> tuple[float, str] | None:
        """The part done and what is being done, after so long at most; None once it has ended."""
        return None if self._ended.wait(seconds) else (self.part, self.what)

    def wait(self, progress: Callable[[float, str], object] | None = None) -> FeatureIndex:
        """The index, once it is made. UserError if it cannot be."""
        while (pending := self.pending(0.25)) is not None:
            if progress is not None:
                progress(*pending)
        if self.index is None:
            raise UserError(f"no examples of {self._source}: {self.failed}")
        return self.index

    def name(self, latent: int) -> str:
        """The automatic name of a latent; empty while there is no index."""
        if latent not in self.names and self.index is not None:
            self.names[latent] = automatic_name(self.index, latent)
        return self.names.get(latent, "")


@dataclass(frozen=True)
class Hit:
    """A latent that answers a search, and why."""

    latent: int
    label: str
    why: str


def search(loaded: Loaded, gathered: Gathering, text: str, most: int = 30) -> list[Hit]:
    """Latents whose label holds a text, then those named so, then those that fire where it stands.

    The last two need the index, and are left out while there is none.
    """
    asked = text.strip().casefold()
    if not asked:
        raise UserError("write what to look for: a word, or part of a label")
    hits: dict[int, Hit] = {}
    for latent in sorted(loaded.labels):
        label = loaded.label(latent) or ""
        if asked in label.casefold():
            hits[latent] = Hit(latent, label, "label")
    index = gathered.index
    if index is not None:

        def called(latent: int) -> str:
            return loaded.label(latent) or gathered.name(latent)

        for latent, name in sorted(gathered.names.copy().items()):
            if latent not in loaded.labels and asked in name.casefold():
                hits.setdefault(latent, Hit(latent, name, "strongest tokens"))
        try:
            found = index.search(text.strip(), most)
        except ValueError:  # no single token is spelt so
            found = []
        for one in found:
            why = f"fires on {one.coverage:.0%} of “{text.strip()}”"
            hits.setdefault(one.latent, Hit(one.latent, called(one.latent), why))
    return list(hits.values())[:most]


def covering(folder: Path, loaded: Loaded) -> FeatureIndex | None:
    """The index of an SAE in a folder that `saert index` made; None if it holds no such SAE's.

    Raises ValueError for an index that is damaged.
    """
    try:
        index = FeatureIndex.open(folder, str(loaded.sae.hookpoint))
    except FileNotFoundError:
        return None
    held = index.config["saert"]["sae"]["fingerprint"]
    return index if held == sae_identity(loaded.sae)["fingerprint"] else None
