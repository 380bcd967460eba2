"""A tap: one SAE at one hookpoint of a live model, with its hooks, its plan and its recorder.

The hooks are ordinary PyTorch ones, so they run under autograd, torch.compile, accelerate and PEFT.
A tap has up to three: where the SAE reads (transcoders), where it writes, and where the change has
to be carried to (`resid_mid`, which a block also keeps in a local variable).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from saert.context import Context
from saert.edits import Edit, LatentEdit, VectorEdit
from saert.hookpoint import Hookpoint, Location
from saert.hooks import InputHook, OutputHook
from saert.kernels.numerics import accumulation_dtype, no_autocast
from saert.parts import gathered
from saert.plan import EditPlan, compile_plan, edit, summed
from saert.record import Recorder
from saert.refine import refit
from saert.sae import SAE
from saert.sparse import SparseCode
from saert.tracker import Tracker, no_copy

Record = Literal[False, "last", "all"]


class Tap:
    """One SAE at one hookpoint: its hooks, plan and recorder."""

    def __init__(self, model: nn.Module, at: Hookpoint, sae: SAE, record: Record) -> None:
        self.hookpoint, self.sae = at, sae
        self._model = model
        self.read = at.resolve(model)
        target = sae.target_hookpoint
        own = at if target is None or sae.hookpoint is None else sae.hookpoint
        if own != at and own.resolve(model) != self.read:
            raise ValueError(
                f"a transcoder from {sae.hookpoint} to {target} cannot read at {at}: it would "
                f"still write at {target}; make one with SAE.from_weights for another layer"
            )
        self.write = self.read if target is None else target.resolve(model)
        _check_width(self.read, sae.d_in, at, "reads")
        _check_width(self.write, sae.d_out, target or at, "writes")
        self.carry: nn.Module | None = None
        if self.write.carry is not None:
            self.carry = model.get_submodule(self.write.carry)
        self.recorder = Recorder(sae, record)
        self.record = record is not False
        self.splice = self.refine = False
        self._edits: list[Edit] = []
        self._plan, self._planned_for = EditPlan(), (sae.device, sae.dtype)
        self._live, self._summed = False, (0, 0)
        self._tracker: Tracker | None = None
        self._handles: list[Any] = []
        self._source: Tensor | None = None
        self._carried: Tensor | None = None

    # -- edits ---------------------------------------------------------------------------------

    def check_edits(self, edits: list[Edit]) -> None:
        """Raise ValueError for a latent or a vector that does not fit this SAE."""
        for one in edits:
            latents = list(one.latents) if isinstance(one, LatentEdit) else []
            if one.select.when is not None:
                latents.append(one.select.when.latent)
            if latents and max(latents) >= self.sae.num_latents:
                raise ValueError(
                    f"{one!r}: latent {max(latents)} does not exist; the SAE at {self.hookpoint} "
                    f"has {self.sae.num_latents} latents, 0 to {self.sae.num_latents - 1}"
                )
            if isinstance(one, VectorEdit) and one.vector.shape[0] != self.sae.d_out:
                raise ValueError(
                    f"{one!r}: the vector has {one.vector.shape[0]} entries, but the SAE at "
                    f"{self.hookpoint} writes width {self.sae.d_out}"
                )

    def set_edits(self, edits: list[Edit]) -> bool:
        """Replace the plan. True: graphs made with the old one must go."""
        self._edits = edits
        self._latent_edits = [e for e in edits if isinstance(e, LatentEdit)]
        self._vector_edits = [e for e in edits if isinstance(e, VectorEdit)]
        # tensors may be trained in place, and amounts belong to the graph of one pass
        tensors = (e.amount for e in edits if isinstance(e.amount, Tensor))
        self._live = any(True for _ in tensors) or bool(self._vector_edits)
        self._plan = self._compile()
        return True

    def _compile(self) -> EditPlan:
        self._planned_for = (self.sae.device, self.sae.dtype)
        with outside_inference_mode():
            plan = compile_plan(self._latent_edits, self._vector_edits, self.sae)
            if self._live:
                return plan
            self._summed = self.sae.decoder_version
            return summed(plan, self.sae)

    def _outdated(self) -> bool:
        """Whether the plan holds a sum of directions that have changed since."""
        if torch.compiler.is_compiling() or self._plan.added is None:
            return False
        return self._summed != self.sae.decoder_version

    def _plan_for(self, context: Context, device: torch.device) -> EditPlan:
        plan = self._compile() if self._live else self._plan
        if plan.empty or (context.real is None and all(e.select.everywhere for e in self._edits)):
            return plan
        self._check_recomputation()

        def gates(edits: Sequence[Edit], repeats: list[int]) -> Tensor | None:
            columns = [context.gate(e.select, device) for e in edits]
            spread = [c for c, n in zip(columns, repeats, strict=True) for _ in range(n)]
            return torch.stack(spread, -1) if spread else None

        return plan.gated(
            gates(self._latent_edits, [len(e.latents) for e in self._latent_edits]),
            gates(self._vector_edits, [1] * len(self._vector_edits)),
        )

    def _check_recomputation(self) -> None:
        if self._tracker is not None and self._tracker.pending > 1 and _recomputing():
            raise RuntimeError(
                f"{self.hookpoint}: gradient checkpointing recomputes one of "
                f"{self._tracker.pending} forward passes, and edits that select tokens cannot tell "
                "which; run backward after each pass, and passes without one under torch.no_grad"
            )

    # -- hooks ---------------------------------------------------------------------------------

    def go_live(self, tracker: Tracker) -> None:
        """Register the hooks; nothing has touched the model before."""
        self._tracker = tracker
        same = self.write is self.read
        if not same:
            self._hook(self.read, self._on_source)
        self._hook(self.write, self._on_hidden)
        if self.carry is not None:
            # first of all: an SAE on the block's output must see the stream with the change in it
            block = Location(str(self.write.carry), self.carry, "out")
            self._hook(block, self._on_carry, first=True)

    def _hook(
        self, at: Location, act: Callable[[Tensor], Tensor | None], first: bool = False
    ) -> None:
        """Register in attach order, and ahead of other hooks, so that those see the edit."""
        assert self._tracker is not None
        act = gathered(self._model, at, act)
        if at.side == "out":
            handle = at.module.register_forward_hook(OutputHook(act), prepend=True)
            hooks: Any = at.module._forward_hooks
        else:
            hook = InputHook(act)
            handle = at.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            hooks = at.module._forward_pre_hooks
        self._handles.append(handle)
        order = self._tracker.registered.setdefault((id(at.module), at.side), [])
        order.insert(0, handle.id) if first else order.append(handle.id)
        for key in reversed([key for key in order if key in hooks]):
            hooks.move_to_end(key, last=False)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_source(self, hidden: Tensor) -> None:
        self._source = hidden

    def _on_carry(self, hidden: Tensor) -> Tensor | None:
        change, self._carried = self._carried, None
        return None if change is None else (hidden + change.reshape(hidden.shape)).to(hidden.dtype)

    def _on_hidden(self, hidden: Tensor) -> Tensor | None:
        assert self._tracker is not None
        source, self._source = self._source, None
        self._carried = None  # a pass that broke off may have left its own
        x, y = hidden if source is None else source.to(hidden.device), hidden
        if self.write is not self.read and source is None:
            raise RuntimeError(f"{self.hookpoint} did not run before {self.sae.target_hookpoint}")
        tracker = self._tracker
        context = _context(tracker.trained if _recomputing() else tracker.context, y)
        x = self._checked(x, context, self.sae.d_in, "reads")
        if self.sae.device != x.device:
            with outside_inference_mode():
                self.sae.to(x.device)
        if self._planned_for != (self.sae.device, self.sae.dtype) or self._outdated():
            self._plan = self._compile()
        if context.rows * context.length != y.numel() // y.shape[-1]:
            raise RuntimeError(
                f"{self.hookpoint}: {list(y.shape)} does not hold {context.rows} rows"
            )
        x = x.reshape(context.rows, context.length, x.shape[-1])
        y = y.reshape(context.rows, context.length, y.shape[-1])
        with self.recorder.timed(y.device):
            new = self._act(x, y, source is not None, context)
        if new is None:
            return None
        if self.carry is not None:
            wide = accumulation_dtype(new.dtype)
            self._carried = new.to(wide) - y.to(wide)
        return new.reshape(hidden.shape)

    def _act(self, x: Tensor, y: Tensor, transcodes: bool, context: Context) -> Tensor | None:
        recomputing = _recomputing()
        if recomputing and self._tracker is not None:
            self._tracker.recomputed = True
        plan = self._plan_for(context, y.device)
        changes = self.splice or not plan.empty
        observe = self.record and not recomputing
        code = None
        if observe or self.splice or plan.reads_code:
            per_latent = self.sae.activation.per_latent
            graph = torch.is_grad_enabled() and (self.splice or plan.reads_code)
            with torch.set_grad_enabled(graph):
                if self.refine:
                    code = self._refined(x, y if transcodes else x, context)
                elif (observe or self.splice or not per_latent) and not (
                    per_latent and torch.compiler.is_compiling()
                ):
                    code = self.sae.encode(x)
        if observe:
            with torch.no_grad():
                self.recorder.observe(code, x, y, context.real)
        if not changes:
            return None
        source = x if transcodes else None
        return edit(y, self.sae, plan, source=source, code=code, splice=self.splice)

    def _refined(self, x: Tensor, y: Tensor, context: Context) -> SparseCode:
        """The code that conditions and edits read, that is recorded and spliced, instead of what
        the encoder says: its activations refitted to y (`saert.refine`)."""
        if torch.compiler.is_compiling() and self.sae.activation.per_latent:
            # torch.compile leaves a frame that raises to Python, where nothing is compiling
            raise NotImplementedError(
                f"{self.hookpoint}: refine=True in a graph without breaks needs a TopK SAE, found "
                f"{type(self.sae.activation).__name__}, whose codes have no fixed width"
            )
        code = self.sae.encode(x)
        if y is not x:
            y = self._checked(y, context, self.sae.d_out, "writes")
        with no_autocast(y):
            return SparseCode(code.indices, refit(self.sae, code, x, y).values, code.num_latents)

    def _checked(self, x: Tensor, context: Context, width: int, verb: str) -> Tensor:
        """x, with zeros where padding holds NaN or inf; ValueError for those at a real token."""
        if x.shape[-1] != width:
            raise ValueError(
                f"{self.hookpoint}: the hidden state is {list(x.shape)}, but the SAE {verb} width "
                f"{width}"
            )
        if torch.compiler.is_compiling() or _finite(x):
            return x
        finite = x.isfinite().all(-1).reshape(context.rows, context.length)
        bad = ~finite if context.real is None else ~finite & context.real.to(x.device)
        if bad.any():  # padding may hold anything: nothing reads it
            row, column = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"{self.hookpoint}: the hidden state contains NaN or inf, first in row {row} at "
                f"column {column}; the model, or an edit before this hookpoint, made it (overflow?)"
            )
        return x.where(x.isfinite(), 0)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise no_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise no_copy()


def _finite(x: Tensor) -> bool:
    """Whether nothing is NaN or inf. One sum says so, unless it overflows."""
    return math.isfinite(x.detach().sum(dtype=accumulation_dtype(x.dtype)).item()) or bool(
        x.isfinite().all()
    )


def _check_width(location: Location, width: int, at: Hookpoint, verb: str) -> None:
    if location.width is not None and location.width != width:
        raise ValueError(
            f"{at} has width {location.width} in this model ({location.path}), but the SAE {verb} "
            f"width {width}"
        )


def _context(context: Context | None, hidden: Tensor) -> Context:
    """The pass's context if it describes this tensor, else what its shape alone says."""
    tokens = hidden.shape[:-1]
    if context is None:
        return Context.of_shape(hidden)
    if tokens.numel() == context.rows * context.length:
        return context
    if len(tokens) == 2 and tokens[0] == context.rows and tokens[1] < context.length:
        return context.last(tokens[1])  # logits_to_keep
    why = f"the hidden state is {list(hidden.shape)}, not of {context.rows}x{context.length} tokens"
    return Context(1, tokens.numel(), expansion=None, why=why)


def outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """Tensors that outlive the pass must not be inference tensors: training may come after it."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _recomputing() -> bool:
    """Whether gradient checkpointing runs this module a second time, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
