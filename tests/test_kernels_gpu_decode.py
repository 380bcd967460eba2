"""The Triton kernels for decoding and its gradients, on a GPU or in Triton's interpreter.

Integers make sums exact, so what goes where is compared to the last bit; random numbers are held
to the error budget, twice plain PyTorch's, both against float64.
"""

import pytest
import torch

from saert.kernels.decode import gather_dot_reference, sparse_decode_reference
from saert.kernels.segments import row_gradient_reference

pytest.importorskip("triton")

from hopper import assert_all_compile  # noqa: E402

from saert.kernels.gpu import decode, segments  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPEATS = 10 if DEVICE == "cuda" else 1
HALF = [torch.bfloat16, torch.float16]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape, device=DEVICE).to(dtype)


def indices_below(num_latents, *shape):
    return torch.randint(num_latents, shape, device=DEVICE)


def assert_within_budget(found, plain, exact):
    """At most twice plain PyTorch's float32 error, plus a few units in the last place."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    error = (found.double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * 2**-24 * exact.abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


# -- decode ----------------------------------------------------------------------------------------

# one slot; k not, and exactly, a multiple of eight; d below, at and above a block of 256
DECODES = [(1, 1, 1), (3, 5, 70), (2, 9, 256), (2, 16, 257), (2, 4, 520)]


@pytest.mark.parametrize("shape", DECODES)
@pytest.mark.parametrize("extras", ["", "bias base"])
def test_decode_stays_within_the_error_budget(shape, extras):
    tokens, k, d = shape
    indices, values, W = indices_below(20, tokens, k), randn(tokens, k), randn(20, d)
    bias = randn(d) if "bias" in extras else None
    base = randn(tokens, d) if "base" in extras else None
    plain = sparse_decode_reference(indices, values, W, bias, base)
    exact = sparse_decode_reference(indices, values, W.double(), bias, base)
    assert_within_budget(decode.sparse_decode(indices, values, W, bias, base), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_decode_of_integers_is_exact(dtype):
    indices, values, W = indices_below(20, 3, 11), integers(3, 11), integers(20, 300, dtype=dtype)
    bias, base = integers(300, dtype=dtype), integers(3, 300, dtype=torch.float64)
    found = decode.sparse_decode(indices, values, W, bias, base)
    assert torch.equal(found, sparse_decode_reference(indices, values, W.float(), bias, base))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_weights_lose_nothing_after_the_load(dtype):
    indices, values, W = indices_below(20, 2, 40), randn(2, 40), randn(20, 60, dtype=dtype)
    bias, base = randn(60, dtype=dtype), randn(2, 60, dtype=dtype)
    exact = sparse_decode_reference(indices, values, W.double(), bias, base)
    plain = sparse_decode_reference(indices, values, W.float(), bias, base)
    assert_within_budget(decode.sparse_decode(indices, values, W, bias, base), plain, exact)
    g = randn(2, 60)
    exact, plain = (gather_dot_reference(g.to(w.dtype), indices, w) for w in (W.double(), W))
    assert_within_budget(decode.gather_dot(g, indices, W), plain, exact)


def test_an_edit_of_nothing_gives_base_back():
    base = randn(3, 70)
    unused = torch.zeros(3, 4, device=DEVICE)
    nothing = decode.sparse_decode(indices_below(9, 3, 4), unused, randn(9, 70), None, base)
    assert torch.equal(nothing, base)
    assert torch.equal(
        decode.sparse_decode(indices_below(9, 3, 0), unused[:, :0], randn(9, 70), None, base), base
    )


def test_an_unused_slot_is_not_looked_up():
    W = randn(9, 70)
    W[0] = torch.nan
    indices, values = torch.tensor([[3, 0, 10**15, 5]], device=DEVICE), randn(1, 4)
    values[0, 1], values[0, 2] = 0.0, -0.0
    expected = sparse_decode_reference(indices[:, ::3], values[:, ::3], W)
    torch.testing.assert_close(decode.sparse_decode(indices, values, W), expected)


@pytest.mark.parametrize("where", ["value", "row"])
def test_a_nan_that_is_used_comes_out(where):
    indices, values, W = torch.tensor([[1], [2]], device=DEVICE), randn(2, 1), randn(4, 40)
    (values if where == "value" else W[1:])[0] = torch.nan
    found = decode.sparse_decode(indices, values, W)
    assert found[0].isnan().all() and not found[1].isnan().any()


def test_views_are_read_as_what_they_show():
    W = integers(40, 300)[::2, 100:180]  # a shard of the columns: row pitch 600
    indices, values = indices_below(20, 7, 3).T, integers(7, 3).T
    bias, base = integers(160)[::2], integers(1, 80).expand(3, 80)
    expected = sparse_decode_reference(indices, values, W, bias, base)
    assert torch.equal(decode.sparse_decode(indices, values, W, bias, base), expected)
    strided = integers(80, 20).T
    expected = sparse_decode_reference(indices, values, strided)
    assert torch.equal(decode.sparse_decode(indices, values, strided), expected)
    g = integers(80, 3).T
    for weights in (W, strided):
        expected = gather_dot_reference(g, indices, weights)
        assert torch.equal(decode.gather_dot(g, indices, weights), expected)


def test_rows_beyond_four_billion_elements_are_found(tmp_path):
    pitch, size = 2**30, 5 * 2**30 + 40
    if DEVICE == "cuda":
        flat = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    else:  # a sparse file: only the pages that are touched exist
        file = tmp_path / "W"
        flat = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
        file.unlink()
    W = flat.as_strided((6, 40), (pitch, 1))
    W.copy_(integers(6, 40))
    indices, values, g = torch.tensor([[5, 3, 1]], device=DEVICE), integers(1, 3), integers(1, 40)
    expected = sparse_decode_reference(indices, values, W)
    assert torch.equal(decode.sparse_decode(indices, values, W), expected)
    assert torch.equal(decode.gather_dot(g, indices, W), gather_dot_reference(g, indices, W))


@pytest.mark.parametrize("shape", DECODES)
def test_gather_dot_stays_within_the_error_budget(shape):
    tokens, k, d = shape
    indices, g, W = indices_below(20, tokens, k), randn(tokens, d), randn(20, d)
    exact = gather_dot_reference(g.double(), indices, W.double())
    found = decode.gather_dot(g, indices, W)
    assert_within_budget(found, gather_dot_reference(g, indices, W), exact)


def test_no_tokens_no_slots_no_columns():
    W, none = randn(9, 40), indices_below(9, 0, 4)
    assert decode.sparse_decode(none, none.float(), W).shape == (0, 40)
    assert decode.gather_dot(randn(0, 40), none, W).shape == (0, 4)
    assert decode.gather_dot(randn(2, 40), none.view(0, 4)[:0].view(2, 0), W).shape == (2, 0)
    some = indices_below(9, 2, 3)
    assert decode.sparse_decode(some, randn(2, 3), W[:, :0]).shape == (2, 0)
    assert decode.gather_dot(randn(2, 0), some, W[:, :0].contiguous()).tolist() == [[0.0] * 3] * 2


# -- row gradient ----------------------------------------------------------------------------------

CHUNK = 8
RUNS = {  # lengths of the runs of equal latents after sorting, in chunks of eight pairs
    "single pair": [1],
    "one latent, less than a chunk": [5],
    "one latent, exactly a chunk": [8],
    "one latent, many chunks": [37],
    "runs end on every edge": [8, 8, 8],
    "a run ends on an edge, the next crosses one": [3, 5, 10, 6],
    "a run begins on an edge and fills chunks": [8, 24, 2],
    "a run ends one past an edge": [4, 5, 3],
    "a run spans chunks between small ones": [1, 2, 1, 29, 1, 1, 3],
    "two long runs meet inside a chunk": [20, 20],
    "two long runs meet on an edge": [16, 16, 1],
    "one pair each": [1] * 17,
}


def pairs_of(runs, gaps=2):
    """k = 1, shuffled tokens: indices [P, 1] where latent gaps · r fires runs[r] times."""
    latents = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs)) * gaps
    shuffled = latents[torch.randperm(len(latents))]
    return shuffled.unsqueeze(-1).to(DEVICE), gaps * len(runs) + 3


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_every_run_is_summed_exactly(runs):
    indices, num_latents = pairs_of(runs)
    coefficients, rows = integers(len(indices), 1), integers(len(indices), 5)
    coefficients[coefficients == 0] = 1.0
    dW, sums = segments.row_gradient(indices, coefficients, rows, num_latents, chunk=CHUNK)
    expected, expected_sums = row_gradient_reference(indices, coefficients, rows, num_latents)
    assert torch.equal(dW, expected) and torch.equal(sums, expected_sums)
    ids, touched, touched_sums = segments.touched_rows(indices, coefficients, rows, chunk=CHUNK)
    assert ids.dtype == torch.int64 and torch.equal(ids, indices.unique())
    assert torch.equal(touched, dW[ids]) and torch.equal(touched_sums, sums[ids])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("d", [1, 40, 515])
def test_row_gradient_of_many_columns(k, d):
    indices, coefficients, rows = indices_below(6, 11, k), integers(11, k), integers(11, d)
    dW, sums = segments.row_gradient(indices, coefficients, rows, 7, chunk=CHUNK)
    expected, expected_sums = row_gradient_reference(indices, coefficients, rows, 7)
    assert torch.equal(dW, expected) and torch.equal(sums, expected_sums)


def test_a_latent_that_fires_at_every_token_stays_within_the_budget():
    tokens, d = 200, 33  # 400 pairs in chunks of 64, half of them of latent 4
    indices = torch.stack([torch.full((tokens,), 4), 5 + torch.arange(tokens) % 90], -1).to(DEVICE)
    coefficients, rows = randn(tokens, 2), randn(tokens, d)
    assert tokens > 3 * segments.SMALL_CHUNK
    found = segments.row_gradient(indices, coefficients, rows, 100)
    plain = row_gradient_reference(indices, coefficients, rows, 100)
    exact = row_gradient_reference(indices, coefficients.double(), rows.double(), 100)
    for three in zip(found, plain, exact, strict=True):
        assert_within_budget(*three)
    assert not found[0][:4].any() and not found[1][:4].any() and not found[0][95:].any()


@pytest.mark.parametrize("number", [0, 3, 20, 48])  # 3 of them lie within the last chunk
def test_unused_pairs_touch_nothing(number):
    indices, coefficients, rows = indices_below(9, 12, 4), integers(12, 4), integers(12, 6)
    coefficients[coefficients == 0] = 1.0
    unused = (torch.randperm(48, device=DEVICE) < number).view(12, 4)
    indices[unused], coefficients[unused] = 0, 0.0  # as a code marks its unused slots
    expected, expected_sums = row_gradient_reference(indices, coefficients, rows, 9)
    silent = (coefficients == 0).all(-1)
    rows[silent] = torch.nan  # nobody may read these
    dW, sums = segments.row_gradient(indices, coefficients, rows, 9, chunk=CHUNK)
    assert torch.equal(dW, expected) and torch.equal(sums, expected_sums)
    ids, touched, touched_sums = segments.touched_rows(indices, coefficients, rows, chunk=CHUNK)
    assert torch.equal(ids, indices[coefficients != 0].unique())
    assert torch.equal(touched, dW[ids]) and torch.equal(touched_sums, sums[ids])


@pytest.mark.parametrize("dtype", HALF)
def test_rows_may_be_half_precision_and_views(dtype):
    indices, coefficients = indices_below(5, 4, 9).T, integers(4, 9).T
    rows = integers(9, 60, dtype=dtype)[:, ::3]
    found = segments.row_gradient(indices, coefficients, rows, 5, chunk=CHUNK)
    expected = row_gradient_reference(indices, coefficients, rows, 5)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_nan_reaches_its_own_latent_only():
    indices, num_latents = pairs_of([9, 9, 9], gaps=1)
    coefficients, rows = integers(27, 1) + 5, integers(27, 4)
    rows[(indices == 1).flatten().nonzero()[3]] = torch.nan
    dW, _ = segments.row_gradient(indices, coefficients, rows, num_latents, chunk=CHUNK)
    assert dW.isnan().any(-1).nonzero().tolist() == [[1]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_pairs(shape):
    indices, rows = indices_below(9, *shape), randn(shape[0], 5)
    dW, sums = segments.row_gradient(indices, indices.float(), rows, 9)
    assert dW.shape == (9, 5) and sums.shape == (9,) and not dW.any() and not sums.any()
    ids, touched, touched_sums = segments.touched_rows(indices, indices.float(), rows)
    assert ids.shape == (0,) and touched.shape == (0, 5) and touched_sums.shape == (0,)


def test_no_columns_still_has_sums():
    indices, coefficients = indices_below(9, 4, 3), integers(4, 3)
    expected = row_gradient_reference(indices, coefficients, randn(4, 1), 9)[1]
    assert torch.equal(segments.row_gradient(indices, coefficients, randn(4, 0), 9)[1], expected)


def test_same_bits_every_time():
    indices, values, W, rows = indices_below(6, 12, 3), randn(12, 3), randn(6, 40), randn(12, 40)

    def once():
        return (
            decode.sparse_decode(indices, values, W),
            decode.gather_dot(rows, indices, W),
            *segments.row_gradient(indices, values, rows, 6, chunk=CHUNK),
        )

    first = once()
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.gpu
def test_row_gradient_does_not_wait_for_the_device():
    indices, coefficients, rows = indices_below(90, 64, 8), randn(64, 8), randn(64, 40)
    segments.row_gradient(indices, coefficients, rows, 90)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments.row_gradient(indices, coefficients, rows, 90)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_realistic_batch_on_the_device():
    tokens, k, d, num_latents = 2048, 32, 768, 4096
    indices = torch.rand(tokens, num_latents, device=DEVICE).topk(k).indices
    indices[:, 0] = 7  # at every token
    values, W, g = randn(tokens, k), randn(num_latents, d), randn(tokens, d)
    exact = sparse_decode_reference(indices, values.double(), W.double())
    plain = sparse_decode_reference(indices, values, W)
    assert_within_budget(decode.sparse_decode(indices, values, W), plain, exact)
    exact = gather_dot_reference(g.double(), indices, W.double())
    assert_within_budget(
        decode.gather_dot(g, indices, W), gather_dot_reference(g, indices, W), exact
    )
    found = segments.row_gradient(indices, values, g, num_latents)
    plain = row_gradient_reference(indices, values, g, num_latents)
    exact = row_gradient_reference(indices, values.double(), g.double(), num_latents)
    for three in zip(found, plain, exact, strict=True):
        assert_within_budget(*three)


# -- the compiler, which the interpreter says nothing about ----------------------------------------


def compilations():
    integer = dict.fromkeys(("d", "pitch", "k", "pairs", "count", "max_steps"), "i32")

    def case(module, kernel, pointers, scalars, constants, num_warps):
        signature = {n: f"*{t}" for n, t in pointers.items()} | {n: integer[n] for n in scalars}
        return [module, kernel, signature, constants, {"num_warps": num_warps}]

    floats = dict.fromkeys(("values", "W_dec", "bias", "base", "out"), "fp32")
    for extras in ({"W_dec": "bf16", "base": "fp64"}, {"W_dec": "fp16"}, {}):
        yield case(
            "decode",
            "_decode_kernel",
            floats | {"indices": "i64"} | extras,
            ["d", "pitch", "k"],
            {"SLOTS": 8, "BLOCK": 256},
            4,
        )
    bare = {"out": "fp32", "indices": "i64", "values": "fp32", "W_dec": "fp32"}
    constants = {"SLOTS": 8, "BLOCK": 32, "bias": None, "base": None, "d": 1, "pitch": 1}
    yield case("decode", "_decode_kernel", bare, ["k"], constants, 4)
    dots = {"out": "fp32", "g": "fp32", "indices": "i64", "W": "bf16"}
    constants = {"SLOTS": 8, "BLOCK": 256}
    yield case("decode", "_gather_dot_kernel", dots, ["d", "pitch", "k"], constants, 4)
    sums = dict.fromkeys(("dW", "sums", "scratch", "scratch_sums", "coefficients"), "fp32")
    pairs = sums | {"keys": "i32", "tokens": "i64", "rows": "bf16"}
    constants = {"CHUNK": 256, "BLOCK": 512}
    scalars = ["pairs", "count", "d"]
    yield case("segments", "_runs_kernel", pairs, scalars, constants, 4)
    joins = {n: t for n, t in pairs.items() if n not in ("coefficients", "tokens", "rows")}
    yield case("segments", "_join_kernel", joins, scalars, constants, 4)
    names = ("solution", "residual", "gram", "linear", "start")
    problem = dict.fromkeys(names, "fp32") | {"steps": "i64"}
    for block, warps in ((32, 1), (1024, 4)):
        entry = case(
            "refine", "_descent_kernel", problem, ["k", "max_steps"], {"BLOCK": block}, warps
        )
        entry[2]["tol"] = "fp32"
        yield entry


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_a_gpu(tmp_path):
    assert_all_compile(compilations(), tmp_path)
