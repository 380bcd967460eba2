"""The app: steer, explore, ablate and refine a live model in a browser.

`saert app` serves it, and so does a Hugging Face Space with this file (README.md beside it).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from saert.demos.ablate import tab as ablate
from saert.demos.explore import tab as explore
from saert.demos.markup import header
from saert.demos.refine import tab as refine
from saert.demos.shared import Shared
from saert.demos.steer import tab as steer
from saert.demos.theme import SAID, looks
from saert.demos.workbench import Loads, Workbench
from saert.hub import bundled
from saert.hub.session import BUNDLED, Session, open_session

LAUNCH: dict[str, Any] = {
    "ssr_mode": False,
    "run_history": False,  # what visitors write is kept nowhere
    "quiet": True,
    "prevent_thread_lock": True,
    "show_error": True,
    "max_file_size": "1mb",  # of a setup; nothing else is uploaded
    "state_session_capacity": 200,  # pages whose state is kept; the oldest begin anew
}
QUEUE: dict[str, Any] = {"default_concurrency_limit": 8, "max_size": 64}
HOUR = 3600  # seconds


LOADED: dict[Loads, str] = {
    "nothing": "what reads the model's hidden states",
    "hub": "one of these, or ORG/REPO:PATH or a short name, to load from the Hub",
    "anything": "one of these, or a Hub id, REPO:PATH, short name or folder to load",
}


def build(
    session: Session, features: Path | None = None, loads: Loads = "nothing"
) -> gr.Blocks:  # fmt: skip
    """The whole app for a model and its SAEs, with a feature index if there is one; not served.

    `loads` says which other SAEs visitors may load.
    """
    return lay(Workbench(session, features, loads))


def lay(bench: Workbench) -> gr.Blocks:
    """The page of a workbench; not served."""
    session = bench.session
    app = gr.Blocks(title="saert", analytics_enabled=False, delete_cache=(HOUR, HOUR))
    with app:
        size = sum(parameter.numel() for parameter in session.model.parameters())
        gr.HTML(header(session.name, size, SAID), js_on_load=None, elem_id="header")
        edits = gr.State([])
        source = gr.Dropdown(
            bench.sources, value=bench.sources[0], allow_custom_value=bench.loads != "nothing",
            label="Sparse autoencoder", elem_id="source", info=LOADED[bench.loads],
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


def launch(
    session: Session, features: Path | None = None, loads: Loads = "nothing", **options: Any
) -> None:
    """Serve the app until interrupted; options as `gr.Blocks.launch` takes them.

    What the first SAE's latents fire on is gathered from now on, in the background.

    Raises OSError when the port asked for is taken.
    """
    bench = Workbench(session, features, loads)
    try:
        app = lay(bench).queue(**QUEUE)
        _, address, public = app.launch(**(looks() | LAUNCH | options))
        print(f"saert on {session.name}: {public or address}  (ctrl-C ends it)", flush=True)
        bench.warm()
        app.block_thread()
    finally:
        bench.close()


def main() -> None:
    """Serve what SAERT_MODEL, SAERT_SAE (several: with spaces) and SAERT_FEATURES name.

    With SAERT_ANY_SAE=1, visitors may load others from the Hub.
    """
    asked = os.environ.get
    sources = asked("SAERT_SAE", "").split()
    features = asked("SAERT_FEATURES")
    session = open_default(asked("SAERT_MODEL"), sources)
    loads: Loads = "hub" if asked("SAERT_ANY_SAE") == "1" else "nothing"
    launch(session, Path(features) if features else None, loads)


if __name__ == "__main__":
    main()
