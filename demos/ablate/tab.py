"""The Ablate tab: a token's active latents by effect, what each does, and the text without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from saert.demos.ablate import data, view
from saert.demos.ablate import text as texts
from saert.demos.ablate.api import endpoints
from saert.demos.errors import shown
from saert.demos.pieces import chosen_of
from saert.demos.widgets import bars, figures, tokens
from saert.demos.workbench import Workbench
from saert.hub.session import UserError

if TYPE_CHECKING:
    from saert.demos.app import Shared

UNSEEN = "Look at a text first, and choose a token and a latent."


def build(bench: Workbench, shared: Shared) -> None:
    """Lay the tab out and connect it."""
    seen, chosen = gr.State(None), gr.State(None)  # data.ablation's, and a latent
    with gr.Row(equal_height=False):
        with gr.Column(scale=3):
            text = gr.Textbox(
                view.EXAMPLES[0], label="Text", lines=2, elem_id="ablate-text",
                info="then choose a token; the last is looked at first",
            )  # fmt: skip
            gr.Examples(
                [[one] for one in view.EXAMPLES], text, label="Examples", api_visibility="private"
            )
        with gr.Column(scale=2):
            by = gr.Dropdown(
                [(name, key) for key, name in view.RANKS.items()], value="kl",
                label="Rank latents by", elem_id="ablate-by",
                info="true effects take a pass for each latent; attribution estimates all at once",
            )  # fmt: skip
            target = gr.Textbox(
                label="Next token", elem_id="ablate-target", visible=False,
                info="whose logit; the model's likeliest if empty",
            )  # fmt: skip
            horizon = gr.Slider(
                1, 32, 8, step=1, label="Horizon", elem_id="ablate-horizon",
                info="tokens that an effect is followed over, from the chosen one on",
            )  # fmt: skip
            look = gr.Button("Look", variant="primary", elem_id="ablate-look")
    line = tokens("Text, choose a token", "ablate-tokens", choose=True, empty="Press Look.")
    status = gr.Markdown(elem_id="ablate-status")
    with gr.Row(equal_height=False):
        with gr.Column():
            ranked = bars(
                "Active latents, choose one", "ablate-latents", choose=True,
                empty="Active latents appear here, the largest effect first.",
            )  # fmt: skip
        with gr.Column():
            sparse = gr.Markdown("Choose a latent to see what it does.", elem_id="ablate-sentence")
            facts = figures("Its effect here", "ablate-facts")
            after = tokens("KL divergence by token", "ablate-by-token")
            with gr.Row():
                up = bars("Promotes, mean change of the logit", "ablate-promoted")
                down = bars("Suppresses", "ablate-suppressed")
    detail = [chosen, ranked, sparse, facts, after, up, down]

    def looked(
        source: str, text: str, by: str, target: str, horizon: float, position: int,
        progress: gr.Progress,
    ) -> list[Any]:  # fmt: skip
        def report(done: int, total: int) -> None:
            progress((done, total), desc="ablating latents", unit="latents")

        found = data.ablation(bench, source, text, position, by, int(horizon), target, report)
        best = found["latents"][0]["latent"]
        several = gr.Dropdown(choices=view.choices(found), value=[])
        return [
            found, view.tokens(found), view.status(found), several, [], [], *detailed(found, best)
        ]  # fmt: skip

    def detailed(found: dict[str, Any], latent: int) -> list[Any]:
        one = data.effect(
            bench, found["source"], found["text"], latent, found["position"], found["horizon"]
        )
        return [
            latent, view.latents(found, latent), view.sentence(one), view.facts(one),
            view.by_token(one), view.moved(one["promoted"]), view.moved(one["suppressed"]),
        ]  # fmt: skip

    @shown
    def on_look(
        source: str, text: str, by: str, target: str, horizon: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
    ) -> list[Any]:  # fmt: skip
        return looked(source, text, by, target, horizon, -1, progress)

    @shown
    def on_token(
        found: dict[str, Any] | None, by: str, target: str, horizon: float, event: gr.EventData,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        found = _seen(found)
        at = chosen_of(event, len(found["tokens"]))
        return looked(found["source"], found["text"], by, target, horizon, at, progress)

    @shown
    def on_rank(
        found: dict[str, Any] | None, source: str, by: str, target: str, horizon: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:  # fmt: skip
        if found is None:
            return [gr.skip()] * (6 + len(detail))
        return looked(source, found["text"], by, target, horizon, found["position"], progress)

    @shown
    def on_latent(found: dict[str, Any] | None, event: gr.EventData) -> list[Any]:
        found = _seen(found)
        return detailed(found, found["latents"][chosen_of(event, len(found["latents"]))]["latent"])

    with gr.Row(equal_height=False):
        several = gr.Dropdown(
            [], multiselect=True, label="Latents to ablate", elem_id="ablate-several",
            min_width=280,
            info="with the latent chosen above; add others to ablate them together",
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
        run = gr.Button("Ablate it", variant="primary", elem_id="ablate-run")
        stop = gr.Button("Stop", elem_id="ablate-stop")
        undo = gr.Button("Undo", elem_id="ablate-undo")
        steer = gr.Button("Steer with this", elem_id="ablate-steer")
    with gr.Row(equal_height=False):
        default = tokens("Continued from the chosen token, as the model is", "ablate-default")
        ablated = tokens(
            "The same with the latents ablated; colour: change of log-probability", "ablate-ablated"
        )

    @shown
    def on_run(
        found: dict[str, Any] | None, latent: int | None, several: list[int], phase: str,
        length: float, temperature: float, seed: float,
    ) -> Iterator[list[Any]]:  # fmt: skip
        found, latents = _chosen(found, latent, several)
        yield [gr.Dropdown(value=latents), [], []]
        for both in texts.continued(
            bench, found["source"], found["text"], latents, found["position"], phase,
            int(length), temperature, int(seed),
        ):  # fmt: skip
            yield [gr.skip(), both.default, both.ablated]

    @shown
    def on_steer(
        found: dict[str, Any] | None, latent: int | None, several: list[int], phase: str,
        edits: list[dict[str, Any]],
    ) -> list[Any]:  # fmt: skip
        found, latents = _chosen(found, latent, several)
        more = [one for one in texts.specs(found["source"], latents, phase) if one not in edits]
        return [edits + more, gr.Tabs(selected="steer")]

    results = [seen, line, status, several, default, ablated, *detail]
    settings = [by, target, horizon]
    hidden: dict[str, Any] = {"api_visibility": "private"}
    gr.on(
        [look.click, text.submit], on_look, [shared.source, text, *settings], results, **hidden
    )  # fmt: skip
    line.select(on_token, [seen, *settings], results, **hidden)
    gr.on(
        [by.change, target.submit, horizon.release, shared.source.change],
        on_rank, [seen, shared.source, *settings], results, **hidden,
    )  # fmt: skip
    by.change(lambda by: gr.Textbox(visible=by == "attributed_logit"), by, target, **hidden)
    ranked.select(on_latent, seen, detail, **hidden)
    running = run.click(
        on_run, [seen, chosen, several, phase, length, heat, seed], [several, default, ablated],
        **hidden,
    )  # fmt: skip
    gr.on(
        [stop.click, look.click, line.select], None, None, None, cancels=[running], **hidden
    )  # fmt: skip
    undo.click(
        lambda: [gr.Dropdown(value=[]), []], None, [several, ablated], cancels=[running], **hidden
    )  # fmt: skip
    steer.click(
        on_steer, [seen, chosen, several, phase, shared.edits], [shared.edits, shared.tabs],
        **hidden,
    )  # fmt: skip
    endpoints(bench)


def _seen(found: dict[str, Any] | None) -> dict[str, Any]:
    if found is None:
        raise UserError(UNSEEN)
    return found


def _chosen(
    found: dict[str, Any] | None, latent: int | None, several: list[int]
) -> tuple[dict[str, Any], list[int]]:
    """What was looked at, and the latents to ablate: those of the list and the one chosen."""
    found = _seen(found)
    latents = list(dict.fromkeys([*several, *([] if latent is None else [latent])]))
    return found, latents
