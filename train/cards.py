"""The model card of a trained SAE: the published repo's card, for one SAE that has no repo yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saert.hub.formats.saelens_write import saelens_can_read
from saert.hub.publishing.card import render
from saert.hub.publishing.entry import Entry
from saert.sae import SAE

REPO = "YOU/THIS_REPOSITORY"
UNMEASURED = "Nothing: the run held out no text (`data.holdout = 0`)."


def card(sae: SAE, name: str, record: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    """The README.md of one SAE. `record` is the run's `run.json`; metrics None: not evaluated."""
    layout = "saelens" if saelens_can_read(sae) else "saert"
    entry = Entry.of(sae, layout, metrics, record)
    return render({name: entry}, REPO, title=f"`{name}`", unmeasured=UNMEASURED)
