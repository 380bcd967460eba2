"""How a source is spelled: what belongs to the Hub, and where in it.

    org/repo   org/repo:path   org/repo@revision:path
    hf://org/repo[@revision][/path]   hf://org/repo[@revision][:path]
    https://huggingface.co/org/repo[/tree|blob|resolve|raw/revision[/path]]
    az://account/path   https://host/path/weights.pt

Nothing here asks the network, and no message repeats what may be a secret.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import SplitResult, unquote, urlsplit

from huggingface_hub import constants

from saert.hub.sources.folder import safe_path

HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
OTHER_KINDS = frozenset({"datasets", "spaces", "buckets", "kernels"})
WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".bin")
REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^:@\s]+))?(:(?P<path>.*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubAddress:
    """A repo, and what the spelling says of the revision and of the path inside."""

    repo: str
    revision: str | None = None
    path: str | None = None


def hub_address(text: str) -> HubAddress | None:
    """What a spelling means on the Hub; None if it is none of the Hub's.

    >>> hub_address("hf://org/repo@v1/layers.6")
    HubAddress(repo='org/repo', revision='v1', path='layers.6')

    Raises ValueError for a place on the Hub that is no model repo, and for credentials in a URL.
    """
    if not is_url(text):
        found = REPO.fullmatch(text)
        return None if found is None else _address(**found.groupdict())
    parts = split_url(text)
    if parts.scheme == "hf":
        return _of_segments([parts.netloc, *parts.path.split("/")], text)
    own = urlsplit(constants.ENDPOINT)
    prefix = own.path.rstrip("/") + "/"
    if (parts.scheme, parts.netloc) == (own.scheme, own.netloc) and parts.path.startswith(prefix):
        return _of_segments(parts.path.removeprefix(prefix).split("/"), text)
    if parts.hostname in HUB_HOSTS:
        return _of_segments(parts.path.split("/"), text)
    return None


def file_url(text: str) -> str:
    """The https address of a weights file. Raises ValueError for anything else.

    >>> file_url("az://openaipublic/sparse-autoencoder/gpt2-small/x.pt")
    'https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small/x.pt'
    """
    parts = split_url(text)
    if parts.scheme == "az":
        host = f"{parts.netloc}.blob.core.windows.net"
        parts = parts._replace(scheme="https", netloc=host)
    if not is_secure(parts):
        raise ValueError(f"{shown(text)}: expected an https:// address")
    path = safe_path(unquote(parts.path).lstrip("/") or "/")
    if PurePosixPath(path).suffix not in WEIGHTS:
        raise ValueError(
            f"{shown(text)}: expected the address of a weights file ({', '.join(WEIGHTS)}), "
            "or of a repo: https://huggingface.co/ORG/REPO"
        )
    return parts._replace(fragment="").geturl()


def is_url(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def is_secure(parts: SplitResult) -> bool:
    """Whether bytes from there can be trusted to come from there: TLS, or this very machine."""
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and local))


def split_url(text: str) -> SplitResult:
    """The parts of a URL without credentials. Raises ValueError otherwise, without repeating it."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        raise ValueError("the source is no URL: its host or port is malformed") from None
    if "@" in parts.netloc and parts.scheme != "hf":
        raise ValueError(
            f"{shown(text)}: a URL with a user name or token in it; leave it out, and give the "
            "token to huggingface_hub: HF_TOKEN, or `hf auth login`"
        )
    return parts


def shown(text: str) -> str:
    """A source as messages may show it: without credentials, query and anything like a token."""
    text = re.sub(r"^([\w+.-]*://)[^/]*@", r"\1", text) if is_url(text) else text
    text = re.split(r"[?#]", text, maxsplit=1)[0] if is_url(text) else text
    return re.sub(r"hf_\w+", "hf_…", text)


def _of_segments(segments: list[str], text: str) -> HubAddress:
    """ORG/REPO[@REV][/PATH], or ORG/REPO[/tree|blob|resolve|raw/REV[/PATH]]."""
    segments = [one for one in segments if one]
    if segments and segments[0] == "models":
        segments = segments[1:]
    if len(segments) < 2 or segments[0] in OTHER_KINDS:
        raise ValueError(f"{shown(text)}: expected a model repo, ORG/REPO, on the Hub")
    if ":" in segments[1]:  # ORG/REPO[@REVISION]:PATH, as it is spelled without a scheme
        return _spelled(unquote("/".join(segments)), text)
    repo, at, revision = "/".join(segments[:2]).partition("@")
    rest = segments[2:]
    if not text.startswith("hf://") and rest:
        if rest[0] not in ("tree", "blob", "resolve", "raw") or len(rest) < 2:
            raise ValueError(f"{shown(text)}: expected /tree/REVISION/… after the repo")
        revision, rest = rest[1], rest[2:]
    if revision == "refs" and len(rest) >= 2:  # refs/pr/7: a revision with slashes
        if at and ":" in rest[1]:
            return _spelled(unquote("/".join(segments)), text)
        revision, rest = "/".join([revision, *rest[:2]]), rest[2:]
    found = REPO.fullmatch(repo)
    if found is None or found["repo"] != repo:
        raise ValueError(f"{shown(text)}: expected a model repo, ORG/REPO, on the Hub")
    return _address(repo, unquote(revision) or None, unquote("/".join(rest)) or None)


def _spelled(name: str, text: str) -> HubAddress:
    if (found := REPO.fullmatch(name)) is None:
        raise ValueError(f"{shown(text)}: expected ORG/REPO[@REVISION][:PATH] on the Hub")
    return _address(**found.groupdict())


def _address(repo: str, revision: str | None, path: str | None) -> HubAddress:
    revision = safe_path(revision) if revision else None
    return HubAddress(repo, revision, safe_path(path) if path else None)
