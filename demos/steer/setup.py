"""A Setup and the controls that show it: each from the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from saert.demos.pieces import ids_of, new_tokens
from saert.demos.workbench import Workbench
from saert.edits import Phase
from saert.hub.session import Loaded, UserError
from saert.measure.steering import EditSpec, Sampling, Setup, Step, side_by_side

PROMPT, GENERATED = "the prompt", "what is written"
COMPLETION, CHAT = "continue the text", "answer as a chat"
Edits = list[dict[str, Any]]  # as in `Shared.edits`


def compose(
    bench: Workbench, edits: Edits, source: str, prompt: str, form: str, tokens: Sequence[str],
    keep: bool, temperature: float, top_p: float, new_tokens: float, seed: float | None,
) -> Setup:  # fmt: skip
    """What the controls say. Raises UserError, ValueError or TypeError for what cannot be meant.

    Without a latent, but with the error left out, the SAE looked at replaces the hidden state.
    """
    phase = _phase(tokens)
    specs = tuple(replace(EditSpec.from_dict(edit), phase=phase) for edit in edits)
    if not specs and keep:
        raise UserError("add a latent to steer with first, or choose one of the setups under “Try”")
    setup = Setup(
        bench.session.name, prompt, form == CHAT, specs, not keep,
        Sampling(int(new_tokens), float(temperature), float(top_p), int(seed or 0)),
        () if specs else (source,),
    )  # fmt: skip
    return checked(bench, setup)


def controls(setup: Setup) -> list[Any]:
    """Source, prompt, form, tokens, keep, temperature, top-p, new tokens, seed: as for `compose`.

    Raises UserError for what they cannot show: edits of different phases, more SAEs than those of
    the edits.
    """
    phases = {spec.phase for spec in setup.edits} or {"all"}
    if len(phases) > 1:
        raise UserError(
            "this setup steers some latents at the prompt and others at what is written; the app "
            "has one choice for all: use its Python code instead"
        )
    if setup.saes and (setup.edits or len(setup.saes) > 1 or not setup.splice):
        raise UserError(
            "this setup attaches SAEs beside those of its latents, for which the app has no place: "
            "use its Python code instead"
        )
    shown = {"all": [PROMPT, GENERATED], "prompt": [PROMPT], "generated": [GENERATED]}
    how = setup.sampling
    return [
        setup.sources[0] if setup.sources else gr.skip(), setup.prompt,
        CHAT if setup.chat else COMPLETION, shown[phases.pop()],
        not setup.splice, how.temperature, how.top_p, how.max_new_tokens, how.seed,
    ]  # fmt: skip


def checked(bench: Workbench, setup: Setup) -> Setup:
    """A setup this app can run, or UserError."""
    if setup.model != bench.session.name:
        raise UserError(
            f"this setup is for the model {setup.model}, and this app runs {bench.session.name}: "
            f"start one with saert app --model {setup.model}"
        )
    if not setup.prompt.strip():
        raise UserError("the prompt is empty: write something to continue")
    if setup.chat and not bench.chats:
        raise UserError(f"{setup.model} has no chat template: use {COMPLETION!r}")
    new_tokens(setup.sampling.max_new_tokens)
    for spec in setup.edits:
        loaded = bench.sae(spec.sae)
        for latent in (spec.latent, spec.when):
            if latent is not None:
                exists(loaded, latent)
    return setup


def steps(bench: Workbench, setup: Setup) -> Iterator[Step]:
    """Both texts, token by token, on a model of this request's own."""
    more = setup.sampling.max_new_tokens
    ids = ids_of(bench, setup.prompt, chat=setup.chat, more=more)
    saes = {source: bench.sae(source).sae for source in setup.sources}
    return side_by_side(
        bench.model(), bench.tokenizer, setup, saes, ids=ids, strict=bench.session.strict
    )


def exists(loaded: Loaded, latent: int) -> int:
    """The latent, or UserError if the SAE has none of that number."""
    width = loaded.sae.num_latents
    if not 0 <= latent < width:
        raise UserError(f"latent {latent}: {loaded.source} has latents 0 to {width - 1}")
    return latent


def _phase(tokens: Sequence[str]) -> Phase:
    if not tokens:
        raise UserError("choose which tokens to steer: the prompt, what is written, or both")
    return "all" if len(tokens) > 1 else "prompt" if PROMPT in tokens else "generated"
