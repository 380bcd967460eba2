"""The app: steer, explore, ablate and refine a live model in a browser.

Also what a Hugging Face Space runs (demos/README.md): the bundled model, or MODEL and SAE from the
environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import gradio as gr

from saert.demos import ablate, explore, refine, steer
from saert.demos.theme import STYLE, theme
from saert.demos.workbench import Workbench
from saert.hub.session import Session, open_session

LAUNCH: dict[str, Any] = {
    "css_paths": [STYLE],
    "footer_links": [],
    "ssr_mode": False,
    "show_error": True,
}


@dataclass(frozen=True)
class Shared:
    """Components that several tabs read and write.

    Attributes:
        tabs: "steer", "explore", "ablate" or "refine" may be selected.
        source: the SAE looked at, a source string.
        edits: gr.State, list of `EditSpec.to_dict()`: what the Steer tab steers with.
    """

    tabs: gr.Tabs
    source: gr.Dropdown
    edits: gr.State


def build(session: Session) -> gr.Blocks:
    """The whole app for a model and its SAEs; not yet served."""
    bench = Workbench(session)
    with gr.Blocks(title="saert", analytics_enabled=False) as app:
        gr.Markdown(f"# saert\n{session.name}")
        edits = gr.State([])
        source = gr.Dropdown(
            bench.sources, value=bench.sources[0], allow_custom_value=True,
            label="Sparse autoencoder", elem_id="source",
            info="one of these, or a Hub id, REPO:PATH or short name to load",
        )  # fmt: skip
        with gr.Tabs() as tabs:
            shared = Shared(tabs, source, edits)
            for title, tab in (
                ("Steer", steer), ("Explore", explore), ("Ablate", ablate), ("Refine", refine)
            ):  # fmt: skip
                with gr.Tab(title, id=title.lower()):
                    tab.build(bench, shared)
    return app


def launch(session: Session, **options: Any) -> None:
    """Serve the app until interrupted; options as `gr.Blocks.launch` takes them."""
    app = build(session).queue(default_concurrency_limit=8)
    app.launch(theme=theme(), **LAUNCH, **options)


if __name__ == "__main__":
    launch(open_session(os.environ.get("MODEL"), os.environ.get("SAE", "").split()))
