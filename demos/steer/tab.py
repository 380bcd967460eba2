"""The Steer tab: the model's text and the steered text, written side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from saert.demos import widgets
from saert.demos.errors import shown, warn
from saert.demos.pieces import CHARACTERS, NEW, paced
from saert.demos.shared import Shared
from saert.demos.steer import api as steer_api
from saert.demos.steer import presets
from saert.demos.steer import rows as steer_rows
from saert.demos.steer import share as steer_share
from saert.demos.steer import text as steer_text
from saert.demos.steer.hold import hold, landed
from saert.demos.steer.setup import (
    CHAT,
    COMPLETION,
    GENERATED,
    PROMPT,
    Edits,
    compose,
    steps,
)
from saert.demos.steer.text import CHANGE, KL, NONE, Texts
from saert.demos.workbench import HEAVY, Workbench
from saert.measure.steering import Sampling, Setup

OF = "Add a latent of {}"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Controls:
    """What a Setup is composed of, beside the edits."""

    source: gr.Dropdown
    prompt: gr.Textbox
    form: gr.Radio
    tokens: gr.CheckboxGroup
    keep: gr.Checkbox
    temperature: gr.Slider
    top_p: gr.Slider
    new_tokens: gr.Slider
    seed: gr.Number

    @property
    def all(self) -> list[Any]:
        """In the order of `compose` and `controls`."""
        return [self.source, self.prompt, self.form, self.tokens, self.keep, self.temperature,
                self.top_p, self.new_tokens, self.seed]  # fmt: skip


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    ran = gr.State(None)  # the Texts that are shown
    start = gr.State([])  # the edits that the page began with, until a person adds to them
    with gr.Row(elem_classes=["steer"]):
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                presets.examples(bench)[0], label="Prompt", lines=3, elem_id="steer-prompt",
                render=False, info="Ctrl+Enter runs it", max_length=CHARACTERS,
            )  # fmt: skip
            chosen, strongest = _try(bench, prompt)
            form = _prompt(bench, prompt)
            with gr.Row(elem_id="steer-buttons"):
                run = gr.Button("Run", variant="primary", elem_id="steer-run", min_width=90)
                stop = gr.Button("Stop", variant="stop", elem_id="steer-stop", min_width=90)
                reset = gr.Button("Reset", elem_id="steer-reset", min_width=90)
            _latents(bench, shared, prompt, start)
            with_ = Controls(shared.source, prompt, form, *_how(bench))
        with gr.Column(scale=6, min_width=320, elem_classes=["steer-results"]):
            with gr.Row(elem_classes=["steer-panes"]):
                default = widgets.tokens("Default", "steer-default", empty="as the model writes it")
                steered = widgets.tokens(
                    "Steered", "steer-steered", empty="with the latents that are set",
                    legend=steer_text.LEGENDS[CHANGE],
                )  # fmt: skip
            heat = gr.Radio(
                [CHANGE, KL, NONE], value=CHANGE, label="Colour of the steered text",
                elem_id="steer-heat", info="what the edits change about each token: its "
                "log-probability (orange up, blue down) or all of its distribution (KL)",
            )  # fmt: skip
            figures = widgets.figures("Live figures", "steer-figures", empty="nothing run yet")
    outputs = [default, steered, figures, ran]
    steer_share.build(bench, shared.edits, start, with_.all)

    def write(edits: Edits, how: str, *values: Any) -> Iterator[Any]:
        yield from _run(bench, edits, how, values)

    event = run.click(
        shown(write), [shared.edits, heat, *with_.all], outputs,
        trigger_mode="always_last", **QUIET, **HEAVY,  # a click in the middle of a run counts
    )  # fmt: skip
    stop.click(None, cancels=[event])
    waited: dict[str, Any] = {"js": hold("setup"), **QUIET}
    first = steer_share.state(presets.start(bench))
    landed(reset.click(lambda: [first[0], *first, [], [], [], None], None,
                [start, shared.edits, *with_.all, *outputs], cancels=[event], **waited,
                ), "setup")  # fmt: skip
    heat.input(_coloured, [heat, ran], steered, **QUIET)
    for button, setup in chosen:
        landed(button.click(lambda setup=setup: [[], *steer_share.state(setup)], None,
                     [start, shared.edits, *with_.all], **waited,
                     ), "setup")  # fmt: skip
    landed(strongest.click(
        shown(lambda source, text: [[], [
            spec.to_dict() for spec in presets.strongest(bench, source, text)
        ]]),
        [shared.source, prompt], [start, shared.edits], **waited, **HEAVY,
    ), "setup")  # fmt: skip
    steer_api.build(bench)


def _try(bench: Workbench, prompt: gr.Textbox) -> tuple[list[tuple[gr.Button, Setup]], gr.Button]:
    gr.HTML("<h2>Try</h2>", padding=False)
    with gr.Row(elem_classes=["steer-presets"]):
        chosen = [
            (gr.Button(name, size="sm", min_width=80, elem_id=f"steer-preset-{at}"), setup)
            for at, (name, setup) in enumerate(presets.presets(bench).items())
        ]
        strongest = gr.Button(
            "This prompt's strongest latents", size="sm", elem_id="steer-strongest", min_width=200
        )
    gr.Examples([[text] for text in presets.examples(bench)[1:]], prompt, label="Examples",
                elem_id="steer-examples", api_visibility="private")  # fmt: skip
    return chosen, strongest


def _prompt(bench: Workbench, prompt: gr.Textbox) -> gr.Radio:
    prompt.render()  # type: ignore[no-untyped-call]
    return gr.Radio(
        [COMPLETION, CHAT], value=COMPLETION, label="What to do with it", elem_id="steer-form",
        visible=bench.chats,
    )  # fmt: skip


def _latents(bench: Workbench, shared: Shared, prompt: gr.Textbox, start: gr.State) -> None:
    gr.HTML("<h2>Latents to steer with</h2>", padding=False)
    with gr.Row(equal_height=True):
        first = bench.sae(bench.sources[0])
        asked = gr.Dropdown(
            steer_rows.choices(first), value=None, allow_custom_value=True,
            label=OF.format(first.name), elem_id="steer-asked", scale=3, min_width=180,
            info="its number, or words of its label",
        )  # fmt: skip
        more = gr.Button("Add latent", elem_id="steer-add", scale=1, min_width=100)
    rows = [steer_rows.lay(place) for place in range(steer_rows.ROWS)]
    steer_rows.connect(bench, rows, shared.edits, prompt, start)

    @shown
    def add(edits: Edits, source: str, words: str | None, text: str) -> list[Any]:
        try:
            found = steer_rows.add(bench, edits, source, words, text)
        except steer_rows.Several as error:
            warn(f"{error}.", "Which one?")
            some = steer_rows.choices(bench.sae(source), error.hits)
            return [gr.skip(), gr.skip(), gr.Dropdown(choices=some, value=None)]
        return [[], found, gr.Dropdown(value=None)]

    def other(source: str) -> Any:
        try:
            loaded = bench.sae(source)
        except Exception:  # the Explore tab says so, and puts the box right
            return gr.skip()
        label = OF.format(loaded.name)
        return gr.Dropdown(choices=steer_rows.choices(loaded), value=None, label=label)

    landed(more.click(
        add, [shared.edits, shared.source, asked, prompt], [start, shared.edits, asked],
        js=hold("add"), **QUIET,
    ), "add")  # fmt: skip
    shared.source.change(other, shared.source, asked, **QUIET)


def _how(bench: Workbench) -> tuple[Any, ...]:
    tokens = gr.CheckboxGroup(
        [PROMPT, GENERATED], value=[PROMPT, GENERATED], label="Tokens to steer",
        elem_id="steer-tokens",
    )  # fmt: skip
    with gr.Group():  # a box of its own
        keep = gr.Checkbox(
            True, label="Keep the SAE's error", elem_id="steer-keep",
            info="off: the model goes on with the SAE's reconstruction alone",
        )  # fmt: skip
    usual = Sampling()
    context = getattr(bench.session.model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(context or NEW, NEW)
    with gr.Accordion("Sampling", open=False, elem_id="steer-sampling"), gr.Row():
        temperature = gr.Slider(
            0, 2, usual.temperature, step=0.05, label="Temperature", elem_id="steer-temperature",
            info="0: always the likeliest token", min_width=140, buttons=[],
        )  # fmt: skip
        top_p = gr.Slider(
            0.05, 1, usual.top_p, step=0.05, label="Top-p", elem_id="steer-top-p",
            info="of the likeliest tokens, this share", min_width=140, buttons=[],
        )  # fmt: skip
        new_tokens = gr.Slider(
            1, limit, usual.max_new_tokens, step=1, label="New tokens", elem_id="steer-new-tokens",
            info="at most", min_width=140, buttons=[],
        )  # fmt: skip
        seed = gr.Number(
            usual.seed, label="Seed", precision=0, minimum=0, elem_id="steer-seed",
            info="the same for both texts", min_width=140,
        )  # fmt: skip
    return tokens, keep, temperature, top_p, new_tokens, seed


def _run(bench: Workbench, edits: Edits, how: str, values: Any) -> Iterator[Any]:
    """Widget values as both texts grow; none at first, as what is refused has none."""
    yield [], [], [], None
    for texts in paced(steer_text.grown(steps(bench, compose(bench, edits, *values)))):
        yield (
            steer_text.plain(texts), _coloured(how, texts), steer_text.figures(texts), texts
        )  # fmt: skip


def _coloured(how: str, texts: Texts | None) -> Any:
    tokens = steer_text.heated(texts or Texts(), how)
    return gr.HTML(value=tokens, legend=steer_text.LEGENDS[how])
