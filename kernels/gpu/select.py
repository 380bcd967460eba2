"""Streaming selection: of scores that pass by a chunk at a time, the k largest or all above θ.

    rank[t, i] = relu(score[t, i] + bias[i]) · weight[i]
    key[t, i]  = bits(rank) · 2³² + (2³¹ − 1 − i), an int64

A non-negative float32 orders like its bits, so the k largest keys are the k largest ranks, the
lowest latent first among equals, and a selection that compares keys is exact and has no order of
its own to depend on. One program owns one segment of one row and sees its latents in ascending
order. It keeps K >= k keys. A block without a rank above the K-th is skipped; the few survivors of
any other are appended to a buffer, and only a full buffer costs sorts, of a PIECE at a time. So a
row costs one pass, and about log(n / K) small sorts if its scores come in no particular order.

NaN never wins a maximum, so it is looked for as "not <= the K-th rank", and sets the row's flag.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters. Fixed, not autotuned: every run of a shape does the same work.
BLOCK = 1024  # scores a step: 8 a thread, two 16-byte loads, 4 KB in flight a program
WARPS = 4  # or K / WARP_KEYS
WARP_KEYS = 128  # kept keys a warp can sort in registers: four or more pairs a thread spill
REGISTERS = 64  # a thread: what the sorts need more is spilled, so that twice the programs fit
MIN_KEPT, MAX_K = 16, 2048  # keys a program keeps
PIECE = 128  # survivors sorted together, if K is no more: one key a thread
LIMIT = 128  # survivors that wait for a sort: 2 K, at least this, above 1024 only K
PROGRAMS = 1056  # 8 for each of an H200's 132 SMs: rows are split until there are as many
SEGMENT_BLOCKS = 4  # but no segment is shorter, since its first block is sorted whole
MERGED = 8192  # keys of one row that the last step merges at most, MERGE_BLOCK at a time
MERGE_BLOCK = 1024

if hasattr(tl, "topk") and hasattr(tl, "bitonic_merge"):

    @triton.jit
    def _largest(keys, K: tl.constexpr):
        """The K largest of int64 keys [N], descending: [K]. Powers of two, N >= K."""
        return tl.topk(keys, K)

    @triton.jit
    def _ordered(keys, DESCENDING: tl.constexpr):
        """Sort keys [K] that rise and then fall, as zeros and what `_merge` returns do."""
        return tl.bitonic_merge(keys, descending=DESCENDING)

else:  # triton 3.2 has only a full sort

    @triton.jit
    def _largest(keys, K: tl.constexpr):
        ranked = tl.reshape(tl.sort(keys, descending=True), (keys.shape[0] // K, K))
        first = tl.arange(0, keys.shape[0] // K)[:, None] == 0
        return tl.sum(tl.where(first, ranked, 0), axis=0)

    @triton.jit
    def _ordered(keys, DESCENDING: tl.constexpr):
        return tl.sort(keys, descending=DESCENDING)


@triton.jit
def _merge(kept, keys, K: tl.constexpr):
    """The K largest of kept [K] and keys [N], in an order that `_ordered` sorts.

    Ascending against descending, the larger of each pair is in the top K of the union.
    """
    return tl.maximum(_ordered(kept, False), _largest(keys, K))


@triton.jit
def _rank(keys):
    return (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load(
    scores, bias, weight, at, latent, inside, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """Scores and ranks [BLOCK]; −inf outside. A rank is NaN where the score is, and never > 0
    where the score is not."""
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        score += tl.load(bias + latent, mask=inside, other=0.0).to(tl.float32)
    rank = score
    if HAS_WEIGHT:
        scale = tl.load(weight + latent, mask=inside, other=0.0)
        rank = tl.where(score <= 0, float("-inf"), score * scale)
    return score, rank


@triton.jit
def _drain(kept, buffer, waits, K: tl.constexpr, PIECE: tl.constexpr):
    """Merge the first `waits` keys of the buffer into kept [K], PIECE at a time."""
    lane = tl.arange(0, PIECE)  # [PIECE]
    for begin in range(0, waits, PIECE):
        keys = tl.load(buffer + begin + lane, mask=begin + lane < waits, other=0)
        if tl.max(keys, axis=0) > tl.min(kept, axis=0):
            kept = _merge(kept, keys, K)
    return kept


@triton.jit
def _topk_chunk(
    scores, bias, weight, state, buffers, start, width, n, span, stride,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    K: tl.constexpr, PIECE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, segment): carry its state over latents [start, start + width) of n.

    state: int64 [rows, segments, K + 2], zeros at first: the K kept keys, how many survivors wait
    in the buffer, and whether a NaN was seen. buffers: int64 [rows, segments, LIMIT + BLOCK].
    """
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    program = row * tl.num_programs(1) + segment
    own = state + program * (K + 2)
    buffer = buffers + program * (LIMIT + BLOCK)
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    kept = tl.load(own + tl.arange(0, K))  # [K]
    waits = tl.load(own + K).to(tl.int32)
    bad = tl.load(own + K + 1).to(tl.int32)
    least = _rank(tl.min(kept, axis=0))

    end = tl.minimum(segment * span + span, width)
    for begin in range(segment * span, end, BLOCK):
        at = begin + lane
        latent = start + at
        score, rank = _load(
            scores + row * stride, bias, weight, at, latent, at < end, HAS_BIAS, HAS_WEIGHT
        )
        # Later latents lose ties against kept ones, so only a rank above the K-th can enter.
        if tl.sum(1 - (rank <= least).to(tl.int32), axis=0) > 0:
            bad = tl.maximum(bad, tl.max((score != score).to(tl.int32), axis=0))
            enters = (rank > least).to(tl.int32)
            place = waits + tl.cumsum(enters, axis=0) - enters  # < LIMIT + BLOCK
            bits = rank.to(tl.int32, bitcast=True).to(tl.int64) << 32
            key = bits | (0x7FFFFFFF - latent).to(tl.int64)
            tl.store(buffer + place, key, mask=enters > 0)
            waits += tl.sum(enters, axis=0)
            if waits >= LIMIT:
                tl.debug_barrier()  # what other threads appended, before reading it
                kept = _drain(kept, buffer, waits, K, PIECE)
                least = _rank(tl.min(kept, axis=0))
                waits -= waits
                tl.debug_barrier()  # and read it before anything is appended over it

    if start + width >= n:  # the last chunk; before it, survivors may wait for the next
        tl.debug_barrier()
        kept = _drain(kept, buffer, waits, K, PIECE)
    tl.store(own + tl.arange(0, K), kept)
    tl.store(own + K, waits.to(tl.int64))
    tl.store(own + K + 1, bad.to(tl.int64))


@triton.jit
def _topk_finish(
    state, weight, indices, values, nan, segments, k,
    HAS_WEIGHT: tl.constexpr, K: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): merge the kept keys of its segments, unpack the first k, collect the flags."""
    row = tl.program_id(0).to(tl.int64)
    own = state + row * segments * (K + 2)
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    kept = tl.zeros((K,), tl.int64)
    for begin in range(0, segments * K, BLOCK):
        at = begin + lane
        where = (at // K) * (K + 2) + at % K
        keys = tl.load(own + where, mask=at < segments * K, other=0)
        if tl.max(keys, axis=0) > tl.min(kept, axis=0):
            kept = _merge(kept, keys, K)
    kept = _ordered(kept, True)  # [K]

    slot = tl.arange(0, K)  # [K]
    value = _rank(kept)
    used = value > 0
    latent = tl.where(used, 0x7FFFFFFF - (kept & 0x7FFFFFFF), 0)  # int64
    if HAS_WEIGHT:
        value = tl.div_rn(value, tl.load(weight + latent, mask=used, other=1.0))
    tl.store(indices + row * k + slot, latent, mask=slot < k)
    tl.store(values + row * k + slot, value, mask=slot < k)
    part = tl.arange(0, SEGMENTS)  # [SEGMENTS]
    flag = own + part * (K + 2) + K + 1
    bad = tl.max(tl.load(flag, mask=part < segments, other=0), axis=0)
    tl.store(nan + row, bad.to(tl.int8))


@triton.jit
def _above_chunk(
    scores, bias, weight, threshold, cursor, after, nan, indices, values,
    start, width, span, stride, capacity,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, PER_LATENT: tl.constexpr,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, segment): count, and with WRITE also store, the scores whose rank is above θ.

    cursor and after: int32 [rows, segments], where the segment's entries begin and end in its
    row's [capacity]. Counting goes on past capacity; storing does not.
    """
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    state = row * tl.num_programs(1) + segment
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    found = tl.load(cursor + state)
    bad = tl.load(nan + state).to(tl.int32)
    bar = tl.load(threshold)

    end = tl.minimum(segment * span + span, width)
    for begin in range(segment * span, end, BLOCK):
        at = begin + lane
        latent = start + at
        score, rank = _load(
            scores + row * stride, bias, weight, at, latent, at < end, HAS_BIAS, HAS_WEIGHT
        )
        theta = tl.zeros((BLOCK,), tl.float32) + bar
        if PER_LATENT:
            theta = tl.load(threshold + latent, mask=at < end, other=0.0)
        keep = ((rank > theta) & (score > 0)).to(tl.int32)
        broken = (score != score).to(tl.int32)
        if tl.sum(keep + broken, axis=0) > 0:
            bad = tl.maximum(bad, tl.max(broken, axis=0))
            if WRITE:
                place = found + tl.cumsum(keep, axis=0) - keep
                fits = (keep > 0) & (place < capacity)
                tl.store(indices + row * capacity + place, latent.to(tl.int64), mask=fits)
                tl.store(values + row * capacity + place, score, mask=fits)
            found = found + tl.sum(keep, axis=0)
    tl.store(after + state, found)
    tl.store(nan + state, bad.to(tl.int8))


class TopK:
    """The top-k of rows whose scores arrive a chunk of latents at a time."""

    def __init__(
        self, tokens: int, width: int, k: int, weight: Tensor | None, device: torch.device
    ):
        """For rows that arrive at most `width` latents at a time.

        Raises:
            ValueError: k outside 1 to MAX_K.
        """
        if not 1 <= k <= MAX_K:
            raise ValueError(f"k is {k}; this kernel selects between 1 and {MAX_K} latents")
        self.k, self.weight = k, weight
        self.K = max(MIN_KEPT, triton.next_power_of_2(k))
        self.limit = max(LIMIT, min(2 * self.K, max(1024, self.K)))
        self.warps = max(WARPS, self.K // WARP_KEYS)
        rows = (tokens, _segments(tokens, width, MERGED // self.K))
        self.state = torch.zeros(*rows, self.K + 2, dtype=torch.int64, device=device)
        self.buffers = torch.empty(*rows, self.limit + BLOCK, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, bias: Tensor | None, start: int, n: int) -> None:
        """scores float32 [T, width] of latents [start, start + width) of n, in ascending order."""
        tokens, segments, _ = self.state.shape
        _topk_chunk[(tokens, segments)](
            scores, bias, self.weight, self.state, self.buffers,
            start, scores.shape[1], n, _span(scores.shape[1], segments), scores.stride(0),
            HAS_BIAS=bias is not None, HAS_WEIGHT=self.weight is not None,
            K=self.K, PIECE=max(PIECE, self.K), LIMIT=self.limit, BLOCK=BLOCK,
            num_warps=self.warps, maxnreg=REGISTERS if self.K <= 256 else None,
        )  # fmt: skip

    def finish(self, indices: Tensor, values: Tensor, nan: Tensor) -> None:
        """After the last chunk, write int64 [T, k], float32 [T, k] and int8 [T], all contiguous.

        With a weight, a value is rank / weight: the score but for two roundings of float32.
        """
        tokens, segments, _ = self.state.shape
        _topk_finish[(tokens,)](
            self.state, self.weight, indices, values, nan, segments, self.k,
            HAS_WEIGHT=self.weight is not None, K=self.K,
            SEGMENTS=triton.next_power_of_2(segments),
            BLOCK=min(max(MERGE_BLOCK, self.K), triton.next_power_of_2(segments * self.K)),
            num_warps=self.warps,
        )  # fmt: skip


class Above:
    """The entries above a threshold of rows whose scores arrive a chunk of latents at a time."""

    def __init__(
        self, tokens: int, width: int, capacity: int, threshold: Tensor, weight: Tensor | None
    ):
        device = threshold.device
        self.threshold, self.weight = threshold, weight
        self.indices = torch.zeros(tokens, capacity, dtype=torch.int64, device=device)
        self.values = torch.zeros(tokens, capacity, device=device)
        segments = _segments(tokens, width, PROGRAMS)
        self.found = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
        self.nan = torch.zeros(tokens, segments, dtype=torch.int8, device=device)

    def add(self, scores: Tensor, bias: Tensor | None, start: int) -> None:
        """scores float32 [T, width] of latents [start, start + width), in ascending order.

        A row in several segments is counted first: a segment begins where the one before ends.
        """
        if self.nan.shape[1] == 1:
            self._launch(scores, bias, start, self.found, self.found, write=True)
            return
        counts = torch.zeros_like(self.nan, dtype=torch.int32)
        self._launch(scores, bias, start, counts, counts, write=False)
        ends = self.found + counts.cumsum(1, dtype=torch.int32)
        self._launch(scores, bias, start, ends - counts, counts, write=True)
        self.found = ends[:, -1:]

    def _launch(
        self,
        scores: Tensor,
        bias: Tensor | None,
        start: int,
        begin: Tensor,
        end: Tensor,
        write: bool,
    ) -> None:
        tokens, segments = self.nan.shape
        width = scores.shape[1]
        _above_chunk[(tokens, segments)](
            scores, bias, self.weight, self.threshold, begin, end, self.nan,
            self.indices, self.values,
            start, width, _span(width, segments), scores.stride(0), self.indices.shape[1],
            HAS_BIAS=bias is not None, HAS_WEIGHT=self.weight is not None,
            PER_LATENT=self.threshold.numel() > 1, WRITE=write, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _segments(tokens: int, width: int, most: int) -> int:
    """Into how many segments a row is cut, so that few rows still fill the device."""
    return max(1, min(PROGRAMS // tokens, width // (SEGMENT_BLOCKS * BLOCK), most))


def _span(width: int, segments: int) -> int:
    """Latents of one segment: whole blocks, which keeps every load aligned."""
    blocks: int = triton.cdiv(width, segments * BLOCK)
    return blocks * BLOCK
