"""Which row of the edit tables belongs to which request, and which of a pass's tokens to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saert.engines.directive import KEY, Directive


class Rows:
    """Rows 1 to `count` of a table, lent to requests; row 0 is nobody's and stays empty."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count, 0, -1))
        self._row: dict[str, int] = {}

    def keep(self, requests: Sequence[str]) -> None:
        """Take back the rows of all other requests."""
        gone = set(self._row).difference(requests)
        self._free += [self._row.pop(request) for request in gone]

    def of(self, request: str) -> int:
        """The row of a request, 0 if it has none."""
        return self._row.get(request, 0)

    def lend(self, request: str) -> int:
        """The row of a request, a new one if it has none. RuntimeError if all are lent."""
        if request in self._row:
            return self._row[request]
        if not self._free:
            raise RuntimeError(f"all {len(self._row)} rows are lent, and {request} needs one")
        self._row[request] = self._free.pop()
        return self._row[request]


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one pass at which one SAE has something to do.

    Attributes:
        tokens: int64 [n], which of the pass's tokens they are.
        rows, positions: int64 [n], their rows of the table and their places in their requests.
        edited, spliced: whether any of them may be edited or spliced.
        kept: whose codes are kept: (key, first, last) into `tokens`.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    edited: bool
    spliced: bool
    kept: tuple[tuple[str, int, int], ...] = ()

    def later(self, positions: Tensor) -> Batch:
        """The same requests in another pass of as many tokens, at `positions` int64 [T]."""
        return replace(self, positions=positions.index_select(0, self.tokens).long())


def batch_of(
    name: str,
    directives: Sequence[Directive | None],
    rows: Sequence[int],
    starts: Sequence[int],
    positions: Tensor,
) -> Batch | None:
    """The tokens of the SAE `name`, None if no request of the pass names it.

    Args:
        directives, rows: one per request, in the order of the pass's tokens.
        starts: [requests + 1], where each request's tokens begin, and the end of the last.
        positions: int64 [T], of all tokens of the pass.
    """
    mine = [i for i, one in enumerate(directives) if one is not None and name in one.names]
    if not mine:
        return None
    asked = [one for i in mine if (one := directives[i]) is not None]
    spans = [range(starts[i], starts[i + 1]) for i in mine]
    ends = np.cumsum([0, *(len(span) for span in spans)])
    device = positions.device
    tokens = torch.from_numpy(np.concatenate([np.asarray(span, np.int64) for span in spans]))
    repeated = np.repeat([rows[i] for i in mine], [len(span) for span in spans]).astype(np.int64)
    tokens = tokens.to(device, non_blocking=True)
    return Batch(
        tokens=tokens,
        rows=torch.from_numpy(repeated).to(device, non_blocking=True),
        positions=positions.index_select(0, tokens).long(),
        edited=any(one.at(name) for one in asked),
        spliced=any(name in one.splice for one in asked),
        kept=tuple(
            (one.key, int(ends[n]), int(ends[n + 1]))
            for n, one in enumerate(asked)
            if name in one.codes
        ),
    )


def directive_of(extra_args: Mapping[str, object] | None) -> Directive | None:
    """The directive in a request's extra arguments; None if there is none, or it is empty."""
    given = (extra_args or {}).get(KEY)
    if given is None:
        return None
    directive = Directive.parse(given)
    return None if directive.empty else directive
