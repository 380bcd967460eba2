"""Which token is where: rows, positions and phases of a forward pass, shared by all attachments.

A hook sees a hidden state [rows, T, d] and nothing else. Whether column 3 is padding, which token
of the conversation it is, whether it was in the prompt, and which row of the caller's batch a beam
came from is known further up: to the call of the model (its 2-D attention mask, its positions,
its cache) and to `generate`. A `Tracker` listens there, once per model, and keeps the answer as
tensors in a `Context`.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from saert.edits import Selection
from saert.hookpoint import HookpointError, backbone, unwrap

_MISSING = object()


@dataclass(frozen=True, eq=False)
class Context:
    """The tokens of one forward pass.

    Attributes:
        positions: int64 [rows, T], each row's real tokens counted from 0; None: unknown.
        real: bool [rows, T], False at padding; None: nothing is padding.
        prompt_lengths: int64 [rows], real tokens in each row's prompt; None: unknown.
        expansion: rows per row of the caller's batch (beams, returned sequences).
        packed: several sequences share a row (`generate_batch`): rows and prompts are unknown.
    """

    rows: int
    length: int
    positions: Tensor | None = None
    real: Tensor | None = None
    prompt_lengths: Tensor | None = None
    expansion: int = 1
    packed: bool = False

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
        if select.everywhere or (select.positions is None and select.phase == "all"):
            return gate
        if self.positions is None:
            raise ValueError(
                "positions and phase are unknown here: the model is not a language model"
            )
        positions = self.positions.to(device)
        ends = self._prompt_ends(select, device)
        if select.phase != "all" and ends is not None:
            past = positions >= ends
            gate = gate & (past if select.phase == "generated" else ~past)
        if select.positions is None:
            return gate
        return gate & _selected(positions, select.positions, ends)

    def _rows(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        callers = self.rows // self.expansion
        if self.packed:
            raise ValueError("rows: generate_batch packs its requests into one row")
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
            where = "generate_batch packs its requests" if self.packed else "no prompt was seen"
            raise ValueError(f"phase and negative positions need the end of the prompt: {where}")
        return self.prompt_lengths.to(device)[:, None]


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


@dataclass(eq=False)
class _Generation:
    """One call of `generate`: the size of the caller's batch, and where its prompts end."""

    rows: int
    columns: int
    mask: Tensor | None
    prompt_lengths: Tensor | None = None

    def context(self, ids: Tensor, length: int, mask: Tensor | None, cache: Any) -> Context:
        """The context of the next forward pass: `length` tokens at the end of `mask`."""
        rows = ids.shape[0]
        expansion = max(1, rows // self.rows)
        padded = mask is not None  # generate drops a mask without padding
        if mask is None:
            seen = getattr(cache, "get_seq_length", None)
            total = max(length, ids.shape[1]) if seen is None else int(seen()) + length
            mask = torch.ones(rows, total, dtype=torch.long, device=ids.device)
        if self.prompt_lengths is None or mask.shape[1] <= self.columns:
            self.prompt_lengths = self._measure(mask, expansion)
        counted = mask.long().cumsum(-1) - 1
        return Context(
            rows,
            length,
            positions=counted[:, -length:],
            real=mask[:, -length:].bool() if padded else None,
            prompt_lengths=self.prompt_lengths,
            expansion=expansion,
        )

    def _measure(self, mask: Tensor, expansion: int) -> Tensor:
        if self.mask is not None:  # chunked prefill shows the mask piece by piece
            return self.mask.long().sum(-1).repeat_interleave(expansion).to(mask.device)
        prompt = mask[:, : self.columns]
        return self.columns - (prompt == 0).sum(-1)


class Tracker:
    """Listens to one model on behalf of its attachments; made by the first, undone by the last.

    `Tracker.of(model)` is the only way to get one. It holds the hooks that follow a forward pass
    and, on the outermost module that can generate, replaces `generate`, `generate_batch` and
    `prepare_inputs_for_generation` on that instance by versions that take notes.
    """

    _all: weakref.WeakKeyDictionary[nn.Module, Tracker] = weakref.WeakKeyDictionary()
    _lock = threading.Lock()

    def __init__(self, key: nn.Module) -> None:
        self.context: Context | None = None
        self.owner = threading.get_ident()
        self.pending = 0  # passes with gradients since gradient checkpointing last recomputed one
        self.recomputed = False
        self.registered: dict[tuple[int, str], list[Any]] = {}  # attachments' hooks, in order
        self._users: list[object] = []
        self._refusals: list[Callable[[], str | None]] = []
        self._depth = 0
        self._busy: int | None = None
        self._generations: list[_Generation] = []
        self._prepared: Context | None = None
        self._prompts: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._patched: list[tuple[nn.Module, str, Any]] = []
        self._names: dict[int, list[str]] = {}  # parameter names of each module listened to
        self._key = weakref.ref(key)

    # -- life ----------------------------------------------------------------------------------

    @classmethod
    def of(cls, model: nn.Module, user: object, refuse: Callable[[], str | None]) -> Tracker:
        """The model's tracker, made if it has none, on behalf of `user`.

        `refuse` is asked before `generate_batch` starts, and names what it could not honour.
        Raises RuntimeError if another thread has the model.
        """
        key = _identity(model)
        with cls._lock:
            tracker = cls._all.get(key)
            if tracker is None:
                tracker = cls._all[key] = cls(key)
            elif tracker.owner != threading.get_ident():
                raise RuntimeError(
                    "attach: the model has an attachment made in another thread, and its edits "
                    "would reach this one; detach that first, or share it and assign its edits"
                )
            tracker._users.append(user)
            tracker._refusals.append(refuse)
            try:
                tracker._listen(model)
            except BaseException:
                tracker._forget(user)
                raise
            return tracker

    def release(self, user: object) -> None:
        """`user` is gone; the last one restores the model."""
        with self._lock:
            self._forget(user)

    def _forget(self, user: object) -> None:
        if user in self._users:
            index = self._users.index(user)
            del self._users[index], self._refusals[index]
        if self._users:
            return
        for handle in self._handles:
            handle.remove()
        for module, name, previous in reversed(self._patched):
            if previous is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = previous
        self._handles.clear()
        self._patched.clear()
        key = self._key()
        if key is not None and self._all.get(key) is self:
            del self._all[key]

    def _listen(self, model: nn.Module) -> None:
        for module in _language_modules(model):
            if id(module) in self._names:
                continue
            self._names[id(module)] = _parameters(module)
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._exit, always_call=True),
            ]
            # a PEFT model and the model inside it can both be asked to generate
            if hasattr(module, "generate") and hasattr(module, "prepare_inputs_for_generation"):
                self._patch(module, "generate", self._generate)
                self._patch(module, "prepare_inputs_for_generation", self._prepare)
                if hasattr(module, "generate_batch"):
                    self._patch(module, "generate_batch", self._generate_batch)

    def _patch(self, module: nn.Module, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self._patched.append((module, name, module.__dict__.get(name, _MISSING)))
        module.__dict__[name] = wrapped

    # -- the forward pass ----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._claim()
        if self._depth == 0:
            call = dict(zip(self._names[id(module)], args, strict=False)) | kwargs
            self.context = self._read(call)
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                self.pending = 1 if self.recomputed else self.pending + 1
                self.recomputed = False
        self._depth += 1

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and not torch.compiler.is_compiling():
            self._busy = None
            self._remember(output)

    def _claim(self) -> None:
        thread = threading.get_ident()
        if self._busy not in (None, thread):
            raise RuntimeError(
                "two threads are inside one model with an attachment: its codes and positions "
                "would mix; run the passes one after the other, or give each thread a model"
            )
        self._busy = thread

    def _read(self, call: dict[str, Any]) -> Context | None:
        """The context of a call of the model, from what `generate` prepared or its arguments."""
        ids = call.get("input_ids")
        tokens = ids if ids is not None else call.get("inputs_embeds")
        if tokens is None:
            return None
        rows, length = tokens.shape[:2]
        prepared, self._prepared = self._prepared, None
        if prepared is not None and (prepared.rows, prepared.length) == (rows, length):
            return prepared
        positions = call.get("position_ids")
        if call.get("cu_seq_lens_q") is not None:
            return Context(rows, length, positions=_expand(positions, rows), packed=True)
        cache = call.get("past_key_values", call.get("cache_params"))
        mask = call.get("attention_mask")
        real = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
            end = self._columns_seen(cache, mask.shape[1], length)
            positions = (mask.long().cumsum(-1) - 1)[:, end - length : end]
            real = mask[:, end - length : end].bool()
        elif isinstance(positions, Tensor) and positions.dim() == 2:
            positions = positions.expand(rows, -1)
        else:
            seen = getattr(cache, "get_seq_length", None)
            start = 0 if seen is None else seen()
            positions = (torch.arange(length, device=tokens.device) + start).expand(rows, length)
        ends = self._prompt_lengths(cache, positions, real)
        return Context(rows, length, positions=positions, real=real, prompt_lengths=ends)

    def _columns_seen(self, cache: Any, width: int, length: int) -> int:
        """How many columns of a 2-D mask are tokens so far: all, but for a preallocated mask."""
        if cache is None or width == length or torch.compiler.is_compiling():
            return width
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else width - length
        return min(width, past + length)

    def _prompt_lengths(self, cache: Any, positions: Tensor, real: Tensor | None) -> Tensor | None:
        """Outside `generate`, the first pass seen with a cache is (the rest of) its prompt."""
        if cache is not None:
            if torch.compiler.is_compiling():
                return (
                    None  # which pass came first is not in the graph; an edit that asks is refused
                )
            if cache in self._prompts:
                return self._prompts[cache]
        counted = positions if real is None else positions.masked_fill(~real, -1)
        return counted.amax(-1) + 1

    def _remember(self, output: Any) -> None:
        """Note the prompt of a cache that the model has just made, for calls that continue it."""
        cache = getattr(output, "past_key_values", None)
        ends = None if self.context is None else self.context.prompt_lengths
        if cache is not None and ends is not None and cache not in self._prompts:
            self._prompts[cache] = ends

    # -- generate ------------------------------------------------------------------------------

    @contextmanager
    def _generation(self, generation: _Generation) -> Iterator[None]:
        if self._generations and self._generations[-1].prompt_lengths is not None:
            # a model that assists itself: the outer prompt is the prompt
            generation.prompt_lengths = self._generations[-1].prompt_lengths
            generation.columns = 0
        self._generations.append(generation)
        try:
            yield
        finally:
            self._generations.pop()
            self._prepared = None

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = (args[0] if args else None, *(kwargs.get(k) for k in ("inputs", "input_ids")))
        embeds = kwargs.get("inputs_embeds")
        prompt = next((p for p in (*given, embeds) if isinstance(p, Tensor)), None)
        mask = kwargs.get("attention_mask")
        rows, columns = (1, 1) if prompt is None else (prompt.shape[0], prompt.shape[1])
        if isinstance(mask, Tensor):
            columns = max(columns, mask.shape[1])  # a continued cache: only the new ids are given
        with self._generation(_Generation(rows, columns, mask)):
            return original(*args, **kwargs)

    def _prepare(
        self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = original(input_ids, *args, **kwargs)
        if not self._generations:
            return inputs
        tokens = inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if tokens is None else tokens
        if tokens is not None:
            mask = kwargs.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            ids = input_ids if input_ids.shape[1] else tokens
            cache = kwargs.get("past_key_values")
            self._prepared = self._generations[-1].context(ids, tokens.shape[1], mask, cache)
        return inputs

    def _generate_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for reason in filter(None, (refuse() for refuse in self._refusals)):
            raise ValueError(f"generate_batch packs its requests into one row: {reason}")
        return original(*args, **kwargs)

    # -- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise no_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise no_copy()


def no_copy() -> TypeError:
    return TypeError(
        "a model with a saert attachment cannot be copied or pickled: the copy would share or lose "
        "its edits. Detach first, copy, then attach to either"
    )


def _identity(model: nn.Module) -> nn.Module:
    """The one module that stands for a model in all its wrappers."""
    try:
        return backbone(model)[1]
    except HookpointError:
        return unwrap(model)[1]


def _language_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules from `model` down to its backbone that take tokens, outermost first."""
    try:
        path, _ = backbone(model)
    except HookpointError:
        return
    names = path.split(".") if path else []
    for depth in range(len(names) + 1):
        module = model.get_submodule(".".join(names[:depth]))
        if hasattr(module, "config") and "input_ids" in _parameters(module):
            yield module


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _expand(positions: Any, rows: int) -> Tensor | None:
    return positions.expand(rows, -1) if isinstance(positions, Tensor) else None
