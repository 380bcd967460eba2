"""What the Hub's client and a plain download share: what counts as unreachable, patience, files."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

T = TypeVar("T")

# httpx's in huggingface_hub 1.x, httpx2's from 2.0 on; what both call HTTPError.
HttpError: type[Exception] = next(k for k in HfHubHTTPError.__mro__ if k.__name__ == "HTTPError")


class NoAnswer(ConnectionError):
    """An answer that is not the Hub's: a network's login page, a broken proxy."""


Trouble = (HttpError, OfflineModeIsEnabled, NoAnswer)
BUSY = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 30.0


def unreachable(error: BaseException | None) -> str | None:
    """Why a request got no answer worth the name, in words; None if it was answered."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"the server answers {status}" if status in BUSY else None
    if isinstance(error, NoAnswer):
        return str(error)
    if isinstance(error, HttpError):
        return f"the connection failed ({type(error).__name__}: {error})"
    return None


def patiently(ask: Callable[[], T]) -> T:
    """The answer of a server that may be busy (429, 5xx): asked three times, when it says to.

    One that says to come back after more than half a minute is not waited for.
    """
    for wait in (1.0, 2.0):
        try:
            return ask()
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            if (wait := wait_of(error.response.headers.get("Retry-After"), wait)) > LONGEST_WAIT:
                raise
            time.sleep(wait)
    return ask()


def answered(ask: Callable[[], T]) -> T:
    """What `patiently` gives; an answer that the client cannot read is NoAnswer."""
    try:
        return patiently(ask)
    except (JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise NoAnswer(
            "the server answers what the Hub does not (a login page of this network?)"
        ) from error


def wait_of(retry_after: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks for (it may also be a date, which is ignored)."""
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else otherwise


def own_cache() -> Path:
    """saert's own folder beside the Hub's cache."""
    return Path(constants.HF_HOME) / "saert"


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial(path.parent) as (part, file):
        file.write(text.encode())
        file.close()
        os.replace(part, path)


@contextmanager
def partial(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file, deleted unless it is moved away.

    As readable as any other (tempfile's is its owner's alone, and caches are shared).
    """
    part = folder / f"{secrets.token_hex(8)}.partial"
    try:
        with part.open("xb") as file:
            yield part, file
    finally:
        part.unlink(missing_ok=True)
