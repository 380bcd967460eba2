"""Answers in OpenAI's shapes, whole or in pieces, with what the SAEs had to say beside them."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from saert.engines.server.engine import End, Job, Reason, Step
from saert.engines.server.monitors import Alarm, Reading
from saert.engines.server.shelf import Shelf
from saert.engines.server.text import Text

Kind = Literal["completion", "chat"]
FINISH: dict[Reason, str] = {"stop": "stop", "length": "length", "monitor": "content_filter"}
NAMES: dict[Kind, tuple[str, str, str]] = {
    "completion": ("cmpl-", "text_completion", "text_completion"),
    "chat": ("chatcmpl-", "chat.completion", "chat.completion.chunk"),
}


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer."""

    text: str = ""
    tokens: tuple[dict[str, Any], ...] = ()  # as in logprobs of a chat
    events: tuple[dict[str, Any], ...] = ()
    codes: tuple[dict[str, Any], ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.text or self.tokens or self.events or self.codes)


@dataclass
class Answer:
    """An answer that is being written.

    Attributes:
        asked: whether the request had a `saert` field: only then there is one in the answer.
        written: tokens so far; finish: OpenAI's reason, None until it is over.
    """

    kind: Kind
    model: str
    job: Job
    tokenizer: Any
    shelf: Shelf
    stops: list[str]
    asked: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    written: int = 0
    finish: str | None = None

    def __post_init__(self) -> None:
        self.id = NAMES[self.kind][0] + uuid.uuid4().hex
        self._text = Text(self.tokenizer, self.job.prompt, self.stops)
        self._ids = list(self.job.prompt)
        self._begins = 0  # where in the text the next token begins

    # -- steps ---------------------------------------------------------------------------------

    def add(self, step: Step) -> Piece:
        """What a step adds. `finish` is set if a stop text came."""
        events = tuple(self._event(alarm) for alarm in step.alarms)
        codes = tuple(self._codes(reading) for reading in step.readings)
        if step.token is None:
            return Piece("", (), events, codes)
        self.written += 1
        self._ids.append(step.token)
        tokens = () if step.logprob is None else (self._logprob(step),)
        ends = step.token in self.job.stops
        text = "" if ends else self._text.add(step.token)
        if self._text.stopped:
            self.finish = "stop"
        return Piece(text, tokens, events, codes)

    def end(self, end: End) -> Piece:
        """The rest of the text."""
        self.finish = self.finish or FINISH.get(end.reason, "stop")
        return Piece(self._text.end())

    def _event(self, alarm: Alarm) -> dict[str, Any]:
        monitor = alarm.monitor
        return {
            "type": "monitor",
            "action": monitor.action,
            "sae": monitor.sae,
            "latent": monitor.latent,
            "label": self.shelf.label(monitor.sae, monitor.latent),
            "threshold": monitor.threshold,
            "activation": None if math.isnan(alarm.activation) else alarm.activation,
            **self._token_at(alarm.position),
        }

    def _codes(self, reading: Reading) -> dict[str, Any]:
        latents = [
            {"latent": i, "activation": value, "label": self.shelf.label(reading.sae, i)}
            for i, value in reading.latents
        ]
        return {"sae": reading.sae, **self._token_at(reading.position), "latents": latents}

    def _token_at(self, position: int) -> dict[str, Any]:
        token, prompt = self._ids[position], len(self.job.prompt)
        where = "prompt" if position < prompt else "generated"
        return {
            "position": position,
            "phase": where,
            "token_id": token,
            "token": self.tokenizer.decode([token]),
        }

    def _logprob(self, step: Step) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token])
            return {
                "token": text,
                "logprob": max(logprob, -9999.0),
                "bytes": list(text.encode("utf-8", "replace")),
            }

        assert step.token is not None and step.logprob is not None
        return one(step.token, step.logprob) | {"top_logprobs": [one(t, v) for t, v in step.top]}

    # -- bodies --------------------------------------------------------------------------------

    @property
    def usage(self) -> dict[str, int]:
        read = len(self.job.prompt)
        return {
            "prompt_tokens": read,
            "completion_tokens": self.written,
            "total_tokens": read + self.written,
        }

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer in one body."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(tokens)
        body = self._body(NAMES[self.kind][1], [choice]) | {"usage": self.usage}
        if self.asked:
            body["saert"] = {
                "events": [event for piece in pieces for event in piece.events],
                "codes": [code for piece in pieces for code in piece.codes],
            }
        return body

    def chunk(self, piece: Piece, *, role: bool = False) -> dict[str, Any]:
        """A piece of a stream; the last one has the reason why it ends."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish}
        if self.kind == "chat":
            choice["delta"] = ({"role": "assistant"} if role else {}) | (
                {"content": piece.text} if piece.text or role else {}
            )
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._logprobs(list(piece.tokens))
        body = self._body(NAMES[self.kind][2], [choice])
        if piece.events or piece.codes:
            body["saert"] = {"events": list(piece.events), "codes": list(piece.codes)}
        return body

    def usage_chunk(self) -> dict[str, Any]:
        """What a stream says behind the last piece, if asked to."""
        return self._body(NAMES[self.kind][2], []) | {"usage": self.usage}

    def _body(self, what: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": what,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, tokens: list[dict[str, Any]]) -> dict[str, Any] | None:
        if not tokens:
            return None
        if self.kind == "chat":
            return {"content": tokens, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self._begins)
            self._begins += len(token["token"])
        return {
            "tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens
            ],
            "text_offset": offsets,
        }
