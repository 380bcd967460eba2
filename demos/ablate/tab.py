"""The Ablate tab: a token's active latents by effect, what each does, and the text without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from saert.demos.ablate import data, view
from saert.demos.ablate import text as texts
from saert.demos.ablate.api import endpoints
from saert.demos.errors import shown
from saert.demos.pieces import chosen_of
from saert.demos.shared import Shared
from saert.demos.widgets import CHANGE_LEGEND, bars, figures, tokens
from saert.demos.workbench import HEAVY, Workbench
from saert.hub.session import UserError

UNSEEN = "Look at a text first, and choose a token and a latent."
ABLATED = "The same with the latents ablated"


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    seen = gr.State(None)  # data.ablation's
    specials = frozenset(bench.tokenizer.all_special_tokens)
    with gr.Row(equal_height=False):
        text = gr.Textbox(
            view.EXAMPLES[0], label="Text", lines=2, elem_id="ablate-text", scale=5, min_width=300,
            info="then choose a token; the last is looked at first",
        )  # fmt: skip
        look = gr.Button("Look", variant="primary", elem_id="ablate-look", scale=1, min_width=120)
    examples = gr.Examples(
        [[one] for one in view.EXAMPLES], text, label="Examples", api_visibility="private"
    )
    with gr.Row():
        by = gr.Dropdown(
            [(name, key) for key, name in view.RANKS.items()], value="kl",
            label="Rank latents by", elem_id="ablate-by", min_width=280,
            info="true effects take a pass for each latent; attribution estimates all at once",
        )  # fmt: skip
        target = gr.Textbox(
            label="Next token", elem_id="ablate-target", visible=False, min_width=200,
            info="whose logit; the model's likeliest if empty",
        )  # fmt: skip
        horizon = gr.Slider(
            1, 32, 8, step=1, label="Horizon", elem_id="ablate-horizon", min_width=280,
            info="tokens that an effect is followed over, from the chosen one on",
        )  # fmt: skip
    line = tokens("Text, choose a token", "ablate-tokens", choose=True, empty="Press Look.")
    status = gr.HTML(elem_id="ablate-status", elem_classes="saert-say")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            ranked = bars(
                "Active latents, choose one", "ablate-latents", choose=True, marks=True,
                empty="Active latents appear here, the largest effect first.",
            )  # fmt: skip
        with gr.Column(min_width=300):
            sparse = gr.HTML(elem_id="ablate-sentence", elem_classes="saert-say")
            facts = figures("Its effect here", "ablate-facts", empty="Choose a latent.")
            after = tokens("KL divergence by token", "ablate-by-token")
            with gr.Row():
                up = bars("Promotes (logits)", "ablate-promoted")
                down = bars("Suppresses (logits)", "ablate-suppressed")
    with gr.Row(equal_height=False):
        several = gr.Dropdown(
            [], multiselect=True, label="Ablate these too", elem_id="ablate-several",
            min_width=280, info="together with the latent chosen above",
        )  # fmt: skip
        phase = gr.Dropdown(
            [(name, key) for key, name in view.PHASES.items()], value="all",
            label="Where", elem_id="ablate-phase", min_width=280,
            info="where latents are set to 0; the effects above are of the chosen token alone",
        )  # fmt: skip
    with gr.Accordion("Continuation settings", open=False), gr.Row():
        length = gr.Slider(
            1, 200, 40, step=1, label="New tokens", elem_id="ablate-length",
            info="for each of the two texts",
        )  # fmt: skip
        heat = gr.Slider(
            0, 2, 0, step=0.1, label="Temperature", elem_id="ablate-temperature",
            info="0 always takes the likeliest token",
        )  # fmt: skip
        seed = gr.Number(
            0, label="Seed", precision=0, elem_id="ablate-seed", info="the same for both texts"
        )
    with gr.Row():
        run = gr.Button("Ablate it", variant="primary", elem_id="ablate-run", interactive=False)
        stop = gr.Button("Stop", elem_id="ablate-stop", interactive=False)
        undo = gr.Button("Undo", elem_id="ablate-undo", interactive=False)
        steer = gr.Button("Steer with this", elem_id="ablate-steer", interactive=False)
    with gr.Row(equal_height=False):
        default = tokens(
            "Continued from the chosen token, as the model is", "ablate-default",
            empty="Ablate a latent to compare.",
        )  # fmt: skip
        ablated = tokens(
            ABLATED, "ablate-ablated", legend=CHANGE_LEGEND, empty="Ablate a latent to compare."
        )
    on, off = gr.update(interactive=True), gr.update(interactive=False)
    detail = [sparse, facts, after, up, down]
    results = [seen, line, status, ranked, several, default, ablated, run, steer, stop, undo,
               *detail]  # fmt: skip

    def looked(
        source: str, text: str, by: str, target: str, horizon: float, position: int,
        progress: gr.Progress | None,
    ) -> list[Any]:  # fmt: skip
        def report(done: int, total: int) -> None:
            if progress is not None:
                progress((done, total), desc="ablating latents", unit="latents")

        token = target or ""  # a box that is not on the page has None
        found = data.ablation(bench, source, text, position, by, int(horizon), token, report)
        if not found["latents"]:
            raise UserError(f"no latent is active at token {found['position']}; choose another")
        best = found["latents"][0]["latent"]
        return [
            found, view.tokens(found, specials), view.status(found), view.latents(found, best),
            gr.Dropdown(choices=view.choices(found), value=[]), [],
            gr.HTML(value=[], label=ABLATED), on, on, off, off, *detailed(found, best),
        ]  # fmt: skip

    def detailed(found: dict[str, Any], latent: int) -> list[Any]:
        one = data.effect(
            bench, found["source"], found["text"], latent, found["position"], found["horizon"]
        )
        strip = view.by_token(one)
        return [
            view.sentence(one), view.facts(one),
            gr.HTML(value=strip, visible=bool(strip), legend=view.by_token_legend(one)),
            view.moved(one["promoted"]), view.moved(one["suppressed"]),
        ]  # fmt: skip

    @shown
    def on_look(
        source: str, text: str, by: str, target: str, horizon: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
    ) -> list[Any]:  # fmt: skip
        return looked(source, text, by, target, horizon, _at(by, -1), progress)

    @shown
    def on_open(
        found: dict[str, Any] | None, source: str, text: str, by: str, target: str,
        horizon: float, event: gr.SelectData,
    ) -> list[Any]:  # fmt: skip
        """The text that is there, when the tab is first opened."""
        if found is not None or event.value != "Ablate" or not text.strip():
            return [gr.skip()] * len(results)
        return looked(source, text, by, target, horizon, _at(by, -1), None)

    @shown
    def on_token(
        found: dict[str, Any] | None, text: str, by: str, target: str, horizon: float,
        event: gr.EventData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        found = _seen(found, text)
        at = chosen_of(event, len(found["tokens"]))
        if found["tokens"][at] in specials:
            said: list[Any] = [gr.skip()] * len(results)
            said[results.index(status)] = view.special(found, at)
            return said
        return looked(found["source"], found["text"], by, target, horizon, at, progress)

    @shown
    def on_rank(
        found: dict[str, Any] | None, source: str, by: str, target: str, horizon: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        if found is None:
            return [gr.skip()] * len(results)
        at = found["position"]
        if at == len(found["tokens"]) - 1:
            at = _at(by, -1)
        return looked(source, found["text"], by, target, horizon, at, progress)

    @shown
    def on_source(
        found: dict[str, Any] | None, source: str, by: str, target: str, horizon: float
    ) -> list[Any]:
        """The same text and token; what is wrong with the SAE is said elsewhere."""
        try:
            same = found is None or bench.sae(source).source == bench.sae(found["source"]).source
        except Exception:  # noqa: BLE001 - the Explore tab says it, and puts the last one back
            same = True
        return [gr.skip()] * len(results) if same else on_rank(found, source, by, target, horizon)

    @shown
    def on_latent(found: dict[str, Any] | None, text: str, event: gr.EventData) -> list[Any]:
        found = _seen(found, text)
        return detailed(found, found["latents"][chosen_of(event, len(found["latents"]))]["latent"])

    @shown
    def on_run(
        found: dict[str, Any] | None, text: str, ranked: list[Any], several: list[int],
        phase: str, length: float, temperature: float, seed: float,
    ) -> Iterator[list[Any]]:  # fmt: skip
        found, latents = _chosen(found, text, ranked, several)
        names = ", ".join(map(view.named, latents))
        yield [[], gr.HTML(value=[], label=f"The same with {names} ablated"), on, on]
        for both in texts.continued(
            bench, found["source"], found["text"], latents, found["position"], phase,
            int(length), temperature, int(seed),
        ):  # fmt: skip
            yield [both.default, both.ablated, gr.skip(), gr.skip()]
        yield [gr.skip(), gr.skip(), off, gr.skip()]

    @shown
    def on_steer(
        found: dict[str, Any] | None, text: str, ranked: list[Any], several: list[int],
        phase: str, edits: list[dict[str, Any]],
    ) -> list[Any]:  # fmt: skip
        found, latents = _chosen(found, text, ranked, several)
        more = [one for one in texts.specs(found["source"], latents, phase) if one not in edits]
        return [edits + more, gr.Tabs(selected="steer")]

    def on_text(found: dict[str, Any] | None, text: str) -> Any:
        if found is None:
            return gr.skip()
        return view.status(found) if text == found["text"] else view.STALE

    settings = [by, target, horizon]
    choice = [seen, text, ranked, several, phase]
    hidden: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {"show_progress": "hidden", **hidden}
    for asked in (look.click, text.submit, examples.load_input_event.success):
        asked(on_look, [shared.source, text, *settings], results, **hidden, **HEAVY)
    shared.tabs.select(
        on_open, [seen, shared.source, text, *settings], results, **quiet, **HEAVY
    )  # fmt: skip
    text.change(on_text, [seen, text], status, queue=False, **quiet)
    line.select(on_token, [seen, text, *settings], results, **hidden, **HEAVY)
    gr.on(
        [by.change, target.submit, horizon.release],
        on_rank, [seen, shared.source, *settings], results, **hidden, **HEAVY,
    )  # fmt: skip
    shared.source.change(
        on_source, [seen, shared.source, *settings], results, **quiet, **HEAVY
    )  # fmt: skip
    by.change(lambda by: gr.Textbox(visible=by == "attributed_logit"), by, target, **quiet)
    ranked.select(on_latent, [seen, text], detail, **hidden, **HEAVY)
    running = run.click(
        on_run, [*choice, length, heat, seed], [default, ablated, stop, undo],
        trigger_mode="always_last", **quiet, **HEAVY,  # a click in the middle of a run counts
    )  # fmt: skip
    gr.on([look.click, line.select], None, None, None, cancels=[running], **hidden)
    stop.click(lambda: off, None, stop, cancels=[running], **hidden)
    undo.click(
        lambda: [[], gr.HTML(value=[], label=ABLATED), off, off], None,
        [several, ablated, stop, undo], cancels=[running], **hidden,
    )  # fmt: skip
    steer.click(on_steer, [*choice, shared.edits], [shared.edits, shared.tabs], **hidden)
    endpoints(bench)


def _at(by: str, position: int) -> int:
    """The last token, or that before it for a loss: nothing comes after the last."""
    return position - 1 if by in view.LOSSES else position


def _seen(found: dict[str, Any] | None, text: str) -> dict[str, Any]:
    if found is None:
        raise UserError(UNSEEN)
    if text != found["text"]:
        raise UserError(view.STALE)
    return found


def _chosen(
    found: dict[str, Any] | None, text: str, ranked: list[Any], several: list[int]
) -> tuple[dict[str, Any], list[int]]:
    """What was looked at, and the latents to ablate: what the page shows as chosen, and others."""
    found, latent = _seen(found, text), view.marked(ranked)
    known = {one["latent"] for one in found["latents"]}
    latents = list(dict.fromkeys([*([] if latent is None else [latent]), *several]))
    if not latents or not known.issuperset(latents):
        raise UserError("choose a latent first")
    return found, latents
