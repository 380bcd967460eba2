"""What all visitors of the app share: a model, its SAEs, what their latents fire on.

Whoever runs the model asks for `model()`, a twin of it (`saert.twin`), so that one visitor's edits
cannot reach another's text. What visitors add is an SAE loaded by name, if the app allows it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from saert.demos.gather import Gathering, Hit, Worker, covering, search
from saert.hub.public import load_public
from saert.hub.session import Loaded, Session, UserError, canonical, load_sae
from saert.measure.features import FeatureIndex, own_index
from saert.measure.features.own import Told
from saert.runtime import attach
from saert.twin import twin

Loads = Literal["nothing", "hub", "anything"]
"""What visitors may load beside the SAEs of the start: nothing, what `load_public` allows, or
whatever `load` takes, files and addresses too, which is for one's own machine."""
KEPT = 4  # SAEs that visitors loaded, beside those of the start
AT_ONCE = 3  # loads
LONGEST = 300  # characters of a source
HEAVY: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 8}
"""For every event that runs the model: `button.click(…, **HEAVY)`. They share these places, where
gradio would give each event its own."""
PATIENT: dict[str, Any] = {"concurrency_id": "patient", "concurrency_limit": 16}
"""For events that wait for an index: they would keep the places of those that work."""


class Workbench:
    """A session's model and SAEs, for many visitors at once.

    Attributes:
        session: as `saert app` opened it. Its model is never hooked.
        features: the folder of a feature index (`saert index`), if there is one.
        loads: which other SAEs visitors may load.
    """

    def __init__(
        self, session: Session, features: Path | None = None, loads: Loads = "nothing"
    ) -> None:
        self.session, self.features, self.loads = session, features, loads
        self._own = {canonical(one.source): one for one in session.saes}
        for one in session.saes:  # otherwise the first hooks would, amid a visitor's request
            one.sae.to(session.model.device)
        self._loaded: OrderedDict[str, Future[Loaded]] = OrderedDict()
        self._lock = threading.Lock()  # of the two dictionaries; never held while anything is done
        self._places = threading.BoundedSemaphore(AT_ONCE)
        self._gathered: dict[str, Gathering] = {}
        self._worker = Worker()

    @property
    def sources(self) -> list[str]:
        """The SAEs of the start, by source string."""
        return [one.source for one in self._own.values()]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.session.tokenizer

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def model(self) -> Any:
        """A twin of the model, for one request."""
        return twin(self.session.model)

    def sae(self, source: str) -> Loaded:
        """An SAE by source string: of the start, loaded before, or loaded now.

        One SAE has one object, whose `source` is the one spelling to keep in edits.

        Raises whatever `load` raises, and UserError for one that does not fit the model or that
        visitors may not load.
        """
        name = canonical(_text(source))
        if name in self._own:
            return self._own[name]
        self._refuse(name)
        with self._lock:
            held = self._loaded.get(name)
            asked = held or self._loaded.setdefault(name, Future())
            self._loaded.move_to_end(name)
        if held is None:
            try:
                asked.set_result(self._open_in_turn(name))
            except BaseException as error:
                with self._lock:
                    self._loaded.pop(name, None)
                asked.set_exception(error)
            self._evict()
        return asked.result()

    def saes(self, sources: Sequence[str]) -> list[Loaded]:
        """Several of them, each once."""
        return list({one.source: one for one in map(self.sae, sources)}.values())

    def _refuse(self, name: str) -> None:
        """UserError for what visitors may not ask for; nothing is looked for before."""
        if self.loads == "nothing":
            raise UserError(f"this app has only the SAEs it began with: {', '.join(self.sources)}")
        if not name:
            raise UserError("name an SAE: a Hub id, REPO:PATH, a short name or a folder")
        if len(name) > LONGEST:
            raise UserError(f"an SAE's name of {len(name)} characters; at most {LONGEST} are read")

    def _open_in_turn(self, name: str) -> Loaded:
        if not self._places.acquire(blocking=False):  # whoever waited would keep others waiting
            raise UserError("other SAEs are being loaded; ask again in a moment")
        try:
            return self._open(name)
        finally:
            self._places.release()

    def _open(self, source: str) -> Loaded:
        loaded = load_sae(source) if self.loads == "anything" else load_public(source)
        if loaded.sae.hookpoint is None:
            raise UserError(f"{source} does not say where it reads, so it cannot be put on a model")
        loaded.sae.to(self.session.model.device)
        with attach(self.model(), loaded.sae, record=False, strict=self.session.strict):
            pass  # refuses, in the usual words, an SAE that does not fit
        return loaded

    def _evict(self) -> None:
        """Let go of the SAEs looked at longest ago, and of what is gathered for them."""
        with self._lock:
            done = [name for name, one in self._loaded.items() if one.done()]
            old = done[: max(0, len(done) - KEPT)]
            for name in old:
                del self._loaded[name]
            gone = [self._gathered.pop(name) for name in old if name in self._gathered]
        for one in gone:
            one.drop()

    # -- what latents fire on ----------------------------------------------------------------------

    def warm(self) -> None:
        """Begin with the index of the first SAE, in a thread of its own."""
        self.gathering(self.sources[0])

    def close(self) -> None:
        """End the work in the background, before the program ends."""
        self._worker.close()
        with self._lock:
            gathered, self._gathered = list(self._gathered.values()), {}
        for one in gathered:
            one.drop()

    def gathering(self, source: str, again: bool = False) -> Gathering:
        """The index of an SAE, made or being made; begun now if nobody asked for it before, and
        `again` if it failed. UserError if too many are waiting."""
        loaded = self.sae(source)
        name = canonical(loaded.source)
        with self._lock:
            held = self._gathered.get(name)
            if held is None or (again and held.failed):
                if held is not None:
                    held.drop()
                held = self._gathered[name] = self._gather(loaded, kept=name in self._own)
                try:
                    self._worker.begin(held)
                except UserError:
                    self._gathered.pop(name).drop()
                    raise
            return held

    def index(self, source: str) -> FeatureIndex | None:
        """What the latents of an SAE fire on; None while that is not gathered, or if it failed.

        From the folder of the start if it holds this SAE's, else from text that the model writes.
        """
        held = self._gathered.get(canonical(source))
        return None if held is None else held.index

    def wait_index(
        self, source: str, progress: Callable[[float, str], object] | None = None
    ) -> FeatureIndex:
        """The index, once it is there; `progress` hears the part done and what is being done.

        UserError, which says why, if it could not be made.
        """
        return self.gathering(source, again=True).wait(progress)

    def label(self, source: str, latent: int) -> str:
        """What somebody called a latent, else the tokens it fires on; empty if neither is known."""
        held = self._gathered.get(canonical(source))
        return self.sae(source).label(latent) or ("" if held is None else held.name(latent))

    def largest(self, source: str, latent: int) -> float | None:
        """The largest activation known of a latent: its label's, else the index's."""
        known = self.sae(source).labels.get(latent, {}).get("max_activation")
        held = self._gathered.get(canonical(source))
        if known is None and held is not None and held.index is not None:
            known = held.largest[latent]
        return None if known is None else float(known)

    def search(self, source: str, text: str) -> list[Hit]:
        """Latents by label, by automatic name, or by where they fire; UserError for empty text."""
        return search(self.sae(source), self._gathered.get(canonical(source)), text)

    def _gather(self, loaded: Loaded, kept: bool) -> Gathering:
        """Not begun yet. Only what is `kept`, the SAEs of the start, goes into the disk's cache."""
        folder = None if kept else TemporaryDirectory(prefix="saert-index-")
        place: dict[str, Any] = {} if folder is None else {"folder": Path(folder.name) / "index"}

        def make(told: Told) -> FeatureIndex:
            if self.features and (there := covering(self.features, loaded)) is not None:
                return there
            return own_index(
                self.model(), self.tokenizer, loaded.sae, labels=loaded.labels, told=told, **place
            )

        return Gathering(loaded.source, make, folder)


def _text(source: object) -> str:
    if not isinstance(source, str):  # from a program
        raise UserError(f"an SAE is named by a text, not by a {type(source).__name__}")
    return source
