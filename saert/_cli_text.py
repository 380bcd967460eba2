"""Text for commands that measure: `--data`, or what the model writes by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saert.hub.session import Session, UserError
from saert.measure.passes import Special
from saert.own_text import own_text

OWN_WORDS = "text that the model wrote itself (seed 0); add --data for real text"


@dataclass(frozen=True)
class Text:
    """Rows of token ids int64 [rows, context], where they came from, and what to leave out."""

    rows: Tensor
    source: str
    special: Special


def read_text(
    session: Session, data: list[str] | None, rows: int, context: int | None = None
) -> Text:
    """The first `rows` rows of `--data` (files, folders, or a Hub data set), all of it unseen or
    not: nothing is held out. Without `--data` the model writes them, sampling from its start
    token."""
    limit = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    width = min(context or 128, limit or context or 128)
    if context is not None and limit is not None and context > limit:
        raise UserError(f"--context {context}: {session.name} holds {limit} tokens")
    tokenizer = session.tokenizer
    ids = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)

    def special(part: Tensor) -> Tensor:
        return torch.isin(part, ids.to(part.device))

    if not data:
        return Text(_own_words(session, rows, width), OWN_WORDS, special)
    # here, because it needs the `train` extra's libraries
    from saert.train.rows import TokenRows
    from saert.train.text import DataConfig, Documents

    config = DataConfig(source=tuple(data), context=width, holdout=0.0)
    found = TokenRows(Documents(config, side="train", repeat=False), tokenizer, width).take(rows)
    if not len(found):
        raise UserError(f"--data {data[0]}: not one row of {width} tokens")
    return Text(found, ", ".join(data), special)


def _own_words(session: Session, rows: int, context: int) -> Tensor:
    start = session.tokenizer.bos_token_id
    start = session.tokenizer.eos_token_id if start is None else start
    if start is None:
        raise UserError(f"{session.name} has no start token to write from: add --data")
    return own_text(session.model, start, rows, context)
