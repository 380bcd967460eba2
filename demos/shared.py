"""Components that several tabs read and write."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class Shared:
    """What the app lays out before its tabs.

    Attributes:
        tabs: "steer", "explore", "ablate" or "refine" may be selected.
        source: the SAE looked at, a source string.
        edits: gr.State, list of `EditSpec.to_dict()`: what the Steer tab steers with.
    """

    tabs: gr.Tabs
    source: gr.Dropdown
    edits: gr.State
