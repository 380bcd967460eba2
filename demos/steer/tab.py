"""The Steer tab: the model's text and the steered text, written side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from saert.demos import widgets
from saert.demos.errors import shown
from saert.demos.steer import api as steer_api
from saert.demos.steer import presets
from saert.demos.steer import rows as steer_rows
from saert.demos.steer import share as steer_share
from saert.demos.steer import text as steer_text
from saert.demos.steer.setup import (
    CHAT,
    COMPLETION,
    GENERATED,
    PROMPT,
    Edits,
    compose,
    controls,
    steps,
)
from saert.demos.steer.text import CHANGE, KL, NONE, Texts
from saert.demos.workbench import Workbench
from saert.measure.steering import Sampling, Setup

if TYPE_CHECKING:
    from saert.demos.app import Shared

LONGEST = 400  # tokens that can be asked for
PACE = 0.1  # seconds between updates of the page: what is written faster comes together
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
    with gr.Row(elem_classes=["steer"]):
        with gr.Column(scale=5, min_width=320):
            chosen, strongest = _presets(bench)
            prompt, form = _prompt(bench)
            _latents(bench, shared, prompt)
            with_ = Controls(shared.source, prompt, form, *_how(bench))
        with gr.Column(scale=6, min_width=320):
            with gr.Row(elem_id="steer-buttons"):
                run = gr.Button("Run", variant="primary", elem_id="steer-run", min_width=90)
                stop = gr.Button("Stop", variant="stop", elem_id="steer-stop", min_width=90)
                reset = gr.Button("Reset", elem_id="steer-reset", min_width=90)
            with gr.Row(elem_classes=["steer-panes"]):
                default = widgets.tokens("Default", "steer-default", empty="as the model writes it")
                steered = widgets.tokens(
                    "Steered", "steer-steered", empty="with the latents that are set"
                )
            heat = gr.Radio(
                [CHANGE, KL, NONE], value=CHANGE, label="Colour of the steered text",
                elem_id="steer-heat", info="what the edits change about each token: its "
                "log-probability (orange up, blue down) or all of its distribution (KL)",
            )  # fmt: skip
            figures = widgets.figures("Live figures", "steer-figures", empty="nothing run yet")
    outputs = [default, steered, figures, ran]
    steer_share.build(bench, shared.edits, with_.all, [run])

    def write(edits: Edits, how: str, *values: Any) -> Iterator[Any]:
        yield from _run(bench, edits, how, values)

    event = run.click(
        shown(write), [shared.edits, heat, *with_.all], outputs, **QUIET
    )  # fmt: skip
    stop.click(None, cancels=[event])
    reset.click(lambda: [*_fresh(bench), [], [], [], None], None,
                [shared.edits, *with_.all, *outputs], cancels=[event], **QUIET)  # fmt: skip
    heat.input(
        lambda how, texts: steer_text.heated(texts or Texts(), how), [heat, ran], steered, **QUIET
    )
    for button, setup in chosen:
        button.click(lambda setup=setup: steer_share.state(setup), None,
                     [shared.edits, *with_.all], **QUIET)  # fmt: skip
    strongest.click(
        shown(lambda source, text: [
            spec.to_dict() for spec in presets.strongest(bench, source, text)
        ]),
        [shared.source, prompt], shared.edits, **QUIET,
    )  # fmt: skip
    steer_api.build(bench)


def _presets(bench: Workbench) -> tuple[list[tuple[gr.Button, Setup]], gr.Button]:
    gr.HTML("<h2>Try</h2>", padding=False)
    with gr.Row(elem_classes=["steer-presets"]):
        chosen = [
            (gr.Button(name, size="sm", min_width=80, elem_id=f"steer-preset-{at}"), setup)
            for at, (name, setup) in enumerate(presets.presets(bench).items())
        ]
        strongest = gr.Button(
            "This prompt's strongest latents", size="sm", elem_id="steer-strongest", min_width=200
        )
    return chosen, strongest


def _prompt(bench: Workbench) -> tuple[gr.Textbox, gr.Radio]:
    prompts = presets.examples(bench)
    prompt = gr.Textbox(prompts[0], label="Prompt", lines=3, elem_id="steer-prompt")
    gr.Examples([[text] for text in prompts[1:]], prompt, label="Prompts to try",
                elem_id="steer-examples", api_visibility="private")  # fmt: skip
    form = gr.Radio(
        [COMPLETION, CHAT], value=COMPLETION, label="What to do with it", elem_id="steer-form",
        visible=bench.chats,
    )  # fmt: skip
    return prompt, form


def _latents(bench: Workbench, shared: Shared, prompt: gr.Textbox) -> None:
    gr.HTML("<h2>Latents to steer with</h2>", padding=False)
    with gr.Row(equal_height=True):
        asked = gr.Dropdown(
            steer_rows.choices(bench, bench.sources[0]), value=None, allow_custom_value=True,
            label="Number, or words of a label", elem_id="steer-asked", scale=3, min_width=180,
        )  # fmt: skip
        more = gr.Button("Add latent", elem_id="steer-add", scale=1, min_width=100)
    rows = [steer_rows.lay(place) for place in range(steer_rows.ROWS)]
    gr.HTML(
        "<p class='steer-note'>Middle of the slider's right half: once the latent's strongest "
        "activation. Its ends: ten times.</p>", padding=False,
    )  # fmt: skip
    steer_rows.connect(bench, rows, shared.edits, prompt)
    more.click(
        shown(lambda *given: (steer_rows.add(bench, *given), None)),
        [shared.edits, shared.source, asked, prompt], [shared.edits, asked], **QUIET,
    )  # fmt: skip
    shared.source.change(
        shown(lambda source: gr.update(choices=steer_rows.choices(bench, source), value=None)),
        shared.source, asked, **QUIET,
    )  # fmt: skip


def _how(bench: Workbench) -> tuple[Any, ...]:
    tokens = gr.CheckboxGroup(
        [PROMPT, GENERATED], value=[PROMPT, GENERATED], label="Tokens to steer",
        elem_id="steer-tokens",
    )  # fmt: skip
    keep = gr.Checkbox(
        True, label="Keep the SAE's error", elem_id="steer-keep",
        info="off: the model goes on with the SAE's reconstruction alone",
    )  # fmt: skip
    usual = Sampling()
    context = getattr(bench.session.model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(context or LONGEST, LONGEST)
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


def _fresh(bench: Workbench) -> list[Any]:
    return [[], *controls(Setup(bench.session.name, presets.examples(bench)[0]))]


def _run(bench: Workbench, edits: Edits, how: str, values: Any) -> Iterator[Any]:
    """Widget values as both texts grow."""
    texts, last = Texts(), 0.0
    for step in steps(bench, compose(bench, edits, *values)):
        texts.add(step)
        if time.monotonic() - last > PACE:
            yield _shown(texts, how)
            last = time.monotonic()
    yield _shown(texts, how)


def _shown(texts: Texts, how: str) -> tuple[Any, ...]:
    return (
        steer_text.plain(texts), steer_text.heated(texts, how), steer_text.figures(texts), texts
    )  # fmt: skip
