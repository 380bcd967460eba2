"""The Triton encoders: scores a chunk at a time, selected before the next chunk is computed.

    for a chunk of tokens:  for a chunk of latents:  product -> workspace;  workspace -> selection

The workspace stays in the L2 cache, so a score is written and read there once and dense scores
never exist. Selecting is exact: see `saert.kernels.gpu.select`. What is computed is defined by the
references in `saert.kernels.encode`; these are the launchers, for 2-D tensors already centred.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from saert.kernels.dispatch import WIDENED
from saert.kernels.encode import Encoded
from saert.kernels.gpu.scores import SMALL_TOKENS, large_scores, small_scores
from saert.kernels.gpu.select import Above, TopK
from saert.kernels.numerics import HALF

WORKSPACE_BYTES = 32 << 20  # float32 scores alive at a time; an H200 has 60 MB of L2
CHUNK_TOKENS = 2048  # with 4096 latents 256 tiles of 128 x 256: two full waves of 132 SMs
ALIGN = 16  # rows of the workspace start on 64 bytes, for vector loads and cuBLAS alike


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor | None,
    k: int,
    weight: Tensor | None = None,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Encoded:
    """The k largest positive scores of each token, largest first, lowest latent first among equals.

    Shapes depend on shapes alone and nothing waits for the device: it can be captured in a graph.

    Args:
        x: [T, d], already x − b_dec: in the dtype of W_enc, or float32 with half-precision W_enc,
            which is then widened, a chunk of latents at a time.
        W_enc: float32, bfloat16 or float16 [n, d]; rows may be strided.
        bias: [n], added in float32.
        k: 1 to `select.MAX_K`, and may exceed n: slots without a positive score stay unused.
        weight: float32 [n], not negative; ranks by relu(score) · weight. A value is then that
            rank over the weight: the score but for two roundings of float32.

    Returns:
        `Encoded` with int64 and float32 [T, k] and bool [T].

    Raises:
        TypeError, ValueError: dtypes, shapes or a k that these kernels do not take.
    """
    product = _Product(x, W_enc, bias, weight, workspace_bytes)
    tokens, device = x.shape[0], x.device
    indices = torch.empty(tokens, k, dtype=torch.int64, device=device)
    values = torch.empty(tokens, k, device=device)
    nan = torch.empty(tokens, dtype=torch.int8, device=device)
    with torch.no_grad(), torch.cuda.device_of(x):
        for rows in product.token_chunks():
            chosen = TopK(rows.stop - rows.start, product.width, k, product.weight, device)
            for start, scores in product.scores(rows):
                chosen.add(scores, product.bias, start, W_enc.shape[0])
            chosen.finish(indices[rows], values[rows], nan[rows])
    return Encoded(indices, values, nan.view(torch.bool))


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    weight: Tensor | None = None,
    capacity: int = 256,
    *,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Encoded:
    """Every positive score whose rank, score · weight, is above its threshold; largest score first.

    Waits for the device once a chunk of tokens. A chunk with a row of more than `capacity` entries
    is computed a second time with room for it, and so are those after it the first time.

    Args:
        x, W_enc, bias, weight: as for `encode_topk`.
        threshold: float32 [n] or [1].

    Returns:
        `Encoded` with int64 and float32 [T, width] and bool [T]; width is the count of the widest
        row, at least 1. Values are the scores themselves.
    """
    product = _Product(x, W_enc, bias, weight, workspace_bytes)
    if threshold.dtype != torch.float32 or threshold.shape not in ((1,), (W_enc.shape[0],)):
        found = f"{threshold.dtype} {list(threshold.shape)}"
        raise ValueError(f"threshold is float32 [1] or [{W_enc.shape[0]}], found {found}")
    threshold = threshold.contiguous()

    def attempt(rows: slice, room: int) -> tuple[Above, int]:
        kept = Above(rows.stop - rows.start, product.width, room, threshold, product.weight)
        for start, scores in product.scores(rows):
            kept.add(scores, product.bias, start)
        return kept, int(kept.found.max())

    parts = []
    with torch.no_grad(), torch.cuda.device_of(x):
        for rows in product.token_chunks():
            kept, widest = attempt(rows, capacity)
            if widest > capacity:
                capacity = triton.next_power_of_2(widest)
                kept, widest = attempt(rows, capacity)
            # Entries lie in latent order, and stability keeps that order among equal values.
            order = kept.values[:, :widest].sort(dim=1, descending=True, stable=True)
            indices = kept.indices[:, :widest].gather(1, order.indices)
            parts.append(Encoded(indices, order.values, kept.nan.any(1)))
    return _joined(parts, x.device)


def _joined(parts: list[Encoded], device: torch.device) -> Encoded:
    """Token chunks one below the other, padded to the widest with unused slots."""
    width = max([1, *(part.values.shape[1] for part in parts)])
    none = torch.zeros(0, width, device=device)
    padded = [Encoded(none.long(), none, none.any(1))]
    for part in parts:
        pad = (0, width - part.values.shape[1])
        padded.append(Encoded(F.pad(part.indices, pad), F.pad(part.values, pad), part.nan))
    return Encoded(*(torch.cat(column) for column in zip(*padded, strict=True)))


class _Product:
    """x @ W_enc.T through a workspace that holds one chunk of tokens by one chunk of latents."""

    def __init__(
        self,
        x: Tensor,
        W_enc: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        workspace_bytes: int,
    ):
        _check(x, W_enc, bias, weight)
        self.x, self.W_enc = x.contiguous(), W_enc
        self.bias = None if bias is None else bias.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        tokens, n = x.shape[0], W_enc.shape[0]
        words = workspace_bytes // 4
        # A full chunk of tokens first, as many latents as fit, then more tokens if n was small.
        width = max(1, min(n, words // max(1, min(tokens, CHUNK_TOKENS))))
        if x.dtype != W_enc.dtype and tokens > SMALL_TOKENS:  # large_scores widens so many rows
            width = min(width, max(1, WIDENED // (4 * max(1, x.shape[1]))))
        self.width = width if width == n or width < ALIGN else width // ALIGN * ALIGN
        self.tokens = max(1, min(tokens, words // self.width))
        stride = triton.cdiv(self.width, ALIGN) * ALIGN
        workspace = torch.empty(self.tokens, stride, device=x.device)
        self.workspace = workspace[:, : self.width]

    def token_chunks(self) -> Iterator[slice]:
        for begin in range(0, self.x.shape[0], self.tokens):
            yield slice(begin, min(begin + self.tokens, self.x.shape[0]))

    def scores(self, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """The first latent and the scores, in the workspace, of every chunk: without bias."""
        x = self.x[rows]
        for start in range(0, self.W_enc.shape[0], self.width):
            W_rows = self.W_enc[start : start + self.width]
            out = self.workspace[: x.shape[0], : W_rows.shape[0]]
            if x.shape[0] <= SMALL_TOKENS:
                yield start, small_scores(x, W_rows, None, out)
            else:
                yield start, large_scores(x, W_rows, out)


def _check(x: Tensor, W_enc: Tensor, bias: Tensor | None, weight: Tensor | None) -> None:
    fits = x.dtype in (torch.float32, W_enc.dtype)
    if not fits or W_enc.dtype not in (torch.float32, *HALF):
        wanted = "W_enc is float32, bfloat16 or float16, x the same or float32"
        raise TypeError(f"{wanted}, found {x.dtype} and {W_enc.dtype}")
    if x.dim() != 2 or W_enc.dim() != 2 or x.shape[1] != W_enc.shape[1]:
        raise ValueError(f"x [T, d] and W_enc [n, d], found {list(x.shape)}, {list(W_enc.shape)}")
    if W_enc.shape[1] > 1 and W_enc.stride(1) != 1:
        raise ValueError(f"the rows of W_enc lie in one piece, found strides {W_enc.stride()}")
    for name, vector in (("bias", bias), ("weight", weight)):
        if vector is not None and vector.shape != W_enc.shape[:1]:
            raise ValueError(f"{name} is [{W_enc.shape[0]}], found {list(vector.shape)}")
    if weight is not None and weight.dtype != torch.float32:
        raise TypeError(f"weight is float32, found {weight.dtype}")
