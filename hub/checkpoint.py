"""Checkpoint: all that a family's `read` may look at; Family: what one layout looks like.

A family is one file in `hub/formats/` with a `FAMILY` (or several in `FAMILIES`) and a pure
function from a Checkpoint to an SAE. It never opens a file, and never asks the network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saert.hookpoint import Hookpoint, HookpointError
from saert.hub.errors import FormatError
from saert.hub.files.tensors import Tensors
from saert.sae import SAE


@dataclass(frozen=True)
class Checkpoint:
    """One SAE of a source, its config files read, its weights file open.

    Attributes:
        where: source and path, for messages and for what only names say (a repo's suffix).
        path: what `load(source, path)` calls it.
        weights: its weights file, as the source names it.
        configs: parsed JSON and YAML files by base name, `{}` entries never: absent means absent.
        tensors: the weights, unread.
        options: keywords that `load` was given for this family.
    """

    where: str
    path: str
    weights: str
    configs: Mapping[str, Mapping[str, Any]]
    tensors: Tensors
    options: Mapping[str, Any] = field(default_factory=dict)

    def error(self, message: str) -> FormatError:
        """A FormatError that begins with where the checkpoint lies."""
        return FormatError(f"{self.where}: {message}")

    def expect_tensors(self, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Refuse missing tensors and unknown ones: leaving one out could change the numbers."""
        needed, found = set(needed), self.tensors.names
        missing, extra = needed - found, found - needed - set(optional)
        if missing or extra:
            raise self.error(
                f"found tensors {sorted(found)}; "
                + "; ".join(
                    f"{word} {sorted(names)}"
                    for word, names in (("missing", missing), ("unknown", extra))
                    if names
                )
            )

    def expect_shape(self, name: str, *sizes: int) -> None:
        """Refuse a tensor whose shape contradicts the others or the config."""
        if (found := self.tensors.shape(name)) != sizes:
            raise self.error(f"{name} is {list(found)}, expected {list(sizes)}")

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor that has to be a matrix."""
        shape = self.tensors.shape(name)
        if len(shape) != 2:
            raise self.error(f"{name} is {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def expect_keys(
        self, file: str, needed: Iterable[str], known: Iterable[str] = ()
    ) -> Mapping[str, Any]:
        """A config file's object; refuse missing keys and unknown ones."""
        config = self.configs[file]
        needed = set(needed)
        if missing := sorted(needed - set(config)):
            raise self.error(f"{file}: missing keys {missing}")
        if unknown := sorted(set(config) - needed - set(known)):
            raise self.error(
                f"{file}: unknown keys {unknown}; ignoring them could change the numbers"
            )
        return config

    def expect_value(self, file: str, key: str, *allowed: Any, default: Any = None) -> Any:
        """A config value that has to be one of a few (compared with their types)."""
        value = self.configs[file].get(key, default)
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self.error(f"{file}: {key} is {value!r}, expected one of {list(allowed)}")
        return value

    def expect_size(self, file: str, key: str, found: int) -> None:
        """Refuse a width or count, where the config declares it, that the tensors contradict."""
        declared = self.configs[file].get(key, found)
        if declared != found or isinstance(declared, bool):
            raise self.error(f"{file} declares {key} = {declared!r}, but the tensors hold {found}")

    def integer(self, file: str, key: str, *, least: int = 1) -> int:
        """A config value that has to be an integer of at least `least`."""
        value = self.configs[file].get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"{file}: {key} is {value!r}, expected an integer of at least {least}")
        return value

    def number(self, file: str, key: str, *, least: float, default: Any = None) -> float:
        """A config value that has to be a finite number of at least `least`."""
        value = self.configs[file].get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= sys.float_info.max:
            raise self.error(f"{file}: {key} is {value!r}, expected a number of at least {least}")
        return float(value)

    def option(self, name: str, *allowed: Any) -> Any:
        """A keyword of `load` for this family; the first allowed value is the default."""
        value = self.options.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{self.where}: {name}={value!r}, expected one of {list(allowed)}")
        return value


@dataclass(frozen=True)
class Family:
    """How the files of one layout are named, and what reads them.

    Attributes:
        name: as messages and `metadata["format"]` call it.
        weights: pattern of the weights file's path below the SAE's folder (`re.fullmatch`); the
            group `stem`, if it has one, may be used in the names of config files.
        read: the checkpoint's SAE.
        recognises: whether this family can be meant, from tensor names and configs; asked where
            several families name their files alike.
        needs, may: config files beside the weights' folder root; without all of `needs` the
            layout is not this one. A name starting with "^" is looked for in the folders above
            too, nearest first.
        is_file: the SAE is called by its weights file, not by its folder.
        options: keywords of `load` that this family understands.
        loose: other things are named so too (a model's own weights, a stray `.pt`): where SAEs of
            other families lie beside it, it is not meant unless it is asked for.
    """

    name: str
    weights: str
    read: Callable[[Checkpoint], SAE]
    recognises: Callable[[Checkpoint], bool] = lambda checkpoint: True
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    is_file: bool = False
    options: frozenset[str] = frozenset()
    loose: bool = False


@dataclass(frozen=True)
class Found:
    """An SAE that the file names of a source promise; nothing has been opened.

    Attributes:
        path: what `load(source, path)` calls it: a folder ("" for the source itself) or a file.
        weights: its weights file.
        configs: its config files, those that exist.
        families: those that name their files so, in the order they are asked.
    """

    path: str
    weights: str
    configs: tuple[str, ...]
    families: tuple[Family, ...]


def parse_hookpoint(name: object) -> Hookpoint | None:
    """A hookpoint, or None where the name is one that no transformers module answers to.

    The name belongs into the metadata all the same; `attach` then asks for a hookpoint.
    """
    if not name:
        return None
    try:
        return Hookpoint.parse(str(name))
    except HookpointError:
        return None


def search(pattern: str, text: str) -> re.Match[str] | None:
    """The last match of a pattern: the innermost folder knows best."""
    found: Sequence[re.Match[str]] = list(re.finditer(pattern, text))
    return found[-1] if found else None
