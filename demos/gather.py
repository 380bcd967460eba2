"""Feature indices made behind the visitors' backs, one at a time, so that no page waits for one."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from saert.hub.session import Loaded, UserError
from saert.measure.features import FeatureIndex
from saert.measure.features.names import automatic_name
from saert.measure.features.own import Told
from saert.measure.identity import sae_identity

log = logging.getLogger(__name__)
WAITING = 8  # that may wait for their turn
DROPPED = "the SAE is no longer looked at"


class Dropped(Exception):
    """Nobody wants the index any more."""


class Gathering:
    """An index that is being made, or waits for its turn.

    Attributes:
        index: once it is there; names: of its latents, as they are worked out.
        largest: the largest activation of each latent, once the index is there.
        failed: why there will be none; part, what: how far it is, from 0 to 1, and at what.
        folder: where its files go, if they are not to outlive it.
    """

    def __init__(
        self,
        source: str,
        make: Callable[[Told], FeatureIndex],
        folder: TemporaryDirectory[str] | None = None,
    ) -> None:
        self.index: FeatureIndex | None = None
        self.names: dict[int, str] = {}
        self.largest: list[float] = []
        self.failed, self.part, self.what = "", 0.0, "waiting for other indices"
        self.folder = folder
        self._source, self._make = source, make
        self._began, self._dropped, self._ended = (threading.Event() for _ in range(3))

    def run(self) -> None:
        """Make the index, here and now; what goes wrong is kept in `failed`."""
        self._began.set()
        try:
            self._told(0.0, "beginning")
            index = self._make(self._told)
            self.largest, self.index = index.largest.tolist(), index
        except Dropped:
            self.failed = DROPPED
        except Exception as error:  # it is told to whoever waits
            log.exception("no feature index of %s", self._source)
            self.failed = str(error) or type(error).__name__
        finally:
            self._ended.set()
        for latent in range(len(self.index or ())):
            if self._dropped.is_set():
                break
            self.name(latent)  # for searches
        self._tidy()

    def drop(self) -> None:
        """Make it no further, and let go of its files."""
        self._dropped.set()
        if not self._began.is_set():
            self.failed = DROPPED
            self._ended.set()
        self._tidy()

    def _tidy(self) -> None:
        if self._dropped.is_set() and self._ended.is_set() and self.folder is not None:
            self.folder.cleanup()

    def _told(self, part: float, what: str) -> None:
        if self._dropped.is_set():
            raise Dropped
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


class Worker:
    """The one thread that makes indices, in the order they were asked for."""

    def __init__(self) -> None:
        self._asked: queue.Queue[Gathering | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True, name="feature indices")
        self._now: Gathering | None = None
        self._closed = False

    def begin(self, gathering: Gathering) -> None:
        """Put one into the queue. UserError if too many wait already."""
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._asked.put_nowait(gathering)
        except queue.Full:
            raise UserError(
                f"examples of {WAITING} other SAEs are to be gathered first; ask again later"
            ) from None

    def close(self, seconds: float = 20.0) -> None:
        """End what is being made, and the thread. Torch aborts a program that exits under it."""
        self._closed = True
        if self._thread.ident is None:
            return
        if (now := self._now) is not None:
            now.drop()
        with suppress(queue.Full):
            self._asked.put_nowait(None)  # wakes it up
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._closed and (asked := self._asked.get()) is not None:
            self._now = asked
            if self._closed:  # meanwhile
                asked.drop()
            asked.run()
            self._now = None
            del asked  # an SAE, perhaps


@dataclass(frozen=True)
class Hit:
    """A latent that answers a search, and why."""

    latent: int
    label: str
    why: str


def search(loaded: Loaded, gathered: Gathering | None, text: str, most: int = 30) -> list[Hit]:
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
    index = None if gathered is None else gathered.index
    if gathered is not None and index is not None:

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
