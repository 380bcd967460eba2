"""What programs can ask of the Steer tab: setups as JSON in, plain data out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gradio.events import api

from saert.demos.errors import shown
from saert.demos.pieces import paced
from saert.demos.steer.setup import checked, steps
from saert.demos.steer.text import Texts, grown
from saert.demos.workbench import HEAVY, Workbench
from saert.measure.steering import Setup

EVERY = 0.25  # seconds between two states of the texts


def build(bench: Workbench) -> None:
    """The endpoints `steer` and `snippet`."""

    def steer(setup: str) -> Iterator[dict[str, Any]]:
        """Both texts of a setup, as they grow: `default` and `steered`, their tokens, `live`.

        Several times a second; the last has all of it.
        """
        for texts in paced(grown(steps(bench, checked(bench, Setup.from_json(setup)))), EVERY):
            yield _plain(texts)

    def snippet(setup: str) -> str:
        """The Python script that prints the texts of a setup."""
        return checked(bench, Setup.from_json(setup)).snippet(strict=bench.session.strict)

    api(shown(steer), api_name="steer", **HEAVY)
    api(shown(snippet), api_name="snippet")


def _plain(texts: Texts) -> dict[str, Any]:
    return {
        "default": "".join(one.text for one in texts.default),
        "steered": "".join(one.text for one in texts.steered),
        "prompt_tokens": [asdict(one) for one in texts.prompt],
        "default_tokens": [asdict(one) for one in texts.default],
        "steered_tokens": [asdict(one) for one in texts.steered],
        "live": {source: asdict(live) for source, live in texts.live.items()},
        "default_ms": texts.default_ms,
        "steered_ms": texts.steered_ms,
    }
