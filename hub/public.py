"""SAEs that strangers may have a server load: what the Hub holds, up to a size; no file, no URL."""

from __future__ import annotations

from dataclasses import replace

from saert.hub import bundled
from saert.hub.detect import find_saes
from saert.hub.registry import lookup
from saert.hub.session import BUNDLED, Loaded, UserError, canonical, load_sae
from saert.hub.sources.address import hub_address, is_url
from saert.hub.sources.partial import choose_whole
from saert.hub.sources.repo import Repo

MOST_BYTES = 1_000_000_000
REFUSED = (
    "only SAEs on the Hub can be loaded here, as ORG/REPO[:PATH], or by a short name such as "
    "gpt2:openai-32k/resid_post.6"
)


def load_public(source: str, most: int = MOST_BYTES) -> Loaded:
    """An SAE of the Hub or the package, by id or short name, of at most `most` bytes to download.

    A name is never looked for among the files of this machine, and what is refused is refused in
    the same words whether or not there is such a file.

    Raises UserError for everything else, and what `load` raises.
    """
    name = canonical(source)
    if name.partition(":")[0] == BUNDLED:
        if name.partition(":")[2] not in bundled.HOOKPOINTS:
            raise UserError(f"{BUNDLED} has {', '.join(bundled.HOOKPOINTS)}")
        return load_sae(name)
    known = None if is_url(name) else lookup(name)
    if known is not None:
        repo, spelt = Repo(known.repo), name
        inside = known.choose([one.path for one in find_saes(repo.names())])
    else:
        address = None if is_url(name) else hub_address(name)
        if address is None:
            raise UserError(REFUSED)
        repo, inside = Repo(address.repo, address.revision), address.path or ""
        spelt = f"hf://{name}"  # a folder of that name here is not meant
    size = repo.to_fetch(choose_whole(repo, inside or None).weights)
    if size is None or size > most:
        found = "of unknown size" if size is None else f"{size / 1e9:.1f} GB"
        raise UserError(f"{name} is {found}; at most {most / 1e9:.1f} GB are downloaded here")
    return replace(load_sae(spelt), source=name)
