"""Rows of token ids from documents, packed so that no token is lost, with a position to resume."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saert.train.text import BOS, DataConfig, DataError, Document, Documents, Ids

# Tokenised together: enough for every core, little enough that the tokens left over, which a
# saved state holds, stay few.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 2**18


class RowSource(Protocol):
    """Rows of token ids from a position that can be saved."""

    def take(self, n: int, /) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TokenRows:
    """Documents joined and cut into rows of `context` token ids.

    Text is tokenised without the tokenizer's own special tokens, though those spelt out in it
    count as such. Between two documents stands EOS, or BOS where there is no EOS; nothing
    stands where a document continues the one before, nor in pre-tokenised text, which has the
    separators its maker chose. BOS, or EOS where there is none, begins every row
    (`bos="row"`: context - 1 tokens of text in each) or every document that does not already
    begin with it.

    `state_dict()` is JSON: rows after a resume equal those of a run never stopped.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        context: int,
        bos: str = "row",
        vocab_size: int | None = None,
    ) -> None:
        """`vocab_size`: pre-tokenised ids from there on are refused. Raises ValueError if the
        tokenizer has no token for `bos`."""
        if bos not in BOS:
            raise ValueError(f"bos is {bos!r}; expected one of {', '.join(BOS)}")
        if context < 1 + (bos == "row"):
            raise ValueError(f"context is {context}: no room for text with bos={bos!r}")
        eos_id, bos_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        begin, separator = (bos_id, eos_id) if bos_id is not None else (eos_id, eos_id)
        if bos != "none" and begin is None:
            raise ValueError(
                f"bos={bos!r}, but the tokenizer has neither a BOS nor an EOS token: "
                'set tokenizer.bos_token, or bos="none"'
            )
        self.separator: int | None = begin if separator is None else separator
        self.row_head: list[int] = [begin] if bos == "row" else []
        self.document_head: int | None = begin if bos == "document" else None
        self.documents, self.tokenizer = documents, tokenizer
        self.context, self.bos, self.vocab_size = context, bos, vocab_size
        self._left: Ids = np.empty(0, dtype=np.int64)  # joined, but in no row yet
        self._began = False  # there is a document before the next one

    def take(self, n: int) -> Tensor:
        """The next rows, int64 [n, context]; fewer only where documents that do not repeat end.

        Raises DataError for a pre-tokenised id outside the vocabulary."""
        width = self.context - len(self.row_head)
        while len(self._left) < n * width and (batch := self._batch()):
            self._left = np.concatenate([self._left, *self._join(batch)])
        count = min(n, len(self._left) // width)
        text = torch.from_numpy(self._left[: count * width].reshape(count, width).copy())
        self._left = self._left[count * width :]
        head = torch.tensor(self.row_head, dtype=torch.int64).expand(count, -1)
        return torch.cat([head, text], dim=1)

    def _batch(self) -> list[Document]:
        batch: list[Document] = []
        size = 0
        for document in islice(self.documents, BATCH_DOCUMENTS):
            batch.append(document)
            size += len(document.content)
            if size >= BATCH_CHARACTERS:
                break
        return batch

    def _join(self, batch: Sequence[Document]) -> Iterator[Ids]:
        """Each document behind what separates it from the one before."""
        pretokenised = not isinstance(batch[0].content, str)
        for ids, document in zip(self._ids(batch), batch, strict=True):
            head: list[int] = []
            if not document.continues:
                if self._began and not pretokenised and self.separator is not None:
                    head.append(self.separator)
                begin = self.document_head
                if begin is not None and begin not in (*head, *ids[:1].tolist()):
                    head.append(begin)
            self._began = True
            yield np.concatenate([np.array(head, dtype=np.int64), ids])

    def _ids(self, batch: Sequence[Document]) -> list[Ids]:
        contents = [document.content for document in batch]
        if isinstance(contents[0], str):
            encoded = self.tokenizer(
                contents,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # a document may be longer than the model's context
            )
            return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]
        found: list[Ids] = [np.asarray(ids, dtype=np.int64) for ids in contents]
        low, high = min(int(ids.min()) for ids in found), max(int(ids.max()) for ids in found)
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            raise DataError(
                f"pre-tokenised text has ids from {low} to {high}; the vocabulary has "
                f"{self.vocab_size or 'no negative'} ids. Was it tokenised for another model?"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "bos": self.bos,
            "began": self._began,
            "left": self._left.tolist(),
            "documents": self.documents.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state was saved with other rows or other data."""
        if (state["context"], state["bos"]) != (self.context, self.bos):
            raise DataError(
                f"this position was saved with context={state['context']}, bos={state['bos']!r}; "
                f"these rows have context={self.context}, bos={self.bos!r}"
            )
        self.documents.load_state_dict(state["documents"])
        self._left = np.array(state["left"], dtype=np.int64)
        self._began = state["began"]


def special_mask(rows: Tensor, tokenizer: Any) -> Tensor:
    """True at the tokenizer's special tokens; bool, of the shape of `rows`."""
    ids = torch.tensor(tokenizer.all_special_ids, dtype=rows.dtype, device=rows.device)
    return torch.isin(rows, ids)


def heldout_rows(
    config: DataConfig, tokenizer: Any, count: int, vocab_size: int | None = None
) -> Tensor:
    """The first rows of the held-out side, int64 [at most `count`, context]. Raises DataError if
    there is not even one."""
    documents = Documents(config, side="heldout", repeat=False)
    rows = TokenRows(documents, tokenizer, config.context, config.bos, vocab_size).take(count)
    if not len(rows):
        limit = "" if config.documents is None else f" or documents={config.documents}"
        raise DataError(
            f"the held-out side does not fill one row of {config.context} tokens: "
            f"raise holdout={config.holdout}{limit}, or give more text"
        )
    return rows


class Prefetched:
    """`take(n)` of a source of rows, from a thread that is at most `depth` blocks ahead.

    `state_dict()` describes what has been taken, not what has been read ahead. The source belongs
    to the thread from the first `take` on: save and load through this object.
    """

    def __init__(self, rows: RowSource, n: int, depth: int = 2) -> None:
        """`n`: rows in every block. Raises ValueError if `depth` is below 1."""
        if depth < 1:
            raise ValueError(f"depth is {depth}; expected at least one block")
        self.rows, self.n, self.depth = rows, n, depth
        self._state = rows.state_dict()
        self._failure: BaseException | None = None
        self._closed = False
        self._pipe: _Pipe | None = None
        self._finish: Callable[[], object] = _nothing

    def take(self, n: int) -> Tensor:
        """The next block, int64 [n, context]. Raises what the source raised, in its turn, and
        RuntimeError once closed."""
        if n != self.n:
            raise ValueError(f"take({n}), but these blocks have {self.n} rows")
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise _closed()
        pipe = self._pipe or self._start()
        block = pipe.blocks.get()
        if isinstance(block, BaseException):
            self._failure = block
            raise block
        pipe.permits.release()
        rows, self._state = block
        return rows

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another position; what was read ahead is dropped."""
        if state == self._state:
            return
        self._finish()
        self._pipe, self._failure = None, None
        self.rows.load_state_dict(state)
        self._state = state

    def close(self) -> None:
        """End the thread; what was read ahead is dropped."""
        self._closed = True
        self._finish()

    def _start(self) -> _Pipe:
        pipe = self._pipe = _Pipe(self.depth)
        thread = threading.Thread(target=_produce, args=(self.rows, self.n, pipe), daemon=True)
        # Runs as well when this object is dropped or the interpreter ends; for that the thread
        # may not hold a reference to it.
        self._finish = weakref.finalize(self, pipe.close, thread)
        thread.start()
        return pipe


def _nothing() -> None:
    pass


class _Pipe:
    """Blocks on their way from the thread, each with the state after it, or why there are no
    more. A permit lets the thread make one."""

    def __init__(self, depth: int) -> None:
        self.blocks: SimpleQueue[tuple[Tensor, dict[str, Any]] | BaseException] = SimpleQueue()
        self.permits = threading.Semaphore(depth)
        self.stop = threading.Event()

    def close(self, thread: threading.Thread) -> None:
        self.stop.set()
        self.permits.release()
        self.blocks.put(_closed())  # a `take` may be waiting
        thread.join(timeout=5)  # it may hang in the network, but is a daemon


def _closed() -> RuntimeError:
    return RuntimeError("this Prefetched is closed")


def _produce(rows: RowSource, n: int, pipe: _Pipe) -> None:
    try:
        while pipe.permits.acquire() and not pipe.stop.is_set():
            pipe.blocks.put((rows.take(n), rows.state_dict()))
    except BaseException as error:  # raised in take()
        pipe.blocks.put(error)
