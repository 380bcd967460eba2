"""find: the SAEs that are known for a model, from the registry and from the Hub's search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, get_session
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
)

from saert.hub.registry import releases
from saert.hub.sources.http import Trouble, answered, unreachable

TAGS = ("saert", "saelens", "sparse-autoencoder", "sae", "sparsify")
"""What publishers of SAEs tag their repositories with."""


TIMEOUT = 15.0


@dataclass(frozen=True)
class Listing:
    """One line of what there is.

    Attributes:
        name: a short name's pattern, or a Hub repo id; both are sources, filled in or with a path.
        about: what the registry says of it, or the repo's tags.
        choices: what may stand for the fields of a pattern.
        repo: the pattern's repo, or the same id.
        downloads: of the last month, as the Hub counts them; None for a pattern.
    """

    name: str
    about: str
    repo: str
    choices: str = ""
    downloads: int | None = None


def find(model: str, *, online: bool = True, limit: int = 50) -> list[Listing]:
    """The SAEs known for a model: short names first, then what the Hub finds, most loaded first.

    Args:
        model: a Hub id, or its last part (`gpt2`, `google/gemma-2-2b`).
        online: whether the Hub is asked too.
        limit: most repositories of each search.

    Raises:
        OSError: the Hub could not be reached; `online=False` asks the registry alone.

    >>> [one.name for one in find("gpt2", online=False)][:2]
    ['gpt2:openai-{width}/{site}.{layer}', 'gpt2:res-jb/{layer}']
    """
    known = [
        Listing(name, one.about, one.repo, one.choices())
        for one in releases()
        if (name := one.for_model(model)) is not None
    ]
    return known + (_search(model, limit) if online else [])


def _search(model: str, limit: int) -> list[Listing]:
    """Repositories with a tag of SAEs that name the model, in their id or as their base model."""
    found: dict[str, Listing] = {}
    try:
        for tag in TAGS:
            by_id = _ask(filter=tag, search=model.rpartition("/")[2], limit=limit)
            by_base = _ask(filter=[tag, f"base_model:{model}"], limit=limit)
            found |= {one.name: one for one in (*by_id, *by_base)}
    except Trouble as error:
        if (reason := unreachable(error)) is None:
            raise
        raise ConnectionError(
            f"the Hub's search cannot be asked, {reason}: pass online=False"
        ) from error
    return sorted(found.values(), key=lambda one: (-(one.downloads or 0), one.name))


def _ask(**query: Any) -> list[Listing]:
    """One page of the Hub's list of models: HfApi's own asks without a timeout."""

    def ask() -> list[Listing]:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/models", params=query,
            headers=build_hf_headers(), timeout=TIMEOUT,
        )  # fmt: skip
        hf_raise_for_status(answer)
        return [_listing(one) for one in answer.json()]

    return answered(ask)


def _listing(info: dict[str, Any]) -> Listing:
    tags = [one for one in info.get("tags") or () if ":" not in one]
    downloads = int(info.get("downloads") or 0)
    return Listing(info["id"], ", ".join(tags[:6]), info["id"], downloads=downloads)
