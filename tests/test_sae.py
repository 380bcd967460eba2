"""The SAE against plain float64 formulas (sae_cases), its numerics, its gradients, its errors."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from sae_cases import (
    ACTIVATIONS,
    D_IN,
    KINDS,
    LATENTS,
    TRANSFORMS,
    inputs,
    latents,
    make,
    pre,
    reconstruct,
)
from torch.autograd import gradcheck

from saert.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK
from saert.kernels.decode import sparse_decode, sparse_decode_reference
from saert.sae import SAE
from saert.sparse import SparseCode
from saert.transforms import DatasetScale, LayerNorm

HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALF]


# -- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_encode_decode_forward_are_the_formula(act, transform, kind):
    sae, x = make(act, transform, kind), inputs(2, 3)
    f = latents(sae, x)
    assert 0 < (f != 0).double().mean() < 1
    code = sae.encode(x)
    torch.testing.assert_close(sae.pre_activations(x), pre(sae, x))
    torch.testing.assert_close(code.to_dense(), f)
    torch.testing.assert_close(sae.activations(x), f)
    torch.testing.assert_close(sae.decode(code, x), reconstruct(sae, f, x))
    torch.testing.assert_close(sae(x), reconstruct(sae, f, x))


@pytest.mark.parametrize(
    ("act", "weighted"),
    [
        (act, weighted)
        for act in ACTIVATIONS
        for weighted in (False, True)
        if (act, weighted) != ("gated", True)
    ],
)
def test_chosen_latents_equal_the_dense_columns(act, weighted):
    sae, x = make(act, "layer_norm", select_by_decoder_norm=weighted), inputs(2, 3)
    f = latents(sae, x)
    flat = torch.tensor([4, 0, 23, 4])
    torch.testing.assert_close(sae.activations(x, flat), f[..., flat])
    per_row = torch.tensor([[[4, 1]], [[7, 0]]])
    expected = f.gather(-1, per_row.expand(2, 3, 2))
    torch.testing.assert_close(sae.activations(x, per_row), expected)


def test_layer_norm_is_the_flavour_of_openai_and_saelens():
    # FORMATS section 0: unbiased std, eps on the way in, none on the way out
    x = inputs(5) * 1e-5  # small enough that eps counts
    mean, std = x.mean(-1, keepdim=True), x.std(-1, unbiased=True, keepdim=True)
    t = LayerNorm()(x)
    torch.testing.assert_close(t.x, (x - mean) / (std + 1e-5))
    torch.testing.assert_close(t.restore(t.x), (x - mean) / (std + 1e-5) * std + mean)
    functional = torch.nn.functional.layer_norm(x, x.shape[-1:])
    assert not torch.allclose(t.x, functional, rtol=1e-2)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_difference_of_two_outputs_rescales_without_the_shift(transform):
    sae, x = make(transform=transform), inputs(2, 3)
    a, b = torch.randn(2, 2, 3, D_IN, dtype=torch.float64)
    t = sae.transform(x)
    torch.testing.assert_close(t.restore(a) - t.restore(b), sae.rescale(a - b, x))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transcoder_output_is_never_rescaled(transform):
    sae, x = make(transform=transform, kind="transcoder"), inputs(2, 3)
    difference = torch.randn(2, 3, sae.d_out, dtype=torch.float64)
    assert sae.rescale(difference, x).equal(difference)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_constant_or_zero_token_gives_finite_output_and_gradients(transform):
    sae = make(transform=transform)
    x = torch.zeros(2, D_IN, dtype=torch.float64)
    x[1] = 3.0
    x.requires_grad_()
    y = sae(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("act", ["topk", "relu"])
def test_any_number_of_token_dimensions(act, shape):
    sae = make(act, "unit_norm")
    x = inputs(*shape)
    code = sae.encode(x)
    assert code.shape[:-1] == x.shape[:-1]
    torch.testing.assert_close(sae(x), reconstruct(sae, latents(sae, x), x))


def test_layer_norm_of_no_tokens_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LayerNorm()(torch.zeros(0, D_IN)).x.shape == (0, D_IN)


@pytest.mark.parametrize("value", [-5.0, 0.0, float("nan"), float("inf")])
def test_dataset_scale_is_positive(value):
    with pytest.raises(ValueError, match=f"factor is {value}"):
        DatasetScale(value)


# -- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("given", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["sae", "sae_plain"])
def test_half_precision_weights_are_added_up_in_float32(dtype, given, kind):
    """Products of two half-precision factors if the input is half precision too; otherwise the
    input is taken as it is."""
    sae, x = make(dtype=dtype, kind=kind, d_in=256), inputs(6, d_in=256, dtype=given)
    read = x.float() if not sae.subtract_b_dec else x.float() - sae.b_dec.float()
    read = read if given == torch.float32 else read.to(dtype)
    exact = read.double() @ sae.W_enc.double().T + sae.b_enc.double()
    z, code = sae.pre_activations(x), sae.encode(x)
    assert z.dtype == code.values.dtype == torch.float32
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-4)
    rounded = exact.to(dtype).double()  # what a half-precision linear layer would return
    assert (z - exact).abs().max() < 0.01 * (rounded - exact).abs().max()
    picked = z.gather(-1, code.indices)
    torch.testing.assert_close(code.values, picked.where(code.values > 0, 0))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("chosen", [[3, 1, 0], [[[3, 1]], [[9, 0]]]], ids=["flat", "per row"])
def test_half_precision_scores_of_chosen_latents_are_those_of_all(dtype, chosen):
    sae, x = make(dtype=dtype, d_in=64), inputs(2, 3, d_in=64, dtype=torch.float32)
    index = torch.tensor(chosen)
    some = sae.pre_activations(x, index)
    assert some.dtype == torch.float32
    wide = index if index.dim() > 1 else index.view(1, 1, -1)
    expected = sae.pre_activations(x).gather(-1, wide.expand(2, 3, -1))
    torch.testing.assert_close(some, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_outputs_are_at_least_float32(act, dtype):
    sae, x = make(act, "layer_norm", "sae_skip", dtype=dtype), inputs(2, 3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert sae.dtype == dtype
    assert sae.encode(x).values.dtype == wide
    y = sae(x)
    assert y.dtype == wide
    f = sae.encode(x).to_dense()
    tolerance = 0.03 if dtype in HALF else 1e-5
    torch.testing.assert_close(y.double(), reconstruct(sae, f, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_decoder_accumulates_in_float32(dtype):
    sae = make(dtype=dtype, n=256)
    f = torch.rand(3, 256)
    y = sae.decode(SparseCode.from_dense(f))
    exact = f.double() @ sae.W_dec.double() + sae.b_dec.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("act", ["topk", "jumprelu", "gated"])
def test_autocast_changes_nothing(act, dtype):
    sae, x = make(act, "layer_norm", "sae_skip", dtype=dtype), inputs(2, 9, dtype=torch.float32)
    chosen = torch.tensor([[[4, 1]], [[7, 0]]])
    plain = sae.encode(x), sae(x), sae.activations(x, chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ sae.W_enc.float().T).dtype == torch.bfloat16
        cast = sae.encode(x), sae(x), sae.activations(x, chosen)
    assert cast[0].indices.equal(plain[0].indices)
    assert cast[0].values.equal(plain[0].values)
    assert cast[1].equal(plain[1])
    assert cast[2].equal(plain[2])


# -- gradients -----------------------------------------------------------------------------------


def trainable(act: str, transform: str, kind: str) -> tuple[SAE, torch.Tensor]:
    sae = make(act, transform, kind, d_in=4, n=7)
    return sae.requires_grad_(True), inputs(2, d_in=4).requires_grad_()


@pytest.mark.parametrize(
    ("act", "transform", "kind"),
    [("relu", transform, "sae_skip") for transform in TRANSFORMS]
    + [("relu", "layer_norm", "transcoder_skip"), ("relu", "none", "sae_plain")]
    + [(act, "unit_norm", "sae_skip") for act in ("jumprelu", "topk")]
    + [(act, "none", "transcoder_skip") for act in ("jumprelu", "topk")],
)
def test_gradients_of_forward_are_exact(act, transform, kind):
    sae, x = trainable(act, transform, kind)
    names = [name for name, _ in sae.named_parameters()]

    def forward(x, *parameters):
        return torch.func.functional_call(sae, dict(zip(names, parameters, strict=True)), (x,))

    z = sae.pre_activations(x)
    edge = sae.activation.threshold if act == "jumprelu" else torch.zeros(())
    assert (z - edge).abs().min() > 1e-4  # no kink within reach of the finite differences
    assert gradcheck(forward, (x, *sae.parameters()))
    forward(x, *sae.parameters()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())


def test_gradients_of_sparse_decode_are_exact_and_those_of_the_reference():
    indices = torch.tensor([[0, 3, 3], [5, 0, 1]])
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    W_dec = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v, w: sparse_decode(indices, v, w), (values, W_dec))
    weight = torch.randn(2, 4, dtype=torch.float64)
    grads = [
        torch.autograd.grad((decode(indices, values, W_dec) * weight).sum(), (values, W_dec))
        for decode in (sparse_decode, sparse_decode_reference)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (0,)], ids=str)
def test_sparse_decode_is_its_reference(tokens, dtype):
    indices = torch.randint(9, (*tokens, 4))
    values = torch.randn(*tokens, 4, dtype=torch.float64)
    W_dec = torch.randn(9, 6).to(dtype)
    expected = sparse_decode_reference(indices, values, W_dec.double())
    out = sparse_decode(indices, values, W_dec)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_weights_get_gradients():
    sae = make("topk", dtype=torch.bfloat16).requires_grad_(True)
    x = inputs(4, dtype=torch.float32)
    sae(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in sae.parameters())


def test_from_weights_asks_for_no_gradients():
    assert not any(p.requires_grad for p in make().parameters())


# -- refusals ------------------------------------------------------------------------------------

W = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def with_nan(*shape: int) -> torch.Tensor:
    x = torch.zeros(*shape)
    x.view(-1)[1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(W_enc=W.T), r"\[4, 8\].*\[8, 4\].*W_enc looks transposed"),
        (dict(W_dec=torch.zeros(5, 8)), r"\[8, 4\].*\[5, 8\].*W_dec looks transposed"),
        (dict(W_enc=torch.zeros(8)), r"W_enc is \[8\]"),
        (dict(W_enc=with_nan(8, 4)), r"W_enc contains NaN or inf \(1 of 32"),
        (dict(b_enc=with_nan(8)), "b_enc contains NaN"),
        (dict(b_dec=torch.full((4,), torch.inf)), "b_dec contains NaN or inf"),
        (dict(W_skip=with_nan(4, 4)), "W_skip contains NaN"),
        (dict(W_dec=W.double()), "W_dec is torch.float64, but W_enc is torch.float32"),
        (dict(b_enc=torch.zeros(8).bfloat16()), "b_enc is torch.bfloat16"),
        (dict(W_enc=W.long(), W_dec=W.long()), "torch.int64, expected a floating dtype"),
        (dict(b_enc=torch.zeros(7)), r"b_enc is \[7\], expected \[8\]"),
        (dict(b_dec=torch.zeros(8)), r"b_dec is \[8\], expected \[4\]"),
        (dict(W_skip=torch.zeros(4, 5)), r"W_skip is \[4, 5\], expected \[4, 4\]"),
        (dict(b_enc=torch.zeros(8), activation=Gated(*torch.zeros(3, 8))), "no b_enc"),
        (dict(subtract_b_dec=True), "subtract_b_dec=True, but there is no b_dec"),
        (
            dict(W_dec=torch.zeros(8, 3), b_dec=torch.zeros(3), subtract_b_dec=True),
            "needs d_in == d_out, found 4 and 3",
        ),
        (dict(activation=TopK(9)), "k is 9, but there are only 8"),
        (dict(activation=JumpReLU(torch.zeros(9))), r"threshold has shape \[9\]"),
    ],
)  # fmt: skip
def test_weights_that_contradict_each_other_are_named(arguments, match):
    weights = dict(W_enc=W, W_dec=W, activation=ReLU()) | arguments
    with pytest.raises(ValueError, match=match):
        SAE.from_weights(**weights)


def test_a_linear_layer_s_decoder_weight_is_recognised():
    with pytest.raises(ValueError, match="W_dec looks transposed"):
        SAE.from_weights(W, W.T, torch.zeros(8), torch.zeros(4), activation=ReLU())


def test_gated_selection_by_decoder_norm_is_refused_at_once():
    with pytest.raises(ValueError, match="Gated"):
        SAE.from_weights(W, W, activation=Gated(*torch.zeros(3, 8)), select_by_decoder_norm=True)


def test_transcoders_do_not_subtract_b_dec_unless_told():
    b_dec = torch.ones(4)
    options = dict(b_dec=b_dec, activation=ReLU(), hookpoint="resid_post.0")
    assert SAE.from_weights(W, W, **options).subtract_b_dec
    moved = SAE.from_weights(W, W, **options, target_hookpoint="mlp_out.0")
    assert moved.is_transcoder
    assert not moved.subtract_b_dec


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_asks_for_the_input_only_where_it_is_needed(kind, transform):
    sae, x = make("topk", transform, kind), inputs(2)
    code = sae.encode(x)
    scaled_back = not sae.is_transcoder and transform not in ("none", "dataset_scale")
    if scaled_back or sae.W_skip is not None:
        with pytest.raises(ValueError, match=r"needs the input; call decode\(code, x\)"):
            sae.decode(code)
    else:
        torch.testing.assert_close(sae.decode(code), sae(x))


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match=rf"resid_post.0 reads width {D_IN}.*\[2, {D_IN + 1}\]"):
        make().encode(torch.zeros(2, D_IN + 1))


# -- the decoder norm ----------------------------------------------------------------------------


def doubled_rows(sae: SAE) -> dict[str, torch.Tensor]:
    """A state whose decoder norms rank the latents in another order."""
    state = {name: t.clone() for name, t in sae.state_dict().items()}
    state["W_dec"] *= torch.linspace(0.01, 9, LATENTS, dtype=torch.float64)[:, None]
    return state


@pytest.mark.parametrize("act", ["topk", "jumprelu"])
def test_selection_by_decoder_norm_is_the_formula(act):
    sae, x = make(act, select_by_decoder_norm=True), inputs(9)
    torch.testing.assert_close(sae.encode(x).to_dense(), latents(sae, x))
    plain = make(act, select_by_decoder_norm=False)
    assert not (latents(plain, x) != 0).equal(latents(sae, x) != 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_decoder_norms_follow_a_loaded_state(training, assign):
    sae, x = make("topk", select_by_decoder_norm=True).train(training), inputs(9)
    before = sae.encode(x).to_dense()
    sae.load_state_dict(doubled_rows(sae), assign=assign)
    torch.testing.assert_close(sae.encode(x).to_dense(), latents(sae, x))
    assert not before.equal(latents(sae, x))


def test_decoder_norms_follow_training_and_hold_still_in_evaluation():
    sae, x = make("topk", select_by_decoder_norm=True), inputs(9)
    sae.train()
    sae.W_dec.data.copy_(doubled_rows(sae)["W_dec"])
    torch.testing.assert_close(sae.encode(x).to_dense(), latents(sae, x))
    sae.eval()
    torch.testing.assert_close(sae.encode(x).to_dense(), latents(sae, x))


def test_decoder_norms_stay_float32_when_the_weights_are_halved():
    sae = make("jumprelu", select_by_decoder_norm=True, dtype=torch.float32).to(torch.bfloat16)
    exact = sae.W_dec.double().norm(dim=-1)
    torch.testing.assert_close(sae._selection_weight().double(), exact, rtol=1e-6, atol=0)


# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_state_dict_round_trip_restores_every_number(act):
    weighted = act == "topk"
    sae, x = make(act, "layer_norm", "sae_skip", select_by_decoder_norm=weighted), inputs(3)
    other = make(act, "layer_norm", "sae_skip", select_by_decoder_norm=weighted)
    for tensor in (*other.parameters(), *other.activation.buffers()):
        tensor.data.zero_()
    assert not other(x).equal(sae(x))
    other.load_state_dict(sae.state_dict())
    assert other(x).equal(sae(x))
    assert not any("norm" in name for name in sae.state_dict())


def pickled(sae: SAE) -> SAE:
    return pickle.loads(pickle.dumps(sae))


def torch_saved(sae: SAE) -> SAE:
    file = io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, torch_saved])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_copy_computes_the_same_and_shares_nothing(act, copied):
    sae, x = make(act, "layer_norm", "transcoder_skip", metadata={"a": [1]}), inputs(3)
    other = copied(sae)
    assert other(x).equal(sae(x))
    assert (other.hookpoint, other.target_hookpoint) == (sae.hookpoint, sae.target_hookpoint)
    assert other.metadata == sae.metadata
    before = sae(x)
    other.W_dec.data.zero_()
    other.metadata["a"].append(2)
    assert sae(x).equal(before)
    assert sae.metadata == {"a": [1]}


def test_to_moves_weights_and_thresholds_together():
    sae = make("batchtopk").to(torch.float32)
    assert isinstance(sae.activation, BatchTopK)
    assert sae.activation.threshold.dtype == sae.dtype == torch.float32
    assert sae.to("meta").device.type == "meta"


def test_repr_names_hookpoints_sizes_and_activation():
    text = repr(make("topk", kind="transcoder"))
    assert "resid_post.0 -> mlp_out.0" in text
    assert f"d_in={D_IN}, num_latents={LATENTS}, d_out=7" in text
    assert "TopK(k=5)" in text


def test_nan_is_refused_in_words_for_any_shape():
    sae = SAE.from_weights(torch.randn(20, 6), torch.randn(20, 6), activation=TopK(3))
    x = torch.randn(2, 3, 6)
    x[1, 2, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"scores of 1 of 6 tokens are NaN, first at token \[1, 2\]"
    ):
        sae.encode(x)
    with pytest.raises(ValueError, match="scores of 1 of 1 tokens are NaN; the input"):
        sae.encode(x[1, 2])
    with pytest.raises(ValueError, match=r"reads width 6, but the input is \[\]"):
        sae.encode(torch.tensor(1.0))
    assert sae.encode(torch.zeros(0, 6)).shape == (0, 3)
    assert torch.func.vmap(sae)(x[:1]).shape == (1, 3, 6)
