"""What all visitors of the app share: a model, its SAEs, what their latents fire on.

Nothing here changes with what a visitor does. Whoever runs the model asks for `model()`, a twin of
it (`saert.twin`), so that one visitor's edits cannot reach another's text.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from saert.hub.session import Loaded, Session, UserError, load_sae
from saert.runtime import attach
from saert.twin import twin

KEPT = 8  # SAEs that visitors loaded, beside those of the start


class Workbench:
    """A session's model and SAEs, for many visitors at once.

    Attributes:
        session: as `saert app` opened it. Its model is never hooked.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._own = {one.source: one for one in session.saes}
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()

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
