"""Setups to begin with: what they do was read in the text, not supposed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from saert.demos.steer.strength import strongest_here
from saert.demos.workbench import Workbench
from saert.hub.session import BUNDLED, UserError
from saert.measure.steering import EditSpec, Sampling, Setup

STORY = "Once upon a time, there was a little girl named Lily. One day, she"
STORIES = (
    STORY,
    "Tom and his dog went to the beach. The sun was",
    'Sam was bored at home. He asked his mom, "Can we go',
    "The little bird was sad because",
)
PLAIN = (
    "The most important thing I learned this year is",
    "Dear diary, today",
    "My favourite place in the whole world is",
)
HERE = f"{BUNDLED}:resid_post.2"  # the SAE whose latents were labelled by hand


def _story(*edits: EditSpec) -> Setup:
    return Setup(BUNDLED, STORY, edits=edits, sampling=Sampling(max_new_tokens=50))


OURS: Mapping[str, Setup] = {
    "Hungry": _story(EditSpec(HERE, 71, "add", 6.0)),
    "Sad": _story(EditSpec(HERE, 349, "add", 10.0)),
    "Not “to the park”": _story(EditSpec(HERE, 546, "add", -8.0, phase="prompt")),
    "Toys and dancing": _story(
        EditSpec(HERE, 748, "add", 6.0), EditSpec(HERE, 365, "add", 6.0)
    ),
    "Sad, but only near trees": _story(
        EditSpec(HERE, 349, "add", 16.0, when=532, above=0.5)
    ),
}  # fmt: skip


def presets(bench: Workbench) -> Mapping[str, Setup]:
    """Those for the app's model: none for one whose latents nobody has read."""
    return OURS if bench.session.name == BUNDLED and HERE in bench.sources else {}


def start(bench: Workbench) -> Setup:
    """What the page begins with: a preset where there are any, else a prompt alone."""
    first = next(iter(presets(bench).values()), Setup(bench.session.name, examples(bench)[0]))
    return replace(first, sampling=Sampling())


def examples(bench: Workbench) -> tuple[str, ...]:
    """Prompts to try, the first of them there at the start."""
    return STORIES if bench.session.name == BUNDLED else PLAIN


def strongest(bench: Workbench, source: str, prompt: str, count: int = 3) -> list[EditSpec]:
    """The prompt's strongest latents of an SAE, each added at its own activation there.

    Raises UserError where the prompt is empty or too long, or nothing fires.
    """
    source = bench.sae(source).source
    latents, highest = strongest_here(bench, source, prompt)
    if not latents:
        raise UserError(f"no latent of {source} fires in this prompt")
    return [
        EditSpec(source, latent, "add", float(f"{float(highest[latent]):.3g}"))
        for latent in latents[:count]
    ]
