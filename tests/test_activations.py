"""Every activation against its formula in float64, dense, sparse and at chosen latents."""

import copy

import pytest
import sae_cases
import torch
from sae_cases import K, activate, activation, inputs, make
from tiny_models import tiny

from saert import ablate, attach
from saert.activations import AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from saert.measure.features.build import feature_index
from saert.measure.reports.reconstruction import Reconstruction
from saert.pursuit import MatchingPursuit
from saert.sae import SAE

N = 24
ACTIVATIONS = [*sae_cases.ACTIVATIONS, *sae_cases.RANKED]
WEIGHTED = [name for name in ACTIVATIONS if name != "gated"]
PER_LATENT = [name for name in ACTIVATIONS if name not in ("topk", *sae_cases.RANKED)]


def pre(*tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*tokens, N, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_dense_and_sparse_forms_are_the_formula(name, shape):
    act, z = activation(name, N), pre(*shape)
    expected = activate(act, z)
    assert (expected != 0).any()
    assert (expected == 0).any()
    torch.testing.assert_close(act(z), expected)
    torch.testing.assert_close(act.encode(z).to_dense(), expected)


@pytest.mark.parametrize("name", WEIGHTED)
def test_decoder_norms_choose_the_latents_but_do_not_scale_them(name):
    act, z = activation(name, N), pre(40)
    weight = torch.rand(N, dtype=torch.float64) * 3 + 0.1
    expected = activate(act, z, weight)
    torch.testing.assert_close(act(z, weight), expected)
    torch.testing.assert_close(act.encode(z, weight).to_dense(), expected)
    if name != "relu":  # where every positive passes, nothing is selected
        assert not ((expected != 0) == (activate(act, z) != 0)).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", PER_LATENT)
def test_chosen_latents_are_columns_of_the_dense_form(name, weighted):
    if weighted and name == "gated":
        with pytest.raises(ValueError, match="Gated"):
            activation(name, N)(pre(2), torch.ones(N))
        return
    act, z = activation(name, N), pre(2, 3)
    weight = torch.rand(N, dtype=torch.float64) * 3 if weighted else None
    dense = act(z, weight)
    flat = torch.tensor([5, 0, 23, 5])
    some = None if weight is None else weight[flat]
    torch.testing.assert_close(act.at(z[..., flat], flat, some), dense[..., flat])
    per_row = torch.tensor([[[5, 1]], [[9, 0]]])  # [batch, 1, E]
    some = None if weight is None else weight[per_row]
    at = act.at(z.gather(-1, per_row.expand(2, 3, 2)), per_row, some)
    torch.testing.assert_close(at, dense.gather(-1, per_row.expand(2, 3, 2)))


@pytest.mark.parametrize("act", [TopK(2), AbsTopK(2), GroupMax(2), MatchingPursuit()])
def test_what_compares_latents_cannot_answer_for_chosen_ones(act):
    with pytest.raises(NotImplementedError, match=type(act).__name__):
        act.at(pre(1)[..., :2], torch.tensor([0, 1]))
    assert not act.per_latent


def test_the_others_can():
    assert all(kind.per_latent for kind in (ReLU, JumpReLU, BatchTopK, Gated))


@pytest.mark.parametrize("weight", [None, torch.ones(N, dtype=torch.float64)], ids=["", "weighted"])
@pytest.mark.parametrize("positives", [0, 1, K - 1, K, K + 1])
def test_topk_keeps_positives_only_and_k_at_most(positives, weight):
    z = -pre(1).abs() - 0.1
    z[0, :positives] = torch.arange(1.0, positives + 1, dtype=z.dtype)
    code = TopK(K).encode(z, weight)
    assert code.k == K
    assert code.l0().item() == min(positives, K)
    assert (code.values >= 0).all()
    expected = torch.zeros(N, dtype=z.dtype)
    first = max(0, positives - K)
    expected[first:positives] = z[0, first:positives]
    assert code.to_dense()[0].equal(expected)


def test_topk_code_is_k_wide_for_every_input():
    assert TopK(3).encode(pre(4) - 100).k == 3


def test_variable_width_code_is_as_wide_as_its_widest_token():
    z = torch.full((3, N), -1.0)
    z[1, :4] = 1.0
    assert ReLU().encode(z).k == 4


@pytest.mark.parametrize("threshold", [0.5, torch.full((N,), 0.5)], ids=["number", "per latent"])
def test_jumprelu_is_strictly_above_its_threshold(threshold):
    z = torch.full((1, N), 0.5)
    z[0, 0] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    f = JumpReLU(threshold)(z)
    assert f[0, 0] == z[0, 0]  # not shifted by the threshold
    assert (f[0, 1:] == 0).all()


def test_jumprelu_with_a_negative_threshold_still_refuses_negative_scores():
    f = JumpReLU(-1.0)(torch.tensor([[-0.5, 0.0, 0.25]]))
    assert f.tolist() == [[0.0, 0.0, 0.25]]


def test_jumprelu_thresholds_belong_to_their_latents():
    z = torch.ones(1, 3)
    assert JumpReLU(torch.tensor([0.5, 1.5, 0.9]))(z).tolist() == [[1.0, 0.0, 1.0]]


def test_batchtopk_that_was_never_estimated_passes_every_positive():
    z = pre(5)
    torch.testing.assert_close(BatchTopK(-1.0)(z), z.clamp(min=0))


def test_gated_magnitude_is_an_encoder_with_rescaled_rows():
    # FORMATS section 2: W_mag = W_enc · exp(r_mag), its own bias, opened by the gate
    W = torch.randn(N, 6, dtype=torch.float64)
    x = torch.randn(9, 6, dtype=torch.float64)
    b_gate, b_mag, r_mag = torch.randn(3, N, dtype=torch.float64) * 0.5
    W_mag = W * r_mag.exp()[:, None]
    expected = (x @ W.T + b_gate > 0).double() * (x @ W_mag.T + b_mag).clamp(min=0)
    torch.testing.assert_close(Gated(b_gate, b_mag, r_mag)(x @ W.T), expected)


def test_gate_is_strict_and_closed_gates_silence_large_magnitudes():
    gated = Gated(torch.tensor([0.0, -1.0]), torch.tensor([5.0, 5.0]), torch.zeros(2))
    assert gated(torch.tensor([[0.0, 0.5]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_keep_the_dtype_of_the_scores(name):
    assert activation(name, N, torch.float32)(pre(2, dtype=torch.float32)).dtype == torch.float32
    assert activation(name, N, torch.bfloat16)(pre(2, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_accept_their_own_dictionary(name):
    activation(name, N).check(N)


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (JumpReLU(torch.zeros(N + 1)), rf"threshold has shape \[{N + 1}\], expected \[{N}\]"),
        (Gated(*torch.zeros(3, N - 1)), rf"b_gate has shape \[{N - 1}\]"),
        (Gated(torch.zeros(N), torch.full((N,), torch.nan), torch.zeros(N)), "b_mag contains NaN"),
        (TopK(N + 1), f"TopK: k is {N + 1}, but there are only {N}"),
        (AbsTopK(N + 1), f"AbsTopK: k is {N + 1}, but there are only {N}"),
        (GroupMax(5), f"GroupMax: {N} latents do not divide into k = 5"),
    ],
    ids=["threshold", "gate", "NaN", "k", "abs k", "groups"],
)
def test_parameters_that_do_not_fit_the_dictionary_are_named(act, match):
    with pytest.raises(ValueError, match=match):
        act.check(N)


def test_gated_parameters_are_one_per_latent():
    with pytest.raises(ValueError, match="b_gate"):
        Gated(*torch.zeros(3)).check(N)


@pytest.mark.parametrize("kind", [TopK, AbsTopK, GroupMax])
@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None, True])
def test_k_is_a_positive_integer(kind, k):
    with pytest.raises(ValueError, match=f"{kind.__name__}: k is"):
        kind(k)


def test_abstopk_keeps_signs_and_ranks_by_magnitude():
    code = AbsTopK(3).encode(torch.tensor([[0.5, -2.0, 0.0, 1.0, -0.1], [0.0] * 5]))
    assert code.values.tolist() == [[-2.0, 1.0, 0.5], [0.0] * 3]
    assert code.indices.tolist() == [[1, 3, 0], [0] * 3]
    assert code.l0().tolist() == [3, 0]


def test_groupmax_takes_the_first_of_the_best_positive_of_each_group():
    z = torch.tensor([[1.0, 3.0, 3.0, -1.0, -2.0, -3.0, 0.5, 0.0, 5.0]])
    code = GroupMax(3).encode(z)
    assert code.values.tolist() == [[5.0, 3.0, 0.0]]
    assert code.indices.tolist() == [[8, 1, 0]]
    assert GroupMax(N).encode(-pre(2).abs()).l0().tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", sae_cases.RANKED)
def test_saes_of_ranked_activations_encode_like_the_formula(act, dtype):
    """Through the chunked path, with b_dec, tokens of several dimensions, and no tokens at all."""
    sae = make(act, "layer_norm", dtype=dtype)
    x = inputs(3, 50, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    expected = sae_cases.latents(sae, x)
    found = sae.encode(x).to_dense()
    assert ((found != 0) == (expected != 0)).all(-1).float().mean() > 0.99  # ties in bfloat16
    same = ((found != 0) == (expected != 0)).all(-1)
    torch.testing.assert_close(found[same], expected[same].to(found.dtype), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sae(x).double(), sae_cases.reconstruct(sae, found, x), atol=1e-3, rtol=1e-3
    )
    assert sae.encode(x[:, :0]).shape == (3, 0, sae.activation.k)
    assert sae.activations(x, torch.tensor([3, 0])).equal(found[..., [3, 0]])


@pytest.mark.parametrize("act", sae_cases.RANKED)
def test_gradients_flow_through_what_is_kept(act):
    z = pre(6).requires_grad_()
    code = activation(act, N).encode(z)
    (grad,) = torch.autograd.grad(code.values.sum(), z)
    assert grad.equal((code.to_dense() != 0).double())


@pytest.mark.parametrize("act", [*sae_cases.RANKED, "pursuit"])
def test_a_nan_is_reported_by_its_token(act):
    sae = pursuit_sae() if act == "pursuit" else make(act)
    x = inputs(4)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 4 tokens are NaN, first at token \[2\]"):
        sae.encode(x)


# -- in a model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return tiny("gpt2")


@pytest.mark.parametrize("act", [*sae_cases.RANKED, "pursuit"])
def test_splice_and_ablation_in_a_model(gpt2, act):
    """A negative activation is taken out of the stream as a positive one is."""
    model, ids = copy.deepcopy(gpt2), torch.tensor([[5, 9, 2, 40, 7, 3]])
    sae = pursuit_sae(d_in=32, n=40) if act == "pursuit" else make(act, d_in=32, n=40)
    sae, hidden = sae.float(), []
    sae.hookpoint = sae_cases.make(hookpoint="resid_post.1").hookpoint
    keep = model.transformer.h[1].register_forward_hook(lambda m, a, out: hidden.append(first(out)))
    model(ids)
    keep.remove()
    f = sae.encode(hidden[0]).to_dense()
    latent = int(f.min(0).values[0].argmin()) if act == "abstopk" else int(f[0].sum(0).argmax())
    assert (f[..., latent] < 0).any() == (act == "abstopk")
    written = []

    def after():
        spy = model.transformer.h[1].register_forward_hook(
            lambda m, a, out: written.append(first(out))
        )
        model(ids)
        spy.remove()
        return written[-1]

    with attach(model, sae, ablate(latent)) as attached:
        expected = hidden[0] - f[..., latent, None] * sae.W_dec[latent]
        torch.testing.assert_close(after(), expected, atol=1e-4, rtol=1e-4)
        report = attached.report()
        l0 = next(iter(report.values())).l0 if isinstance(report, dict) else report.l0
        assert l0 == pytest.approx((f != 0).sum(-1).float().mean().item())
    with attach(model, sae, splice=True):
        torch.testing.assert_close(after(), sae(hidden[0]), atol=1e-4, rtol=1e-4)


def first(output):
    return (output[0] if isinstance(output, tuple) else output).detach()


def test_signed_codes_are_not_refined(gpt2):
    from saert import refine

    sae = make("abstopk")
    with pytest.raises(ValueError, match="AbsTopK gives signed activations"):
        refine(sae, inputs(4))
    model = copy.deepcopy(gpt2)
    sae = make("abstopk", d_in=32, n=40, dtype=torch.float32, hookpoint="resid_post.1")
    with (
        attach(model, sae, refine=True, splice=True),
        pytest.raises(ValueError, match="AbsTopK gives signed activations"),
    ):
        model(torch.tensor([[5, 9, 2]]))


def test_negative_activations_count_where_activations_are_counted(gpt2):
    sae, y = make("abstopk"), inputs(30)
    report = Reconstruction(sae, [(0, 30)])
    code = sae.encode(y)
    assert (code.values < 0).any()
    report.add(y, sae.decode(code, y), code, torch.arange(30))
    assert report.report().l0 == K
    silent = (code.to_dense() == 0).all(0).double().mean().item()
    assert report.report().dead == pytest.approx(silent)
    with pytest.raises(ValueError, match="AbsTopK gives signed activations"):
        feature_index(gpt2, sae, torch.zeros(1, 4, dtype=torch.int64), "nowhere")


# -- matching pursuit ----------------------------------------------------------------------------


def pursuit_sae(d_in: int = 10, n: int = 24, subtract: bool = True, **options) -> SAE:
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    W = W / W.norm(dim=-1, keepdim=True)
    b_dec = torch.randn(d_in, generator=generator, dtype=torch.float64) * 0.3
    return SAE.from_weights(
        W, W, None, b_dec if subtract else None, activation=MatchingPursuit(**options)
    )


def pursue(W, r, threshold, steps, stop):
    """One token, step by step, in the words of the SAELens paper: what it keeps."""
    f, r = [0.0] * len(W), r.clone()
    for _ in range(steps):
        products = [float(r @ w) for w in W]
        best = max(range(len(W)), key=lambda i: products[i])
        a = max(0.0, products[best])
        again = f[best] != 0 or a == 0
        f[best] += a
        r = r - a * W[best]
        if (stop and again) or (threshold > 0 and float(r.norm()) < threshold):
            break
    return torch.tensor(f, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_iterations": 3},
        {"residual_threshold": 2.0},
        {"residual_threshold": 0.0, "max_iterations": 7},
        {"stop_on_duplicate": False, "max_iterations": 40},
        {"stop_on_duplicate": False, "residual_threshold": 0.0, "max_iterations": 15},
        {"residual_threshold": 100.0},  # the first step is taken all the same
    ],
    ids=str,
)
def test_matching_pursuit_goes_step_by_step(options):
    sae, x = pursuit_sae(**options), inputs(3, 7)
    act = sae.activation
    expected = torch.stack(
        [
            pursue(sae.W_enc, one - sae.b_dec, act.residual_threshold, act.max_iterations or 10,
                   act.stop_on_duplicate)
            for one in x.reshape(-1, 10)
        ]
    ).view(3, 7, -1)  # fmt: skip
    found = sae.encode(x)
    torch.testing.assert_close(found.to_dense(), expected)
    assert found.k == int((expected != 0).sum(-1).max())
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec)


def test_matching_pursuit_explains_more_with_every_step():
    x = inputs(40)
    errors = [
        (x - pursuit_sae(max_iterations=steps, stop_on_duplicate=False)(x)).norm()
        for steps in (1, 2, 4, 8, 16)
    ]
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False))


def test_matching_pursuit_refuses_what_it_is_not_defined_for():
    with pytest.raises(ValueError, match="residual_threshold is -1"):
        MatchingPursuit(-1)
    with pytest.raises(ValueError, match="max_iterations is 0"):
        MatchingPursuit(max_iterations=0)
    with pytest.raises(NotImplementedError, match="needs the input"):
        MatchingPursuit()(pre(2))
    W = torch.eye(4)
    with pytest.raises(ValueError, match="without b_enc"):
        SAE.from_weights(W, W, torch.ones(4), activation=MatchingPursuit()).encode(torch.ones(2, 4))


@pytest.mark.parametrize("kind", [JumpReLU, BatchTopK])
@pytest.mark.parametrize(
    "threshold", [float("nan"), float("inf"), torch.zeros(2, 2), torch.tensor([0.0, torch.nan])]
)
def test_thresholds_are_finite_numbers(kind, threshold):
    with pytest.raises(ValueError, match=f"{kind.__name__}: threshold must be finite"):
        kind(threshold)


def test_an_activation_does_not_alias_the_tensors_it_was_made_from():
    threshold = torch.zeros(3)
    act = JumpReLU(threshold)
    threshold += 1
    assert (act.threshold == 0).all()
