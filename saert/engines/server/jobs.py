"""A request as a job for an engine: tokens, edits by latent, limits."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from saert.engines.directive import Directive
from saert.engines.server.engine import Job, Sampling
from saert.engines.server.monitors import Monitor, Wanted
from saert.engines.server.schema import Chat, CodesOf, Common, Completion, Saert
from saert.engines.server.shelf import Shelf, Unknown
from saert.measure.steering.spec import EditSpec

DEFAULT_TOKENS = 16  # of a completion; a chat goes on as long as it may


@dataclass(frozen=True)
class Jobs:
    """Turns requests into jobs.

    Attributes:
        context: how many tokens the model holds.
        max_tokens: of one answer.
        stops: ids that end an answer.
        template: of chats, in place of the tokenizer's own.
    """

    shelf: Shelf
    tokenizer: Any
    context: int
    max_tokens: int
    stops: frozenset[int]
    template: str | None = None

    def completion(self, body: Completion) -> Job:
        """Raises ValueError: a prompt or edits that cannot be meant; TypeError likewise."""
        prompt = self._ids(body.prompt)
        return self._job(body, prompt, body.max_tokens or DEFAULT_TOKENS, body.alternatives)

    def chat(self, body: Chat) -> Job:
        """As `completion`; ValueError, too, for a model without a chat template."""
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "this model has no chat template, so it takes no chats: use /v1/completions, or "
                "start the server with --chat-template FILE"
            )
        messages = [{"role": one.role, "content": one.text} for one in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # what a template raises is its own
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        prompt = self._checked(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        left = max(1, min(self.max_tokens, self.context - len(prompt)))
        asked = body.max_completion_tokens or body.max_tokens or left
        return self._job(body, prompt, asked, body.alternatives)

    # -- helpers -------------------------------------------------------------------------------

    def _ids(self, prompt: str | list[Any]) -> tuple[int, ...]:
        if isinstance(prompt, list):
            if len(prompt) == 1 and isinstance(prompt[0], str | list):
                prompt = prompt[0]
            elif isinstance(prompt[0], str | list):
                raise ValueError(f"prompt: found {len(prompt)} prompts, expected one per request")
        if isinstance(prompt, str):
            return self._checked(self.tokenizer(prompt)["input_ids"])
        size = len(self.tokenizer)
        for one in prompt:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < size:
                raise ValueError(f"prompt: expected token ids, whole numbers from 0 to {size - 1}")
        return self._checked(prompt)

    def _checked(self, ids: list[int]) -> tuple[int, ...]:
        if not ids:
            raise ValueError("prompt: it has no tokens; write at least one word")
        if len(ids) >= self.context:
            raise ValueError(f"prompt: it has {len(ids)} tokens; the model holds {self.context}")
        return tuple(ids)

    def _job(
        self, body: Common, prompt: tuple[int, ...], asked: int, alternatives: int | None
    ) -> Job:
        if asked > self.max_tokens:
            raise ValueError(f"max_tokens: found {asked}, this server allows {self.max_tokens}")
        if len(prompt) + asked > self.context:
            raise ValueError(
                f"max_tokens: the prompt has {len(prompt)} tokens and {asked} more were asked for; "
                f"the model holds {self.context}"
            )
        sampling = Sampling(asked, body.temperature, body.top_p, body.seed, alternatives)
        directive, monitors, wanted = self._saert(body.saert or Saert())
        return Job(prompt, sampling, directive, monitors, wanted, self.stops)

    def _saert(self, asked: Saert) -> tuple[Directive, tuple[Monitor, ...], tuple[Wanted, ...]]:
        shelf = self.shelf
        edits = [self._edit(given) for given in asked.edits]
        monitors = []
        for one in asked.monitors:
            name = shelf.name(one.sae)
            latent = shelf.latent(name, one.latent)
            monitors.append(Monitor(name, latent, one.threshold, one.action, one.value, one.phase))
        codes = asked.return_codes
        several = [codes] if isinstance(codes, CodesOf) else codes or []
        wanted = [Wanted(shelf.name(one.sae), one.top, one.phase) for one in several]
        splice = asked.splice
        if isinstance(splice, bool):
            splice = list(shelf.attached) if splice else []
        read = dict.fromkeys((*(one.sae for one in monitors), *(one.sae for one in wanted)))
        directive = Directive(
            edits=(*edits, *(edit for one in monitors if (edit := one.edit()) is not None)),
            splice=tuple(splice),
            codes=tuple(read),
            key=uuid.uuid4().hex,
        )
        return directive.resolved(shelf.attached), tuple(monitors), tuple(wanted)

    def _edit(self, given: dict[str, Any]) -> EditSpec:
        name = self.shelf.name(given.get("sae"))
        if "latent" not in given:
            raise Unknown("an edit: 'latent' is missing")
        named = {"sae": name, "latent": self.shelf.latent(name, given["latent"])}
        if given.get("when") is not None:
            named["when"] = self.shelf.latent(name, given["when"])
        return EditSpec.from_dict(given | named)
