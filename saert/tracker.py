"""Finding out which token is where: a `Tracker` follows the calls of one model.

What a hook cannot see (`saert.context`) is known to the call of the model (its 2-D attention mask,
its positions, its cache) and to `generate`. A tracker listens there, once per model, on behalf of
all attachments. Why it wraps `generate`: docs/adr/0002-generate-is-wrapped.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from saert.context import Context, Generation
from saert.hookpoint import HookpointError, backbone, unwrap

_ATTRIBUTE = "_saert_tracker"
_MISSING = object()


class User(Protocol):
    """What a tracker asks of an attachment.

    Attributes:
        compiled: whether its hooks run in a graph that must not change.
    """

    compiled: bool

    def refuse_batching(self) -> str | None:
        """Which edit `generate_batch` could not honour, if any."""

    def refuse_embeds(self) -> None:
        """Raise if an SAE sits on the token embedding, which a call with embeddings never runs."""


class Tracker:
    """Listens to one model on behalf of its attachments; made by the first, undone by the last.

    `Tracker.of(model, user)` is the only way to get one. It holds the hooks that follow a forward
    pass and, on the instances that can generate, replaces `generate`, `generate_batch` and
    `prepare_inputs_for_generation` by versions that take notes.

    Attributes:
        context: of the pass under way, or the latest.
        trained: of the latest pass with gradients, for what checkpointing recomputes.
        pending: passes with gradients since checkpointing last recomputed one.
        recomputed: set by whoever notices a recomputation.
        registered: ids of attachments' hooks per (module, side), in the order they act.
    """

    _lock = threading.Lock()

    def __init__(self, key: nn.Module) -> None:
        self.context: Context | None = None
        self.trained: Context | None = None
        self.owner = threading.get_ident()
        self.pending = 0
        self.recomputed = False
        self.registered: dict[tuple[int, str], list[Any]] = {}
        self._key = key
        self._users: list[User] = []
        self._inside: list[int] = []  # ids of the modules that the pass under way has entered
        self._busy: int | None = None
        self._generations: list[Generation] = []
        self._prepared: Context | None = None
        self._cache: Any = None
        self._prompts: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []
        self._patched: list[tuple[nn.Module, str, Any, Any]] = []
        self._names: dict[int, list[str]] = {}  # parameter names of each module listened to

    # -- life ----------------------------------------------------------------------------------

    @classmethod
    def of(cls, model: nn.Module, user: User) -> Tracker:
        """The model's tracker, made if it has none, on behalf of `user`.

        It lives on the model itself, so that a model nobody refers to can go, attached or not.
        Raises RuntimeError if another thread has the model.
        """
        key = _identity(model)
        with cls._lock:
            tracker: Tracker | None = key.__dict__.get(_ATTRIBUTE)
            if tracker is None:
                tracker = key.__dict__[_ATTRIBUTE] = cls(key)
            elif tracker.owner != threading.get_ident():
                raise RuntimeError(
                    "attach: the model has an attachment made in another thread, and its edits "
                    "would reach this one; detach that first, or share it and assign its edits"
                )
            tracker._users.append(user)
            try:
                tracker._listen(model)
            except BaseException:
                tracker._forget(user)
                raise
            return tracker

    def release(self, user: User) -> None:
        """`user` is gone; the last one restores the model."""
        with self._lock:
            self._forget(user)

    def _forget(self, user: User) -> None:
        if user in self._users:
            self._users.remove(user)
        if self._users:
            return
        for handle in self._handles:
            handle.remove()
        for module, name, ours, previous in reversed(self._patched):
            if module.__dict__.get(name) is not ours:
                continue  # replaced by somebody else meanwhile: theirs to keep
            if previous is _MISSING:
                del module.__dict__[name]
            else:
                module.__dict__[name] = previous
        self._handles.clear()
        self._patched.clear()
        self._key.__dict__.pop(_ATTRIBUTE, None)

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

        self._patched.append((module, name, wrapped, module.__dict__.get(name, _MISSING)))
        module.__dict__[name] = wrapped

    # -- the forward pass ----------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._claim()
        if id(module) in self._inside:
            # no module is inside itself: a KeyboardInterrupt ended a pass without telling us
            self._inside.clear()
        if not self._inside:
            call = dict(zip(self._names[id(module)], args, strict=False)) | kwargs
            self.context = self._read(call)
            if not compiling and torch.is_grad_enabled():
                self.trained = self.context
                self.pending = 1 if self.recomputed else self.pending + 1
                self.recomputed = False
        self._inside.append(id(module))

    def _exit(self, module: nn.Module, args: Any, output: Any) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and self._busy != threading.get_ident():
            return  # a pass that was refused: the one under way is another thread's
        if id(module) not in self._inside:
            return
        del self._inside[self._inside.index(id(module)) :]
        if not self._inside and not compiling:
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
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            return None
        if ids is None:
            for user in self._users:
                user.refuse_embeds()
        rows, length = tokens.shape[:2]
        prepared, self._prepared = self._prepared, None
        if prepared is not None and (prepared.rows, prepared.length) == (rows, length):
            return prepared
        positions = call.get("position_ids")
        if call.get("cu_seq_lens_q") is not None:
            why = "generate_batch packs its requests into one row"
            return Context(rows, length, _spread(positions, rows), expansion=None, why=why)
        cache = call.get("past_key_values", call.get("cache_params"))
        self._cache = cache
        mask = call.get("attention_mask")
        expansion, why = self._expansion(rows, cache)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            why = "the attention mask is not [rows, columns], which shows padding"
            return Context(rows, length, expansion=expansion, why=why)
        real = None
        if mask is not None and mask.shape[1] >= length:
            mask = mask.expand(rows, -1)
            end = self._columns_seen(cache, mask.shape[1], length)
            positions = (mask.long().cumsum(-1) - 1)[:, end - length : end]
            real = mask[:, end - length : end].bool()
        elif isinstance(positions, Tensor) and positions.dim() == 2:
            positions = positions.expand(rows, -1)
        elif (start := _seen(cache)) is not None:
            positions = (torch.arange(length, device=tokens.device) + start).expand(rows, length)
        else:
            why = f"{type(cache).__name__} does not count the tokens it holds; pass a mask"
            return Context(rows, length, expansion=expansion, why=why)
        ends = self._prompt_lengths(cache, positions, real)
        return Context(rows, length, positions, real, ends, expansion, why)

    def _expansion(self, rows: int, cache: Any) -> tuple[int | None, str]:
        """Rows per row of the caller's batch; and why they, or the prompt, may be unknown."""
        why = "the first pass over this cache was not seen; use model.generate, or positions from 0"
        if self._generations:  # a pass that generate makes without preparing it, as guidance does
            return self._generations[-1].expansion(rows), why
        if cache is not None and not self._patched:
            return None, "attach to the model whose generate is called, not to its backbone"
        return 1, why

    def _columns_seen(self, cache: Any, width: int, length: int) -> int:
        """How many columns of a 2-D mask are tokens so far: all, but for a preallocated mask."""
        if cache is None or width == length or torch.compiler.is_compiling():
            return width
        past = _seen(cache)
        return width if past is None else min(width, int(past) + length)

    def _prompt_lengths(self, cache: Any, positions: Tensor, real: Tensor | None) -> Tensor | None:
        """Outside `generate`, the first pass seen with a cache is (the rest of) its prompt."""
        if cache is not None:
            if torch.compiler.is_compiling():
                return (
                    None  # which pass came first is not in the graph; an edit that asks is refused
                )
            seen = _seen(cache)
            if cache in self._prompts and (seen is None or int(seen) > 0):
                return self._prompts[cache]
            if seen is None:
                return None
        counted = positions if real is None else positions.masked_fill(~real, -1)
        return counted.amax(-1) + 1

    def _remember(self, output: Any) -> None:
        """Note where the prompt of the pass's cache ends, for calls that continue it."""
        given, self._cache = self._cache, None
        cache = getattr(output, "past_key_values", getattr(output, "cache_params", None))
        cache = given if cache is None else cache
        ends = None if self.context is None else self.context.prompt_lengths
        if cache is not None and ends is not None:
            with contextlib.suppress(TypeError):  # a tuple, as old models return, cannot be noted
                self._prompts[cache] = ends

    # -- generate ------------------------------------------------------------------------------

    @contextmanager
    def _generation(self, generation: Generation, assists: bool) -> Iterator[None]:
        """While `generate` runs. A model that `assists` itself goes on with the outer prompt."""
        outer = self._generations[-1] if self._generations else None
        if outer is not None and assists and outer.prompt_lengths is not None:
            generation.prompt_lengths = outer.prompt_lengths
            generation.columns = generation.given = 0
        self._generations.append(generation)
        try:
            yield
        finally:
            self._generations.pop()
            self._prepared = None
            if not self._generations:  # whatever ended it, no pass is under way
                self._inside.clear()
                self._busy = None

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = (args[0] if args else None, *(kwargs.get(k) for k in ("inputs", "input_ids")))
        ids = next((p for p in given if isinstance(p, Tensor)), None)
        prompt = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        rows, given_columns = (1, 1) if prompt is None else (prompt.shape[0], prompt.shape[1])
        columns = given_columns
        if mask is not None:
            columns = max(columns, mask.shape[1])  # a continued cache: only the new ids are given
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        stops = () if ids is None else _stops(original, config, kwargs)
        still = any(user.compiled for user in self._users)
        generation = Generation(rows, columns, given_columns, mask, stops, still)
        with self._generation(generation, bool(getattr(config, "is_assistant", False))):
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
            seen = _seen(kwargs.get("past_key_values")) if "past_key_values" in kwargs else None
            self._prepared = self._generations[-1].context(
                ids, tokens.shape[1], mask, None if seen is None else int(seen)
            )
        return inputs

    def _generate_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for reason in filter(None, (user.refuse_batching() for user in self._users)):
            raise ValueError(f"generate_batch packs its requests into one row: {reason}")
        return original(*args, **kwargs)

    # -- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise no_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise no_copy()


def no_copy() -> TypeError:
    """The refusal to copy or pickle anything that is attached."""
    return TypeError(
        "a model with a saert attachment cannot be copied or pickled: the copy would share or lose "
        "its edits. Detach first, copy, then attach to either"
    )


def _seen(cache: Any) -> Any:
    """Tokens in a cache (an int, or a 0-d tensor); None where it does not count them."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):  # a tuple; linear attention, which keeps a state instead
        return None


def _stops(original: Callable[..., Any], config: Any, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end a row, as `generate` was told them."""
    own = getattr(getattr(original, "__self__", None), "generation_config", None)
    found = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    if found is None and "eos_token_id" not in kwargs:
        found = getattr(own, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def is_attached(model: nn.Module) -> bool:
    """Whether SAEs are attached to a model at the moment."""
    return _ATTRIBUTE in _identity(model).__dict__


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


def _spread(positions: Any, rows: int) -> Tensor | None:
    return positions.expand(rows, -1) if isinstance(positions, Tensor) else None
