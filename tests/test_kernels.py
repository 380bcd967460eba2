"""The kernels off the GPU: encode, decode and their gradients against plain PyTorch and float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import KINDS, assert_same, assert_threshold, assert_topk, layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from saert.kernels import dispatch, encode_chunks, linear, segments
from saert.kernels import screen as screening_module
from saert.kernels.decode import (
    gather_dot,
    gather_dot_reference,
    sparse_decode,
    sparse_decode_reference,
)
from saert.kernels.encode import (
    encode_threshold,
    encode_threshold_reference,
    encode_topk,
    encode_topk_reference,
)
from saert.kernels.screen import Screen, screen
from saert.kernels.segments import row_gradient, row_gradient_reference
from saert.kernels.select import topk_rows

SHAPES = [(5, 12, 97), (3, 8, 4099), (40, 16, 2048)]  # below and above the group maxima, ragged


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(dispatch, "WORKSPACE", 3 * 4096 * 4)


@pytest.fixture(params=["blas", "onednn"])
def product(request, monkeypatch):
    """Both CPU products, whichever is the faster one here."""
    monkeypatch.setenv("SAERT_CPU_GEMM", request.param)
    monkeypatch.setattr(dispatch, "ONEDNN_LEAST", 0)
    dispatch.prefers_onednn.cache_clear()
    if dispatch.prefers_onednn() != (request.param == "onednn"):
        pytest.skip("this PyTorch has no oneDNN linear operator")
    yield
    dispatch.prefers_onednn.cache_clear()


# -- selection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_holds_the_contract(shape, kind, k, product, small_chunks):
    x, W, b = layer(kind, *shape)
    assert_topk(encode_topk(x, W, b, k), x, W, b, k)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 13, 32])
def test_ties_go_to_the_lowest_latent(shape, k, small_chunks):
    x, W, b = layer("ties", *shape)
    found, expected = encode_topk(x, W, b, k), encode_topk_reference(x, W, b, k)
    values = expected.values
    assert (values[:, 1:] == values[:, :-1]).any() or k == 1  # the case is what it says
    assert_same(found, expected)


def test_every_dtype_of_weights():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for tokens in (2, 30):
            x, W, b = layer("random", tokens, 24, 3000)
            W, b = W.to(dtype), b.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for given in (x, x.to(dtype), x.half()):  # a wider x is not rounded with the weights
                found = encode_topk(given, W, b, 9, b_dec=given[0])
                assert found.values.dtype == wide
                assert_topk(found, given, W, b, 9, b_dec=given[0])
                assert encode_topk(given[:0], W, b, 9).values.dtype == wide


def test_half_weights_are_widened_once_for_many_chunks(small_chunks, monkeypatch):
    x, W, b = layer("random", 30, 24, 3000)
    W, b = W.bfloat16(), b.bfloat16()
    once = encode_topk(x, W, b, 9)
    monkeypatch.setattr(dispatch, "WIDENED", 0)
    assert_topk(encode_topk(x, W, b, 9), x, W, b, 9)
    assert_topk(once, x, W, b, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_selection(kind, small_chunks):
    x, W, b = layer(kind, 9, 12, 4099)
    weight = torch.rand(4099) + 0.1
    found = encode_topk(x, W, b, 20, weight=weight)
    assert_topk(found, x, W, b, 20, weight=weight)
    plain = encode_topk(x, W, b, 20)
    if kind == "random":
        assert not torch.equal(found.indices, plain.indices)


def test_a_latent_of_weight_zero_is_never_selected():
    x, W, b = layer("random", 4, 8, 50)
    weight = torch.ones(50)
    weight[::2] = 0
    found = encode_topk(x, W, b.abs() + 5, 40, weight=weight)
    assert (found.indices[found.values > 0] % 2 == 1).all() and (found.values > 0).sum() == 100
    assert_same(found, encode_topk_reference(x, W, b.abs() + 5, 40, weight=weight))


def test_more_slots_than_latents_or_positives():
    x, W, b = layer("random", 6, 8, 30)
    assert encode_topk(x, W, b, 1000).indices.shape == (6, 30)
    assert_topk(encode_topk(x, W, b, 29), x, W, b, 29)
    few = encode_topk(x, W, b - 1.5, 30)
    assert 0 < (few.values > 0).sum() < few.values.numel()
    assert_topk(few, x, W, b - 1.5, 30)


def test_only_the_given_latents_compete():
    x, W, b = layer("random", 9, 12, 5000)
    latents = torch.arange(2, 5000, 2)
    found = encode_topk(x, W, b, 17, latents=latents)
    assert_topk(found, x, W, b, 17, latents=latents)
    assert_same(found, encode_topk_reference(x, W, b, 17, latents=latents))
    assert encode_topk(x, W, b, 17, latents=latents[:3]).indices.shape == (9, 3)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (2, 3)])
def test_token_dimensions(lead):
    _, W, b = layer("random", 1, 12, 60)
    x, b_dec = torch.randn(*lead, 12), torch.randn(12)
    found = encode_topk(x, W, b, 4, b_dec=b_dec)
    assert found.indices.shape == found.values.shape == (*lead, 4) and found.nan.shape == lead
    expected = encode_topk_reference(x, W, b, 4, b_dec=b_dec)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values)
    some = encode_threshold(x, W, b, 0.3, b_dec=b_dec)
    assert some.indices.shape[:-1] == some.nan.shape == lead


def test_inputs_that_are_not_contiguous():
    x, W, b = layer("random", 8, 24, 4099)
    for a, w in ((x.T.contiguous().T, W), (x, W.T.contiguous().T), (x[::2], W), (x, W[::2])):
        c = b[: len(w)]
        assert_topk(encode_topk(a, w, c, 5), a, w, c, 5)
        assert_threshold(encode_threshold(a, w, c, 0.5), a, w, c, 0.5)


def test_nan_is_flagged_and_infinity_is_not():
    x, W, b = layer("random", 5, 8, 4099)
    x[1, 3], x[3] = torch.nan, torch.inf
    W = W.abs()
    for found in (
        encode_topk(x, W, b, 3),
        encode_topk(x, W, b, 3, weight=torch.ones(4099)),
        encode_threshold(x, W, b, 0.5),
        encode_topk_reference(x, W, b, 3),
        encode_threshold_reference(x, W, b, 0.5),
    ):
        assert found.nan.tolist() == [False, True, False, False, False]
        assert found.values[3, 0] == torch.inf
    one = b.clone()
    one[4000] = torch.nan  # a single NaN score, far from the best
    assert encode_topk(x, W, one, 3).nan.all() and encode_threshold(x, W, one, 0.5).nan.all()


@pytest.mark.parametrize("per_latent", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_thresholds_hold_the_contract(shape, kind, per_latent, product, small_chunks):
    x, W, b = layer(kind, *shape)
    threshold = torch.rand(shape[2]) * 2 - 0.5 if per_latent else 0.75
    assert_threshold(encode_threshold(x, W, b, threshold), x, W, b, threshold)


def test_threshold_comparisons_are_strict_and_ties_ordered(small_chunks):
    x, W, b = layer("ties", 20, 12, 2048)
    for threshold in (0.0, 2.0, -1.0):
        found = encode_threshold(x, W, b, threshold)
        assert_same(found, encode_threshold_reference(x, W, b, threshold))
    weight = torch.randint(0, 3, (2048,)).float()
    found = encode_threshold(x, W, b, 3.0, weight=weight)
    assert_same(found, encode_threshold_reference(x, W, b, 3.0, weight=weight))


def test_a_threshold_nothing_passes_gives_one_empty_slot():
    x, W, b = layer("random", 4, 8, 50)
    found = encode_threshold(x, W, b, 1e9)
    assert found.values.shape == (4, 1) and not found.values.any() and not found.indices.any()


def test_topk_rows_sorts_only_what_is_tied():
    ranks = torch.tensor([[3.0, 1.0, 3.0, 2.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert topk_rows(ranks, 2)[1].tolist() == [[0, 2], [0, 1]]
    assert topk_rows(ranks, 5)[1][0].tolist() == [0, 2, 4, 3, 1]


def test_repeated_calls_agree_to_the_last_bit():
    x, W, b = layer("random", 33, 24, 4099)
    first = encode_topk(x, W, b, 16)
    out = sparse_decode(first.indices, first.values, W)
    dW = row_gradient(first.indices, first.values, x, 4099)
    for _ in range(10):
        again = encode_topk(x, W, b, 16)
        assert_same(again, first)
        assert torch.equal(sparse_decode(again.indices, again.values, W), out)
        for one, other in zip(row_gradient(again.indices, again.values, x, 4099), dW, strict=True):
            assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """The largest storage that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_outgrows_the_workspace(small_chunks):
    x, W, b = layer("random", 64, 16, 4096)
    dense = 64 * 4096 * 4
    inputs = W.numel() * 4
    dispatch.prefers_onednn()  # measures once, on tensors of its own
    for run in (
        lambda: encode_chunks._topk_in_chunks(x, W, b, 8, None),
        lambda: encode_chunks._threshold_in_chunks(x, W, b, torch.tensor(4.0), None),
    ):
        with Largest() as seen:
            run()
        assert seen.bytes <= max(dispatch.WORKSPACE, inputs) < dense
    with Largest() as seen:  # the measure sees a dense tensor where there is one
        encode_topk_reference(x, W, b, 8)
    assert seen.bytes >= dense


# -- screening -------------------------------------------------------------------------------------


@pytest.fixture
def screening(monkeypatch):
    """Screens although this CPU may gain nothing; counts the tokens that are encoded in full."""
    monkeypatch.setattr(dispatch, "screens", lambda W: W.dtype == torch.float32)
    in_full = []
    plain = encode_chunks._topk

    def counting(x, *rest):
        in_full.append(len(x))
        return plain(x, *rest)

    monkeypatch.setattr(encode_chunks, "_topk", counting)
    return in_full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 9, 32])
def test_screening_is_exact(kind, k, screening):
    x, W, b = layer(kind, 40, 64, 4099)
    assert_topk(encode_topk(x, W, b, k, screen=screen(W)), x, W, b, k)


def test_screening_certifies_most_tokens(screening):
    x, W, b = layer("random", 100, 256, 8192)
    encode_topk(x, W, b, 32, screen=screen(W))
    assert sum(screening) <= 5, "tokens without a certificate"


def test_tokens_without_a_certificate_are_encoded_in_full(screening):
    x, W, b = layer("random", 20, 64, 4099)
    W = W[:1] + 1e-4 * W  # all scores within what half precision can tell apart
    assert_topk(encode_topk(x, W, b * 0, 9, screen=screen(W)), x, W, b * 0, 9)
    assert sum(screening) == 20
    x, W, b = layer("ties", 20, 16, 4099)
    assert_same(encode_topk(x, W, b, 9, screen=screen(W)), encode_topk_reference(x, W, b, 9))


def test_screening_flags_nan_and_has_gradients(screening):
    x, W, b = layer("random", 10, 32, 4099)
    x[4, 1] = torch.nan
    found = encode_topk(x, W, b, 5, screen=screen(W))
    assert found.nan.nonzero().tolist() == [[4]]
    W_enc = W.clone().requires_grad_()
    encode_topk(x[:4], W_enc, b, 5, screen=screen(W)).values.sum().backward()
    plain = W.clone().requires_grad_()
    encode_topk_reference(x[:4], plain, b, 5).values.sum().backward()
    torch.testing.assert_close(W_enc.grad, plain.grad)


# -- decode ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "k", "n"), [(0, 4, 50), (1, 1, 50), (7, 4, 500), (9, 30, 60)])
def test_decode_is_as_exact_as_plain_pytorch(tokens, k, n, dtype, small_chunks):
    indices, values = torch.randint(n, (tokens, k)), torch.randn(tokens, k)
    W, bias = torch.randn(n, 12).to(dtype), torch.randn(12).to(dtype)
    base = torch.randn(tokens, 12)
    values = values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = sparse_decode_reference(
        indices, values.double(), W.double(), bias.double(), base.double()
    )
    found = sparse_decode(indices, values, W, bias, base)
    plain = sparse_decode_reference(indices, values, W, bias, base)
    assert found.dtype == plain.dtype == values.dtype
    error, allowed = ((t - exact).abs().max() if tokens else 0 for t in (found, plain))
    assert error <= 2 * allowed + 1e-6
    dots = gather_dot(base.to(values.dtype), indices, W)
    torch.testing.assert_close(
        dots.double(), gather_dot_reference(base.double(), indices, W.double()), atol=1e-5, rtol=0
    )


def test_an_edit_table_is_shared_by_all_tokens():
    W, base = torch.randn(40, 8), torch.randn(2, 3, 8).bfloat16()
    latents, amounts = torch.tensor([3, 3, 9]), torch.randn(2, 3, 3)
    found = sparse_decode(latents, amounts, W, base=base)
    expected = base + amounts @ W[latents]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_wide_codes_are_decoded_by_a_dense_product():
    W = torch.randn(64, 8)
    dense = [(tokens, dispatch.decodes_densely(tokens, 16, W)) for tokens in (1, 16, 70)]
    assert dense == [(1, False), (16, True), (70, True)]
    assert not dispatch.decodes_densely(70, 2, W)
    for dtype in (torch.float32, torch.bfloat16):
        indices, values = torch.randint(64, (70, 32)), torch.randn(70, 32)
        found = sparse_decode(indices, values, W.to(dtype))
        expected = sparse_decode_reference(indices, values, W.to(dtype))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# -- gradients -------------------------------------------------------------------------------------


def double_layer(tokens=5, d_in=6, n=20):
    x, W, b = (t.double().requires_grad_() for t in layer("random", tokens, d_in, n))
    return x, W, b, torch.randn(d_in, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reference", [False, True])
def test_gradcheck_of_the_encoders(reference):
    x, W, b, b_dec = double_layer()
    weight, latents = torch.rand(20).double() + 0.5, torch.arange(1, 20, 3)
    topk = encode_topk_reference if reference else encode_topk
    above = encode_threshold_reference if reference else encode_threshold
    for run in (
        lambda *p: topk(p[0], p[1], p[2], 4, b_dec=p[3]).values,
        lambda *p: topk(p[0], p[1], p[2], 4, b_dec=p[3], weight=weight).values,
        lambda *p: topk(p[0], p[1], p[2], 4, b_dec=p[3], latents=latents).values,
        lambda *p: above(p[0], p[1], p[2], 0.4, b_dec=p[3]).values,
    ):
        assert gradcheck(run, (x, W, b, b_dec))
        fixed = x.detach()  # as in training: b_dec takes the shorter way
        assert gradcheck(lambda *p, run=run, fixed=fixed: run(fixed, *p), (W, b, b_dec))
    assert gradcheck(lambda x: topk(x, W.detach(), None, 3).values, (x,))


@pytest.mark.parametrize("decode", [sparse_decode, sparse_decode_reference])
def test_gradcheck_of_the_decoder(decode):
    x, W, _, bias = double_layer()
    indices, values = torch.randint(20, (5, 2)), torch.randn(5, 2).double().requires_grad_()
    assert gradcheck(lambda v, W, b, x: decode(indices, v, W, b, x), (values, W, bias, x))
    assert gradcheck(lambda v, W: decode(indices[0], v, W), (values, W))
    wide, every = torch.randn(5, 20).double().requires_grad_(), torch.randint(20, (5, 20))
    assert gradcheck(lambda v, W: decode(every, v, W), (wide, W))  # by a dense product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_training_step(dtype):
    """The whole step against autograd through the dense definition."""
    x, W, b = layer("random", 50, 16, 300)
    parameters = [W.to(dtype), b.to(dtype), W.flip(0).to(dtype), torch.randn(16).to(dtype)]

    def step(topk, decode, x):
        W_enc, b_enc, W_dec, b_dec = (
            p.clone().to(x.dtype if x.dtype == torch.float64 else dtype).requires_grad_()
            for p in parameters
        )
        code = topk(x, W_enc, b_enc, 8, b_dec=b_dec)
        (decode(code.indices, code.values, W_dec, b_dec) - x).square().mean().backward()
        return [p.grad for p in (W_enc, b_enc, W_dec, b_dec)]

    found = step(encode_topk, sparse_decode, x)
    plain = step(encode_topk_reference, sparse_decode_reference, x)
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == dtype
        scale = other.abs().max()
        torch.testing.assert_close(
            one / scale, other / scale, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=0
        )


def test_the_row_gradient_is_its_definition():
    indices = torch.randint(30, (200, 6))
    indices[:, 0] = 7  # one latent fires at every token
    coefficients, rows = torch.randn(200, 6), torch.randn(200, 10)
    coefficients[::3] = 0
    found = row_gradient(indices, coefficients, rows, 40)
    plain = row_gradient_reference(indices, coefficients, rows, 40)
    exact = row_gradient_reference(indices, coefficients.double(), rows.double(), 40)
    for one, other, true in zip(found, plain, exact, strict=True):
        assert (one - true).abs().max() <= 2 * (other - true).abs().max() + 1e-6
    assert not found[0][30:].any()


def test_row_sparse_gradients_are_the_dense_ones():
    x, W, b = layer("random", 20, 8, 4000)
    grads = []
    for row_sparse in (False, True):
        W_enc, W_dec = W.clone().requires_grad_(), W.clone().requires_grad_()
        code = encode_topk(x, W_enc, b, 4, row_sparse=row_sparse)
        out = sparse_decode(code.indices, code.values, W_dec, row_sparse=row_sparse)
        (out - x).square().sum().backward()
        grads.append((W_enc.grad, W_dec.grad))
    for dense, sparse in zip(*grads, strict=True):
        assert sparse.layout == torch.sparse_coo
        assert (sparse._indices().diff() > 0).all()  # each row once, ascending
        assert sparse._nnz() == (dense != 0).any(-1).sum()
        assert torch.equal(sparse.to_dense(), dense)
    parameter = torch.nn.Parameter(W.clone())
    optimiser = torch.optim.SparseAdam([parameter], lr=0.1)
    encode_topk(x, parameter, b, 4, row_sparse=True).values.sum().backward()
    optimiser.step()
    changed = (parameter != W).any(-1)
    assert 0 < changed.sum() <= 80


def test_the_auxk_path_trains_the_encoder():
    x, W, b = layer("random", 30, 8, 100)
    dead = torch.arange(60, 100)
    grads = []
    for topk in (encode_topk, encode_topk_reference):
        W_enc = W.clone().requires_grad_()
        code = topk(x, W_enc, b, 6, latents=dead)
        (sparse_decode(code.indices, code.values, W) - x).square().mean().backward()
        grads.append(W_enc.grad)
    assert grads[0][60:].abs().sum() > 0 and not grads[0][:60].any()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


# -- as operators ----------------------------------------------------------------------------------


def run_both(x, W, b, b_dec):
    code = encode_topk(x, W, b, 4, b_dec=b_dec)
    return code.indices, code.values, sparse_decode(code.indices, code.values, W, b_dec, x)


def test_the_operators_are_well_formed():
    x, W, b, b_dec = double_layer()
    ops = torch.ops.saert
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    zero = torch.zeros((), dtype=torch.float64)
    for tokens in (1, 2, 5):
        args = (x[:tokens], W, b, b_dec, None, None, None, None, 4, False)
        opcheck(ops.encode_topk, args, test_utils=checks)
        assert all(t.is_contiguous() for t in ops.encode_topk(*args))  # as the fake one says
    opcheck(ops.encode_threshold, (x, W, b, b_dec, zero, None, False), test_utils=checks)
    code = encode_topk(x, W, b, 4)
    values = code.values.detach().requires_grad_()
    opcheck(ops.sparse_decode, (code.indices, values, W, b_dec, x, False))
    opcheck(ops.gather_dot, (x.detach(), code.indices, W.detach()))
    opcheck(ops.row_gradient, (code.indices, values.detach(), x.detach(), 20))
    opcheck(ops.topk, (x.detach(), 3))


def test_compiled_without_a_break_gradients_included():
    args = [t.detach().float().requires_grad_() for t in double_layer()]
    compiled = torch.compile(run_both, fullgraph=True, backend="aot_eager")
    results = []
    for run in (run_both, compiled):
        for t in args:
            t.grad = None
        indices, values, out = run(*args)
        (out.sum() + values.square().sum()).backward()
        results.append([indices, values.detach(), out.detach(), *(t.grad for t in args)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_exported_and_faked():
    args = tuple(t.detach().float() for t in double_layer())

    class Layer(torch.nn.Module):
        def forward(self, x, W, b, b_dec):
            return run_both(x, W, b, b_dec)

    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(Layer(), args, dynamic_shapes=({0: tokens}, None, None, None))
    more = torch.randn(11, 6)
    for one, other in zip(
        program.module()(more, *args[1:]), run_both(more, *args[1:]), strict=True
    ):
        assert torch.equal(one, other)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in args]
        indices, values, out = run_both(*fakes)
    assert indices.shape == values.shape == (5, 4) and out.shape == (5, 6)


def test_autocast_does_not_reach_the_scores():
    x, W, b = layer("random", 30, 64, 3000)
    plain = encode_topk(x, W, b, 16)
    above = encode_threshold(x, W, b, 1.0)
    out = sparse_decode(plain.indices, plain.values, W, base=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, W).dtype == torch.bfloat16  # it is on
        assert_same(encode_topk(x, W, b, 16), plain)
        assert_same(encode_threshold(x, W, b, 1.0), above)
        assert torch.equal(sparse_decode(plain.indices, plain.values, W, base=x), out)


# -- choices and complaints ------------------------------------------------------------------------


def test_the_product_can_be_fixed(monkeypatch):
    monkeypatch.setenv("SAERT_CPU_GEMM", "fastest")
    dispatch.prefers_onednn.cache_clear()
    with pytest.raises(ValueError, match="SAERT_CPU_GEMM is 'fastest', expected 'onednn', 'blas'"):
        dispatch.prefers_onednn()


def test_a_missing_private_operator_falls_back(monkeypatch):
    def gone(*_):
        raise NotImplementedError("not in this build")

    monkeypatch.delenv("SAERT_CPU_GEMM", raising=False)
    monkeypatch.setattr(dispatch, "onednn_linear", gone)
    dispatch.prefers_onednn.cache_clear()
    assert dispatch.prefers_onednn() is False
    x, W, b = layer("random", 4, 8, 100)
    assert_topk(encode_topk(x, W, b, 3), x, W, b, 3)
    dispatch.prefers_onednn.cache_clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, W, b: encode_topk(x[:, :5], W, b, 3), r"x is \[4, 5\], expected \[4, 8\]"),
        (lambda x, W, b: encode_topk(x, W, b[:7], 3), r"b_enc is \[7\], expected \[50\]"),
        (lambda x, W, b: encode_topk(x, W, b, 3, b_dec=b), r"b_dec is \[50\], expected \[8\]"),
        (lambda x, W, b: encode_topk(x, W, b, 0), "k is 0, expected at least 1"),
        (lambda x, W, b: encode_topk(x, W, b, 3, weight=x[0]), r"weight is \[8\]"),
        (lambda x, W, b: encode_threshold(x, W, b, x[0]), r"threshold is \[8\], expected a number"),
        (
            lambda x, W, b: sparse_decode(torch.zeros(4, 2).long(), x, W),
            r"indices are \[4, 2\] but values are \[4, 8\]",
        ),
        (
            lambda x, W, b: sparse_decode(torch.zeros(4, 8).long(), x, W, b),
            r"bias is \[50\], expected \[8\]",
        ),
    ],
)
def test_shapes_that_contradict_each_other(call, message):
    with pytest.raises(ValueError, match=message):
        call(*layer("random", 4, 8, 50))


# -- what a reviewer broke -------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_strided_bias_is_read_as_it_is(tokens, product):
    x, W, _ = layer("random", tokens, 300, 8192)
    wide = torch.randn(8192, 2)
    found = encode_topk(x, W, wide[:, 0], 8)
    assert_same(found, encode_topk(x, W, wide[:, 0].contiguous(), 8))
    one = torch.ones(1).expand(8192)
    assert_threshold(encode_threshold(x, W, one, 2.0), x, W, one, 2.0)


def test_a_wider_base_keeps_its_digits():
    base = torch.randn(3, 8, dtype=torch.float64)
    latents, amounts, W = torch.tensor([1, 2]), torch.zeros(3, 2), torch.randn(5, 8)
    assert torch.equal(sparse_decode(latents, amounts, W, base=base), base)


def test_forward_mode_is_refused_instead_of_giving_zeros():
    x, W, b = layer("random", 3, 6, 40)
    for run in (
        lambda w: encode_topk(x, w, b, 4).values,
        lambda w: encode_threshold(x, w, b, 0.1).values,
        lambda w: sparse_decode(torch.zeros(3, 2).long(), torch.ones(3, 2), w),
    ):
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            torch.func.jvp(run, (W,), (W,))


def test_vmap_maps_over_codes():
    x, W, b = layer("random", 6, 6, 40)
    mapped = torch.func.vmap(lambda x: encode_topk(x, W, b, 4).values)(x.view(2, 3, 6))
    torch.testing.assert_close(mapped, encode_topk(x.view(2, 3, 6), W, b, 4).values)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.ones(50, dtype=torch.bool), r"torch.bool \[50\].*mask.nonzero\(\).squeeze\(-1\)"),
        (torch.tensor([1, 2], dtype=torch.int32), r"torch.int32 \[2\], expected torch.int64"),
        (torch.tensor([-2, -1]), "ascending, each once, from 0 to 49; found -2 to -1"),
        (torch.tensor([3, 3]), "each once"),
        (torch.tensor([3, 50]), "found 3 to 50"),
    ],
)
def test_latents_that_cannot_be(latents, message):
    x, W, b = layer("random", 4, 8, 50)
    with pytest.raises(ValueError, match=message):
        encode_topk(x, W, b, 3, latents=latents)


@pytest.mark.parametrize("tokens", [0, 2, 9])
def test_no_latent_competes(tokens):
    x, W, b = layer("random", tokens, 8, 50)
    found = encode_topk(x, W, b, 3, latents=torch.zeros(0, dtype=torch.int64))
    assert found.indices.shape == found.values.shape == (tokens, 0) and not found.nan.any()
    assert sparse_decode(found.indices, found.values, W).eq(0).all()


def test_weight_and_latents_together_are_their_definition():
    x, W, b = layer("random", 9, 12, 300)
    weight, latents = torch.rand(300) + 0.1, torch.arange(5, 300, 7)
    found = encode_topk(x, W, b, 6, weight=weight, latents=latents)
    expected = encode_topk_reference(x, W, b, 6, weight=weight, latents=latents)
    assert torch.equal(found.indices, expected.indices)


def test_tensors_on_two_devices_are_refused():
    x, W, b = layer("random", 4, 8, 50)
    with pytest.raises(ValueError, match="x is on cpu, but W_enc on meta"):
        encode_topk(x, W.to("meta"), None, 3)


def test_the_probe_ignores_default_dtype_and_device(monkeypatch):
    monkeypatch.setenv("SAERT_CPU_GEMM", "onednn")
    dispatch.prefers_onednn.cache_clear()
    expected = dispatch.prefers_onednn()
    dispatch.prefers_onednn.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert dispatch.prefers_onednn() == expected
    finally:
        torch.set_default_dtype(torch.float32)
        dispatch.prefers_onednn.cache_clear()


def test_screening_survives_few_latents_tiny_numbers_and_overflow(screening, monkeypatch):
    W = torch.tensor([[-1.0, 0.0]] * 10)
    W[3] = torch.tensor([1.003, -1.0])
    x = torch.ones(1, 2)
    assert_same(encode_topk(x, W, None, 2, screen=screen(W)), encode_topk(x, W, None, 2))
    base = torch.randn(64)
    W = base + 1e-3 * torch.randn(4000, 64)
    x = (base + 0.1 * torch.randn(6, 64)) * 1e-24
    W16, bounds = screen(W)
    for on_gpu in (False, True):  # the GPU's candidates come without the CPU's slack
        if on_gpu:
            monkeypatch.setattr(
                screening_module, "_half_candidates", lambda x, w, b, k: _candidates(x, w, b, k)
            )
        exact = (x.double() @ W.double().T).topk(8).indices.sort().values
        found = encode_topk(x, W, None, 8, screen=Screen(W16, bounds))
        assert torch.equal(found.indices.sort().values, exact)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "screens", lambda W: True)
    W, x = torch.randn(4000, 64), torch.randn(6, 64) * 1e5  # beyond float16
    found = encode_topk(x, W, None, 8, screen=screen(W, torch.float16))
    assert not found.nan.any()
    assert_topk(found, x, W, None, 8)


def _candidates(x, weights, bias, wanted):
    indices, values, _ = encode_chunks._topk_in_chunks(x, weights, bias, wanted, None)
    return indices, values[:, -1]


def test_scores_stay_float32_where_products_need_not(monkeypatch):
    seen = []
    plain = linear._product

    def watching(*args):
        seen.append(torch.get_float32_matmul_precision())
        return plain(*args)

    monkeypatch.setattr(linear, "_product", watching)
    torch.set_float32_matmul_precision("medium")
    try:
        x, W, b = layer("random", 4, 8, 50)
        assert_topk(encode_topk(x, W, b, 3), x, W, b, 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_an_operator_module_can_be_reloaded():
    x, W, b = layer("random", 4, 8, 50)
    before = row_gradient(torch.zeros(4, 1).long(), torch.ones(4, 1), x, 5)[0]
    importlib.reload(segments)
    assert torch.equal(
        segments.row_gradient(torch.zeros(4, 1).long(), torch.ones(4, 1), x, 5)[0], before
    )
