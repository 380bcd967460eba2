"""What all visitors of the app share: a model, its SAEs, what their latents fire on.

Nothing here changes with what a visitor does. Whoever runs the model asks for `model()`, a twin of
it (`saert.twin`), so that one visitor's edits cannot reach another's text.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saert.demos.gather import Gathering, Hit, covering, search
from saert.hub.session import Loaded, Session, UserError, load_sae
from saert.measure.features import FeatureIndex, own_index
from saert.measure.features.own import Told
from saert.runtime import attach
from saert.twin import twin

KEPT = 8  # SAEs that visitors loaded, beside those of the start


class Workbench:
    """A session's model and SAEs, for many visitors at once.

    Attributes:
        session: as `saert app` opened it. Its model is never hooked.
        features: the folder of a feature index (`saert index`), if there is one.
    """

    def __init__(self, session: Session, features: Path | None = None) -> None:
        self.session = session
        self.features = features
        self._own = {one.source: one for one in session.saes}
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()
        self._gathered: dict[str, Gathering] = {}

    @property
    def sources(self) -> list[str]:
        """The SAEs of the start, by source string."""
        return list(self._own)

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

        Raises whatever `load` raises, and UserError for one that does not fit the model.
        """
        source = source.strip()
        if source in self._own:
            return self._own[source]
        with self._lock:
            if source not in self._loaded:
                self._loaded[source] = self._open(source)
                while len(self._loaded) > KEPT:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(source)
            return self._loaded[source]

    def saes(self, sources: Sequence[str]) -> list[Loaded]:
        """Several of them, each once."""
        return [self.sae(source) for source in dict.fromkeys(sources)]

    def _open(self, source: str) -> Loaded:
        if not source:
            raise UserError("name an SAE: a Hub id, REPO:PATH, a short name or a folder")
        loaded = load_sae(source)
        if loaded.sae.hookpoint is None:
            raise UserError(f"{source} does not say where it reads, so it cannot be put on a model")
        with attach(self.model(), loaded.sae, record=False, strict=self.session.strict):
            pass  # refuses, in the usual words, an SAE that does not fit
        loaded.sae.to(self.session.model.device)
        return loaded

    # -- what latents fire on ----------------------------------------------------------------------

    def warm(self) -> None:
        """Begin with the index of the first SAE, in a thread of its own."""
        self.gathering(self.sources[0])

    def gathering(self, source: str, again: bool = False) -> Gathering:
        """The index of an SAE, made or being made; begun now if nobody asked for it before, and
        `again` if it failed."""
        loaded = self.sae(source)
        with self._lock:
            known = {one.source for one in (*self._own.values(), *self._loaded.values())}
            self._gathered = {s: one for s, one in self._gathered.items() if s in known}
            held = self._gathered.get(loaded.source)
            if held is None or (again and held.failed):
                made = Gathering(loaded.source, lambda told: self._gather(loaded, told))
                self._gathered[loaded.source] = made
            return self._gathered[loaded.source]

    def index(self, source: str) -> FeatureIndex | None:
        """What the latents of an SAE fire on; None while that is being gathered, or if it failed.

        From the folder of the start if it holds this SAE's, else from text that the model writes.
        """
        return self.gathering(source).index

    def wait_index(
        self, source: str, progress: Callable[[float, str], object] | None = None
    ) -> FeatureIndex:
        """The index, once it is there; `progress` hears the part done and what is being done.

        UserError, which says why, if it could not be made.
        """
        return self.gathering(source, again=True).wait(progress)

    def label(self, source: str, latent: int) -> str:
        """What somebody called a latent, else the tokens it fires on; empty if neither is known."""
        return self.sae(source).label(latent) or self.gathering(source).name(latent)

    def largest(self, source: str, latent: int) -> float | None:
        """The largest activation known of a latent: its label's, else the index's."""
        known = self.sae(source).labels.get(latent, {}).get("max_activation")
        if known is None and (index := self.index(source)) is not None:
            known = index.largest[latent]
        return None if known is None else float(known)

    def search(self, source: str, text: str) -> list[Hit]:
        """Latents by label, by automatic name, or by where they fire; UserError for empty text."""
        return search(self.sae(source), self.gathering(source), text)

    def _gather(self, loaded: Loaded, told: Told) -> FeatureIndex:
        if self.features is not None and (there := covering(self.features, loaded)) is not None:
            return there
        return own_index(
            self.model(), self.tokenizer, loaded.sae, labels=loaded.labels, told=told
        )  # fmt: skip
