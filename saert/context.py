"""Which token is where: the rows, positions, padding and prompts of one forward pass.

A hook sees a hidden state [rows, T, d] and nothing else. Whether column 3 is padding, which token
of the conversation it is, whether it was in the prompt, and which row of the caller's batch a beam
came from is known further up. `saert.tracker` finds it out; this is what it finds, as tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saert.edits import Selection


@dataclass(frozen=True, eq=False)
class Context:
    """The tokens of one forward pass.

    Attributes:
        rows, length: the shape of the tokens, [rows, T].
        positions: int64 [rows, T], each row's real tokens counted from 0; None: unknown.
        real: bool [rows, T], False at padding; None: nothing is padding.
        prompt_lengths: int64 [rows], real tokens in each row's prompt; None: unknown.
        expansion: rows per row of the caller's batch (beams, returned sequences); None: unknown.
        why: why something is unknown, for the error that says so.
    """

    rows: int
    length: int
    positions: Tensor | None = None
    real: Tensor | None = None
    prompt_lengths: Tensor | None = None
    expansion: int | None = 1
    why: str = "the model was not seen to be called with tokens"

    @classmethod
    def of_shape(cls, hidden: Tensor) -> Context:
        """What the shape of a hidden state says where nothing else is known."""
        tokens = hidden.shape[:-1]
        if len(tokens) == 2:
            steps = torch.arange(tokens[1], device=hidden.device).expand(tokens)
            return cls(tokens[0], tokens[1], positions=steps)
        why = f"the hidden state is {list(hidden.shape)}, without rows"
        return cls(1, tokens.numel(), expansion=None, why=why)

    def last(self, length: int) -> Context:
        """The last columns only, as a head sees them that is asked for the last logits."""
        return replace(
            self,
            length=length,
            positions=None if self.positions is None else self.positions[:, -length:],
            real=None if self.real is None else self.real[:, -length:],
        )

    def gate(self, select: Selection, device: torch.device) -> Tensor:
        """bool [rows, T]: the tokens that a selection means. Padding is never selected.

        Raises ValueError for a row that the batch does not have, or for a selection that cannot
        be decided here.
        """
        gate = torch.ones(self.rows, self.length, dtype=torch.bool, device=device)
        if self.real is not None:
            gate = gate & self.real.to(device)
        if select.rows is not None:
            gate = gate & self._rows(select.rows, device)[:, None]
        if select.positions is None and select.phase == "all":
            return gate
        if self.positions is None:
            raise ValueError(f"positions and phase are unknown here: {self.why}")
        positions = self.positions.to(device)
        ends = self._prompt_ends(select, device)
        if select.phase != "all" and ends is not None:
            past = positions >= ends
            gate = gate & (past if select.phase == "generated" else ~past)
        if select.positions is None:
            return gate
        return gate & _selected(positions, select.positions, ends)

    def _rows(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if self.expansion is None:
            raise ValueError(f"rows are unknown here: {self.why}")
        callers = self.rows // self.expansion
        if max(rows) >= callers:
            raise ValueError(
                f"rows: an edit names row {max(rows)}, but the batch has {callers} rows"
            )
        source = torch.arange(self.rows, device=device) // self.expansion
        return torch.stack([source == row for row in rows]).any(0)

    def _prompt_ends(self, select: Selection, device: torch.device) -> Tensor | None:
        if not select.needs_prompt:
            return None
        if self.prompt_lengths is None:
            raise ValueError(
                f"phase and negative positions need the end of the prompt, unknown here: {self.why}"
            )
        return self.prompt_lengths.to(device)[:, None]


@dataclass(eq=False)
class Generation:
    """One call of `generate`: the caller's batch, and where its prompts end.

    Attributes:
        rows, columns: the shape of the caller's prompt, padding included.
        given: how many of its columns have ids; fewer than `columns` if a cache holds the rest.
        mask: the caller's 2-D attention mask, if one was given.
        stops: ids after which a row is finished and gets padding; () if the prompt had no ids.
        still: whether the contexts of all passes must have tensors for the same things, as a
            compiled graph wants it. Else, where no row has finished, `real` is the mask's or None.
        prompt_lengths: int64 [rows · expansion], once a pass has shown them.
    """

    rows: int
    columns: int
    given: int
    mask: Tensor | None = None
    stops: tuple[int, ...] = ()
    still: bool = True
    prompt_lengths: Tensor | None = None
    _unfinished: int = 0  # columns behind the prompt in which no row has ended; -1: one has

    def expansion(self, rows: int) -> int:
        """Rows of a pass per row of the caller's batch."""
        return rows // self.rows if rows % self.rows == 0 else 1

    def context(self, ids: Tensor, length: int, mask: Tensor | None, seen: int | None) -> Context:
        """The context of the next pass: `length` tokens, after `seen` in the cache."""
        rows = ids.shape[0]
        total = max(length, ids.shape[1]) if seen is None else seen + length
        width = total if mask is None else mask.shape[1]
        if self.prompt_lengths is None or width <= self.columns:
            whole = ids.new_ones(rows, total) if mask is None else mask
            self.prompt_lengths = self._measure(whole, self.expansion(rows))
        # whole tensors: torch.compile makes a graph for each stride that a view has
        real = None
        if mask is None:  # generate drops a mask without padding
            positions = torch.arange(total - length, total, device=ids.device).repeat(rows, 1)
        else:
            positions = (mask.long().cumsum(-1) - 1)[:, -length:].contiguous()
            real = mask[:, -length:].bool().contiguous()
        finished = self._finished(ids, length)
        if finished is not None:
            running = ~finished.expand(rows, length)
            real = running if real is None else real & running.to(real.device)
        return Context(
            rows,
            length,
            positions=positions,
            real=real,
            prompt_lengths=self.prompt_lengths,
            expansion=self.expansion(rows),
        )

    def _measure(self, mask: Tensor, expansion: int) -> Tensor:
        if self.mask is not None:  # chunked prefill shows the mask piece by piece
            return self.mask.long().sum(-1).repeat_interleave(expansion).to(mask.device)
        prompt = mask[:, : self.columns]
        return self.columns - (prompt == 0).sum(-1)

    def _finished(self, ids: Tensor, length: int) -> Tensor | None:
        """bool [rows, 1 or length]: tokens of rows that ended before them, which are padding.

        transformers gives them a mask of 1. A batch of one stops instead.
        """
        whole = length == ids.shape[1]  # generate without a cache
        if ids.shape[0] == 1 or not self.stops or not (length == 1 or whole):
            return None
        behind = ids[:, self.given :]
        if behind.shape[1] < 2:
            return None
        looks = not self.still and ids.device.type == "cpu"  # elsewhere it would wait
        if looks and self._none_finished(behind[:, :-1]):
            return None
        ended = torch.isin(behind, torch.tensor(self.stops, device=ids.device))
        if not whole:
            return ended[:, :-1].any(-1, keepdim=True)
        before = ended.long().cumsum(-1) > ended.long()
        return torch.cat([before.new_zeros(len(ids), length - behind.shape[1]), before], 1)

    def _none_finished(self, before: Tensor) -> bool:
        """Whether no row has ended. Columns that the pass before looked at are not looked at."""
        if self._unfinished < 0:
            return False
        columns = before.shape[1]
        fresh = before[:, -1] if self._unfinished == columns - 1 else before.flatten()
        found = any(token in self.stops for token in fresh.tolist())
        self._unfinished = -1 if found else columns
        return not found


def _selected(positions: Tensor, wanted: tuple[int, ...] | slice, ends: Tensor | None) -> Tensor:
    def absolute(p: int) -> int | Tensor:
        return p if p >= 0 or ends is None else ends + p

    if not isinstance(wanted, slice):
        return torch.stack([positions == absolute(p) for p in wanted]).any(0)
    start = absolute(0 if wanted.start is None else wanted.start)
    if isinstance(start, Tensor):
        start = start.clamp_min(0)  # slice(-5, None) of three tokens is all three, as in Python
    chosen = positions >= start
    if wanted.stop is not None:
        chosen = chosen & (positions < absolute(wanted.stop))
    if wanted.step is not None:
        chosen = chosen & ((positions - start) % wanted.step == 0)
    return chosen
