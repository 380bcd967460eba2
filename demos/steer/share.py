"""The same texts elsewhere: a link, a JSON file, a Python script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from saert.demos.errors import shown
from saert.demos.steer.setup import Edits, checked, compose, controls
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.steering import Setup

LARGEST = 100_000  # bytes of a JSON file: a setup has a few hundred
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(bench: Workbench, edits: gr.State, values: list[Any], runs: list[gr.Button]) -> None:
    """Lay the section out; it follows the edits and the controls `values`."""
    with gr.Accordion("Share or repeat", open=False, elem_id="steer-share") as section, gr.Tabs():
        with gr.Tab("Link"):
            link = gr.Textbox(
                label="Link", interactive=False, buttons=["copy"], elem_id="steer-link",
                info="opens this page with the prompt, the latents and everything else set",
            )  # fmt: skip
        with gr.Tab("JSON"):
            text = gr.Code(
                label="JSON, to copy, download or change", language="json", interactive=True,
                elem_id="steer-json", lines=8, max_lines=20,
            )  # fmt: skip
            with gr.Row():
                use = gr.Button("Use this JSON", elem_id="steer-json-use", size="sm")
                upload = gr.UploadButton(
                    "Open a JSON file", file_types=[".json"], elem_id="steer-json-open",
                    size="sm",
                )  # fmt: skip
        with gr.Tab("Python"):
            code = gr.Code(
                label="Python that prints the same two texts", language="python",
                interactive=False, elem_id="steer-snippet", lines=8, max_lines=30,
            )  # fmt: skip
    everything = [edits, *values]
    gr.on(
        [section.expand, edits.change, *(part.change for part in values), *(b.click for b in runs)],
        lambda *given: share(bench, *given),
        everything,
        [link, text, code],
        trigger_mode="always_last",
        **QUIET,
    )
    link.change(None, link, link, js="link => link && new URL(link, window.location.href).href")
    use.click(shown(lambda given: state(opened(bench, given))), text, everything, **QUIET)
    upload.upload(
        shown(lambda path: state(opened(bench, _read(path)))), upload, everything, **QUIET
    )
    _restore(bench, everything)


def share(bench: Workbench, edits: Edits, *values: Any) -> tuple[str, str, str]:
    """Link, JSON and script of what is set; where that is not complete, what is missing."""
    try:
        setup = compose(bench, edits, *values)
    except (UserError, ValueError, TypeError, OSError, NotImplementedError) as error:
        return "", "", f"# not yet: {error}"
    return f"?setup={setup.to_link()}", setup.to_json(), setup.snippet(strict=bench.session.strict)


def state(setup: Setup) -> list[Any]:
    """The edits and the controls' values that show a setup."""
    return [[spec.to_dict() for spec in setup.edits], *controls(setup)]


def opened(bench: Workbench, text: str) -> Setup:
    """A setup from JSON, if this app can run it."""
    try:
        return checked(bench, Setup.from_json(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"this JSON does not hold a setup: {error}") from error


def linked(bench: Workbench, link: str) -> Setup:
    """A setup from the `setup` of a link, or UserError."""
    try:
        return checked(bench, Setup.from_link(link))
    except (ValueError, TypeError) as error:
        raise UserError(f"this link does not hold a setup: {error}") from error


def _restore(bench: Workbench, everything: list[Any]) -> None:
    def restore(request: gr.Request) -> list[Any]:
        link = dict(request.query_params).get("setup")
        if not link:
            return [gr.skip()] * len(everything)
        return state(linked(bench, link))

    assert Context.root_block is not None  # a tab is laid out within the app
    Context.root_block.load(shown(restore), None, everything, **QUIET)


def _read(path: str) -> str:
    file = Path(path)
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file.name} is too large for a setup")
    return file.read_text("utf-8")
