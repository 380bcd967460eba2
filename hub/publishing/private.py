"""What must not leave the machine with an SAE: paths are cut, secrets are refused."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

WEB = re.compile(r"(\b(?:https?|hf|s3|gs|az)://[^\s\"'<>]+)")  # addresses, which stay
LOCAL = re.compile(r"~[\w.-]*[\\/]|~$|/|\\\\|[A-Za-z]:[\\/]|file:|\.\.?[\\/]|\$\{?\w+\}?[\\/]")
PART = r"[^\s\\/:\"'`,;|<>()\[\]{}]"
# Only after what no relative path or pattern has there: "and/or", "a/b", "data/*/x" are none.
INSIDE_TEXT = re.compile(
    rf"(?:(?<![\w./\\~*)\]}}%+-])|(?<=\s-[A-Za-z])|(?<=^-[A-Za-z]))(?:"
    rf"(?:file:)?(?:~[\w.-]*|\$\{{?\w+\}}?|[A-Za-z]:|\.\.?|\\(?=\\\w))[\\/]+{PART}*(?:[\\/]+{PART}*)*"
    rf"|(?:file:)?/+{PART}+(?:[\\/]+{PART}*)+"
    rf"|(?:(?<=[^\s\w])|^|file:)/+{PART}+)"
)
HOME = re.compile(r"(?:(?:/(?:home|Users))|[A-Za-z]:[\\/]Users)[\\/]+[^\\/]+[\\/]*|~[\w.-]*[\\/]*")
SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[baprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\w+://[^/\s:@]+:[^/\s@]+@|eyJ[\w-]{5,}\.eyJ[\w-]{5,}\.|(?i:\bbearer\s+[\w.~+/=-]{8,})"
    r"|(?i:[?&](?:sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token)"
    r"|(?:access_)?token|api_?key)=[^\s&])"
    r"|(?i:--(?:[a-z]+[-_])*(?:token|password|secret|api[-_]?key)(?:=|\s+)[^\s-])"
    r"|\b(?:[A-Z]+_)*(?:API_KEY|TOKEN|SECRET|PASSWORD)=\S"
)
SECRET_KEY = re.compile(  # of keys_in_this_case
    r"(?:api|private|ssh|signing)_?keys?$|access_?key|pass(?:word|wd|phrase)|credential"
    r"|(?<![a-z])secrets?(?![a-z])|authori[sz]ation$|^token$"
    r"|(?:^|_)(?:hf|hub|auth|access|api|wandb|git[a-z]*|session|bearer|refresh)_?tokens?$"
)
HEX_KEY, HEX = re.compile(r"key|token|wandb"), re.compile(r"[0-9a-f]{40}")


def without_paths(value: Any) -> Any:
    """Plain data in which every path of this machine is cut to its last part, a home to "~".

    Web addresses (https, hf, s3, …) stay. Keys that become equal are numbered.

    >>> without_paths({"model": "/home/me/models/gpt2", "data": "roneneldan/TinyStories"})
    {'model': 'gpt2', 'data': 'roneneldan/TinyStories'}
    """
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for key, inner in value.items():
            cut, number = (name := without_paths(key)), 1
            while cut in found or (cut != key and cut in value):
                number += 1
                cut = f"{name} ({number})"
            found[cut] = without_paths(inner)
        return found
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if LOCAL.match(value) and not re.search(
        r"\s(?:[\\/~$]|\.\.?/)|://", value.removeprefix("file://")
    ):
        return _last(value)
    parts = WEB.split(value)
    parts[::2] = [_cut(text) for text in parts[::2]]
    return "".join(parts)


def refuse_secrets(value: Any, where: str, known: tuple[str, ...] = ()) -> None:
    """Raise ValueError, without saying what it is, if plain data hold something like a password.

    `known`: strings that must not appear, such as the token that is used to publish.
    """
    for place, key, inner in _places(value, where, ""):
        if _is_secret_key(key, inner):
            raise ValueError(f"{place}: a key for secrets; take it out before publishing")
        if isinstance(inner, str) and (
            SECRET_VALUE.search(inner) or any(one in inner for one in known if one)
        ):
            raise ValueError(f"{place}: this looks like a secret; take it out before publishing")


def _is_secret_key(key: str, value: Any) -> bool:
    """Numbers count too (a password), but not flags, and not numbers of tokens."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_")
    if isinstance(value, str) and HEX_KEY.search(name) and HEX.fullmatch(value):
        return True
    if isinstance(value, bool) or value is None or value in ("", [], {}):
        return False
    counts = isinstance(value, int | float) and name.endswith("tokens")
    return not counts and SECRET_KEY.search(name) is not None


def _places(value: Any, where: str, key: str) -> Iterator[tuple[str, str, Any]]:
    """Every value in plain data, with its place and the key it stands under; keys as values too."""
    yield where, key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{where} (a key)", "", name
            yield from _places(inner, f"{where}.{without_paths(str(name))}", str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _places(inner, where, key)


def _cut(text: str) -> str:
    for root in {str(Path.home()), os.getcwd(), tempfile.gettempdir()}:
        if len(Path(root).parts) > 2:  # long enough to be meant wherever it stands
            text = re.sub(
                rf"{re.escape(root)}(?:[\\/]+{PART}*)*(?![\w.-])", lambda m: _last(m[0]), text
            )
    return INSIDE_TEXT.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    path = path.removeprefix("file:")
    bare = re.sub(r"^/+", "/", path)
    if HOME.fullmatch(bare) or (bare.startswith("/") and Path(bare) == Path.home()):
        return "~"
    parts = [part for part in re.split(r"[\\/]", path) if part.strip("~.")]
    return parts[-1] if parts else ""
