"""What is timed: every op, who takes part, its check, and what it costs at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _checks as checks
from benchmarks import _training as training
from benchmarks._inputs import Inputs, Shape, centred, plain_scores
from benchmarks._timing import NotRun, Run, first_line
from saert.kernels import dispatch
from saert.kernels.decode import gather_dot, sparse_decode
from saert.kernels.encode import encode_threshold, encode_topk
from saert.kernels.refine import refine, refine_reference
from saert.kernels.segments import row_gradient
from saert.kernels.select import topk_rows

Role = Literal["saert", "baseline", "gemm", "select", "peer"]
Check = Callable[[Inputs, Any], None]


@dataclass(frozen=True)
class Contender:
    """One way to do an op, or a part of it.

    Attributes:
        make: inputs -> the call to time; may raise NotRun.
        check: raises CheckRed if what the call returns does not fit the inputs. saert's have one.
        applies: whether it means anything for these inputs.
        compiles: takes part of a minute to build, so not with --quick.
    """

    name: str
    role: Role
    make: Callable[[Inputs], Run]
    check: Check | None = None
    applies: Callable[[Inputs], bool] = lambda i: True
    compiles: bool = False


@dataclass(frozen=True)
class Op:
    """Contenders, saert's own first; cost(shape) in bytes and flop.

    `trains`: needs gradients, and float32 weights. `waits`: no CUDA graph can hold it.
    """

    contenders: Sequence[Contender]
    cost: Callable[[Shape], tuple[float, float]] | None
    trains: bool = False
    waits: bool = False


def saert(act: Callable[[Inputs], object], check: Check, name: str = "saert") -> Contender:
    return Contender(name, "saert", lambda i: lambda: act(i), check)


def baseline(name: str, act: Callable[[Inputs], object], **options: Any) -> Contender:
    return Contender(name, "baseline", lambda i: lambda: act(i), **options)


def compiled(name: str, act: Callable[[Inputs], object]) -> Contender:
    """`act` under torch.compile, for this one shape."""

    def make(i: Inputs) -> Run:
        torch._dynamo.reset()  # or it gives up, silently, after eight shapes
        fast = torch.compile(lambda: act(i), dynamic=False)
        try:
            fast()
        except Exception as error:
            raise NotRun(first_line(error)) from error
        return fast

    return Contender(f"{name}, compiled", "baseline", make, compiles=True)


# -- plain PyTorch ---------------------------------------------------------------------------------


def _topk(i: Inputs) -> tuple[Tensor, Tensor]:
    best = plain_scores(centred(i), i.W_enc, i.b_enc).relu().topk(i.shape.k)
    return best.indices, best.values


def _topk_of_rounded(i: Inputs) -> tuple[Tensor, Tensor]:
    best = F.linear(centred(i), i.W_enc, i.b_enc).relu().topk(i.shape.k)
    return best.indices, best.values


def _threshold_dense(i: Inputs) -> Tensor:
    scores = plain_scores(centred(i), i.W_enc, i.b_enc)
    return torch.where(scores > i.threshold, scores, 0)


def _threshold(i: Inputs) -> tuple[Tensor, Tensor]:
    kept = _threshold_dense(i)
    best = kept.topk(int((kept > 0).sum(-1).max().clamp_min(1)))
    return best.indices, best.values


def _bag_decode(i: Inputs, indices: Tensor, values: Tensor) -> Tensor:
    return training.bag(indices, values.to(i.W_dec.dtype), i.W_dec) + i.b_dec


def _dense_decode(i: Inputs, indices: Tensor, values: Tensor) -> Tensor:
    return training.dense(indices, values.to(i.W_dec.dtype), i.W_dec) + i.b_dec


def _gather_decode(i: Inputs, indices: Tensor, values: Tensor) -> Tensor:
    rows = i.W_dec[indices]  # [T, k, d]
    return (values.to(rows.dtype).unsqueeze(1) @ rows).squeeze(1) + i.b_dec


def _index_add(i: Inputs) -> Tensor:
    pairs = i.values.unsqueeze(-1) * i.g.unsqueeze(1)  # [T, k, d]
    dW = i.g.new_zeros(i.shape.n, i.shape.d)
    return dW.index_add_(0, i.indices.flatten(), pairs.flatten(0, 1))


def _dense_gradient(i: Inputs) -> Tensor:
    code = i.values.new_zeros(len(i.values), i.shape.n).scatter_(1, i.indices, i.values)
    return code.T @ i.g


def _gathered_dots(i: Inputs) -> Tensor:
    return (i.W_dec[i.indices].float() @ i.g.unsqueeze(-1)).squeeze(-1)


def _dense_dots(i: Inputs) -> Tensor:
    return F.linear(i.g.to(i.W_dec.dtype), i.W_dec).gather(1, i.indices)


def _inference(decode: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda i: decode(i, *_topk(i))


def _projected_gradient(i: Inputs) -> Tensor:
    """`refine` by projected gradient on the Gram matrices: what plain PyTorch does best."""
    rows = i.W_dec[i.indices].float()
    gram, linear = rows @ rows.mT, (rows @ i.target.unsqueeze(-1)).squeeze(-1)
    step = 1 / gram.abs().sum(-1).amax(-1, keepdim=True)  # at least λ_max
    norms, scale = rows.norm(dim=-1), i.target.norm(dim=-1, keepdim=True)
    z = i.start
    for _ in range(10_000):
        slope = linear - (gram @ z.unsqueeze(-1)).squeeze(-1)
        y = z * norms / scale
        left = y - (y + slope / norms / scale).clamp_min(0)
        if float(left.abs().max()) <= checks.TOLERANCE:
            break
        z = (z + step * slope).clamp_min(0)
    return z


def _paper_refine(i: Inputs) -> object:
    return refine_reference(i.indices, i.start, i.W_dec, i.target, tol=checks.TOLERANCE)


# -- parts -----------------------------------------------------------------------------------------


def _linear(i: Inputs) -> Run:
    x = centred(i)
    return lambda: F.linear(x, i.W_enc, i.b_enc)


def _linear_float32(i: Inputs) -> Run:
    x = centred(i)
    return lambda: plain_scores(x, i.W_enc, i.b_enc)


def _onednn(i: Inputs) -> Run:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise NotRun("this torch has no oneDNN operator")
    x = centred(i)
    return lambda: dispatch.onednn_linear(x, i.W_enc, i.b_enc)


def _select(select: Callable[[Tensor, int], object]) -> Callable[[Inputs], Run]:
    def make(i: Inputs) -> Run:
        scores = plain_scores(centred(i), i.W_enc, i.b_enc).relu()
        return lambda: select(scores, i.shape.k)

    return make


def _is_half(i: Inputs) -> bool:
    return i.W_enc.dtype != torch.float32


def _on_cpu_in_float32(i: Inputs) -> bool:
    return not i.x.is_cuda and not _is_half(i)


GEMMS = [
    Contender("GEMM alone, F.linear", "gemm", _linear),
    Contender("GEMM alone, oneDNN", "gemm", _onednn, applies=_on_cpu_in_float32),
    Contender("GEMM alone, float32 scores", "gemm", _linear_float32, applies=_is_half),
]
SELECTIONS = [
    Contender("select alone, torch.topk", "select", _select(torch.topk)),
    Contender(
        "select alone, saert", "select", _select(topk_rows),
        applies=lambda i: not i.x.is_cuda,
    ),
]  # fmt: skip


# -- costs: bytes that have to move, products and sums that have to happen -------------------------


def _size(s: Shape) -> int:
    return 4 if s.dtype == "float32" else 2


def _encode_cost(s: Shape) -> tuple[float, float]:
    moved = _size(s) * s.d * (s.n + s.tokens) + 12 * s.tokens * s.k
    return moved, 2.0 * s.tokens * s.n * s.d


def _decode_cost(s: Shape) -> tuple[float, float]:
    moved = s.tokens * s.k * (_size(s) * s.d + 12) + 4 * s.tokens * s.d  # no row is read twice
    return moved, 2.0 * s.tokens * s.k * s.d


def _gradient_cost(s: Shape) -> tuple[float, float]:
    moved = s.tokens * s.k * (4 * s.d + 12) + 4 * s.n * s.d
    return moved, 2.0 * s.tokens * s.k * s.d


def _inference_cost(s: Shape) -> tuple[float, float]:
    return _total(_encode_cost(s), _decode_cost(s))


def _training_cost(s: Shape) -> tuple[float, float]:
    adam = 28.0 * 2 * s.n * s.d, 0.0  # reads w, dw, m, v; writes w, m, v
    gradients = _gradient_cost(s), _gradient_cost(s), _decode_cost(s)  # dW twice, dvalues
    return _total(_inference_cost(s), *gradients, adam)


def _total(*costs: tuple[float, float]) -> tuple[float, float]:
    return sum(moved for moved, _ in costs), sum(flop for _, flop in costs)


# -- the ops ---------------------------------------------------------------------------------------


def _saert_topk(i: Inputs) -> Any:
    return encode_topk(i.x, i.W_enc, i.b_enc, i.shape.k, b_dec=i.b_dec)


def _saert_threshold(i: Inputs) -> Any:
    return encode_threshold(i.x, i.W_enc, i.b_enc, i.threshold, b_dec=i.b_dec)


def _saert_inference(i: Inputs) -> Tensor:
    found = _saert_topk(i)
    return sparse_decode(found.indices, found.values, i.W_dec, i.b_dec)


STEPS = [
    Contender("saert", "saert", training.saert_step, training.check_step),
    Contender(
        "saert, bfloat16 arithmetic", "saert",
        lambda i: training.saert_step(i, torch.bfloat16), training.check_rounded_step,
    ),
    Contender("torch, embedding_bag", "baseline", lambda i: training.torch_step(i, training.bag)),
    Contender("torch, dense", "baseline", lambda i: training.torch_step(i, training.dense)),
    Contender(
        "torch, dense, bfloat16 autocast", "baseline",
        lambda i: training.torch_step(i, training.dense, autocast=True),
    ),
]  # fmt: skip

OPS = {
    "encode_topk": Op(
        [
            saert(_saert_topk, checks.check_topk),
            baseline("torch: linear, relu, topk", _topk),
            compiled("torch: linear, relu, topk", _topk),
            baseline("torch, scores rounded to bfloat16", _topk_of_rounded, applies=_is_half),
            *GEMMS,
            *SELECTIONS,
        ],
        _encode_cost,
    ),
    "encode_threshold": Op(
        [
            saert(_saert_threshold, checks.check_threshold),
            baseline("torch: linear, where, topk", _threshold),
            baseline("torch: linear, where, dense", _threshold_dense),
            compiled("torch: linear, where, dense", _threshold_dense),
            *GEMMS,
        ],
        _encode_cost,
        waits=True,
    ),
    "sparse_decode": Op(
        [
            saert(
                lambda i: sparse_decode(i.indices, i.values, i.W_dec, i.b_dec), checks.check_decode
            ),
            baseline("F.embedding_bag", lambda i: _bag_decode(i, i.indices, i.values)),
            baseline("gather, bmm", lambda i: _gather_decode(i, i.indices, i.values)),
            baseline("dense: scatter, matmul", lambda i: _dense_decode(i, i.indices, i.values)),
        ],
        _decode_cost,
    ),
    "inference": Op(
        [
            saert(_saert_inference, checks.check_inference),
            saert(lambda i: i.sae(i.x), checks.check_inference, "saert.SAE"),
            baseline("torch: topk, embedding_bag", _inference(_bag_decode)),
            compiled("torch: topk, embedding_bag", _inference(_bag_decode)),
            baseline("torch: topk, dense decode", _inference(_dense_decode)),
            baseline("OpenAI style: topk, gather", _inference(_gather_decode)),
            *GEMMS,
        ],
        _inference_cost,
    ),
    "row_gradient": Op(
        [
            saert(
                lambda i: row_gradient(i.indices, i.values, i.g, i.shape.n),
                checks.check_row_gradient,
            ),
            baseline("index_add_ into dense dW", _index_add),
            baseline("dense: scatter, matmul", _dense_gradient),
        ],
        _gradient_cost,
    ),
    "gather_dot": Op(
        [
            saert(lambda i: gather_dot(i.g, i.indices, i.W_dec), checks.check_gather_dot),
            baseline("gather, bmm", _gathered_dots),
            baseline("dense: matmul, gather", _dense_dots),
        ],
        _decode_cost,
    ),
    "training": Op([*STEPS, *GEMMS], _training_cost, trains=True),
    "refine": Op(
        [
            saert(
                lambda i: refine(i.indices, i.start, i.W_dec, i.target, tol=checks.TOLERANCE),
                checks.check_refine,
            ),
            baseline("projected gradient, Gram matrices", _projected_gradient),
            baseline("projected gradient, as in the paper", _paper_refine),
        ],
        None,
        waits=True,
    ),
}
"""Every op by name. `inference` is encode and decode; `training` is a whole step with Adam."""
