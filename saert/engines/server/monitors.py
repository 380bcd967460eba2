"""Latents that are watched while text is read and written.

An alarm goes off at a token where the SAE, encoding the hidden state before any edit of its own,
finds the latent above the threshold. A token that cannot be read, because its hidden state is huge
or not finite, sets off all monitors. A token is read in the pass after the one that drew it, so
the last token of an answer is never read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saert.edits import Phase
from saert.engines.codes import Chunk, CodeStore
from saert.measure.steering.spec import EditSpec

Action = Literal["flag", "stop", "clamp"]


@dataclass(frozen=True)
class Monitor:
    """One watched latent.

    Attributes:
        sae: the hookpoint.
        action: "flag" tells; "stop" also ends the answer before another token; "clamp" also sets
            the latent to `value` at that token, in the pass that found it.
    """

    sae: str
    latent: int
    threshold: float
    action: Action = "flag"
    value: float = 0.0
    phase: Phase = "all"

    def edit(self) -> EditSpec | None:
        """What "clamp" does."""
        if self.action != "clamp":
            return None
        return EditSpec(
            sae=self.sae,
            latent=self.latent,
            op="clamp",
            amount=self.value,
            phase=self.phase,
            when=self.latent,
            above=self.threshold,
        )


@dataclass(frozen=True)
class Alarm:
    """A monitor that went off: which, at which position of the job's tokens, how strongly.

    `activation` is NaN at a token that cannot be read.
    """

    monitor: Monitor
    position: int
    activation: float


@dataclass(frozen=True)
class Wanted:
    """Codes that a job wants to see: the `top` strongest latents of an SAE at each token."""

    sae: str
    top: int
    phase: Phase = "all"


@dataclass(frozen=True)
class Reading:
    """The strongest latents at one token, (latent, activation), the strongest first."""

    sae: str
    position: int
    latents: tuple[tuple[int, float], ...]


class PassCodes(CodeStore):
    """The codes of one pass only, by job and hookpoint, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self._pass: dict[str, dict[str, Chunk]] = {}

    def add(self, key: str, name: str, chunk: Chunk) -> None:
        """Keep the code of a job's tokens."""
        self._pass.setdefault(key, {})[name] = chunk

    def drain(self) -> dict[str, dict[str, Chunk]]:
        """All of them; none are left."""
        found, self._pass = self._pass, {}
        return found


def in_phase(phase: Phase, position: int, prompt_length: int) -> bool:
    """Whether a phase includes a position."""
    return phase == "all" or (phase == "prompt") == (position < prompt_length)


def alarms(
    monitors: Iterable[Monitor], chunks: Mapping[str, Chunk], prompt_length: int
) -> tuple[Alarm, ...]:
    """Those of the monitors that go off at the tokens of a pass, by position."""
    found = []
    for monitor in monitors:
        chunk = chunks[monitor.sae]
        latents, values = chunk.code.indices.numpy(), chunk.code.values.numpy()
        activations = (values * (latents == monitor.latent)).sum(-1)
        quiet = activations <= monitor.threshold  # NaN is not: nobody can say that it did not fire
        for token in np.flatnonzero(~quiet).tolist():
            position = int(chunk.positions[token])
            if in_phase(monitor.phase, position, prompt_length):
                found.append(Alarm(monitor, position, float(activations[token])))
    return tuple(sorted(found, key=lambda alarm: alarm.position))


def readings(
    wanted: Iterable[Wanted], chunks: Mapping[str, Chunk], prompt_length: int
) -> tuple[Reading, ...]:
    """The strongest latents at the tokens of a pass, for whoever wants them."""
    found = []
    for one in wanted:
        chunk = chunks[one.sae]
        activations = chunk.code.values.numpy()  # a torch operator costs ten times as much
        top = np.argsort(-np.abs(activations), axis=-1, kind="stable")[:, : one.top]
        values = np.take_along_axis(activations, top, -1).tolist()
        latents = np.take_along_axis(chunk.code.indices.numpy(), top, -1).tolist()
        for token, position in enumerate(chunk.positions.tolist()):
            if in_phase(one.phase, position, prompt_length):
                pairs = zip(latents[token], values[token], strict=True)
                latents_here = tuple(p for p in pairs if p[1] != 0 and not math.isnan(p[1]))
                found.append(Reading(one.sae, position, latents_here))
    return tuple(found)
