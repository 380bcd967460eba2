"""A Hugging Face Hub on the loopback, as far as huggingface_hub's own client asks.

Reading:
    GET  /api/models?search=…                     ids that hold the words
    GET  /api/models/{id}[/revision/{rev}]        id, sha, siblings
    GET  /api/models/{id}/tree/{rev}[/{path}]     files and folders
    GET  /api/models/{id}/refs                    branches and tags
    POST /api/models/{id}/paths-info/{rev}        sizes and sha256 of some files
    HEAD|GET /{id}/resolve/{rev}/{path}           the file; ETag, X-Repo-Commit, Content-Length
    GET  /_lfs/{sha256}                           where the Hub redirects large files to
Writing, with the token:
    POST /api/repos/create, DELETE /api/repos/delete, POST /api/validate-yaml, GET /api/whoami-v2
    POST /api/models/{id}/preupload/{rev}         which files go to LFS, which are there already
    POST /{id}.git/info/lfs/objects/batch, PUT /_lfs/{sha256}, POST /_lfs/verify
    POST /api/models/{id}/commit/{rev}            newline-separated JSON operations
    POST|DELETE /api/models/{id}/tag/…, …/branch/…; PUT …/settings

Errors carry X-Error-Code, from which the client makes its exception types. `log` keeps every
request, so that a test can say what was fetched; `faults` breaks chosen ones. The client reads
its environment at import: start it in a process of its own with `environment(home)`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_routes import TOKEN, Files, Handler, commit_of

__all__ = ["TOKEN", "Fault", "HubServer", "commit_of"]


@dataclass
class Fault:
    """What happens to the next `times` requests that match, instead of the right answer.

    Attributes:
        request: pattern of "METHOD /path" (`re.search`).
        status: answered with `headers` and `text`.
        cut: the connection breaks after so many bytes of the body.
        delay: seconds before anything is answered.
        change: the body that is sent instead, with a Content-Length of its own.
        then: called before the answer, to change the server meanwhile.
    """

    request: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    text: str = "planted"
    cut: int | None = None
    delay: float = 0.0
    change: Callable[[bytes], bytes] | None = None
    then: Callable[[], object] | None = None


class HubServer:
    """`with HubServer({"someone/saes": {"main": {path: bytes}, "v1": …}}) as hub:`

    Attributes:
        private, gated: repos that need the token; that this user has no access to.
        log: method and path of every request; `headers`, what each one sent.
        redirect: whether large files come from another host, as the Hub's do.
        about: more fields of a repo's info (`tags`, `cardData`, …).
        web: files at addresses of their own, as on any web server.
        steps: called when the client asks for "/mark/<step>".
    """

    def __init__(
        self, repos: dict[str, dict[str, Files]] | None = None, *, redirect: bool = True
    ) -> None:
        self.repos = repos if repos is not None else {}
        self.redirect = redirect
        self.branches = {(repo, "main") for repo in self.repos}  # every other ref is a tag
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.about: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.lfs: dict[str, bytes] = {}
        self.web: Files = {}
        self.steps: dict[str, Callable[[], object]] = {}
        self.commits: dict[str, Files] = {}
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})
        )
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def commit(self, repo: str, revision: str = "main") -> str:
        return commit_of(self.repos[repo][revision])

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit and the files that a branch, tag or sha names."""
        for files in self.repos[repo].values():
            self.commits.setdefault(f"{repo}@{commit_of(files)}", dict(files))
        files = self.repos[repo].get(revision, self.commits.get(f"{repo}@{revision}"))
        return None if files is None else (commit_of(files), files)

    def push(self, repo: str, files: Files, revision: str = "main") -> str:
        """Move a branch; what it named before stays reachable by its commit."""
        if revision in self.repos[repo]:
            self.at(repo, revision)
        self.repos[repo][revision] = files
        return self.commit(repo, revision)

    def fault(self, method: str, path: str) -> Fault:
        """The fault planted for a request, used up by one."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.request, f"{method} {path}"):
                fault.times -= 1
                return fault
        return Fault("")

    def during(self, step: str) -> list[str]:
        """ "METHOD /path" of every request after a client's mark, until its next one."""
        lines = [f"{method} {path}" for method, path in self.log]
        begin = lines.index(f"GET /mark/{step}") + 1
        ends = (at for at, line in enumerate(lines) if at >= begin and "/mark/" in line)
        return lines[begin : next(ends, None)]

    def requests(self, pattern: str, since: int = 0) -> list[str]:
        """The logged "METHOD /path" that a pattern finds."""
        lines = [f"{method} {path}" for method, path in self.log[since:]]
        return [line for line in lines if re.search(pattern, line)]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client that knows no other Hub, no proxy and no other token."""
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.lower().endswith("_proxy") and k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        }
        return (
            kept
            | {
                "HF_ENDPOINT": self.url,
                "HF_HOME": str(home),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            | ({"HF_TOKEN": token} if token else {})
        )
