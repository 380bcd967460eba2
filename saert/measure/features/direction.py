"""What one latent writes, asked of the weights alone: no text and no index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saert.measure.features.cards import Logit
from saert.measure.features.directions import logit_lens, neighbours, unembedding
from saert.measure.features.look import check_latent
from saert.measure.features.vocabulary import vocabulary
from saert.measure.passes import sites
from saert.sae import SAE


@dataclass(frozen=True)
class Direction:
    """The logit lens and the nearest decoder directions of a latent, as a card has them.

    Attributes:
        promoted, suppressed: tokens and lens logits, the largest first; empty where the lens is
            not defined.
        undefined: why it is not, else empty.
        neighbours: (latent, cosine), the nearest first.
    """

    promoted: tuple[Logit, ...]
    suppressed: tuple[Logit, ...]
    undefined: str
    neighbours: tuple[tuple[int, float], ...]


def direction(
    model: Any, tokenizer: Any, sae: SAE, latent: int, *, logits: int = 20, near: int = 10
) -> Direction:
    """What a latent's decoder direction promotes, suppresses and lies near.

    It runs one token through the model, to find its final norm. ValueError if there is no such
    latent, or if the SAE does not say where it reads.
    """
    check_latent(latent, sae.num_latents)
    at = (latent, latent + 1)
    through = unembedding(model, sites(sae)[1], sae.d_out)
    found = neighbours(sae.W_dec, near, at)
    undefined = through if isinstance(through, str) else ""
    lens = {} if isinstance(through, str) else logit_lens(sae.W_dec, through, logits, at)

    def named(which: str) -> tuple[Logit, ...]:
        if which not in lens:
            return ()
        ids = lens[which][0].tolist()
        return tuple(
            map(Logit, ids, vocabulary(tokenizer, ids), lens[f"{which}_logits"][0].tolist())
        )

    cosines = zip(found["neighbours"][0].tolist(), found["cosines"][0].tolist(), strict=True)
    return Direction(named("promoted"), named("suppressed"), undefined, tuple(cosines))
