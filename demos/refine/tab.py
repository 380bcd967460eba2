"""The Refine tab: a text before and after refinement, and what the model makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.events import api

from saert.demos.errors import shown
from saert.demos.pieces import chosen_of
from saert.demos.refine import view
from saert.demos.refine.data import refinement
from saert.demos.widgets import bars, figures, tokens
from saert.demos.workbench import Workbench
from saert.hub.session import UserError

if TYPE_CHECKING:
    from saert.demos.app import Shared

EXAMPLES = (
    "Once upon a time, there was a little girl named Lily. One day, she found a red ball.",
    "Tom and his dog went to the park. They saw a big tree and wanted to climb it.",
)
WHAT = (
    "An encoder chooses which latents are active, and how strongly. Refinement keeps the choice "
    "and finds the strengths, none negative, that reconstruct best."
)


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    seen, place = gr.State(None), gr.State(None)  # refinement's, and a position
    gr.Markdown(WHAT)
    text = gr.Textbox(EXAMPLES[0], label="Text", lines=2, elem_id="refine-text")
    gr.Examples([[one] for one in EXAMPLES], text, label="Examples", api_visibility="private")
    run = gr.Button("Refine", variant="primary", elem_id="refine-run")
    status = gr.Markdown(elem_id="refine-status")
    whole = figures("The whole text, as encoded → refined", "refine-summary")
    heat = gr.Dropdown(
        [(name, key) for key, name in view.HEATS.items()], value="error",
        label="Colour tokens by", elem_id="refine-heat",
        info="errors, losses and KL have the same scale as encoded and refined",
    )  # fmt: skip
    line = tokens("Text, choose a token", "refine-tokens", choose=True, empty="Press Refine.")
    about = gr.Markdown(elem_id="refine-about")
    here = figures("This token, as encoded → refined", "refine-token")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2):
            latents = bars("Its latents, as encoded → refined", "refine-latents")
        with gr.Column(scale=3):
            gr.Markdown("What comes next, by the model and with either reconstruction in place")
            with gr.Row():
                bare = bars("The model", "refine-next-model")
                spliced = bars("As encoded", "refine-next-spliced")
                respliced = bars("Refined", "refine-next-refined")
    detail = [place, line, about, here, latents, bare, spliced, respliced]
    results = [seen, status, whole, *detail]

    def detailed(found: dict[str, Any], heat: str, at: int) -> list[Any]:
        nexts = [view.predicted(found[name], at) for name in ("model", "spliced", "respliced")]
        return [
            at, view.tokens(found, heat, at), view.about(found, at), view.token_summary(found, at),
            view.latents(found, at), *nexts,
        ]  # fmt: skip

    @shown
    def on_run(source: str, text: str, heat: str) -> list[Any]:
        found = refinement(bench, source, text)
        last = len(found["tokens"]) - 1
        return [found, view.status(found), view.summary(found), *detailed(found, heat, last)]

    @shown
    def on_token(found: dict[str, Any] | None, heat: str, event: gr.EventData) -> list[Any]:
        if found is None:
            raise UserError("refine a text first")
        return detailed(found, heat, chosen_of(event, len(found["tokens"])))

    def on_heat(found: dict[str, Any] | None, heat: str, at: int | None) -> Any:
        return gr.skip() if found is None else view.tokens(found, heat, at)

    def on_source(found: dict[str, Any] | None) -> list[Any]:
        """What is shown was another SAE's."""
        if found is None:
            return [gr.skip()] * len(results)
        again = "Another sparse autoencoder is chosen: press Refine again."
        return [None, again, [], None, [], "", [], [], [], [], []]

    def refinement_of(source: str, text: str) -> dict[str, Any]:
        """A text's activations, errors and predictions, as encoded and refined."""
        return refinement(bench, source, text)

    private: dict[str, Any] = {"api_visibility": "private"}
    gr.on(
        [run.click, text.submit], on_run, [shared.source, text, heat], results, **private
    )  # fmt: skip
    line.select(on_token, [seen, heat], detail, **private)
    heat.change(on_heat, [seen, heat, place], line, **private)
    shared.source.change(on_source, seen, results, **private)
    api(shown(refinement_of), api_name="refinement")
