"""A read-only Hugging Face Hub on the loopback, as far as huggingface_hub's own client asks.

    GET  /api/models/{id}[/revision/{rev}]        id, sha, siblings
    GET  /api/models/{id}/tree/{rev}[/{path}]     files and folders
    HEAD|GET /{id}/resolve/{rev}/{path}           the file; ETag, X-Repo-Commit, Content-Length

Errors carry X-Error-Code, from which the client makes its exception types. `log` keeps every
request, so that a test can say what was fetched. The client reads its environment at import:
start it in a process of its own with `environment(home)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    """A sha that changes with the content, as a commit's does."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


class HubServer:
    """`with HubServer({"someone/saes": {"main": {path: bytes}, "v1": …}}) as hub:`"""

    def __init__(self, repos: dict[str, dict[str, dict[str, bytes]]]) -> None:
        self.repos, self.log = repos, []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def commit(self, repo: str, revision: str = "main") -> str:
        return commit_of(self.repos[repo][revision])

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files that a branch, tag or sha names."""
        for name, files in self.repos[repo].items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a client that knows no other Hub, and no proxy."""
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            path = unquote(address.path)
            hub.log.append((self.command, path))
            if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
                self.api(m[1], m[2] or "revision", m[3] or "main", parse_qs(address.query))
            elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(*m.groups())
            else:
                self.reply(404, b"no such route")

        do_HEAD = do_GET

        def api(self, repo: str, what: str, rest: str, query: dict[str, list[str]]) -> None:
            revision, _, folder = rest.partition("/")
            if (found := self.find(repo, revision)) is None:
                return
            commit, files = found
            if what == "revision":
                siblings = [{"rfilename": name} for name in sorted(files)]
                answer = {"_id": "0", "id": repo, "modelId": repo, "sha": commit}
                self.json(answer | {"siblings": siblings, "tags": [], "private": False})
                return
            inside = [n for n in sorted(files) if n.startswith(folder and folder + "/")]
            if query.get("recursive", ["false"])[0].lower() != "true":
                inside = [n for n in inside if "/" not in n.removeprefix(folder).lstrip("/")]
            folders = {str(p) for n in inside for p in Path(n).parents if str(p) != "."}
            entries = [
                {"type": "file", "path": n, "size": len(files[n]), "oid": _etag(files[n])}
                for n in inside
            ]
            entries += [{"type": "directory", "path": p, "oid": "0", "size": 0} for p in folders]
            self.json(entries)

        def resolve(self, repo: str, revision: str, path: str) -> None:
            if (found := self.find(repo, revision)) is None:
                return
            commit, files = found
            if path not in files:
                self.error("EntryNotFound", "Entry not found", commit)
                return
            etag = f'"{_etag(files[path])}"'
            self.reply(200, files[path], {"ETag": etag, "X-Repo-Commit": commit})

        def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            if repo not in hub.repos:
                self.error("RepoNotFound", "Repository not found")
                return None
            if (found := hub.at(repo, revision)) is None:
                self.error("RevisionNotFound", f"Invalid rev id: {revision}")
            return found

        def error(self, code: str, message: str, commit: str | None = None) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            if commit is not None:
                headers["X-Repo-Commit"] = commit
            self.reply(404, json.dumps({"error": message}).encode(), headers)

        def json(self, answer: object) -> None:
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
