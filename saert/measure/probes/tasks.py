"""Probing tasks: labelled texts, or texts with a label for each word, from JSON lines or CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor

from saert.measure.probes.pooling import POOLS, Pool
from saert.measure.probes.probing import as_text, spelled, stratified

FORMATS = {".jsonl": None, ".json": None, ".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Task:
    """Labelled examples: whole texts, or parts of them.

    Attributes:
        name: of the task.
        texts: what the model reads.
        labels: of the N examples.
        train: bool [N], the train split; the rest is the test split.
        text_of, spans: int64 [N] and [N, 2], the text of each example and the characters of it;
            None where example and text are one.
        positive: the classes of a single binary task, or () for one task for each class.
        pool: over the tokens of an example.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    train: Tensor
    text_of: Tensor | None = None
    spans: Tensor | None = None
    positive: tuple[str, ...] = ()
    pool: Pool = "max"


@dataclass(frozen=True)
class TaskFile:
    """Where a task lies and how to read it: one [[task]] of a suite.

    Attributes:
        name, file: of the task; .jsonl, .csv or .tsv, a relative path from the suite's folder.
        text: column with the text.
        label: column with the label, or with a list of labels if `words` is given; in one spelling
            for all files (`saert.measure.probes.probing.spelled`).
        words: column with the words that the labels belong to. They are looked up in the text in
            order; without a column `text` in the file they are joined by spaces.
        labels: new names for labels; several may get the same. All or none.
        positive: the class or classes of a single binary task. () makes one for each class (only
            one where there are two).
        pool: max, mean or last.
        split: column that names the split; `train_split` and `test_split` are its values, other
            rows are left out. None: `test_fraction` of the texts of each class, drawn with `seed`;
            equal texts fall on one side.
        max_examples: keep this many, drawn with `seed`; of words, as many whole texts as reach it.
    """

    name: str
    file: Path
    text: str = "text"
    label: str = "label"
    words: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    pool: Pool = "max"
    split: str | None = None
    train_split: tuple[str, ...] = ("train",)
    test_split: tuple[str, ...] = ("test",)
    test_fraction: float = 0.2
    max_examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\"):
            raise ValueError("the name is a file's name too: it is empty or has a slash")
        if self.pool not in POOLS:
            raise ValueError(f"pool is {self.pool!r}, expected one of {', '.join(POOLS)}")
        if self.file.suffix not in FORMATS:
            raise ValueError(f"file is {self.file.name}, expected {', '.join(FORMATS)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}, expected between 0 and 1")
        if self.max_examples is not None and self.max_examples < 4:
            raise ValueError(f"max_examples is {self.max_examples}, expected at least 4")
        if both := set(self.train_split) & set(self.test_split):
            raise ValueError(f"{sorted(both)} is in train_split and in test_split")

    def load(self) -> Task:
        """Read the file. Raises ValueError, naming the row, for what does not fit."""
        try:
            rows = list(self._rows())
            found = _words(rows) if self.words else _texts(rows)
            return self._task(*found)
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}") from None

    def _task(
        self, texts: list[str], text_of: list[int], spans: list[tuple[int, int]] | None,
        labels: list[str], sides: list[bool | None],
    ) -> Task:  # fmt: skip
        kept = self._drawn(len(texts), text_of)  # before the split, which is then in proportion
        labels, text_of = [labels[at] for at in kept], [text_of[at] for at in kept]
        train = self._train(texts, text_of, labels, sides)
        if self.labels:
            renamed = {spelled(old): new for old, new in self.labels.items()}
            if unknown := set(labels) - set(renamed):
                raise ValueError(
                    f"labels has no entry for {sorted(unknown)[:8]}; it has {sorted(renamed)}"
                )
            labels = [renamed[one] for one in labels]
        number = {text: at for at, text in enumerate(dict.fromkeys(text_of))}
        return Task(
            name=self.name,
            texts=tuple(texts[text] for text in number),
            labels=tuple(labels),
            train=train,
            text_of=None if spans is None else torch.tensor([number[text] for text in text_of]),
            spans=None if spans is None else torch.tensor([spans[at] for at in kept]),
            positive=self.positive,
            pool=self.pool,
        )

    def _train(
        self, texts: list[str], text_of: list[int], labels: list[str], sides: list[bool | None]
    ) -> Tensor:
        """bool [N], true for train."""
        if self.split is not None:
            return torch.tensor([bool(sides[text]) for text in text_of])
        first: dict[str, str] = {}  # equal texts are one: none may lie on both sides
        for text, label in zip(text_of, labels, strict=True):
            first.setdefault(texts[text], "" if self.words else label)
        train = stratified(list(first.values()), self.test_fraction, self.seed).tolist()
        side = dict(zip(first, train, strict=True))
        return torch.tensor([side[texts[text]] for text in text_of])

    def _drawn(self, texts: int, text_of: list[int]) -> list[int]:
        """The examples to keep, in the file's order."""
        if self.max_examples is None or len(text_of) <= self.max_examples:
            return list(range(len(text_of)))
        order = torch.randperm(texts, generator=torch.Generator().manual_seed(self.seed))
        count = torch.bincount(torch.tensor(text_of), minlength=texts)[order].cumsum(0)
        chosen = set(order[: int((count < self.max_examples).sum()) + 1].tolist())
        return [at for at, text in enumerate(text_of) if text in chosen]

    def _rows(self) -> Iterator[_Row]:
        for number, row in enumerate(_records(self.file), 1):
            where = f"{self.file.name}, row {number}"
            side = self._side(row, where)
            if self.split is not None and side is None:
                continue
            label = _column(row, self.label, where)
            if self.words is None:
                text = str(_column(row, self.text, where))
                yield _Row(where, text, _label(label, where), None, side)
                continue
            words = _column(row, self.words, where)
            if not isinstance(words, list) or not isinstance(label, list):
                raise ValueError(f"{where}: {self.words} and {self.label} should be lists")
            if len(words) != len(label):
                raise ValueError(f"{where}: {len(words)} words but {len(label)} labels")
            text = str(row[self.text]) if self.text in row else " ".join(map(str, words))
            labels = [_label(one, where) for one in label]
            yield _Row(where, text, labels, list(map(str, words)), side)

    def _side(self, row: Mapping[str, Any], where: str) -> bool | None:
        if self.split is None:
            return None
        value = spelled(_column(row, self.split, where))
        if value in map(spelled, self.train_split):
            return True
        return False if value in map(spelled, self.test_split) else None


def task_file(table: Mapping[str, Any], folder: Path) -> TaskFile:
    """A [[task]] table as a TaskFile. ValueError for a missing, unknown or ill-typed key."""
    known = [one.name for one in fields(TaskFile)]
    name = table.get("name", "?")
    for key in table:
        if key not in known:
            raise ValueError(f"task {name}: unknown key {key!r}{nearest(key, known)}")
    for key in ("name", "file"):
        if key not in table:
            raise ValueError(f"task {name}: no {key!r}")
    kept = dict(table) | {"file": folder / str(table["file"])}
    for key in ("positive", "train_split", "test_split"):
        if key in kept:
            listed = kept[key] if isinstance(kept[key], list) else [kept[key]]
            kept[key] = tuple(spelled(one) for one in listed)
    expected: dict[str, tuple[type, ...]] = {"labels": (dict,), "test_fraction": (float, int)}
    expected |= {"max_examples": (int,), "seed": (int,)}
    expected |= {key: (str,) for key in ("name", "text", "label", "words", "pool", "split")}
    for key, kinds in expected.items():
        if key in kept and (not isinstance(kept[key], kinds) or isinstance(kept[key], bool)):
            raise ValueError(f"task {name}: {key} is {kept[key]!r}, expected {kinds[0].__name__}")
    if not kept["file"].is_file():
        near = kept["file"].parent
        siblings = [path.name for path in near.iterdir()] if near.is_dir() else []
        raise ValueError(
            f"task {name}: no file {kept['file']}{nearest(kept['file'].name, siblings)}"
        )
    if "labels" in kept:
        kept["labels"] = {str(key): spelled(value) for key, value in kept["labels"].items()}
    try:
        return TaskFile(**kept)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None


def nearest(name: str, names: Sequence[str]) -> str:
    """For the end of an error: what it may have meant."""
    close = get_close_matches(name, names, 3, 0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


@dataclass(frozen=True)
class _Row:
    """A text, its label or labels, its words, and its split: true for train."""

    where: str
    text: str
    label: str | list[str]
    words: list[str] | None
    train: bool | None


_Found = tuple[
    list[str], list[int], list[tuple[int, int]] | None, list[str], list[bool | None]
]  # texts, text_of, spans, labels, side of each text


def _texts(rows: list[_Row]) -> _Found:
    labels = [str(row.label) for row in rows]
    return [r.text for r in rows], list(range(len(rows))), None, labels, [r.train for r in rows]


def _words(rows: list[_Row]) -> _Found:
    text_of: list[int] = []
    spans: list[tuple[int, int]] = []
    labels: list[str] = []
    for at, row in enumerate(rows):
        cursor = 0
        for word, label in zip(row.words or (), row.label, strict=True):
            start = row.text.find(word, cursor)
            if start < 0:
                raise ValueError(f"{row.where}: the word {word!r} is not in the rest of the text")
            cursor = start + len(word)
            if word:
                text_of.append(at)
                spans.append((start, cursor))
                labels.append(label)
    return [r.text for r in rows], text_of, spans, labels, [r.train for r in rows]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    delimiter = FORMATS[path.suffix]
    # utf-8-sig: Excel and others begin a file with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="" if delimiter else None) as lines:
        if delimiter:
            yield from _table(lines, delimiter, path.name)
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path.name}, line {number}: expected an object")
            yield record


def _table(lines: TextIO, delimiter: str, name: str) -> Iterator[dict[str, Any]]:
    """Rows by the header's names. In tab-separated files a quote is a character like any other."""
    quotes: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(lines, delimiter=delimiter, quoting=quotes, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # a text may be long; the default is 128 KiB
    number = 0
    try:
        header = next(rows, [])
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) != len(header):
                raise ValueError(
                    f"{name}, row {number} (to line {rows.line_num}): {len(row)} fields, but the "
                    f"header has {len(header)}: {', '.join(header)}"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, row {number + 1} (to line {rows.line_num}): {error}") from None
    finally:
        csv.field_size_limit(limit)


def _label(label: Any, where: str) -> str:
    try:
        return as_text(label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"{where}: no column {name!r}; found {', '.join(map(str, row))}")
    return row[name]
