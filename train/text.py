"""The documents of a data set, one after the other, from a position that can be saved.

A source is one dataset on the Hub, or local files of one kind: `.txt`, `.jsonl` and `.json` (each
also `.gz` or `.zst`), `.parquet`, or `.npy` arrays of token ids. `Documents` reads it epoch after
epoch and keeps the held-out documents apart from the rest.
"""

from __future__ import annotations

import glob
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]

KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".npy": "npy"}
COMPRESSED = (".gz", ".zst")  # of text and json; the other kinds compress themselves or not at all
PIECE = 2000  # characters of a plain text file that make one document
PIECE_IDS = 2048  # token ids of a 1-D array that make one document
BOS = ("row", "document", "none")
SIDES = ("train", "heldout")


class DataError(ValueError):
    """The data is not there, not readable, or not what the configuration says."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes rows of token ids. Nothing is read or opened here.

    The `field` holds strings, or lists of token ids (pre-tokenised text, as in "input_ids").
    """

    source: tuple[str, ...]  # one dataset id, or local paths, globs and folders of one kind
    name: str | None = None  # the dataset's configuration
    split: str = "train"
    revision: str | None = None  # of a Hub dataset: branch, tag or commit
    field: str = "text"  # the column; plain text files and arrays have none
    context: int = 256  # token ids in a row
    bos: str = "row"  # BOS begins every "row", every "document", or there is "none"
    holdout: float = 0.01  # the part of the documents that training never sees
    documents: int | None = None  # of both sides together; all of them unless given

    def __post_init__(self) -> None:
        if not isinstance(self.source, tuple) or not self.source or not all(self.source):
            raise ValueError(f'source is {self.source!r}; give a tuple, as in ("data/*.jsonl",)')
        if self.bos not in BOS:
            raise ValueError(f"bos is {self.bos!r}; expected one of {', '.join(BOS)}")
        least = 2 if self.bos == "row" else 1  # the BOS alone is no text
        if self.context < least:
            raise ValueError(f"context is {self.context}; with bos={self.bos!r} it is ≥ {least}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}; expected a fraction from 0 to below 1")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents is {self.documents}; leave it out to read all of them")
        if not self.field or not self.split:
            raise ValueError(f"field {self.field!r} and split {self.split!r} may not be empty")


class Document(NamedTuple):
    content: str | Ids  # text, or int64 [tokens] where the source is pre-tokenised
    continues: bool  # running text that was cut just before: no separator belongs there


class _Reader(Protocol):
    """One pass over the source, from a position on. The position is that after the item last
    taken from `read`; an item's flag says that it continues the item before it."""

    def read(self) -> Iterator[tuple[str | Ids, bool]]: ...
    def rewind(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Documents:
    """Iterates over the documents of one side, for ever: at the end it begins the next epoch.

    With `repeat=False` it stops at the end of the first one. `state_dict()` is JSON; loaded into
    another `Documents` of the same data, this reads on with the next document. A Hub dataset
    then reads the commit that was saved, whatever its branch has become.
    """

    def __init__(self, config: DataConfig, side: str = "train", repeat: bool = True) -> None:
        """Find and open the source. Raises DataError, ConnectionError, or ImportError without
        `datasets`."""
        if side not in SIDES:
            raise ValueError(f"side is {side!r}; expected one of {', '.join(SIDES)}")
        if side == "heldout" and config.holdout == 0:
            raise ValueError("holdout is 0, so there is no held-out side; raise holdout")
        self.config, self.side, self.repeat = config, side, repeat
        self.epoch = 0
        self._read = self._given = 0  # of this epoch: documents of both sides, and of this one
        self._adjacent = False  # the document read last was given, so the next may continue it
        self._files = _local_files(config)
        self._revision = None if self._files else _resolve(config.source[0], config.revision)
        self._reader = self._open()
        self._items: Iterator[tuple[str | Ids, bool]] | None = None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            if self._items is None:
                self._items = self._reader.read()
            limited = self.config.documents is not None and self._read >= self.config.documents
            if limited or (item := next(self._items, None)) is None:
                self._end_epoch()
                continue
            content, continues = item
            self._read += 1
            if not len(content):
                continue
            continues = continues and self._adjacent
            self._adjacent = is_heldout(content, self.config.holdout) == (self.side == "heldout")
            if self._adjacent:
                self._given += 1
                return Document(content, continues)

    def _end_epoch(self) -> None:
        if not self.repeat:
            raise StopIteration
        if not self._given:
            raise DataError(
                f"{', '.join(self.config.source)}: none of the {self._read} documents read are on "
                f"the {self.side} side (holdout={self.config.holdout}, empty ones do not count)"
            )
        self.epoch, self._read, self._given, self._adjacent = self.epoch + 1, 0, 0, False
        self._reader.rewind()
        self._items = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "data": self._identity(),
            "revision": self._revision,
            "epoch": self.epoch,
            "read": self._read,
            "given": self._given,
            "adjacent": self._adjacent,
            "reader": self._reader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state was saved while reading other data."""
        if state["data"] != (mine := self._identity()):
            changed = [key for key in mine if mine[key] != state["data"].get(key)]
            raise DataError(
                "this position was saved in other data: "
                + "; ".join(f"{k} was {state['data'].get(k)}, is {mine[k]}" for k in changed)
            )
        if state["revision"] != self._revision:
            self._revision = state["revision"]
            self._reader = self._open()
        self.epoch, self._read, self._given = state["epoch"], state["read"], state["given"]
        self._adjacent = state["adjacent"]
        self._reader.load_state_dict(state["reader"])
        self._items = None

    def facts(self) -> dict[str, Any]:
        """What identifies the data, as JSON without machine paths. Hashes local files each time."""
        found: dict[str, Any] = {}
        if self._files:
            found["kind"] = _kind(self._files[0])
            found["files"] = [_describe(path) for path in self._files]
        else:
            found |= {"dataset": self.config.source[0], "revision": self._revision}
            found |= {"name": self.config.name}
        found["split"] = self.config.split
        if found.get("kind") not in ("text", "npy"):
            found["field"] = self.config.field
        if found.get("kind") != "npy":
            found["datasets"] = str(_datasets().__version__)
        return found

    def _identity(self) -> dict[str, Any]:
        """What a position depends on, as far as it is cheap to know."""
        config = self.config
        files = [[path.name, path.stat().st_size] for path in self._files]
        return {
            "source": files or list(config.source),
            "name": config.name,
            "split": config.split,
            "field": config.field,
            "documents": config.documents,
            "holdout": config.holdout,
            "side": self.side,
        }

    def _open(self) -> _Reader:
        config = self.config
        if not self._files:
            return _Table(
                _datasets().load_dataset(
                    config.source[0],
                    config.name,
                    split=config.split,
                    revision=self._revision,
                    streaming=True,
                ),
                config.field,
            )
        kind = _kind(self._files[0])
        if kind == "npy":
            return _Arrays(self._files)
        # `datasets` takes every path for a pattern, and one that matches nothing for no data.
        paths = [glob.escape(str(path.absolute())) for path in self._files]
        load = _datasets().load_dataset
        if kind != "text":
            files = {config.split: paths}
            return _Table(
                load(kind, data_files=files, split=config.split, streaming=True), config.field
            )
        # A split for each file, because a piece ends where its file does. Lines, because
        # "document" holds a whole file in memory and "paragraph" loses the blank lines.
        splits = {f"file{i}": path for i, path in enumerate(paths)}
        loaded = load(
            "text", data_files=splits, streaming=True, sample_by="line", keep_linebreaks=True
        )
        return _Lines([loaded[split] for split in splits])


def is_heldout(content: str | Ids, holdout: float) -> bool:
    """Whether a document is on the held-out side: by its content alone, so that its duplicates
    are too, on every machine; and a greater `holdout` keeps what a smaller one held out."""
    if isinstance(content, str):
        data = content.encode("utf-8", "surrogatepass")
    else:
        data = content.astype("<i8").tobytes()
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    return number < holdout * 2**64


class _Stream:
    """A streaming dataset from a position on, which `datasets` itself forgets between
    `load_state_dict` and the next example."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.start = self.position = dataset.state_dict()
        self.reading = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.load_state_dict(self.position)
        for example in self.dataset:
            self.reading = True
            yield example

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.dataset.state_dict() if self.reading else self.position
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.reading = state, False


class _Table:
    """A column of a streaming dataset."""

    def __init__(self, dataset: Any, field: str) -> None:
        self.field = field
        if dataset.column_names and field in dataset.column_names:
            dataset = dataset.select_columns([field])  # the others need not be decoded
        self.stream = _Stream(dataset)

    def read(self) -> Iterator[tuple[str | Ids, bool]]:
        for example in self.stream:
            yield self._content(example), False

    def _content(self, example: dict[str, Any]) -> str | Ids:
        if self.field not in example:
            raise DataError(
                f"no field {self.field!r}; the columns are {', '.join(map(str, example))}. "
                "Set field to one of strings or of token ids"
            )
        value = example[self.field]
        if value is None or isinstance(value, str):
            return value or ""
        ids = np.asarray(value) if isinstance(value, list | np.ndarray) else None
        if ids is not None and ids.ndim == 1 and (ids.dtype.kind in "iu" or not ids.size):
            return ids.astype(np.int64)
        found = f"{type(value).__name__} {str(value)[:60]!r}"
        raise DataError(f"field {self.field!r} holds {found}; expected text or a list of token ids")

    def rewind(self) -> None:
        self.stream.load_state_dict(self.stream.start)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class _Lines:
    """Plain text files as pieces of whole lines, of at least PIECE characters but for the last."""

    def __init__(self, datasets: list[Any]) -> None:
        self.streams = [_Stream(dataset) for dataset in datasets]
        self.file, self.inside = 0, False  # inside: the next piece continues one of its file

    def read(self) -> Iterator[tuple[str | Ids, bool]]:
        while self.file < len(self.streams):
            piece: list[str] = []
            size = 0
            for example in self.streams[self.file]:
                piece.append(example["text"])
                size += len(piece[-1])
                if size >= PIECE:
                    continues, self.inside = self.inside, True
                    yield "".join(piece), continues
                    piece, size = [], 0
            if piece:
                continues, self.inside = self.inside, True
                yield "".join(piece), continues
            self.file, self.inside = self.file + 1, False

    def rewind(self) -> None:
        self.file, self.inside = 0, False
        for stream in self.streams:
            stream.load_state_dict(stream.start)

    def state_dict(self) -> dict[str, Any]:
        # After the last piece the epoch is over, but nobody knows it yet.
        lines = self.streams[self.file].state_dict() if self.file < len(self.streams) else None
        return {"file": self.file, "inside": self.inside, "lines": lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewind()
        self.file, self.inside = state["file"], state["inside"]
        if state["lines"] is not None:
            self.streams[self.file].load_state_dict(state["lines"])


class _Arrays:
    """Token ids in `.npy` files, read from disk as needed: running [tokens], cut into pieces of
    PIECE_IDS, or [rows, width], each row a document."""

    def __init__(self, files: list[Path]) -> None:
        self.arrays = [_array(path) for path in files]
        shapes = [f"{path.name} {a.shape}" for path, a in zip(files, self.arrays, strict=True)]
        if len({a.shape[1:] for a in self.arrays}) > 1:
            raise DataError(f"arrays of several shapes: {', '.join(shapes)}; give those of one")
        self.file, self.at = 0, 0

    def read(self) -> Iterator[tuple[str | Ids, bool]]:
        while self.file < len(self.arrays):
            array = self.arrays[self.file]
            while self.at < len(array):
                at = self.at
                running = array.ndim == 1
                self.at += PIECE_IDS if running else 1
                content = array[at : self.at] if running else array[at]
                yield np.asarray(content, dtype=np.int64), running and at > 0
            self.file, self.at = self.file + 1, 0

    def rewind(self) -> None:
        self.file = self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"file": self.file, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.file, self.at = state["file"], state["at"]


def _array(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path.name} is not an array of numbers: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or not array.size:
        raise DataError(
            f"{path.name} holds {array.dtype} {array.shape}; expected integer token ids, "
            "[tokens] or [rows, width]"
        )
    return np.asanyarray(array)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading text needs `datasets`: pip install 'saert[train]'") from error
    return datasets


def _resolve(dataset: str, revision: str | None) -> str:
    """The commit that a revision of a Hub dataset names now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        sha = HfApi().dataset_info(dataset, revision=revision).sha
    except RevisionNotFoundError as error:
        raise DataError(f"the Hub dataset {dataset} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{dataset!r} is neither a local path nor a Hub dataset that may be read here; "
            "check the spelling, or log in if it is private or gated"
        ) from error
    except Exception as error:  # each huggingface_hub has the exceptions of its own HTTP client
        raise ConnectionError(
            f"cannot reach the Hub for the dataset {dataset} (offline?), and there is no local "
            f"path of that name: {error}"
        ) from error
    return str(sha)


def _is_local(entry: str) -> bool:
    """A dataset id is `name` or `owner/name`, without the suffix of a data file."""
    if Path(entry).expanduser().exists() or glob.has_magic(entry) or entry[0] in "./~":
        return True
    return _kind(Path(entry)) is not None or "\\" in entry or entry.count("/") > 1


def _kind(path: Path) -> str | None:
    kind = KINDS.get(path.suffix)
    if path.suffix in COMPRESSED:
        kind = KINDS.get(path.with_suffix("").suffix)
        return kind if kind in ("text", "json") else None
    return kind


def _local_files(config: DataConfig) -> list[Path]:
    """The files of a local source, all of one kind and none of them empty; [] for a dataset id.
    Raises DataError."""
    local = [entry for entry in config.source if _is_local(entry)]
    if not local and len(config.source) == 1:
        return []
    if others := [entry for entry in config.source if entry not in local]:
        raise DataError(
            f"{', '.join(others)}: no such file, and a Hub dataset must be the only source"
        )
    given = {"name": config.name, "revision": config.revision}
    for key, value in given.items():
        if value is not None:
            raise DataError(f"{key} is {value!r}, but local files have none: leave it out")
    if config.split != "train":
        raise DataError(
            f"split is {config.split!r}, but local files have no splits: name the files of one"
        )
    files = list(dict.fromkeys(path for entry in local for path in _matching(entry)))
    kinds = Counter(str(_kind(path)) for path in files)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(f"the source mixes kinds of files: {counts}; give those of one kind")
    if empty := [path for path in files if not path.stat().st_size]:
        raise DataError(f"{', '.join(map(str, empty[:5]))}: an empty file; leave it out")
    if any(path.suffix == ".zst" for path in files) and find_spec("zstandard") is None:
        raise ImportError("reading .zst files needs `zstandard`: pip install zstandard")
    return files


def _matching(entry: str) -> list[Path]:
    """The files of a path, of a folder at any depth, or of a glob, in order of their names."""
    expected = f"{' '.join(KINDS)}, text and json also {' '.join(COMPRESSED)}"
    path = Path(entry).expanduser()
    if path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file() and _kind(p))
        found = [p for p in inside if not any(n[0] == "." for n in p.relative_to(path).parts)]
        if not found:
            raise DataError(f"no data file in the folder {entry}; expected {expected}")
        return found
    if path.is_file():
        found = [path]
    else:
        names = sorted(glob.glob(str(path), recursive=True))
        found = [Path(name) for name in names if Path(name).is_file()]
    if not found:
        raise DataError(f"no file matches {entry!r} (in {Path.cwd()})")
    if unknown := [p for p in found if _kind(p) is None]:
        raise DataError(f"cannot read {unknown[0]}: expected {expected}")
    return found


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
