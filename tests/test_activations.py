"""Every activation against its formula in float64, dense, sparse and at chosen latents."""

import pytest
import torch
from sae_cases import ACTIVATIONS, K, activate, activation

from saert.activations import BatchTopK, Gated, JumpReLU, ReLU, TopK

N = 24
WEIGHTED = [name for name in ACTIVATIONS if name != "gated"]
PER_LATENT = [name for name in ACTIVATIONS if name != "topk"]


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


def test_topk_cannot_answer_for_chosen_latents():
    with pytest.raises(NotImplementedError, match="TopK"):
        TopK(2).at(pre(1)[..., :2], torch.tensor([0, 1]))
    assert not TopK.per_latent
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
        (TopK(N + 1), f"k is {N + 1}, but there are only {N}"),
    ],
    ids=["threshold", "gate", "NaN", "k"],
)
def test_parameters_that_do_not_fit_the_dictionary_are_named(act, match):
    with pytest.raises(ValueError, match=match):
        act.check(N)


def test_gated_parameters_are_one_per_latent():
    with pytest.raises(ValueError, match="b_gate"):
        Gated(*torch.zeros(3)).check(N)


@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None])
def test_topk_wants_a_positive_integer(k):
    with pytest.raises(ValueError, match="k is"):
        TopK(k)


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
