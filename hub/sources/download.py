"""One file from an https address onto the disk, whole or not at all.

Through huggingface_hub's HTTP session (its proxies, its offline switch), without its token. A
connection that breaks is taken up where it broke, if the server has the same content still;
redirects stay within https; no message shows a query.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urljoin

from huggingface_hub import constants, get_session
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from saert.hub.sources.address import is_secure, shown, split_url
from saert.hub.sources.http import BUSY, LONGEST_WAIT, HttpError, partial, unreachable, wait_of

TRIES = 4
MOST_REDIRECTS = 5
STORES = ("x-amz-request-id", "x-ms-request-id", "x-guploader-uploadid")
"""Headers of the object stores S3, Azure and Google's (and what speaks like them)."""


class NotModified(Exception):
    """The content is what its ETag says it was."""


class Refused(FileNotFoundError):
    """The server answers, but with no file: no access, a web page, an error of ours."""


class Gone(Refused):
    """There is no such file.

    Attributes:
        sure: the server says so (404, 410). An object store that may not list its files answers
            403 for one that is not there, as for one that may not be read.
    """

    def __init__(self, message: str, sure: bool) -> None:
        super().__init__(message)
        self.sure = sure


def download(
    url: str, folder: Path, name: str, *, most: int | None = None, etag: str | None = None
) -> tuple[str | None, str]:
    """Download into `folder/<sha256>/<name>`. Returns the ETag and the sha256.

    Args:
        most: refuse more bytes; None: what the disk has room for.
        etag: of the content that is there already.

    Raises:
        NotModified: it still has that ETag.
        Refused: the server answers with no file; Gone: because there is none.
        ConnectionError: nobody answers (offline, 429, 5xx), or the connection breaks repeatedly.
        OSError: more bytes than `most`, or a redirect to where nobody should follow or nobody can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    with partial(folder) as (part, file):
        transfer = _Transfer(url, file, free if most is None else min(most, free), etag)
        transfer.run(name)
        file.close()
        target = folder / transfer.digest.hexdigest() / name
        target.parent.mkdir(exist_ok=True)
        os.replace(part, target)
        return transfer.tag, transfer.digest.hexdigest()


@dataclass
class _Transfer:
    url: str
    file: BinaryIO
    most: int
    known: str | None
    tag: str | None = None
    size: int | None = None
    done: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def run(self, name: str) -> None:
        failures = 0
        with tqdm(unit="B", unit_scale=True, desc=name, name="saert.download") as bar:  # type: ignore[no-untyped-call]
            while True:
                before = self.done
                try:
                    return self._attempt(bar)
                except OfflineModeIsEnabled as error:
                    raise ConnectionError(unreachable(error)) from None  # its text has the URL
                except HttpError as error:
                    failures = failures + 1 if self.done <= before else 1
                    if failures == TRIES or (failures > 1 and self.size is None):
                        raise ConnectionError(self._broken(error)) from None
                    time.sleep(0.5 * failures)

    def _broken(self, error: Exception) -> str:
        if not self.done:
            return str(unreachable(error))
        return f"the connection broke after {self.done} of {self.size} bytes ({error})"

    def _attempt(self, bar: Any) -> None:
        with _get(self.url, self._headers()) as response:
            self._begin(response, bar)
            for chunk in response.iter_bytes():  # as they arrive: a chunker loses its last
                self._refuse_more_than_fits(self.done + len(chunk))
                self.file.write(chunk)
                self.digest.update(chunk)
                self.done += len(chunk)
                bar.update(len(chunk))
        if self.size is not None and self.done != self.size:
            raise OSError(f"{shown(self.url)}: {self.done} bytes came, declared {self.size}")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        if self.done and self.tag and not self.tag.startswith("W/"):
            return headers | {"Range": f"bytes={self.done}-", "If-Range": self.tag}
        return headers | ({"If-None-Match": self.known} if self.known else {})

    def _begin(self, response: Any, bar: Any) -> None:
        """Check what is coming, and where in the file it goes."""
        status, headers = response.status_code, response.headers
        if status == 304 and self.known:
            raise NotModified
        if status in (401, 403, 404, 410):
            said = f"{shown(self.url)}: the server answers {status}; no such file, or no access"
            if status in (404, 410) or (status == 403 and any(one in headers for one in STORES)):
                raise Gone(said, sure=status != 403)
            raise Refused(said)
        if status not in (200, 206) or "text/html" in headers.get("Content-Type", ""):
            found = "a web page" if status == 200 else str(status)
            raise Refused(f"{shown(self.url)}: the server answers {found}, expected a file")
        length = headers.get("Content-Length")
        if status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
            if span is None or (int(span[1]), int(span[2])) != (self.done, self.size):
                raise OSError(f"{shown(self.url)}: another part came than was asked for")
            return
        self.file.seek(0)  # the whole of it, from the start
        self.file.truncate()
        self.digest, self.done = hashlib.sha256(), 0
        self.tag, self.size = headers.get("ETag"), int(length) if length else None
        bar.reset(self.size)
        self._refuse_more_than_fits(self.size or 0)

    def _refuse_more_than_fits(self, size: int) -> None:
        if size > self.most:
            raise OSError(
                f"{shown(self.url)}: {size} bytes or more, but at most {self.most} are expected "
                "or fit onto the disk"
            )


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a GET, redirects followed, a busy server asked again."""
    start, waits, redirects = split_url(url), [1.0, 2.0], 0
    while True:
        with get_session().stream(
            "GET",
            url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=False,
        ) as response:
            status = response.status_code
            location = response.headers.get("Location")
            if not (location and status in (301, 302, 303, 307, 308)) and status not in BUSY:
                yield response
                return
            asked = wait_of(response.headers.get("Retry-After"), 0.0)
        if status in BUSY:
            wait = max(asked, waits.pop(0)) if waits else LONGEST_WAIT + 1
            if wait > LONGEST_WAIT:
                raise ConnectionError(f"the server answers {status}")
            time.sleep(wait)
            continue
        try:
            joined = urljoin(url, location)
            target = split_url(joined)
        except ValueError:  # says what is wrong with a source, and this is none
            raise OSError(f"{shown(url)}: redirected to no address, or with a user name") from None
        url, redirects = joined, redirects + 1
        if redirects > MOST_REDIRECTS or not is_secure(target) or target.scheme != start.scheme:
            raise OSError(f"redirected to {shown(url)}, which is not followed")
