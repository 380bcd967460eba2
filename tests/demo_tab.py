"""One tab of the app, served alone to `gradio_client`, without the index that names latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saert.demos.workbench import Workbench
from saert.hub.session import Session, open_session

SOURCES = ("bundled:resid_post.2", "bundled:mlp_in.2")


class Bench(Workbench):
    """Labels by hand only: what latents fire on takes a while to gather."""

    def label(self, source: str, latent: int) -> str:
        return self.sae(source).label(latent) or ""


def bench(session: Session | None = None) -> Bench:
    return Bench(session or open_session("bundled", SOURCES))


@contextmanager
def served(tab: Any, bench: Workbench) -> Iterator[Any]:
    """A `gradio_client.Client` of an app with this tab alone."""
    import gradio as gr
    from gradio_client import Client

    from saert.demos.shared import Shared

    with gr.Blocks(analytics_enabled=False) as app:
        edits = gr.State([])
        source = gr.Dropdown(bench.sources, value=bench.sources[0])
        with gr.Tabs() as tabs, gr.Tab("One"):
            tab.build(bench, Shared(tabs, source, edits))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    client = Client(url, verbose=False)
    yield client
    client.close()
    app.close(verbose=False)
