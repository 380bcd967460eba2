"""Text to token rows.

A window is a piece of running text that may start and end anywhere, with `<|endoftext|>` between
the documents in it. It falls apart into segments that know whether they start or end their
document: `<|endoftext|>` opens a document and closes one, `<|cut|>` opens a segment whose beginning
is missing, so that a model trained on cut text still knows how a story starts and that it may end.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

END = "<|endoftext|>"
CUT = "<|cut|>"
END_ID, CUT_ID = 0, 1
PIECE = 2000  # characters of a plain text file that make one window


@dataclass(frozen=True)
class Segment:
    text: str
    starts: bool  # at the beginning of its document
    ends: bool


def read_windows(paths: Iterable[Path]) -> list[str]:
    """Windows of `.jsonl` files (field "text") and of any other file read as plain text."""
    windows: list[str] = []
    for path in paths:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                windows += [json.loads(line)["text"] for line in lines if line.strip()]
        else:
            windows += _pieces(path.read_text(encoding="utf-8"))
    return windows


def _pieces(text: str) -> Iterator[str]:
    """Whole lines, gathered until a piece is long enough."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def split_windows(
    windows: Sequence[str], fraction: float, shingle: int, seed: int
) -> tuple[list[str], list[str]]:
    """(training, held-out). Windows of one story may overlap, so a training window that shares any
    `shingle` consecutive characters with a held-out one is dropped."""
    order = list(range(len(windows)))
    random.Random(seed).shuffle(order)
    count = max(1, round(fraction * len(windows)))
    heldout = [windows[i] for i in order[:count]]
    seen = {w[i : i + shingle] for w in heldout for i in range(len(w) - shingle + 1)}
    train = [
        w
        for w in (windows[i] for i in sorted(order[count:]))
        if not any(w[i : i + shingle] in seen for i in range(len(w) - shingle + 1))
    ]
    return train, heldout


def segments(windows: Iterable[str]) -> list[Segment]:
    """Every document part of every window, without the white space around `<|endoftext|>`."""
    found: list[Segment] = []
    for window in windows:
        parts = window.split(END)
        for i, part in enumerate(parts):
            starts, ends = i > 0, i < len(parts) - 1
            text = part.lstrip() if starts else part
            text = text.rstrip() if ends else text
            if text:
                found.append(Segment(text, starts, ends))
    return found


def frame(ids: Sequence[int], segment: Segment) -> list[int]:
    """Token ids of a segment between the special tokens that say where it comes from."""
    return [END_ID if segment.starts else CUT_ID, *ids] + [END_ID] * segment.ends


def pack(documents: Iterable[Sequence[int]], context: int, seed: int) -> Tensor:
    """Shuffle documents into int64 rows `[rows, context]`. No token is lost: what a row has no room
    for continues in a later row behind `<|cut|>`. Every row starts with a special token, as a
    prompt does; the last row is filled up with `<|endoftext|>`."""
    queue = deque(documents)
    random.Random(seed).shuffle(queue)
    rest: list[Sequence[int]] = []
    rows: list[list[int]] = []
    row: list[int] = []
    while queue or rest:
        if not queue:
            queue, rest = deque(rest), []
        document = queue.popleft()
        room = context - len(row)
        row += document[:room]
        if len(document) > room:
            rest.append([CUT_ID, *document[room:]])
        if len(row) == context:
            rows.append(row)
            row = []
    if row:
        rows.append(row + [END_ID] * (context - len(row)))
    random.Random(seed + 1).shuffle(rows)  # the rests were packed last
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, context)


class Rows:
    """Batches `[batch, context]` as a pure function of the step, so that a resumed run reads on
    where the stopped one would have."""

    def __init__(
        self, documents: Sequence[Sequence[int]], context: int, batch: int, seed: int
    ) -> None:
        self.documents, self.context, self.batch, self.seed = documents, context, batch, seed
        self.epoch = -1
        self.rows = torch.empty(0, context, dtype=torch.int64)
        self.per_epoch = len(pack(documents, context, seed)) // batch
        if self.per_epoch == 0:
            raise ValueError(
                f"the text does not fill one batch of {batch} rows of {context} tokens"
            )

    def __getitem__(self, step: int) -> Tensor:
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            # Epochs differ a little in length, because a cut adds a token: wrap the index.
            self.rows = pack(self.documents, self.context, self.seed + 2 * epoch)
            self.epoch = epoch
        index = torch.arange(i * self.batch, (i + 1) * self.batch) % len(self.rows)
        return self.rows[index]


class PackedRows:
    """The rows of `pack`, epoch after epoch, as a training stream takes them."""

    def __init__(self, documents: Sequence[Sequence[int]], context: int, seed: int) -> None:
        self.rows = Rows(documents, context, 1, seed)
        self.position = 0

    def take(self, count: int) -> Tensor:
        """The next rows, int64 `[count, context]`."""
        found = [self.rows[self.position + i] for i in range(count)]
        self.position += count
        return torch.cat(found)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]
