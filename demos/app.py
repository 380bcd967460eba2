"""The app: steer, explore, ablate and refine a live model in a browser.

`saert app` serves it, and so does a Hugging Face Space with this file (README.md beside it).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from saert.demos.ablate import tab as ablate
from saert.demos.explore import tab as explore
from saert.demos.markup import header
from saert.demos.refine import tab as refine
from saert.demos.steer import tab as steer
from saert.demos.theme import SAID, looks
from saert.demos.workbench import Workbench
from saert.hub import bundled
from saert.hub.session import BUNDLED, Session, open_session

LAUNCH: dict[str, Any] = {
    "ssr_mode": False,
    "run_history": False,  # what visitors write is kept nowhere
    "quiet": True,
    "prevent_thread_lock": True,
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


def build(session: Session, features: Path | None = None, *, warm: bool = False) -> gr.Blocks:
    """The whole app for a model and its SAEs, with a feature index if there is one; not served.

    With `warm`, what the first SAE's latents fire on is gathered from now on, in the background.
    """
    bench = Workbench(session, features)
    if warm:
        bench.warm()
    app = gr.Blocks(title="saert", analytics_enabled=False)
    with app:
        size = sum(parameter.numel() for parameter in session.model.parameters())
        gr.HTML(header(session.name, size, SAID), js_on_load=None, elem_id="header")
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
                    gr.HTML(f"<h2 class='saert-unseen'>{title}</h2>", js_on_load=None)
                    tab.build(bench, shared)
    return app


def open_default(model: str | None, sources: Sequence[str], **how: Any) -> Session:
    """As `open_session`, and every bundled SAE where none is named, the labelled one first."""
    if not sources and model in (None, BUNDLED):
        first = bundled.DEMO.hookpoint
        places = [first, *(place for place in bundled.HOOKPOINTS if place != first)]
        sources = [f"{BUNDLED}:{place}" for place in places]
    return open_session(model, sources, **how)


def launch(session: Session, features: Path | None = None, **options: Any) -> None:
    """Serve the app until interrupted; options as `gr.Blocks.launch` takes them.

    Raises OSError when the port asked for is taken.
    """
    app = build(session, features, warm=True).queue(default_concurrency_limit=8)
    _, address, public = app.launch(**(looks() | LAUNCH | options))
    print(f"saert on {session.name}: {public or address}  (ctrl-C ends it)", flush=True)
    app.block_thread()


def main() -> None:
    """Serve what SAERT_MODEL, SAERT_SAE (several: with spaces) and SAERT_FEATURES name."""
    asked = os.environ.get
    sources = asked("SAERT_SAE", "").split()
    features = asked("SAERT_FEATURES")
    launch(open_default(asked("SAERT_MODEL"), sources), Path(features) if features else None)


if __name__ == "__main__":
    main()
