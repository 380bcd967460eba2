"""What a change at one token does to a model's next predictions, without running all of it again.

A change at token p of a hookpoint reaches only what lies behind it: later tokens, higher blocks.
`Replay` keeps from one pass of the rows the stream that enters the first block behind the
hookpoint, and the keys and values of that block and those above; a replay from token p then runs
these blocks alone, on the tokens from p on, with the keys and values of the tokens before p as its
cache. It is the model's own forward pass: the blocks below are swapped for stand-ins while it
runs, so masks, rotary or learnt positions, sliding windows, scalings and soft caps are the model's.

`BruteForce` answers the same questions with whole forward passes and a hook. `choose_runner`
replays random changes at the first, a middle and the last token, compares the logits, and takes
brute force where they differ.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from saert.architecture import blocks
from saert.capture import capture
from saert.hookpoint import Hookpoint, unwrap
from saert.hooks import eager, hooked
from saert.kernels.numerics import HALF

TOLERANCE, HALF_TOLERANCE = 2e-4, 0.1
"""Largest error of replayed logits, relative to the largest effect of a change as large as the
hidden state. In float32 rounding makes some 1e-6, in half precision up to a few per cent."""


class Runner(Protocol):
    """Answers what the model predicts after a change at one token.

    Attributes:
        ids: int64 [rows, tokens].
    """

    ids: Tensor

    def logits(self, rows: Tensor, position: int, change: Tensor, length: int) -> Tensor:
        """Logits [B, length, vocabulary] of tokens `position` to `position + length − 1`.

        rows: int64 [B]; change: [B, d], added to the hidden state at `position` alone.
        """
        ...


def choose_runner(
    model: Any,
    hookpoint: Hookpoint,
    ids: Tensor,
    splice: Tensor | None = None,
    horizon: int = 16,
    kind: type[Runner] | None = None,
) -> Runner:
    """The fastest exact runner for rows `ids` [rows, tokens], all of them real tokens.

    splice: [rows, tokens, d], what stands in for the hidden state in every pass.
    kind: what was chosen for rows of the same model that were as long or longer; nothing is
        compared again.
    Warns where the model cannot be replayed and each ablation takes a whole forward pass. Raises
    ValueError where predictions do not answer to a change at the hookpoint, or are NaN.
    """
    splice = None if splice is None else splice.to(ids.device)
    if kind is not None:
        return (Replay if kind is Replay else BruteForce)(model, hookpoint, ids, splice)
    brute = BruteForce(model, hookpoint, ids, splice)
    try:
        replay = Replay(model, hookpoint, ids, splice)
        off = _difference(replay, brute, horizon)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        _check_answers(brute, ids)
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if off <= (HALF_TOLERANCE if model.dtype in HALF else TOLERANCE):
            return replay
        _check_answers(brute, ids)
        why = f"logits after a replayed change are {off:.1%} off"
    warnings.warn(
        f"{type(model).__name__} cannot be replayed from {hookpoint} ({why}); each ablation takes "
        "a whole forward pass, which is exact and slower",
        stacklevel=2,
    )
    return brute


def _difference(replay: Replay, brute: BruteForce, horizon: int) -> float:
    """Largest error of the logits that a replay finds after a random change as large as the hidden
    state, relative to its largest effect: of the first row's first, middle and last token."""
    tokens = replay.ids.shape[1]
    places = sorted({0, tokens // 2, tokens - 1})
    spans = [range(p, min(p + horizon, tokens)) for p in places]
    state = replay.hidden[0, places]
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).to(state)
    change = noise * (state.norm(dim=-1) / noise.norm(dim=-1)).unsqueeze(-1)
    row = torch.zeros(2, dtype=torch.int64, device=replay.ids.device)
    seen = sorted({t for span in spans for t in span})
    at = torch.tensor(places, device=row.device)
    theirs = brute.passes(row[:1].expand(len(places)), at, change, seen)
    worst = 0.0
    for i, span in enumerate(spans):
        both = torch.stack([torch.zeros_like(change[i]), change[i]])
        plain, ours = replay.logits(row, span.start, both, len(span)).float()
        true = theirs[i, [seen.index(t) for t in span]].float()
        effect = _apart(ours, plain).max().clamp_min(1e-30)
        worst = max(worst, (_apart(ours, true).max() / effect).nan_to_num(torch.inf).item())
    return worst


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|, 0 where both are the same infinity."""
    return torch.where(a == b, 0, (a - b).abs())


def _check_answers(brute: BruteForce, ids: Tensor) -> None:
    """ValueError unless a change at the hookpoint changes finite predictions."""
    middle = ids.shape[1] // 2
    row = torch.zeros(1, dtype=torch.int64, device=ids.device)
    width = brute.width()
    nothing, some = (
        brute.logits(row, middle, row.new_full((1, width), value).float(), 1) for value in (0, 1)
    )
    moved = _apart(some, nothing).max()
    if not moved.isfinite() or not moved:
        what = "do not change with" if not moved else "are NaN after a change of"
        raise ValueError(f"the model's predictions {what} its hidden state at {brute.hookpoint}")


class BruteForce:
    """Whole forward passes of whole rows."""

    def __init__(
        self, model: Any, hookpoint: Hookpoint, ids: Tensor, splice: Tensor | None = None
    ) -> None:
        self.model, self.hookpoint, self.ids, self.splice = model, hookpoint, ids, splice
        names = inspect.signature(unwrap(model)[1].forward).parameters
        self._keeps = "logits_to_keep" in names

    def logits(self, rows: Tensor, position: int, change: Tensor, length: int) -> Tensor:
        return self.passes(
            rows, torch.full_like(rows, position), change, range(position, position + length)
        )

    def passes(self, rows: Tensor, at: Tensor, change: Tensor, seen: Sequence[int]) -> Tensor:
        """Logits [B, seen, vocabulary] with change [B, d] at tokens `at` [B]."""

        def act(hidden: Tensor) -> Tensor:
            return _changed(hidden, self.splice, rows, 0, change, at)

        wanted = torch.tensor(list(seen), device=self.ids.device)
        options = {"logits_to_keep": wanted} if self._keeps else {}
        with hooked(self.model, self.hookpoint, act):
            logits: Tensor = self.model(self.ids[rows], use_cache=False, **options).logits
        return logits if logits.shape[1] == len(wanted) else logits[:, wanted]

    def width(self) -> int:
        """Of the hidden state at the hookpoint."""
        return capture(self.model, self.ids[:1], [self.hookpoint])[self.hookpoint].shape[-1]


def _changed(
    hidden: Tensor, splice: Tensor | None, rows: Tensor, first: int, change: Tensor, at: Tensor
) -> Tensor:
    """The hidden states of tokens `first` and on, or what stands in for them, with `change` added
    to token `at` [B] of these. Some models flatten rows and tokens into one dimension."""
    state = hidden.clone().view(len(rows), -1, hidden.shape[-1])
    if splice is not None:
        state = splice[rows, first : first + state.shape[1]].to(hidden)
    each = torch.arange(len(rows), device=state.device)
    state[each, at.to(state.device)] += change.to(hidden)
    return state.view_as(hidden)


class Replay:
    """Forward passes of the blocks above a hookpoint, from any token on."""

    def __init__(
        self, model: Any, hookpoint: Hookpoint, ids: Tensor, splice: Tensor | None = None
    ) -> None:
        """One pass over `ids` [rows, tokens]. Raises HookpointError where the model has no list of
        blocks, and whatever a model raises that cannot take a cache of keys and values."""
        self.model, self.hookpoint, self.ids, self.splice = model, hookpoint, ids, splice
        _, self.blocks = blocks(model)
        self.first, self.inside = _first_block(model, hookpoint)
        self.stream: Tensor | None = None  # what enters the first block that runs again
        self._beside: list[Any] = []  # what each block below returns beside its stream
        seen: list[Tensor] = []
        cache = DynamicCache()  # without the config: sliding layers would drop their oldest keys

        def at_hookpoint(hidden: Tensor) -> Tensor | None:
            seen.append(hidden.clone() if splice is None else splice.to(hidden).view_as(hidden))
            return None if splice is None else seen[-1].clone()

        with ExitStack() as stack:
            stack.enter_context(hooked(model, hookpoint, at_hookpoint))
            for block in self.blocks[: self.first]:
                handle = block.register_forward_hook(self._note)
                stack.callback(handle.remove)
            model.base_model(ids, past_key_values=cache, use_cache=True)
        self.hidden = seen[0].view(*ids.shape, -1)
        kept = [(getattr(c, "keys", None), getattr(c, "values", None)) for c in cache.layers]
        whole = [keys is not None and keys.shape[-2] == ids.shape[1] for keys, _ in kept]
        if len(kept) != len(self.blocks) or not all(whole[self.first :]):
            raise RuntimeError("its cache does not hold the keys of every token and block")
        self.layers = [None] * self.first + kept[self.first :]

    def _note(self, block: nn.Module, args: Any, output: Any) -> None:
        several = isinstance(output, tuple)
        self._beside.append(output[1:] if several else None)
        if block is self.blocks[self.first - 1]:
            self.stream = (output[0] if several else output).clone()

    def logits(self, rows: Tensor, position: int, change: Tensor, length: int) -> Tensor:
        stop = position + length
        cache = Cache(layers=[_Before(layer, rows, position) for layer in self.layers])

        def act(hidden: Tensor) -> Tensor:
            return _changed(hidden, self.splice, rows, position, change, torch.zeros_like(rows))

        with eager(), ExitStack() as stack:
            if self.stream is not None:
                stream = self.stream[rows, position:stop]
                if not self.inside:
                    stream[:, 0] += change.to(stream)  # advanced indexing made it a copy
                stack.enter_context(self._skipping(stream))
            if self.inside:
                stack.enter_context(hooked(self.model, self.hookpoint, act))
            ids = self.ids[rows, position:stop]
            logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True).logits
        return logits

    @contextmanager
    def _skipping(self, stream: Tensor) -> Iterator[None]:
        """The blocks below the first stand aside; the last of them hands out `stream`."""
        below = list(self.blocks[: self.first])
        try:
            for i, (block, beside) in enumerate(zip(below, self._beside, strict=True)):
                self.blocks[i] = _StandIn(block, stream, beside)
            yield
        finally:
            for i, block in enumerate(below):
                self.blocks[i] = block


class _StandIn(nn.Module):
    """Returns a stream in the form in which a block returns it."""

    def __init__(self, block: nn.Module, stream: Tensor, beside: Any) -> None:
        super().__init__()
        self._answer = stream if beside is None else (stream, *beside)
        object.__setattr__(self, "_block", block)  # no submodule: it is not to be moved or listed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for facts, such as which mask they want."""
        return getattr(object.__getattribute__(self, "_block"), name)


class _Before(DynamicLayer):
    """A block's keys and values at the tokens before `position`, for the rows of a batch.

    Nothing is stored: a replay asks each layer once, so only one layer's are in memory at a time.
    """

    def __init__(self, layer: tuple[Any, Any] | None, rows: Tensor, position: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.rows, self.position = layer, rows, position
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.layer is not None  # only blocks that run ask
        before = (states[:, :, : self.position] for states in self.layer)
        if self.layer[0].shape[0] == 1:
            before = (states.expand(len(self.rows), -1, -1, -1) for states in before)
        else:
            before = (states[self.rows] for states in before)
        keys, values = before
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self, *args: Any) -> int:
        return self.position


def _first_block(model: Any, hookpoint: Hookpoint) -> tuple[int, bool]:
    """The first block that a change at a hookpoint reaches, and whether the hookpoint is met when
    that block and those above run (if not, it is the stream that enters that block)."""
    location = hookpoint.resolve(model)
    list_path, layers = blocks(model)
    index, _, within = location.path.removeprefix(f"{list_path}.").partition(".")
    if not location.path.startswith(f"{list_path}.") or not index.isdigit():
        return 0, True  # the embedding, or behind the last block: all blocks run
    if location.module is layers[int(index)] and location.side == "out":
        return int(index) + 1, False
    return int(index), True
