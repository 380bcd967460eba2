"""Config files of strangers: JSON and YAML objects, of bounded size and depth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from saert.hub.errors import CORRUPT, FormatError
from saert.hub.sources.folder import file_size

MOST_BYTES = 4 << 20
MOST_YAML = 64 << 10  # PyYAML reads so much in about a second
MOST_LEVELS = 64


def read_config(path: Path) -> dict[str, Any]:
    """The object in a `.json`, `.yaml` or `.yml` file.

    Raises FormatError for anything else: too large, too deep, not text, not valid, a key twice, not
    an object.
    """
    is_yaml = path.suffix in (".yaml", ".yml")
    limit = MOST_YAML if is_yaml else MOST_BYTES
    if (size := file_size(path)) > limit:
        raise FormatError(f"{path.name}: {size} bytes, expected a config of at most {limit}")
    kind, content = "YAML" if is_yaml else "JSON", path.read_bytes()
    try:
        text = content.decode("utf-8")
        found = yaml.load(text, _Loader) if is_yaml else parse_json(text)
    except (*CORRUPT, yaml.YAMLError) as error:
        raise FormatError(f"{path.name}: not {kind} ({str(error)[:300]})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path.name}: found a {type(found).__name__}, expected an object")
    check_plain(found, path.name)
    return found


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError if it is malformed or an object has a key twice."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} twice")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values; keys are text, as in JSON, and stand once. No merge keys ("<<")."""


def _mapping(loader: _Loader, node: yaml.Node) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    yield found  # now an alias inside may mean this very mapping
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"a mapping made from a {node.id}")
    keys = [key for key, _ in node.value]
    if not all(isinstance(key, yaml.ScalarNode) for key in keys):
        raise ValueError("a key that is no scalar")
    values = [loader.construct_object(value) for _, value in node.value]
    found |= _object(zip((str(loader.construct_object(key)) for key in keys), values, strict=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def check_plain(value: Any, name: str) -> None:
    """Refuse a value that is nested too deeply, holds itself, or is huge when written out.

    YAML aliases and pickles can name one list many times: a page of text that prints as gigabytes.
    """
    if _written(value, {}, 0, name) > 2 * MOST_BYTES:
        raise FormatError(f"{name}: too large when its repetitions are written out")


def _written(value: Any, known: dict[int, int], depth: int, name: str) -> int:
    """About how many characters a value takes; 0 in `known` marks one that is being counted."""
    if isinstance(value, str | bytes):
        return 1 + len(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return 1
    if depth == MOST_LEVELS or known.get(id(value)) == 0:
        raise FormatError(f"{name}: nested too deeply, expected at most {MOST_LEVELS} levels")
    if id(value) not in known:
        known[id(value)] = 0
        inner = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_written(one, known, depth + 1, name) for one in inner)
    return known[id(value)]
