"""The Explore tab: a text, its tokens, their latents, and the card of one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.events import api as endpoint

from saert.demos.errors import shown, visible, warn
from saert.demos.explore import card as cards
from saert.demos.explore import looking
from saert.demos.explore.looking import Looked
from saert.demos.pieces import CHARACTERS, chosen_of
from saert.demos.shared import Shared
from saert.demos.widgets import bars, figures, tokens
from saert.demos.workbench import HEAVY, PATIENT, Workbench
from saert.hub.session import UserError
from saert.measure.steering.spec import whole

TEXT = (
    "Once upon a time, there was a little girl named Lily. One day, she went to the park with her "
    "mom and saw a big dog."
)
REVEAL = """(...inputs) => {
  document.querySelector('#explore-title')?.scrollIntoView({block: 'nearest'});
  return inputs;
}"""  # on a phone the card is far below the lists
PROGRESS = gr.Progress()
SPECIAL = "{} is a special token: the sparse autoencoder is not made for it. Choose another."
GATHERING = "<p class='saert-note'>Gathering examples… {part:.0%} ({what})</p>"


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    used, one = gr.State(bench.sources[0]), gr.State(None)  # the SAE, and a text through it
    latent, token = gr.State(None), gr.State(None)
    with gr.Row(equal_height=False):
        text = gr.Textbox(
            TEXT, lines=2, label="Text", elem_id="explore-text", scale=5, min_width=300,
            info="what the model reads; each token can then be chosen", max_length=CHARACTERS,
        )  # fmt: skip
        look = gr.Button("Look", variant="primary", elem_id="explore-look", scale=1, min_width=120)
    shades = tokens("Tokens", "explore-tokens", choose=True, empty="Look at a text first.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300), gr.Tabs(elem_id="explore-lists") as lists:
            with gr.Tab("Whole text", id="text"):
                whole = bars(
                    "Latents that fire here", "explore-firing", choose=True,
                    empty="Nothing yet: look at a text.", marks=True,
                )  # fmt: skip
                gr.HTML(
                    "<p class='saert-note'>Bars: how much a latent says about this text, by how "
                    "near it comes to its maximum and how rarely it fires at all.</p>",
                    padding=False, elem_classes=["saert-say"],
                )  # fmt: skip
            with gr.Tab("Token", id="token"):
                at_token = bars(
                    "Latents at the token", "explore-at-token", choose=True,
                    empty="Choose a token above.", marks=True,
                )  # fmt: skip
                special = gr.HTML(visible=False, elem_id="explore-special", padding=False)
            with gr.Tab("Search", id="search"):
                asked = gr.Textbox(
                    label="Search latents", elem_id="explore-query", placeholder="park",
                    info="part of a label, text that a latent fires on, or a latent's number",
                )  # fmt: skip
                search = gr.Button("Search", elem_id="explore-search")
                results = bars(
                    "Found", "explore-results", choose=True, marks=True,
                    empty="Nothing yet.",
                )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            head = gr.HTML(cards.title(bench, "", None), elem_id="explore-title")
            with gr.Column(visible=False, elem_id="explore-card") as body:
                with gr.Row():
                    steer = gr.Button(
                        "Steer with this", elem_id="explore-steer", variant="primary", size="sm"
                    )
                    explain = gr.Button("Explain", elem_id="explore-explain", size="sm")
                numbers = figures(
                    "Activations", "explore-figures", empty="known once examples are gathered"
                )
                histogram = gr.HTML(elem_id="explore-histogram")
                explained = gr.HTML(visible=False, elem_id="explore-explanation")
                lens = gr.HTML(elem_id="explore-logits")
                effect = gr.HTML(elem_id="explore-effect")
                examples = gr.HTML(elem_id="explore-examples")
                near = bars("Nearest directions", "explore-neighbours", choose=True)
    blank = {
        head: cards.title(bench, "", None), body: gr.update(visible=False), numbers: [],
        histogram: "", explained: gr.update(value="", visible=False), lens: "", effect: "",
        examples: "", near: [],
    }  # fmt: skip
    panel = list(blank)
    cleared: dict[Any, Any] = {
        one: None,
        latent: None,
        token: None,
        shades: [],
        at_token: [],
        whole: [],
    }

    def looked(text: str, source: str) -> dict[Any, Any]:
        seen = looking.looked(bench, text, source)
        return cleared | {
            used: seen.source, one: seen, shades: looking.heat(bench, seen),
            lists: gr.Tabs(selected="text"),
        }  # fmt: skip

    def first(seen: Looked | None, text: str, source: str, event: gr.SelectData) -> Any:
        """The text that is there, when the tab is first opened."""
        if seen is not None or event.value != "Explore" or not text.strip():
            return {used: gr.skip()}
        return looked(text, source)

    def fire(seen: Looked | None, progress: gr.Progress = PROGRESS) -> Any:
        if seen is None:
            return []
        return looking.firing(bench, seen, bench.wait_index(seen.source, progress_of(progress)))

    def click(seen: Looked | None, number: int | None, event: gr.EventData) -> dict[Any, Any]:
        if seen is None:
            raise UserError("look at the text first; what stood here was of another one")
        at = chosen_of(event, len(seen.strings))
        if not seen.look.used[at]:
            return {
                token: at, shades: looking.heat(bench, seen, number, at), at_token: [],
                lists: gr.Tabs(selected="token"),
                special: gr.HTML(cards.note(SPECIAL.format(seen.strings[at])), visible=True),
            }  # fmt: skip
        return {
            special: gr.HTML(visible=False),
            token: at, shades: looking.heat(bench, seen, number, at),
            at_token: looking.at_token(bench, seen, at), lists: gr.Tabs(selected="token"),
        }  # fmt: skip

    def find(text: str, source: str) -> dict[Any, Any]:
        number = cards.number(text, bench.sae(source).sae.num_latents)
        if number is None:
            return {results: looking.hits(bench, source, text)}
        return {results: [looking.bar(bench, source, number, "", 0.0)], latent: number}

    def choose(listed: Any, event: gr.EventData) -> int:
        return looking.chosen(listed, event)

    def colour(seen: Looked | None, number: int | None, at: int | None) -> Any:
        return [] if seen is None else looking.heat(bench, seen, number, at)

    def show(
        number: int | None, source: str, seen: Looked | None, at: int | None
    ) -> Iterator[dict[Any, Any]]:
        """What is quick first; then, once examples are gathered, the rest."""
        if number is None:
            yield blank
            return
        points = cards.written(bench, source, number)
        yield blank | {
            head: cards.title(bench, source, number), body: gr.Column(visible=True),
            lens: cards.lens(points), near: cards.near(bench, source, points),
        }  # fmt: skip
        gathering = bench.gathering(source, again=True)
        while (note := gathering.pending(0.5)) is not None:
            yield {histogram: GATHERING.format(part=note[0], what=note[1])}
        try:
            card = gathering.wait().card(number, cards.SHOWN)
        except UserError as error:  # the rest of the card needs no examples
            yield {histogram: cards.note(str(error))}
        else:
            yield {
                head: cards.title(bench, source, number), numbers: cards.figures(card),
                histogram: cards.activations(card), examples: cards.examples(card),
                near: cards.near(bench, source, points),
            }  # fmt: skip
        here = seen if seen is not None and seen.source == bench.sae(source).source else None
        yield {effect: cards.effect(bench, here, number, at)}

    def say(number: int | None, source: str, progress: gr.Progress = PROGRESS) -> Any:
        if number is None:
            return gr.HTML("", visible=False)
        index = bench.wait_index(source, progress_of(progress))
        progress(0.5, desc="finding patterns")
        return gr.HTML(cards.explanation(bench, source, number, index.rows), visible=True)

    def add(number: int | None, source: str, held: list[Any]) -> dict[Any, Any]:
        if number is None:
            raise UserError("choose a latent first")
        spec = cards.steer_with(bench, source, number)
        return {shared.edits: [*held, spec], shared.tabs: gr.Tabs(selected="steer")}

    def changed(source: str, before: str, seen: Looked | None, text: str) -> dict[Any, Any]:
        """Another SAE: the same text through it. One that does not work leaves all as it was."""
        if source == before:
            return {used: gr.skip()}
        try:
            with visible():
                fresh = {used: bench.sae(source).source}
                return cleared | fresh | (looked(text, source) if seen is not None else {})
        except gr.Error as error:
            why = error.message if source.strip() else "No SAE was named."
            warn(f"{why.rstrip('.')}. The SAE stays {before}.", "This SAE cannot be used")
            return {shared.source: before}

    private: dict[str, Any] = {"api_visibility": "private"}
    quiet = {"show_progress": "hidden", **private}
    board = [used, lists, *cleared]
    carded = latent.change(shown(show), [latent, used, one, token], panel, **quiet, **PATIENT)
    latent.change(shown(colour), [one, latent, token], shades, **quiet)
    one.change(shown(fire), one, whole, **private, **PATIENT)
    for trigger in (look.click, text.submit):
        trigger(shown(looked), [text, shared.source], board, cancels=[carded], **quiet, **HEAVY)
    shared.tabs.select(shown(first), [one, text, shared.source], board, **quiet, **HEAVY)
    shared.source.change(
        shown(changed), [shared.source, used, one, text], [*board, shared.source], **quiet, **HEAVY
    )
    shades.select(shown(click), [one, latent], [token, shades, at_token, lists, special], **quiet)
    for listed in (whole, at_token, results, near):
        listed.select(shown(choose), listed, latent, cancels=[carded], js=REVEAL, **quiet)
    for trigger in (search.click, asked.submit):
        trigger(shown(find), [asked, used], [results, latent], **quiet)
    explain.click(shown(say), [latent, used], explained, **private, **PATIENT)
    steer.click(shown(add), [latent, used, shared.edits], [shared.edits, shared.tabs], **quiet)
    api(bench)


def api(bench: Workbench) -> None:
    """The same for programs, with `gradio_client`."""

    def look(text: str, source: str) -> dict[str, Any]:
        """A text's tokens, each with its active latents and their activations."""
        seen = looking.looked(bench, text, source)
        return {
            "source": seen.source,
            "tokens": [
                {
                    "text": string,
                    "latents": [
                        {"latent": n, "activation": value, "label": bench.label(seen.source, n)}
                        for n, value in seen.look.at(i)
                    ],
                }
                for i, string in enumerate(seen.strings)
            ],
        }

    def search(text: str, source: str) -> list[dict[str, Any]]:
        """Latents by label, strongest tokens, or where they fire; waits for the examples."""
        bench.wait_index(source)
        return [vars(hit) for hit in bench.search(source, text)]

    def card(latent: int, source: str) -> dict[str, Any]:
        """All that is known of a latent; waits for the examples."""
        return cards.plain(bench, source, whole("latent", latent))

    for name, call in (("search", search), ("card", card)):
        endpoint(shown(call), api_name=name, **PATIENT)
    endpoint(shown(look), api_name="look", **HEAVY)


def progress_of(progress: gr.Progress) -> Any:
    """Gradio's progress, as `wait_index` calls it."""
    return lambda part, what: progress(part, desc=what)
