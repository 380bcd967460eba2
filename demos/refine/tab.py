"""The Refine tab: a text before and after refinement, and what the model makes of it."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio.events import api

from saert.demos.errors import shown
from saert.demos.pieces import chosen_of
from saert.demos.refine import view
from saert.demos.refine.data import refinement
from saert.demos.shared import Shared
from saert.demos.widgets import bars, figures, tokens
from saert.demos.workbench import HEAVY, Workbench
from saert.hub.session import UserError

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
    refined = gr.State("")  # the text that `seen` is of
    gr.HTML(f"<p class='saert-note'>{WHAT}</p>", elem_classes="saert-say")
    with gr.Row(equal_height=False):
        text = gr.Textbox(
            EXAMPLES[0], label="Text", lines=2, elem_id="refine-text", scale=5, min_width=300,
            info="what the model reads; each token can then be chosen",
        )  # fmt: skip
        run = gr.Button(
            "Refine", variant="primary", elem_id="refine-run", scale=1, min_width=120
        )  # fmt: skip
    examples = gr.Examples(
        [[one] for one in EXAMPLES], text, label="Examples", api_visibility="private"
    )
    status = gr.HTML(elem_id="refine-status", elem_classes="saert-say")
    whole = figures(
        "The whole text, as encoded → refined", "refine-summary", empty="Press Refine."
    )  # fmt: skip
    heat = gr.Dropdown(
        [(name, key) for key, name in view.HEATS.items()], value="error",
        label="Colour tokens by", elem_id="refine-heat",
        info="errors, losses and KL have the same scale as encoded and refined",
    )  # fmt: skip
    line = tokens("Text, choose a token", "refine-tokens", choose=True, empty="Press Refine.")
    about = gr.HTML(elem_id="refine-about", elem_classes="saert-say")
    here = figures("This token, as encoded → refined", "refine-token")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            latents = bars("Its latents, as encoded → refined", "refine-latents")
        with gr.Column(scale=3, min_width=300), gr.Row():
            bare = bars("Next, by the model", "refine-next-model")
            spliced = bars("Spliced, as encoded", "refine-next-spliced")
            respliced = bars("Spliced, refined", "refine-next-refined")
    detail = [place, line, about, here, latents, bare, spliced, respliced]
    results = [seen, refined, status, whole, *detail]

    def line_of(found: dict[str, Any], heat: str, at: int | None) -> Any:
        return gr.HTML(value=view.tokens(found, heat, at), legend=view.legend(found, heat))

    def detailed(found: dict[str, Any], heat: str, at: int) -> list[Any]:
        nexts = [view.predicted(found[name], at) for name in ("model", "spliced", "respliced")]
        return [
            at, line_of(found, heat, at), view.about(found, at), view.token_summary(found, at),
            view.latents(found, at), *nexts,
        ]  # fmt: skip

    @shown
    def on_run(source: str, text: str, heat: str) -> list[Any]:
        found = refinement(bench, source, text)
        last = len(found["tokens"]) - 1
        return [
            found, text, view.status(found), view.summary(found), *detailed(found, heat, last)
        ]  # fmt: skip

    @shown
    def on_open(
        found: dict[str, Any] | None, source: str, text: str, heat: str, event: gr.SelectData
    ) -> list[Any]:
        """The text that is there, when the tab is opened and nothing has been refined yet."""
        if found is not None or event.value != "Refine" or not text.strip():
            return [gr.skip()] * len(results)
        return on_run(source, text, heat)  # type: ignore[no-any-return]

    @shown
    def on_token(found: dict[str, Any] | None, heat: str, event: gr.EventData) -> list[Any]:
        if found is None:
            raise UserError("refine a text first")
        return detailed(found, heat, chosen_of(event, len(found["tokens"])))

    def on_heat(found: dict[str, Any] | None, heat: str, at: int | None) -> Any:
        return gr.skip() if found is None else line_of(found, heat, at)

    def on_text(found: dict[str, Any] | None, text: str, refined: str) -> Any:
        if found is None:
            return gr.skip()
        return view.status(found) if text == refined else view.STALE

    def on_source(found: dict[str, Any] | None, source: str) -> list[Any]:
        """What is shown was another SAE's; what is wrong with the new one is said elsewhere."""
        try:
            same = found is None or bench.sae(source).source == bench.sae(found["source"]).source
        except Exception:  # noqa: BLE001 - the Explore tab says it, and puts the last one back
            same = True
        if same:
            return [gr.skip()] * len(results)
        again = "Another sparse autoencoder is chosen: press Refine again."
        return [None, "", again, [], None, [], "", [], [], [], [], []]

    def refinement_of(source: str, text: str) -> dict[str, Any]:
        """A text's activations, errors and predictions, as encoded and refined."""
        return refinement(bench, source, text)

    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {"show_progress": "hidden", **private}
    for asked in (run.click, text.submit, examples.load_input_event.success):
        asked(on_run, [shared.source, text, heat], results, **private, **HEAVY)
    shared.tabs.select(on_open, [seen, shared.source, text, heat], results, **quiet, **HEAVY)
    text.change(on_text, [seen, text, refined], status, queue=False, **quiet)
    line.select(on_token, [seen, heat], detail, **quiet)
    heat.change(on_heat, [seen, heat, place], line, **quiet)
    shared.source.change(on_source, [seen, shared.source], results, queue=False, **quiet)
    api(shown(refinement_of), api_name="refinement", **HEAVY)
