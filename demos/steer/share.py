"""The same texts elsewhere: a link, a JSON file, a Python script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from saert.demos.errors import shown
from saert.demos.steer import presets
from saert.demos.steer.hold import hold, install, landed
from saert.demos.steer.setup import Edits, checked, compose, controls
from saert.demos.workbench import Workbench
from saert.hub.session import UserError
from saert.measure.steering import Setup

LARGEST = 100_000  # bytes of a JSON file: a setup has a few hundred
PLAINER = {
    "not a link that saert made": "it was not made by saert, or changed on the way",
    "not a whole link": "some of it is missing, or something follows it",
    "a setup: found": "it is no object with a model, a prompt and edits",
}
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def build(bench: Workbench, edits: gr.State, start: gr.State, values: list[Any]) -> None:
    """Lay the section out; while it is open it follows the edits and the controls `values`."""
    opened = gr.State(False)
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
    section.expand(lambda: True, None, opened, **QUIET)
    section.collapse(lambda: False, None, opened, **QUIET)

    @shown
    def follow(seen: bool, *given: Any) -> Any:
        return share(bench, *given) if seen else [gr.skip()] * 3

    gr.on(
        [opened.change, edits.change, *(part.change for part in values)], follow,
        [opened, *everything], [link, text, code], trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    link.change(None, link, link, js="link => link && new URL(link, window.location.href).href")
    landed(
        use.click(
            shown(lambda given: state(from_json(bench, given))),
            text,
            everything,
            js=hold("json"),
            **QUIET,
        ),
        "json",
    )
    landed(
        upload.upload(
            shown(lambda path: state(from_file(bench, path))),
            upload,
            everything,
            js=hold("file"),
            **QUIET,
        ),
        "file",
    )
    _restore(bench, start, everything)


def share(bench: Workbench, edits: Edits, *values: Any) -> tuple[str, str, str]:
    """Link, JSON and script of what is set; where that is not complete, what is missing."""
    try:
        setup = compose(bench, edits, *values)
    except (UserError, ValueError, TypeError, OSError, NotImplementedError) as error:
        return "", "", "\n".join(f"# {line}" for line in f"not yet: {error}".splitlines())
    return f"?setup={setup.to_link()}", setup.to_json(), setup.snippet(strict=bench.session.strict)


def state(setup: Setup) -> list[Any]:
    """The edits and the controls' values that show a setup."""
    return [[spec.to_dict() for spec in setup.edits], *controls(setup)]


def from_json(bench: Workbench, text: str) -> Setup:
    """A setup from JSON, if this app can run it; UserError."""
    return checked(bench, _read("JSON", lambda: Setup.from_json(text)))


def from_file(bench: Workbench, path: str) -> Setup:
    """A setup from a file of JSON; UserError."""

    def read() -> Setup:
        file = Path(path)
        if file.stat().st_size > LARGEST:
            raise ValueError(f"{file.name} is too large for one")
        return Setup.from_json(file.read_text("utf-8"))

    return checked(bench, _read("file", read))


def from_link(bench: Workbench, link: str) -> Setup:
    """A setup from the `setup` of a link; UserError."""
    return checked(bench, _read("link", lambda: Setup.from_link(link)))


def _read(what: str, read: Callable[[], Setup]) -> Setup:
    """What goes wrong in unpacking tells nobody anything; what a setup says amiss does."""
    try:
        return read()
    except json.JSONDecodeError as error:
        why = f"it is not JSON from line {error.lineno}, column {error.colno} on"
    except UnicodeDecodeError:
        why = "it was not made by saert, or changed on the way"
    except (ValueError, TypeError) as error:
        why = str(error).partition(" (Error")[0]
        for ours, plain in PLAINER.items():
            why = plain if why.startswith(ours) else why
    raise UserError(f"this {what} does not hold a setup: {why}")


def _restore(bench: Workbench, start: gr.State, everything: list[Any]) -> None:
    """When the page is there: what its link holds, else what pages begin with."""

    def restore(request: gr.Request) -> list[Any]:
        link = dict(request.query_params).get("setup")
        if link:
            return [[], *state(from_link(bench, link))]
        edits, *_ = state(presets.start(bench))
        return [edits, edits, *[gr.skip()] * (len(everything) - 1)]

    install()
    assert Context.root_block is not None  # a tab is laid out within the app
    landed(Context.root_block.load(
        shown(restore), None, [start, *everything], js=hold("link"), **QUIET
    ), "link")  # fmt: skip
