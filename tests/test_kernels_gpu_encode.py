"""The Triton encoders, on a GPU or in Triton's interpreter: scores, selection, and both together.

The selections get their scores directly, so anything can be put in front of them and compared to
the last bit. Blocks, buffers and the workspace are shrunk so that a few hundred latents are many.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import KINDS, assert_same, assert_threshold, assert_topk, layer

from saert.kernels.encode import (
    Encoded,
    encode_threshold_reference,
    encode_topk_reference,
)

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

import interpreter  # noqa: E402, F401
from hopper import assert_all_compile  # noqa: E402

from saert.kernels.gpu import encode, scores, select  # noqa: E402
from saert.kernels.gpu.encode import encode_threshold, encode_topk  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 10 if DEVICE == "cuda" else 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")

# the interpreter computes both sides of a `where`, -inf times 0 among them
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def small(monkeypatch):
    """64 scores a step, 16 survivors a sort: 300 latents take every path of a selection."""
    for name, value in {"BLOCK": 64, "PIECE": 16, "LIMIT": 32, "MERGE_BLOCK": 32}.items():
        monkeypatch.setattr(select, name, value)
    return monkeypatch


@pytest.fixture
def split(small):
    """As `small`, and every row in several segments."""
    small.setattr(select, "SEGMENT_BLOCKS", 1)


def to_device(*tensors):
    return tuple(None if t is None else t.to(DEVICE) for t in tensors)


def cpu(found):
    return Encoded(*(t.cpu() for t in found))


# -- scores ----------------------------------------------------------------------------------------


def assert_within_budget(found, x, W, bias=None):
    """At most twice plain PyTorch's float32 error, both against float64, plus a few units."""
    x, W, found = x.cpu(), W.cpu(), found.cpu()
    bias = torch.zeros(len(W)) if bias is None else bias.cpu()
    exact = x.double() @ W.double().T + bias.double()
    plain = x.float() @ W.float().T + bias.float()
    budget = 2 * (plain - exact).abs().max() + 8 * 2**-24 * exact.abs().max()
    assert found.dtype == torch.float32 and (found - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("n, d", [(1, 1), (17, 16), (70, 300)])
def test_small_scores_stay_within_the_error_budget(tokens, n, d, dtype):
    x, W, bias = torch.randn(tokens, d), torch.randn(n, d), torch.randn(n)
    x, W, bias = x.to(DEVICE, dtype), W.to(DEVICE, dtype), bias.to(DEVICE, dtype)
    for b in (None, bias):
        out = torch.full((tokens, n + 3), 7.0, device=DEVICE)
        scores.small_scores(x, W, b, out[:, :n])
        assert_within_budget(out[:, :n], x, W, b)
        assert (out[:, n:] == 7).all(), "wrote outside of its rows"


@pytest.mark.parametrize("tokens, product", [(1, "small"), (5, "small"), (5, "chunk")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_strided_and_nothing_beside_them_is_touched(tokens, product, dtype):
    def inside(of, rows, columns):  # of a larger tensor that is NaN elsewhere
        around = torch.full((2 * rows + 1, columns + 10), NAN, device=DEVICE, dtype=of)
        part = around[1::2, 3 : 3 + columns]
        part.copy_(torch.randn(rows, columns))
        return around, part

    (_, x), (_, W) = inside(dtype, tokens, 30), inside(dtype, 45, 30)
    around, out = inside(torch.float32, tokens, 45)
    if product == "small":
        scores.small_scores(x, W, None, out)
    else:
        scores.large_scores(x, W, out)
    assert_within_budget(out, x, W)
    out.fill_(NAN)
    assert around.isnan().all(), "wrote outside of its rows"


def test_small_scores_refuses_more_tokens_than_it_is_for():
    x, W = torch.zeros(17, 4, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="at most 16 tokens, found 17"):
        scores.small_scores(x, W, None, torch.zeros(17, 3, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_are_not_rounded_to_the_dtype_of_the_weights(dtype):
    x, W = torch.randn(20, 96, device=DEVICE).to(dtype), torch.randn(33, 96, device=DEVICE)
    out = torch.full((20, 33), NAN, device=DEVICE)
    assert scores.large_scores(x, W.to(dtype), out) is out
    assert_within_budget(out, x, W.to(dtype))


SWITCHES = """
pass
matmul.allow_tf32 = True
torch.set_float32_matmul_precision('high')
torch.set_float32_matmul_precision('medium')
matmul.fp32_precision = 'tf32'
torch.backends.fp32_precision = 'tf32'
matmul.allow_fp16_accumulation = True
"""
SWITCHING = """
import os, sys, torch
from saert.kernels.gpu.scores import _full_precision
matmul = torch.backends.cuda.matmul

def read(owner, name):
    try:
        value = getattr(owner, name)
        return value() if callable(value) else value
    except RuntimeError:
        return "refused"

def state():
    names = ["allow_tf32", "fp32_precision", "allow_fp16_accumulation"]
    names += [f"allow_{half}_reduced_precision_reduction" for half in ("fp16", "bf16")]
    return [read(matmul, name) for name in names] + [
        read(torch, "get_float32_matmul_precision"),
        read(torch.backends.mkldnn.matmul, "fp32_precision"),
    ]

def check():
    before = state()
    for _ in range(2):
        try:
            with _full_precision():
                assert state()[0] is False and state()[1] in ("ieee", "none"), state()
                assert state()[2:5] == [False] * 3, state()
                raise KeyError
        except KeyError:
            pass
        assert state() == before, (before, state())

for switch in sys.stdin.read().split(chr(10)):
    if os.fork() == 0:
        exec(switch)
        check()
        os._exit(0)
    _, status = os.wait()
    assert status == 0, switch
"""


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has one interface to TF32"
)
def test_reduced_precision_is_switched_off_and_back_on():
    """In processes of their own: torch allows one of its two interfaces to TF32 per process."""
    done = subprocess.run(
        [sys.executable, "-c", SWITCHING], input=SWITCHES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -- the k largest ---------------------------------------------------------------------------------


def by_definition(scores, k, weight=None):
    """The references of `saert.kernels.encode`, for given scores instead of given layers."""
    ranks = scores.relu() if weight is None else scores.relu() * weight
    order = ranks.sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - scores.shape[1])
    ranks = torch.nn.functional.pad(order.values[:, :k], (0, missing))
    chosen = torch.nn.functional.pad(order.indices[:, :k], (0, missing))
    values = scores.gather(1, chosen).where(ranks > 0, 0)
    return Encoded(chosen.where(ranks > 0, 0), values, scores.isnan().any(-1))


def top(scores, k, weight=None, bias=None, width=None):
    """`select.TopK` over scores that arrive `width` latents at a time; CPU tensors in and out."""
    scores, weight, bias = to_device(scores, weight, bias)
    tokens, n = scores.shape
    width = width or n
    chosen = select.TopK(tokens, width, k, weight, scores.device)
    for start in range(0, n, width):
        chosen.add(scores[:, start : start + width].contiguous(), bias, start, n)
    indices = torch.empty(tokens, k, dtype=torch.int64, device=DEVICE)
    values = torch.empty(tokens, k, device=DEVICE)
    nan = torch.empty(tokens, dtype=torch.int8, device=DEVICE)
    chosen.finish(indices, values, nan)
    return cpu((indices, values, nan.view(torch.bool)))


def rows_of(kind, n, tokens=3):
    """Rows of scores on which selections go wrong."""
    rows = torch.randn(tokens, n)
    if kind == "ascending":  # every block beats all before it
        rows = rows.sort(-1).values
    elif kind == "descending":
        rows = rows.sort(dim=-1, descending=True).values
    elif kind == "ties":
        rows = torch.randint(-2, 4, (tokens, n)).float()
    elif kind == "constant":
        rows = torch.full((tokens, n), 0.5)
    elif kind == "negative":
        rows = -rows.abs()
    elif kind == "rare":  # fewer positive scores than slots
        rows = torch.where(torch.rand(tokens, n) < 0.01, rows.abs(), -rows.abs())
    elif kind == "clustered":
        rows[:, n // 3 : n // 3 + 40] += 5
    elif kind == "zeros":
        rows = torch.zeros(tokens, n) * torch.tensor([1.0, -1.0] * (n // 2) + [1.0] * (n % 2))
    return rows


ROWS = ["random", "ascending", "descending", "ties", "constant"]
ROWS += ["negative", "rare", "clustered", "zeros"]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("width", [None, 130])
def test_topk_is_the_definition(small, kind, width):
    scores = rows_of(kind, 413)
    assert_same(top(scores, 20, width=width), by_definition(scores, 20))


@pytest.mark.parametrize("kind", ROWS)
def test_topk_of_rows_in_segments_is_the_definition(split, kind):
    scores = rows_of(kind, 413)
    assert select.TopK(3, 413, 20, None, DEVICE).state.shape[1] == 6
    assert_same(top(scores, 20, width=None if kind == "random" else 200), by_definition(scores, 20))


@pytest.mark.parametrize("k", [1, 2, 16, 17, 64, 100, 150])
def test_topk_for_every_size_of_k(small, k):
    scores = rows_of("ties", 120)
    assert_same(top(scores, k), by_definition(scores, k))
    assert_same(top(scores, k, width=50), by_definition(scores, k))


@pytest.mark.parametrize("kind, n, k", [("ties", 3000, 64), ("ascending", 2100, 512)])
def test_topk_with_the_launch_parameters_as_they_are(kind, n, k):
    scores = rows_of(kind, n, tokens=2)
    assert_same(top(scores, k), by_definition(scores, k))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("width", [1, 64])
def test_topk_of_few_latents(small, n, width):
    if width == 1:
        n = min(n, 5)
    scores = rows_of("random", n)
    assert_same(top(scores, 3, width=width), by_definition(scores, 3))


def test_topk_adds_the_bias_and_ranks_by_the_weight(small):
    scores, bias = rows_of("ties", 300), torch.randint(-2, 3, (300,)).float()
    weight = 2.0 ** torch.randint(-3, 4, (300,))  # exact: no rounding in rank / weight
    weight[::7], weight[3::7] = 0, -64  # never selected
    for b, w in ((bias, None), (None, weight), (bias, weight), (bias.bfloat16(), weight)):
        expected = by_definition(scores if b is None else scores + b.float(), 20, w)
        assert_same(top(scores, 20, w, b, width=130), expected)


def test_values_of_a_weighted_topk_are_the_scores_but_for_two_roundings(small):
    scores, weight = rows_of("random", 300), torch.rand(300) + 0.5
    found, expected = top(scores, 20, weight), by_definition(scores, 20, weight)
    assert torch.equal(found.indices, expected.indices)
    assert ((found.values - expected.values).abs() <= 2 * 2**-23 * expected.values).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 70, 399])
def test_topk_of_nan_and_infinity(small, value, place):
    """A NaN sets the flag of its row alone, wherever it is and whatever is larger."""
    scores = rows_of("descending", 400, tokens=2).abs()
    scores[1, place] = value
    weight = torch.ones(400)
    for found in (top(scores, 5), top(scores, 5, weight, width=100)):
        expected = by_definition(scores, 5)
        assert torch.equal(found.nan, expected.nan) and found.nan.tolist() == [
            False,
            value != value,
        ]
        if value == value:
            assert_same(found, expected)
        else:
            assert torch.equal(found.indices[0], expected.indices[0])


def test_topk_sees_a_nan_behind_infinities_and_among_negatives(split):
    scores = torch.full((3, 400), INF)
    scores[1] = -1
    scores[:2, 350] = NAN
    assert top(scores, 3, width=200).nan.tolist() == [True, True, False]
    assert top(scores, 3, torch.ones(400)).nan.tolist() == [True, True, False]
    bias = torch.zeros(400)
    bias[7] = NAN
    assert top(rows_of("negative", 400), 3, bias=bias).nan.all()


@pytest.mark.parametrize("k", [0, select.MAX_K + 1])
def test_topk_refuses_other_k(k):
    with pytest.raises(ValueError, match=f"k is {k}; .* between 1 and {select.MAX_K}"):
        select.TopK(1, 10, k, None, DEVICE)


# -- all above a threshold -------------------------------------------------------------------------


def above(scores, threshold, weight=None, bias=None, width=None, capacity=None):
    """`select.Above`: its buffers, in latent order, and what it counted; CPU tensors."""
    scores, threshold, weight, bias = to_device(scores, threshold, weight, bias)
    tokens, n = scores.shape
    width = width or n
    kept = select.Above(tokens, width, capacity or n, threshold, weight)
    for start in range(0, n, width):
        kept.add(scores[:, start : start + width].contiguous(), bias, start)
    return kept


def assert_above(kept, scores, keep):
    """Of every row the kept latents in order, as many as fit, and nothing else written."""
    assert torch.equal(kept.found.cpu().view(-1), keep.sum(1).int())
    for row in range(len(scores)):
        latents = keep[row].nonzero().view(-1)[: kept.indices.shape[1]]
        count = len(latents)
        assert torch.equal(kept.indices[row, :count].cpu(), latents)
        assert torch.equal(kept.values[row, :count].cpu(), scores[row, latents])
        assert not kept.values[row, count:].any() and not kept.indices[row, count:].any()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("per_latent", [False, True])
def test_above_is_the_definition(small, kind, per_latent):
    scores = rows_of(kind, 300)
    threshold = torch.randint(-1, 2, (300,)).float() if per_latent else torch.tensor([0.4])
    keep = (scores > threshold) & (scores > 0)
    assert_above(above(scores, threshold), scores, keep)
    assert_above(above(scores, threshold, width=130), scores, keep)


@pytest.mark.parametrize("capacity", [1, 37, 500])
def test_above_in_segments_and_past_its_capacity(split, capacity):
    scores = rows_of("ties", 413)
    threshold = torch.tensor([0.0])
    for width in (None, 200):
        kept = above(scores, threshold, width=width, capacity=capacity)
        assert kept.nan.shape[1] > 1
        assert_above(kept, scores, scores > 0)


def test_above_writes_nothing_past_the_capacity_of_the_last_row(small):
    scores = rows_of("constant", 300, tokens=2)
    (scores,) = to_device(scores)
    kept = select.Above(2, 300, 10, torch.zeros(1, device=DEVICE), None)
    room = torch.zeros(400, dtype=torch.int64, device=DEVICE), torch.zeros(400, device=DEVICE)
    kept.indices, kept.values = (buffer[:20].view(2, 10) for buffer in room)
    kept.add(scores, None, 0)
    assert kept.found.tolist() == [[300], [300]]
    assert kept.indices.tolist() == [list(range(10))] * 2
    assert not any(buffer[20:].any() for buffer in room)


def test_above_compares_score_times_weight_and_adds_the_bias(small):
    scores, bias = rows_of("ties", 300), torch.randint(-2, 3, (300,)).float()
    weight = torch.randint(0, 3, (300,)).float()
    keep = ((scores + bias) * weight > 2) & (scores + bias > 0)
    kept = above(scores, torch.tensor([2.0]), weight, bias, width=130)
    assert_above(kept, scores + bias, keep)
    kept = above(scores, torch.tensor([-5.0]), weight, bias.half())
    assert_above(kept, scores + bias, scores + bias > 0)


@pytest.mark.parametrize("segments", [False, True])
def test_above_flags_nan_and_keeps_infinity(small, segments):
    if segments:
        small.setattr(select, "SEGMENT_BLOCKS", 1)
    scores = rows_of("negative", 300)
    scores[0, 250], scores[1, 299], scores[2, 0] = NAN, INF, -INF
    kept = above(scores, torch.tensor([1e30]), width=200)
    assert kept.nan.any(1).tolist() == [True, False, False]
    assert kept.found.view(-1).tolist() == [0, 1, 0] and kept.indices[1, 0] == 299
    assert kept.values[1, 0] == INF


# -- both together ---------------------------------------------------------------------------------


# Every kind of layer for a few tokens; one token, and more than the small kernels take, for some.
CASES = [(kind, 3) for kind in KINDS]
CASES += [("random", 1), ("ties", 1), ("ties", 17)]


@pytest.fixture(params=["at once", "in chunks"])
def workspace(request, small):
    """In one chunk, or with 230 scores at a time: chunks of latents, and of tokens if over 13."""
    small.setattr(encode, "CHUNK_TOKENS", 13)
    return {"workspace_bytes": 4 * 230 if request.param == "in chunks" else encode.WORKSPACE_BYTES}


@pytest.mark.parametrize("kind, tokens", CASES)
def test_encode_topk_keeps_the_contract(workspace, kind, tokens):
    layers = layer(kind, tokens, 24, 150)
    found = cpu(encode_topk(*to_device(*layers), 9, **workspace))
    assert_topk(found, *layers, 9)
    if kind == "ties":
        assert_same(found, encode_topk_reference(*layers, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("rounded", [False, True])
def test_encode_topk_multiplies_half_with_half_and_float32_as_it_is(small, dtype, tokens, rounded):
    x, W, b = layer("random", tokens, 40, 70)
    x = x.to(dtype) if rounded else x
    found = cpu(encode_topk(*to_device(x, W.to(dtype), b), 5))
    assert_topk(found, x, W.to(dtype), b, 5)


def test_the_workspace_bounds_the_chunks(monkeypatch):
    x, W = torch.zeros(50, 4, device=DEVICE), torch.zeros(1000, 4, device=DEVICE)

    def plan(tokens, n, bytes_):
        product = encode._Product(x[:tokens], W[:n], None, None, bytes_)
        return product.tokens, product.width

    assert plan(50, 1000, 1 << 20) == (50, 1000)
    assert plan(50, 1000, 50 * 100 * 4) == (50, 96)  # a multiple of 16
    assert plan(50, 1000, 40) == (10, 1)  # one latent of ten tokens
    assert plan(0, 1000, 1 << 20)[1] == 1000
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 20)
    assert plan(50, 1000, 20 * 100 * 4) == (20, 96)
    assert plan(50, 50, 20 * 100 * 4) == (40, 50)  # fewer latents than fit: more tokens


@pytest.mark.parametrize("weighted", [False, True])
def test_encode_topk_by_weight_without_bias(small, weighted):
    x, W, _ = layer("random", 4, 24, 301)
    weight = torch.rand(301) + 0.5 if weighted else None
    found = cpu(encode_topk(*to_device(x, W, None), 9, *to_device(weight)))
    assert_topk(found, x, W, None, 9, weight=weight)


@pytest.mark.parametrize("kind, tokens", CASES)
@pytest.mark.parametrize("per_latent", [False, True])
def test_encode_threshold_keeps_the_contract(workspace, kind, tokens, per_latent):
    layers = layer(kind, tokens, 24, 150)
    level = torch.rand(150) if per_latent else torch.tensor([0.5])
    found = cpu(encode_threshold(*to_device(*layers, level), **workspace))
    assert_threshold(found, *layers, level)
    if kind == "ties":
        assert_same(found, encode_threshold_reference(*layers, level))


@pytest.mark.parametrize("capacity, tokens", [(1, 2), (8, 12)])
def test_an_overflowing_row_is_encoded_again(small, capacity, tokens):
    """Nothing is dropped, whichever chunk of tokens overflows; later chunks keep the room."""
    x, W, b = layer("ties", tokens, 24, 150)
    rooms, above = [], encode.Above
    small.setattr(encode, "Above", lambda *a: rooms.append(a[2]) or above(*a))
    small.setattr(encode, "CHUNK_TOKENS", 10)
    found = encode_threshold(
        *to_device(x, W, b, torch.tensor([1.0])),
        capacity=capacity,
        workspace_bytes=4 * 150 * 10,
    )
    assert_same(cpu(found), encode_threshold_reference(x, W, b, 1.0))
    assert rooms[0] == capacity < rooms[1], "the first chunk overflowed, and was encoded again"
    assert rooms[2:3] == rooms[1:2] * (tokens > 10), "the second had as much room from the start"


@pytest.mark.parametrize("missing", [0, 1])
def test_a_row_overflows_from_one_entry_too_many(small, missing):
    x, W, b = layer("ties", 2, 24, 90)
    expected = encode_threshold_reference(x, W, b, 1.0)
    rooms, above = [], encode.Above
    small.setattr(encode, "Above", lambda *a: rooms.append(a[2]) or above(*a))
    capacity = expected.values.shape[1] - missing
    found = encode_threshold(*to_device(x, W, b, torch.tensor([1.0])), capacity=capacity)
    assert_same(cpu(found), expected)
    assert len(rooms) == 1 + missing


def test_encode_threshold_by_weight(small):
    x, W, b = layer("random", 4, 24, 301)
    weight, level = torch.rand(301) + 0.5, torch.tensor([0.7])
    found = cpu(encode_threshold(*to_device(x, W, b, level, weight)))
    assert_threshold(found, x, W, b, level, weight=weight)


@pytest.mark.parametrize("tokens, n", [(0, 30), (3, 0), (0, 0)])
def test_nothing_to_encode(tokens, n):
    x, W, level = torch.randn(tokens, 8), torch.randn(n, 8), torch.tensor([0.0])
    found = encode_topk(*to_device(x, W, None), 4)
    assert found.indices.shape == found.values.shape == (tokens, 4)
    assert not found.values.any() and not found.indices.any()
    assert found.nan.shape == (tokens,) and not found.nan.any()
    found = encode_threshold(*to_device(x, W, None, level))
    assert found.indices.shape == found.values.shape == (tokens, 1)
    assert found.indices.dtype == torch.int64 and found.nan.dtype == torch.bool
    assert not found.values.any() and not found.nan.any()


@pytest.mark.parametrize("tokens", [3, 17])
def test_a_token_with_nan_is_flagged(small, tokens):
    x, W, b = layer("random", tokens, 24, 70)
    x[1, 5] = NAN
    expected = [t == 1 for t in range(tokens)]
    assert encode_topk(*to_device(x, W, b), 4).nan.tolist() == expected
    level = torch.tensor([0.1])
    assert encode_threshold(*to_device(x, W, b, level)).nan.tolist() == expected


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_same_bits_every_time(split, tokens):
    layers = to_device(*layer("random", tokens, 24, 70 if tokens > 16 else 150))
    (level,) = to_device(torch.tensor([0.3]))

    def once():
        return *encode_topk(*layers, 9), *encode_threshold(*layers, level)

    first = once()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_parameters_and_autocast_change_nothing(small):
    x, W, b = to_device(*layer("ties", 17, 24, 70))
    expected = encode_topk(x, W, b, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = encode_topk(x, torch.nn.Parameter(W), torch.nn.Parameter(b), 4)
    assert not found.values.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "found torch.float64"),
        ({"W_enc": torch.zeros(9, 8, dtype=torch.float64)}, TypeError, "and torch.float64"),
        ({"W_enc": torch.zeros(9, 7)}, ValueError, r"found \[2, 8\], \[9, 7\]"),
        ({"W_enc": torch.zeros(8, 9).T}, ValueError, "in one piece, found strides"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias is \[9\], found \[8\]"),
        ({"weight": torch.zeros(1)}, ValueError, r"weight is \[9\], found \[1\]"),
        ({"weight": torch.zeros(9).half()}, TypeError, "found torch.float16"),
    ],
)
def test_refusals_say_what_was_found(changed, error, message):
    given = {"x": torch.zeros(2, 8), "W_enc": torch.zeros(9, 8), "bias": None, "weight": None}
    given = {n: t if t is None else t.to(DEVICE) for n, t in (given | changed).items()}
    with pytest.raises(error, match=message):
        encode_topk(**given, k=3)
    with pytest.raises(error, match=message):
        encode_threshold(**given, threshold=torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("level", [torch.zeros(2), torch.zeros(()), torch.zeros(1).double()])
def test_a_threshold_is_one_number_or_one_per_latent(level):
    x, W, level = to_device(torch.zeros(2, 8), torch.zeros(9, 8), level)
    with pytest.raises(ValueError, match=r"threshold is float32 \[1\] or \[9\], found"):
        encode_threshold(x, W, None, level)


# -- what only a device shows ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_topk_replays_as_a_graph(tokens, dtype):
    x = torch.randint(-2, 3, (tokens, 256), device=DEVICE).float()
    W = torch.randint(-2, 3, (20_000, 256), device=DEVICE).to(dtype)
    encode_topk(x, W, None, 32)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = encode_topk(x, W, None, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x.copy_(torch.randint(-2, 3, x.shape, device=DEVICE))
    graph.replay()
    assert_same(found, encode_topk_reference(x, W, None, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 64, 2048])
@pytest.mark.parametrize("tokens, n", [(1, 131_072), (16, 40_005), (700, 131_072), (5000, 9000)])
def test_topk_at_size_is_exact_on_the_device(tokens, n, k):
    x = torch.randint(-2, 3, (tokens, 64), device=DEVICE).float()
    W = torch.randint(-2, 3, (n, 64), device=DEVICE).bfloat16()
    b = torch.randint(-2, 3, (n,), device=DEVICE).float()
    found, expected = encode_topk(x, W, b, k), encode_topk_reference(x, W, b, k)
    assert_same(found, expected)
    for _ in range(REPEATS):
        assert all(torch.equal(u, v) for u, v in zip(found, encode_topk(x, W, b, k), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, n", [(1, 131_072), (16, 40_005), (700, 131_072)])
def test_threshold_at_size_is_exact_on_the_device(tokens, n):
    x = torch.randint(-2, 3, (tokens, 64), device=DEVICE).float()
    W = torch.randint(-2, 3, (n, 64), device=DEVICE).bfloat16()
    (level,) = to_device(torch.tensor([30.0]))
    assert_same(encode_threshold(x, W, None, level), encode_threshold_reference(x, W, None, 30.0))


def compilations():
    def case(module, kernel, types, constants, **options):
        # "bf16*: x w" is a pointer to bfloat16 twice, "i32: n d" are two integers
        signature = {}
        for group in types.split(","):
            kind, names = group.split(":")
            kind = "*" + kind.strip()[:-1] if "*" in kind else kind.strip()
            signature |= dict.fromkeys(names.split(), kind)
        return [module, kernel, signature, constants, {"num_warps": 4} | options]

    for dtype, block in (("bf16", scores.FEW_D_HALF), ("fp32", scores.FEW_D_FLOAT)):
        tile = {"BLOCK_N": scores.ONE_LATENTS, "BLOCK_D": scores.ONE_D}
        types = f"{dtype}*: x w bias, fp32*: out, i32: n d w_stride"
        yield case("scores", "_one_token", types, {"HAS_BIAS": True} | tile)
        tile = {"BLOCK_T": 16, "BLOCK_N": scores.FEW_LATENTS, "BLOCK_D": block, "WIDEN": False}
        types = f"{dtype}*: x w, fp32*: out, i32: tokens n d x_stride w_stride out_stride"
        yield case("scores", "_few_tokens", types, tile | {"HAS_BIAS": False, "bias": None})
    flags = {"HAS_BIAS": True, "HAS_WEIGHT": True}
    types = "fp32*: scores bias weight, i64*: state buffers, i32: start width n span stride"
    sizes = {"K": 64, "PIECE": 128, "LIMIT": 128, "BLOCK": select.BLOCK}
    yield case("select", "_topk_chunk", types, flags | sizes, maxnreg=select.REGISTERS)
    types = "fp32*: weight values, i64*: state indices, i8*: nan, i32: segments k"
    sizes = {"K": 16, "SEGMENTS": 32, "BLOCK": 512, "HAS_WEIGHT": True}
    yield case("select", "_topk_finish", types, sizes)
    for write in (True, False):
        types = "fp32*: scores bias weight threshold values, i32*: cursor after, i8*: nan,"
        types += "i64*: indices, i32: start width span stride capacity"
        sizes = {"PER_LATENT": True, "WRITE": write, "BLOCK": select.BLOCK}
        yield case("select", "_above_chunk", types, flags | sizes)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_a_gpu(tmp_path):
    assert_all_compile(compilations(), tmp_path)
