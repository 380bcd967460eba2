"""The Ablate tab's functions for `gradio_client`: plain data in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradio.events import api

from saert.demos.ablate import data
from saert.demos.ablate import text as texts
from saert.demos.errors import shown
from saert.demos.workbench import HEAVY, Workbench


def endpoints(bench: Workbench) -> None:
    """What `gradio_client` may call: plain data in and out."""

    def ablation(
        source: str, text: str, position: int = -1, by: str = "kl", horizon: int = 8,
        token: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """The latents active at a token, ranked by effect."""
        return data.ablation(bench, source, text, position, by, horizon, token)

    def effect(
        source: str, text: str, latent: int, position: int = -1, horizon: int = 8
    ) -> dict[str, Any]:
        """What ablating one latent at a token does to the predictions from there on."""
        return data.effect(bench, source, text, latent, position, horizon)

    def ablated(
        source: str, text: str, latents: list[int], position: int = -1, phase: str = "all",
        max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0,
    ) -> Iterator[dict[str, str]]:  # fmt: skip
        """The text up to a token, continued with and without latents, as it grows."""
        for both in texts.continued(
            bench, source, text, latents, position, phase, max_new_tokens, temperature, seed
        ):
            yield {"default": texts.joined(both.default), "ablated": texts.joined(both.ablated)}

    api(shown(ablation), api_name="ablation", **HEAVY)
    api(shown(effect), api_name="ablation_effect", **HEAVY)
    api(shown(ablated), api_name="ablated_text", **HEAVY)
