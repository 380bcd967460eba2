"""The routes of tests/hub_server.py: each answers (status, body, headers)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import HubServer

Files = dict[str, bytes]
TOKEN = "hf_TheTokenThatNobodyMaySee"
LARGE = re.compile(r".*\.(safetensors|bin|pt|pth|npz|parquet|gguf)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client hung up: its own business

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.content = self.body()
        self.hub.log.append((self.command, path))
        self.hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.planted = self.hub.fault(self.command, path)
        if self.planted.then is not None:
            self.planted.then()
        time.sleep(self.planted.delay)
        if self.planted.status is not None:
            body = json.dumps({"error": self.planted.text}).encode()
            return self.reply(self.planted.status, body, self.planted.headers)
        with self.hub.lock:
            answer = self.route(path)
        return self.reply(*answer)  # outside the lock: a slow reader stops nobody

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # -- routes: each answers (status, body, headers) --------------------------------------------

    def route(self, path: str) -> Answer:
        kind = "(?:model|dataset)s"
        if path in self.hub.web and self.command in ("GET", "HEAD"):
            return 200, self.hub.web[path], {"ETag": f'"{blob_id(self.hub.web[path])}"'}
        if path.startswith("/mark/"):  # a client says what it does next
            self.hub.steps.get(path.removeprefix("/mark/"), lambda: None)()
            return answer({})
        if m := re.fullmatch(r"/_lfs/(\w+)", path):
            return self.lfs(m[1])
        if self.command in ("POST", "PUT", "DELETE") and "/paths-info/" not in path:
            if not self.known:
                return error(401, "", "Invalid username or password.")
            if m := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self.batch()
            if path in ("/api/repos/create", "/api/repos/delete"):
                return self.create_or_delete(path.endswith("create"))
            if path == "/api/validate-yaml":
                return answer({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            me = {"type": "user", "name": "someone", "orgs": [], "auth": {"type": "access_token"}}
            return answer(me) if self.known else error(401, "", "Invalid user token.")
        if re.fullmatch(f"/api/{kind}", path):
            words = self.query.get("search", [""])[0].lower()
            return answer([self.info(id) for id in self.hub.repos if words in id.lower()])
        if m := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.access(m[1]) or self.resolve(*m.groups())
        if m := re.fullmatch(rf"/api/{kind}/([^/]+/[^/]+)(?:/([^/]+))?(?:/(.+))?", path):
            repo, what, rest = m[1], m[2] or "revision", m[3] or "main"
            return self.access(repo, read=what == "resolve") or self.api(repo, what, rest)
        return error(404, "", f"no such route: {self.command} {path}")

    def access(self, repo: str, read: bool = True) -> Answer | None:
        """A refusal, or None."""
        if repo not in self.hub.repos or (repo in self.hub.private and not self.known):
            status = 404 if self.known else 401
            return error(status, "RepoNotFound", "Repository not found")
        if read and repo in self.hub.gated:
            text = f"Access to model {repo} is restricted."
            return error(403 if self.known else 401, "GatedRepo", text)
        return None

    def api(self, repo: str, what: str, rest: str) -> Answer:
        hub, (revision, _, folder) = self.hub, rest.partition("/")
        refs = hub.repos[repo]
        if what == "refs":
            found = [
                {"name": name, "ref": f"refs/{name}", "targetCommit": commit_of(files)}
                for name, files in refs.items()
            ]
            branches = [one for one in found if (repo, one["name"]) in hub.branches]
            tags = [one for one in found if one not in branches]
            return answer({"branches": branches, "tags": tags, "converts": []})
        if what == "settings":
            sent = json.loads(self.content)
            private = sent.get("private", sent.get("visibility") == "private")
            (hub.private.add if private else hub.private.discard)(repo)
            return answer({})
        if what in ("tag", "branch") and self.command == "DELETE":
            return answer({}) if refs.pop(rest, None) is not None else error(404, "", "no ref")
        if what == "branch":
            sent = json.loads(self.content or b"{}")
            name, revision = rest, sent.get("startingPoint", "main")
        if what == "tag":
            name = json.loads(self.content)["tag"]
        if (at := hub.at(repo, revision)) is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = at
        if what in ("tag", "branch"):
            if name in refs:
                return error(409, "", f"Reference {name} already exists")
            refs[name] = dict(files)
            if what == "branch":
                hub.branches.add((repo, name))
            return answer({})
        if what == "paths-info":
            sent = parse_qs(self.content.decode()).get("paths") or json.loads(self.content)["paths"]
            return answer([entry(name, files[name]) for name in sent if name in files])
        if what == "tree":
            return answer(self.tree(files, folder))
        if what == "preupload":
            return answer({"files": self.preupload(files)})
        if what == "commit":
            return self.commit(repo, revision, commit, files)
        if what == "revision":
            return answer(self.info(repo, at))
        return error(404, "", f"no such route: {what}")

    def info(self, repo: str, at: tuple[str, Files] | None = None) -> dict[str, Any]:
        at = at or self.hub.at(repo, "main")
        commit, files = at if at is not None else ("", {})
        known = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "tags": []}
        known |= {"private": repo in self.hub.private, "downloads": 0, "likes": 0}
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in sorted(files)]
        if self.query.get("blobs"):
            siblings = [sibling(name, files[name]) for name in files]
        return known | {"siblings": siblings} | self.hub.about.get(repo, {})

    def tree(self, files: Files, folder: str) -> list[dict[str, Any]]:
        inside = [n for n in sorted(files) if n.startswith(folder and folder + "/")]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            inside = [n for n in inside if "/" not in n.removeprefix(folder).lstrip("/")]
        folders = {str(p) for n in inside for p in Path(n).parents if str(p) != "."}
        return [entry(n, files[n]) for n in inside] + [
            {"type": "directory", "path": p, "oid": "0", "size": 0} for p in sorted(folders)
        ]

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        if (at := self.hub.at(repo, revision)) is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = at
        if path not in files:
            return error(404, "EntryNotFound", "Entry not found", commit)
        content = files[path]
        headers = {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": commit}
        if not LARGE.fullmatch(path):
            return 200, content, headers
        oid = hashlib.sha256(content).hexdigest()
        self.hub.lfs[oid] = content
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        if not self.hub.redirect:
            return 200, content, headers
        # Another host name, as the Hub's storage is: the client must not take its token there.
        return 302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/_lfs/{oid}"}

    # -- writing ---------------------------------------------------------------------------------

    def create_or_delete(self, create: bool) -> Answer:
        sent = json.loads(self.content)
        repo = f"{sent.get('organization') or 'someone'}/{sent['name']}"
        if not create:
            gone = self.hub.repos.pop(repo, None)
            return answer({}) if gone is not None else error(404, "RepoNotFound", "no such repo")
        told = {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}
        if repo in self.hub.repos:
            return answer(told | {"error": "You already created this model repo"}, 409)
        self.hub.repos[repo] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
        self.hub.branches.add((repo, "main"))
        if sent.get("private") or sent.get("visibility") == "private":
            self.hub.private.add(repo)
        return answer(told)

    def preupload(self, files: Files) -> list[dict[str, Any]]:
        return [
            {
                "path": name,
                "uploadMode": "lfs" if LARGE.fullmatch(name) else "regular",
                "shouldIgnore": False,
                "oid": (large_id(name, files[name]) if name in files else None),
            }
            for name in (one["path"] for one in json.loads(self.content)["files"])
        ]

    def batch(self) -> Answer:
        objects = []
        for sent in json.loads(self.content)["objects"]:
            base = f"http://localhost:{self.hub.port}/_lfs"
            actions = {
                "upload": {"href": f"{base}/{sent['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/_lfs/verify", "header": {}},
            }
            there = sent["oid"] in self.hub.lfs
            objects.append(
                {"oid": sent["oid"], "size": sent["size"]} | ({} if there else {"actions": actions})
            )
        return answer({"transfer": "basic", "objects": objects})

    def lfs(self, oid: str) -> Answer:
        if self.command == "PUT":
            if hashlib.sha256(self.content).hexdigest() != oid:
                return error(400, "", "sha256 mismatch")
            self.hub.lfs[oid] = self.content
            return 200, b"", {"ETag": f'"{oid}"'}
        if self.command == "POST":  # verify
            sent = json.loads(self.content)
            return answer({}) if sent["oid"] in self.hub.lfs else error(404, "", "not stored")
        return 200, self.hub.lfs[oid], {"ETag": f'"{oid}"'}

    def commit(self, repo: str, revision: str, parent: str, files: Files) -> Answer:
        new = dict(files)
        for line in self.content.splitlines():
            sent = json.loads(line)
            key, value = sent["key"], sent["value"]
            if key == "header" and value.get("parentCommit") not in (None, parent):
                return error(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return error(400, "", f"LFS pointer pointed to a missing file {value['path']}")
                new[value["path"]] = self.hub.lfs[value["oid"]]
            if key == "deletedFile":
                new.pop(value["path"], None)
            if key == "deletedFolder":
                under = value["path"].rstrip("/") + "/"
                new = {name: one for name, one in new.items() if not name.startswith(under)}
        more = {}
        if self.query.get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in self.hub.repos[repo])
            revision = f"refs/pr/{number}"
            more = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
        commit = self.hub.push(repo, new, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        told = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        return answer(told | more)

    # -- the answer ------------------------------------------------------------------------------

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.planted.change is not None and status == 200:
            body = self.planted.change(body)
        etag = headers.get("ETag")
        if status == 200 and etag is not None and self.headers.get("If-None-Match") == etag:
            status, body = 304, b""
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, etag)
        if part and same and status == 200 and self.command == "GET":
            first, last = int(part[1]), int(part[2] or len(body) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
            status, body = 206, body[first : last + 1]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: self.planted.cut])
        if self.planted.cut is not None:
            self.wfile.flush()
            self.close_connection = True


Answer = tuple[int, bytes, dict[str, str]]


def answer(content: object, status: int = 200) -> Answer:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}


def error(status: int, code: str, message: str, commit: str | None = None) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    if commit is not None:
        headers["X-Repo-Commit"] = commit
    return status, json.dumps({"error": message}).encode(), headers


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as listings describe it."""
    known = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if LARGE.fullmatch(name):
        oid = hashlib.sha256(content).hexdigest()
        known["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return known


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as a repo's info describes it, asked for sizes."""
    known = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if LARGE.fullmatch(name):
        sha256 = hashlib.sha256(content).hexdigest()
        known["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return known


def large_id(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if LARGE.fullmatch(name) else blob_id(content)


def blob_id(content: bytes) -> str:
    """What git calls a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: Files) -> str:
    """A sha that changes with the content, as a commit's does."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()
