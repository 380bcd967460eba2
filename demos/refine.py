"""The Refine tab."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from saert.demos.workbench import Workbench

if TYPE_CHECKING:
    from saert.demos.app import Shared


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    gr.Markdown("Refine")
