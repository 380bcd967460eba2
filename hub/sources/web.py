"""A weights file at an https address, and the config files that lie beside it.

There is no list of files: the families say which configs they would look for, and each is asked
for once. A file is downloaded once, into

    HF_HOME/saert/urls/<hash of the address>/{about.json, <sha256>/<name>}

and asked about again with its ETag. What is cached loads when nobody answers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from huggingface_hub.errors import LocalEntryNotFoundError

from saert.hub.checkpoint import Family
from saert.hub.files.parse import MOST_BYTES
from saert.hub.sources.address import shown
from saert.hub.sources.download import Gone, NotModified, Refused, download
from saert.hub.sources.folder import safe_path
from saert.hub.sources.http import own_cache, write_whole

FOLDERS_ABOVE = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What is known of an address: the last answer's ETag and content.

    Attributes:
        sha256: of the content; None: nothing is there.
        sure: whether the server said so, or only that it may not say (403 of an object store).
    """

    url: str
    etag: str | None = None
    sha256: str | None = None
    sure: bool = True


class WebFile:
    """The list of names is always whole: what cannot be known of a config is an error.

    Args:
        url: as `file_url` gives it. A query is sent for the weights alone, never shown or stored.
        families: whose configs are looked for.
        revision: "sha256:…" of the weights, if only those will do.
    """

    def __init__(self, url: str, families: Iterable[Family], revision: str | None = None) -> None:
        if revision is not None and re.fullmatch("sha256:[0-9a-f]{64}", revision) is None:
            raise ValueError(f"revision {revision!r}: of an address, expected sha256:…, or none")
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc}"
        self.weights = safe_path(unquote(parts.path).lstrip("/"))
        self.address = shown(url)
        self._url, self._revision = url, revision
        self._configs = configs_beside(self.weights, families)
        self._known: dict[str, About] = {}
        self._unchanged = self._away = False

    partial = None

    def lacks(self, name: str) -> bool:
        return name not in self.names()

    def __repr__(self) -> str:
        return f"WebFile({self.address!r})"

    @property
    def commit(self) -> str:
        return f"sha256:{self._about(self.weights).sha256}"

    def names(self) -> list[str]:
        """The weights file, and those of the config files that are there."""
        self._about(self.weights)
        return [self.weights, *(one for one in self._configs if self._about(one).sha256)]

    def fetch(self, name: str) -> Path:
        """A file, from the cache or downloaded into it.

        Raises LocalEntryNotFoundError if it is not cached and nobody answers; OSError for any other
        failure. Nothing of a broken download is kept.
        """
        about = self._about(safe_path(name))
        return self._content(name, about)

    def _about(self, name: str) -> About:
        if name not in self._known:
            self._known[name] = self._ask(name)
        return self._known[name]

    def _ask(self, name: str) -> About:
        """The cached answer where it still holds, otherwise a new one."""
        is_weights = name == self.weights
        url = self._url if is_weights else f"{self.name}/{quote(name)}"
        last = self._last(name)
        if is_weights and self._revision is not None:
            pinned = About(shown(url), sha256=self._revision.removeprefix("sha256:"))
            if self._content(name, pinned).is_file():
                self._unchanged = True
                return pinned
        if last is not None and not is_weights and (self._away or self._unchanged and last.sure):
            return last
        most, etag = (None if is_weights else MOST_BYTES), (None if last is None else last.etag)
        try:
            found = download(url, self._folder(name), _base(name), most=most, etag=etag)
            about = About(shown(url), *found)
        except NotModified:
            about = last or About(shown(url))
            self._unchanged |= is_weights
        except Refused as error:
            if is_weights:
                raise
            if not isinstance(error, Gone) or not self._believable(error, last):
                raise OSError(
                    f"{error}; whether there is a {_base(name)} decides how the weights are read, "
                    "so they are not. Try again, or download what there is into a folder"
                ) from error
            about = About(shown(url), sure=error.sure)
        except ConnectionError as error:
            if last is None:
                raise LocalEntryNotFoundError(f"{shown(url)} is not cached, and {error}") from error
            logger.warning("%s: %s; loading what is cached", shown(url), error)
            self._away |= is_weights
            return last
        if is_weights and self._revision not in (None, f"sha256:{about.sha256}"):
            raise ValueError(
                f"{shown(url)}: revision {self._revision} is not what is there now, "
                f"sha256:{about.sha256}"
            )
        write_whole(self._folder(name) / "about.json", json.dumps(asdict(about)))
        return about

    def _believable(self, error: Gone, last: About | None) -> bool:
        """Whether a config is not there: not one that was, nor one beside a signed address."""
        was_there = last is not None and last.sha256 is not None
        return error.sure or not (was_there or urlsplit(self._url).query)

    def _folder(self, name: str) -> Path:
        url = self._url if name == self.weights else f"{self.name}/{quote(name)}"
        return own_cache() / "urls" / hashlib.sha256(url.encode()).hexdigest()[:32]

    def _content(self, name: str, about: About) -> Path:
        return self._folder(name) / str(about.sha256) / _base(name)

    def _last(self, name: str) -> About | None:
        """The last answer, if what it describes is still there."""
        with suppress(OSError, ValueError, TypeError):
            text = (self._folder(name) / "about.json").read_text(encoding="utf-8")
            about = About(**json.loads(text))
            if about.sha256 is None or self._content(name, about).is_file():
                return about
        return None


def configs_beside(
    weights: str, families: Iterable[Family], above: int | None = FOLDERS_ABOVE
) -> list[str]:
    """The config files that any family would look for, beside a weights file of that name.

    Args:
        above: of those that may lie in a folder above, how many folders; None: all.
    """
    most = None if above is None else 1 + above
    parts = PurePosixPath(weights).parts
    wanted: dict[str, None] = {}
    for family in families:
        for split in range(len(parts) - 1, -1, -1):
            match = re.fullmatch(family.weights, "/".join(parts[split:]))
            if match is None:
                continue
            folder = PurePosixPath(*parts[:split])
            for one in (*family.needs, *family.may):
                name = one.format(**match.groupdict())
                places = [folder, *folder.parents] if name.startswith("^") else [folder]
                for place in places[:most]:
                    wanted[str(place / name.removeprefix("^"))] = None
    return list(wanted)


def _base(name: str) -> str:
    return PurePosixPath(name).name
