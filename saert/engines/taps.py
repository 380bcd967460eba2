"""A tap: one SAE on one module of an engine, whose tensors are flat tokens without rows.

    native blocks        (hidden [T, d], residual [T, d]); the stream is their sum
    first block, others  hidden [T, d]
    transformers' blocks hidden [1, T, d]

An engine sets the tap's batch before each pass. Tokens that are in no batch come out bit for bit
as they went in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saert.engines.codes import CodeStore
from saert.engines.directive import Directive
from saert.engines.rows import Batch
from saert.hookpoint import Location
from saert.hooks import InputHook
from saert.kernels.numerics import accumulation_dtype
from saert.plan import EditPlan, edit
from saert.sae import SAE
from saert.sparse import SparseCode
from saert.tables import EditTable

HUGE = 1e18  # beyond it (or NaN) an encoder's sums overflow: such a token is left alone
Run = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]


class Tap:
    """One SAE where it reads and writes, with the edits of every request.

    Args:
        name: its hookpoint, as requests call it.
        rows, slots: of its `EditTable`.
        store: keeps codes; None: they are not kept.
    """

    def __init__(
        self, name: str, sae: SAE, rows: int, slots: int, store: CodeStore | None = None
    ) -> None:
        self.name, self.sae, self.store = name, sae.requires_grad_(False), store
        self.table = EditTable(sae, rows, slots)
        self.spliced = torch.zeros(rows, dtype=torch.bool, device=sae.device)
        self.batch: Batch | None = None
        self.run: Run = self.act  # an engine that compiles puts an opaque operator here
        self.always = False  # and runs it whether or not there is a batch
        self.handles: list[Any] = []
        self._source: Tensor | None = None

    def write(self, row: int, directive: Directive | None, prompt_length: int) -> None:
        """Give a row of the tables to a request: its edits and splices here; None clears it."""
        specs = () if directive is None else directive.at(self.name)
        if specs:
            self.table.write(row, [s.edit(self.sae) for s in specs], prompt_length=prompt_length)
        else:
            self.table.clear(row)
        self.spliced[row] = directive is not None and self.name in directive.splice

    # -- hooks ---------------------------------------------------------------------------------

    def hook(self, read: Location, write: Location) -> None:
        """Register where the SAE reads and where it writes."""
        if read != write:
            self._register(read, self._on_source)
        self._register(write, self.on_hidden)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _register(self, at: Location, act: Callable[..., Any]) -> None:
        if at.side == "in":
            hook = InputHook(lambda hidden: act(hidden, None))
            self.handles.append(at.module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self.handles.append(at.module.register_forward_hook(StreamHook(act)))

    def _on_source(self, hidden: Tensor, residual: Tensor | None) -> None:
        self._source = hidden if residual is None else hidden + residual

    def on_hidden(self, hidden: Tensor, residual: Tensor | None) -> Tensor | None:
        """What takes the place of `hidden`; None: it stays as it is."""
        source, self._source = self._source, None
        self._check(hidden, source)
        if self.batch is None and not self.always:
            return None
        out = hidden.clone()
        self.run(out, hidden, residual, source)
        return out

    def _check(self, hidden: Tensor, source: Tensor | None) -> None:
        read = hidden if source is None else source
        for tensor, width, verb in ((read, self.sae.d_in, "reads"),
                                    (hidden, self.sae.d_out, "writes")):  # fmt: skip
            if tensor.shape[-1] != width:
                raise ValueError(
                    f"{self.name}: the hidden state is {list(tensor.shape)}, but the SAE {verb} "
                    f"width {width}"
                )

    # -- what happens --------------------------------------------------------------------------

    def act(
        self, out: Tensor, hidden: Tensor, residual: Tensor | None, source: Tensor | None
    ) -> None:
        """Edit the batch's tokens of `out` in place; `out` begins as a copy of `hidden`.

        Args:
            out, hidden, residual: [T, d] or [1, T, d]; the stream is hidden (+ residual).
            source: [T, d_in], what a transcoder reads; None: the stream.
        """
        batch = self.batch
        if batch is None:
            return
        stream = _tokens(hidden, batch)
        if residual is not None:
            wide = accumulation_dtype(hidden.dtype)
            stream = (stream.to(wide) + _tokens(residual, batch).to(wide)).to(hidden.dtype)
        x = None if source is None else _tokens(source, batch)
        new = self._edited(stream, x, batch)
        if new is None:
            return
        flat = out.view(-1, out.shape[-1])
        if residual is None:
            flat.index_copy_(0, batch.tokens, new)
        else:  # the part of the stream that this module made carries the change
            flat.index_add_(0, batch.tokens, new - stream)

    def _edited(self, stream: Tensor, source: Tensor | None, batch: Batch) -> Tensor | None:
        keeps = self.store is not None and bool(batch.kept)
        if batch.edited and self.table.constant and not (keeps or batch.spliced):
            # what is not finite stays so
            return self.table.apply(stream, batch.rows, batch.positions)
        usable = stream.abs().amax(-1, keepdim=True) < HUGE
        if source is not None:
            usable = usable & (source.abs().amax(-1, keepdim=True) < HUGE)
            source = source.where(usable, 0)
        y = stream.where(usable, 0)
        code = None
        if keeps or batch.spliced:
            code = self.sae.encode(y if source is None else source)
        if keeps and code is not None:
            self._keep(batch, code, usable)
        if not (batch.edited or batch.spliced):
            return None
        new = y
        if batch.edited:
            new = self.table.apply(y, batch.rows, batch.positions, source=source, code=code)
        if batch.spliced:
            edited = batch.edited
            whole = self.table.plan(batch.rows, batch.positions) if edited else EditPlan()
            instead = edit(y, self.sae, whole, source=source, code=code, splice=True)
            new = torch.where(self.spliced[batch.rows].unsqueeze(-1), instead, new)
        return torch.where(usable, new, stream)

    def _keep(self, batch: Batch, code: SparseCode, usable: Tensor) -> None:
        assert self.store is not None
        values = code.values.where(usable, torch.nan)  # a token that cannot be read
        kept = SparseCode(code.indices, values, code.num_latents).to("cpu")
        self.store.add_all(self.name, batch.positions.to("cpu"), kept, batch.kept)


class StreamHook:
    """A forward hook that gives `act` a module's output as (hidden, residual or None), and puts
    what it returns in place of `hidden`."""

    def __init__(self, act: Callable[[Tensor, Tensor | None], Tensor | None]) -> None:
        self.act = act

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        hidden = output[0] if several else output
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"{type(module).__name__} returns {type(output).__name__}, expected hidden states, "
                "or a pair of hidden states and residual"
            )
        residual = residual_of(module, output)
        new = self.act(hidden, residual)
        if new is None:
            return None
        return type(output)((new, *output[1:])) if several else new


def residual_of(module: nn.Module, output: Any) -> Tensor | None:
    """The residual of a native block's (hidden, residual), whose sum is the stream.

    A fused norm returns such a pair too, but what it hands on is the normed stream by itself.
    """
    if not isinstance(output, tuple | list) or len(output) != 2:
        return None
    hidden, second = output
    same = isinstance(second, Tensor) and second.shape == hidden.shape
    if not same or "norm" in type(module).__name__.lower():
        return None
    return second if second.dtype.is_floating_point else None


def _tokens(x: Tensor, batch: Batch) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, batch.tokens)
