"""row_gradient: dW[i] = Σ_{(t, j): indices[t, j] = i} coefficients[t, j] · rows[t].

The T·k pairs are sorted by latent once (stable, so in token order within a latent) and cut into
chunks of equal length, one program each: work per program does not depend on how often a latent
fires. A run of equal latents inside a chunk is written to dW. A run that crosses the edge of a
chunk leaves one partial sum per chunk: in slot 2c of the scratch if it reached chunk c from the
left, in slot 2c + 1 if it begins in c. The program of the chunk where such a run begins then adds
its partials in order. Every row is written by one program: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch parameters. Fixed per shape: they decide the order of the additions.
CHUNK = 256  # pairs per program; the partials then cost about 6 % of the traffic
SMALL_CHUNK = 64  # below MANY_PAIRS, where 256 would leave most of the GPU without a program
MANY_PAIRS = 1 << 17
COLUMNS = 512  # of a row per program: 16 bytes a thread in float32
WARPS = 4

_UNUSED = 2**31 - 1  # the key of a pair with coefficient 0: sorts last and is never looked up


def row_gradient(
    indices: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    num_latents: int,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """indices int64, coefficients float32 [T, k], rows [T, d] -> [num_latents, d], [num_latents].

    Both results are float32; the second is Σ coefficients per latent. Rows may be float32 or half.
    Nothing waits for the device: the shapes of all steps depend on the shapes of the inputs.
    Pairs with coefficient 0 are skipped, whatever their row holds.

    Args:
        num_latents: below 2³¹ − 1; the keys are sorted as int32.
        chunk: pairs per program; by default chosen by their number.
    """
    keys, order = _sorted_keys(indices, coefficients)
    return _sum_runs(keys, order, coefficients, rows, num_latents, chunk)


def touched_rows(
    indices: Tensor, coefficients: Tensor, rows: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_gradient` of the U latents with a non-zero coefficient: ids, [U, d], [U].

    ids are int64, ascending and unique. Waits for the device once, to learn U.
    """
    keys, order = _sorted_keys(indices, coefficients)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    ids = keys[begins & (keys != _UNUSED)].to(torch.int64)  # the wait
    ranks = begins.cumsum(0, dtype=torch.int32) - 1  # unused pairs, sorted last, get rank U
    return ids, *_sum_runs(ranks, order, coefficients, rows, len(ids), chunk)


def _sorted_keys(indices: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """int32 latents ascending [P], and the pair t·k + j that each came from [P]."""
    used = coefficients.flatten() != 0  # an unused slot names latent 0, which would become hot
    keys = torch.where(used, indices.flatten(), _UNUSED).to(torch.int32)
    ordered = keys.sort(stable=True)
    return ordered.values, ordered.indices


def _sum_runs(
    keys: Tensor,
    order: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    count: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Σ coefficient · row over each run of equal keys below count: [count, d], [count]."""
    pairs, d = len(keys), rows.shape[1]
    dW = rows.new_zeros(count, d, dtype=torch.float32)
    sums = rows.new_zeros(count, dtype=torch.float32)
    if not pairs or not count:
        return dW, sums
    chunk = chunk or (CHUNK if pairs >= MANY_PAIRS else SMALL_CHUNK)
    chunks = triton.cdiv(pairs, chunk)
    scratch = rows.new_empty(2 * chunks, d, dtype=torch.float32)
    scratch_sums = rows.new_empty(2 * chunks, dtype=torch.float32)
    tokens = order // coefficients.shape[1]
    ordered = coefficients.flatten()[order].to(torch.float32)
    columns = int(min(COLUMNS, max(32, triton.next_power_of_2(d))))
    grid = (chunks, max(1, triton.cdiv(d, columns)))
    launch = {"CHUNK": chunk, "BLOCK": columns, "num_warps": WARPS if columns == COLUMNS else 1}
    with torch.cuda.device_of(dW):  # Triton launches on the current device
        _runs_kernel[grid](
            dW,
            sums,
            scratch,
            scratch_sums,
            keys,
            tokens,
            ordered,
            rows.contiguous(),
            pairs,
            count,
            d,
            **launch,
        )
        _join_kernel[grid](dW, sums, scratch, scratch_sums, keys, pairs, count, d, **launch)
    return dW, sums


# Not specialised: these change from batch to batch, and for 1 Triton would make them constants.
@triton.jit(do_not_specialize=["pairs", "count"])
def _runs_kernel(
    dW,
    sums,
    scratch,
    scratch_sums,
    keys,
    tokens,
    coefficients,
    rows,
    pairs,
    count,
    d,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < d
    first_column = tl.program_id(1) == 0  # the sums have no columns: one program writes them
    p = c * CHUNK
    end = tl.minimum(p + CHUNK, pairs)
    # A run with the key on the left of the chunk did not begin here. No key is negative.
    before = tl.load(keys + p - 1, mask=p > 0, other=-1)
    key = tl.load(keys + p)
    v, row = _pair(tokens, coefficients, rows, p, key < count, d, column, inside)
    acc = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    acc_sum = 0.0
    for _ in range(0, CHUNK):
        # The next row is asked for before this one is stored: a store may alias every later load,
        # so the compiler would not move the load up by itself.
        q = p + 1
        next_key = tl.load(keys + q, mask=q < pairs, other=-1)
        wanted = (q < end) & (next_key < count)
        next_v, next_row = _pair(tokens, coefficients, rows, q, wanted, d, column, inside)

        acc += v * row
        acc_sum += v
        began = key != before
        ends = next_key != key
        flush = (p < end) & (key < count) & (ends | (q == end))
        whole = flush & began & ends
        part = flush & ((key == before) | (next_key == key))
        i = key.to(tl.int64)
        slot = 2 * c + began.to(tl.int64)
        tl.store(dW + i * d + column, acc, mask=inside & whole)
        tl.store(sums + i, acc_sum, mask=whole & first_column)
        tl.store(scratch + slot * d + column, acc, mask=inside & part)
        tl.store(scratch_sums + slot, acc_sum, mask=part & first_column)
        acc = tl.where(ends, 0.0, acc)
        acc_sum = tl.where(ends, 0.0, acc_sum)
        p, key, v, row = q, next_key, next_v, next_row


@triton.jit
def _pair(tokens, coefficients, rows, p, wanted, d, column, inside):
    """Coefficient and row [BLOCK] of sorted pair p; zeros, unread, where it is not wanted."""
    v = tl.load(coefficients + p, mask=wanted, other=0.0)
    t = tl.load(tokens + p, mask=wanted, other=0)
    row = tl.load(rows + t * d + column, mask=inside & wanted, other=0.0)
    return v, row.to(tl.float32)


@triton.jit(do_not_specialize=["pairs", "count"])
def _join_kernel(
    dW,
    sums,
    scratch,
    scratch_sums,
    keys,
    pairs,
    count,
    d,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < d
    first_column = tl.program_id(1) == 0
    begin = c * CHUNK
    q = c + 1  # the next chunk that the run might reach
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    key = tl.load(keys + tl.minimum(begin + CHUNK, pairs) - 1)
    reached = tl.load(keys + q * CHUNK, mask=q * CHUNK < pairs, other=-1)
    mine = (key != before) & (reached == key) & (key < count)  # it begins here and goes on
    slot = 2 * c + 1
    acc = tl.load(scratch + slot * d + column, mask=inside & mine, other=0.0)  # [BLOCK]
    acc_sum = tl.load(scratch_sums + slot, mask=mine, other=0.0)
    going = mine
    while going:
        acc += tl.load(scratch + 2 * q * d + column, mask=inside, other=0.0)
        acc_sum += tl.load(scratch_sums + 2 * q)
        q += 1
        going = tl.load(keys + q * CHUNK, mask=q * CHUNK < pairs, other=-1) == key
    i = key.to(tl.int64)
    tl.store(dW + i * d + column, acc, mask=inside & mine)
    tl.store(sums + i, acc_sum, mask=mine & first_column)
