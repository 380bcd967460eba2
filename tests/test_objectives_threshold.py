"""The objectives that penalise or threshold: ReLU with L1, Gated, JumpReLU; and Llama Scope."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from objective_cases import D_IN, a_batch, a_dictionary, a_step, planted, trained
from torch import nn
from torch.nn import functional

from saert.activations import Gated, JumpReLU, ReLU, TopK
from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch
from saert.train.objectives.gated import GatedObjective, decode_frozen
from saert.train.objectives.jumprelu import JumpReLUObjective, jump, step_above
from saert.train.objectives.llama_scope import LlamaScopeObjective
from saert.train.objectives.relu_l1 import ReLUL1Objective
from saert.train.training import OptimiserConfig, Training

DOUBLE = torch.float64
TARGETED = [
    ReLUL1Objective(target_l0=4.0),
    GatedObjective(target_l0=4.0),
    JumpReLUObjective(target_l0=4.0, threshold=0.2, bandwidth=0.1),
    JumpReLUObjective(target_l0=4.0),
]
PENALISED = [
    ReLUL1Objective(l1=0.3),
    GatedObjective(l1=0.3, aux=0.7),
    JumpReLUObjective(l0=0.02, threshold=0.3, bandwidth=0.5),
]
EVERY = [*PENALISED, LlamaScopeObjective(k=3)]


def by_name(objective):
    return objective.name


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def reached(objective, steps=600):
    return trained(objective, steps)


def prepared(objective, num_latents=48, seed=0, **more) -> tuple[Dictionary, Batch]:
    """A dictionary in float64 with nothing at its neutral value, and a batch."""
    more = {"subtract_b_dec": objective.subtract_b_dec} | more
    d = a_dictionary(num_latents, dtype=DOUBLE, **more)
    batch = a_batch(planted(64, seed=seed).double())
    objective.prepare(d, batch)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in d.named_parameters():
            scale = 0.2 if name.startswith("b") or "extra" in name else 0.05
            p += scale * torch.randn(p.shape, generator=draw, dtype=DOUBLE)
        if objective.unit_decoder:
            d.W_dec /= d.W_dec.norm(dim=-1, keepdim=True)
        else:
            d.W_dec *= 0.3 + torch.rand(d.local, 1, generator=draw, dtype=DOUBLE)
    return d, batch


def gradients(total, d):
    found = torch.autograd.grad(total, list(d.parameters()), allow_unused=True)
    zeros = [torch.zeros_like(p) for p in d.parameters()]
    return [z if g is None else g for g, z in zip(found, zeros, strict=True)]


def agree(ours, plain, d):
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    pairs = zip(gradients(ours, d), gradients(plain, d), strict=True)
    for (name, p), (a, b) in zip(d.named_parameters(), pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert b.abs().max() > 0 or p is d.b_dec, f"{name} is not tested"


def exported(objective, d) -> SAE:
    """What the loop does: the activation from the unfolded weights, then decoder norms folded."""
    whole = d.whole()
    norm = whole["W_dec"].norm(dim=-1)
    activation = objective.activation(whole | {"norm": norm})
    return SAE.from_weights(
        whole["W_enc"] * norm[:, None],
        whole["W_dec"] / norm[:, None],
        whole["b_enc"] * norm if objective.has_b_enc else None,
        whole["b_dec"],
        activation=activation,
        subtract_b_dec=objective.subtract_b_dec,
    )


def fvu(x, estimate):
    return (x - estimate).square().sum() / (x - x.mean(0)).square().sum()


# -- the formulas ---------------------------------------------------------------------------------


def test_relu_l1_is_the_dense_formula():
    objective = ReLUL1Objective(l1=0.3, warm=0.5)
    d, batch = prepared(objective)
    x = batch.x
    f = ((x - d.b_dec) @ d.W_enc.T + d.b_enc).relu()
    sigma = (x - x.mean(0)).square().sum(-1).mean().sqrt()
    plain = fvu(x, f @ d.W_dec + d.b_dec) + 0.3 * 0.42 * f.sum(-1).mean() / sigma
    loss = objective.loss(d, batch, a_step(d, number=20))  # the 21st of 50 steps of warm-up
    agree(loss.total, plain, d)
    torch.testing.assert_close(loss.fvu, fvu(x, f @ d.W_dec + d.b_dec).detach())
    assert loss.active == (f > 0).sum() and loss.fired.tolist() == (f > 1e-3).any(0).tolist()


def test_the_l1_of_the_paper_is_lambda_times_sigma_on_the_summed_squares():
    objective = ReLUL1Objective(l1=0.3, warm=0.0)
    d, batch = prepared(objective)
    x = batch.x
    f = ((x - d.b_dec) @ d.W_enc.T + d.b_enc).relu()
    variance = (x - x.mean(0)).square().sum(-1).mean()
    squares = (x - f @ d.W_dec - d.b_dec).square().sum(-1).mean()
    paper = squares + 0.3 * variance.sqrt() * f.sum(-1).mean()
    agree(objective.loss(d, batch, a_step(d)).total, paper / variance, d)


def test_gated_is_the_dense_formula_with_a_frozen_decoder():
    objective = GatedObjective(l1=0.3, aux=0.7, warm=0.0)
    d, batch = prepared(objective)
    x, r_mag, b_mag = batch.x, d.extra["r_mag"], d.extra["b_mag"]
    plain_pi = (x - d.b_dec) @ d.W_enc.T
    pi = plain_pi + d.b_enc
    f = (pi > 0) * (plain_pi * r_mag.exp() + b_mag).relu()
    via_gate = pi.relu() @ d.W_dec.detach() + d.b_dec.detach()
    sigma = (x - x.mean(0)).square().sum(-1).mean().sqrt()
    total = fvu(x, f @ d.W_dec + d.b_dec) + 0.7 * fvu(x, via_gate)
    loss = objective.loss(d, batch, a_step(d))
    agree(loss.total, total + 0.3 * pi.relu().sum(-1).mean() / sigma, d)
    assert loss.active == (f > 0).sum()


@pytest.mark.parametrize("transcodes", [False, True])
def test_gated_aux_gives_the_decoder_exactly_no_gradient(transcodes):
    found = {}
    for aux in (0.0, 1.0):
        objective = GatedObjective(aux=aux)
        skip = {"W_skip": torch.eye(D_IN, dtype=DOUBLE) / 9, "subtract_b_dec": False}
        d, batch = prepared(objective, **(skip if transcodes else {}))
        objective.loss(d, batch, a_step(d)).total.backward()
        found[aux] = d
    assert torch.equal(found[0.0].W_dec.grad, found[1.0].W_dec.grad)
    assert not torch.equal(found[0.0].W_enc.grad, found[1.0].W_enc.grad)
    if transcodes:  # an autoencoder's b_dec has the encoder's part of the gradient
        assert torch.equal(found[0.0].b_dec.grad, found[1.0].b_dec.grad)
        assert torch.equal(found[0.0].W_skip.grad, found[1.0].W_skip.grad)
    f = d.scores(batch.x).relu()
    torch.testing.assert_close(decode_frozen(d, f, batch.x), d.decode_dense(f, batch.x))


def test_gated_equals_jumprelu_with_the_closed_form_thresholds():
    objective = GatedObjective()
    d, batch = prepared(objective)
    sae = exported(objective, d)
    scale = sae.activation.r_mag.exp()
    b_mag, b_gate = sae.activation.b_mag, sae.activation.b_gate
    closed = SAE.from_weights(
        sae.W_enc * scale[:, None],
        sae.W_dec,
        b_mag,
        sae.b_dec,
        activation=JumpReLU((b_mag - scale * b_gate).clamp_min(0)),
    )
    f, g = sae.encode(batch.x).to_dense(), closed.encode(batch.x).to_dense()
    torch.testing.assert_close(g, f)
    assert 0 < (f > 0).sum() < f.numel()
    gated_out = (batch.x - d.b_dec) @ d.W_enc.T * scale + b_mag > 0
    assert (gated_out & (f == 0)).any(), "no latent that its gate alone holds back"


# -- JumpReLU's pseudo-derivatives ----------------------------------------------------------------


def windowed(tokens=40, latents=7, bandwidth=0.5):
    draw = torch.Generator().manual_seed(3)
    theta = 0.5 + torch.rand(latents, generator=draw, dtype=DOUBLE)
    a = theta + 1.5 * bandwidth * (torch.rand(tokens, latents, generator=draw, dtype=DOUBLE) - 0.5)
    upstream = torch.randn(tokens, latents, generator=draw, dtype=DOUBLE)
    return a.requires_grad_(), theta.requires_grad_(), upstream, bandwidth


def test_jump_gradients_are_the_stated_formulas_summed_over_the_batch():
    a, theta, g, eps = windowed()
    by_a, by_theta = torch.autograd.grad(jump(a, theta, eps), (a, theta), g)
    assert torch.equal(jump(a, theta, eps), torch.where(a > theta, a, 0.0))
    expected = torch.zeros_like(theta)
    for t in range(len(a)):
        for i in range(len(theta)):
            if abs((a[t, i] - theta[i]) / eps) < 0.5:
                expected[i] -= theta[i].detach() / eps * g[t, i]
    torch.testing.assert_close(by_theta, expected)
    torch.testing.assert_close(by_a, torch.where(a > theta, g, 0.0))


def test_step_gradient_is_a_finite_difference_of_the_smoothed_count():
    a, theta, g, eps = windowed()
    (by_theta,) = torch.autograd.grad(step_above(a, theta, eps), (theta,), g)

    def smoothed(theta):  # H convolved with the window: its slope is K / ε
        return (g * ((a - theta) / eps + 0.5).clamp(0, 1)).sum(0)

    h = 1e-7
    difference = (smoothed(theta + h) - smoothed(theta - h)) / (2 * h)
    torch.testing.assert_close(by_theta, difference.detach(), rtol=1e-5, atol=1e-5)
    (by_a,) = torch.autograd.grad(step_above(a, theta, eps).sum(), (a,), allow_unused=True)
    assert by_a is None or not by_a.any()


@pytest.mark.parametrize("offset, inside", [(-0.24, 1), (0.24, 1), (-0.26, 0), (0.26, 0)])
def test_both_halves_of_the_window_move_the_threshold(offset, inside):
    """Trap 6: a step applied to the activations loses every entry below its threshold."""
    theta = torch.tensor([1.0], dtype=DOUBLE, requires_grad=True)
    a = theta.detach()[None] + offset
    for function, slope in ((jump, -2.0), (step_above, -2.0)):  # θ/ε and 1/ε
        (found,) = torch.autograd.grad(function(a, theta, 0.5).sum(), theta)
        assert found.item() == slope * inside


@pytest.mark.parametrize("pre_act", [0.0, 0.4])
@pytest.mark.parametrize("target", [None, 5.0, 15.0, 30.0])
def test_jumprelu_is_the_dense_formula_and_log_thresholds_get_the_factor(target, pre_act):
    objective = JumpReLUObjective(
        l0=0.02, target_l0=target, threshold=0.3, bandwidth=0.5, warm=0.0, pre_act=pre_act
    )
    d, batch = prepared(objective)
    x, log_theta, eps = batch.x, d.extra["log_threshold"], objective.bandwidth
    dead = torch.arange(d.local) % 3 == 0
    a = (x - d.b_dec) @ d.W_enc.T + d.b_enc
    theta = log_theta.exp()
    on, window = (a > theta).double(), (((a - theta) / eps).abs() < 0.5).double()
    moved = window * (theta - theta.detach())  # 0, with the gradient of the pseudo-derivative
    f = a * on - theta.detach() / eps * moved
    l0 = (on - moved / eps).sum(-1).mean()
    sigma = (x - x.mean(0)).square().sum(-1).mean().sqrt()
    penalty = l0
    if target is not None:  # on all parts of h
        penalty = 2 * functional.huber_loss(l0 / target, torch.ones_like(l0), delta=0.1)
    total = fvu(x, f @ d.W_dec + d.b_dec) + 0.02 * penalty
    total = total + pre_act * (dead * (theta - a).relu()).sum(-1).mean() / sigma
    loss = objective.loss(d, batch, a_step(d, dead=dead))
    agree(loss.total, total, d)
    assert loss.active == on.sum() and window[a < theta].any()


def test_preactivation_loss_raises_dead_latents_only():
    dead = torch.arange(48) < 5
    found = {}
    for pre_act in (0.0, 1.0):
        objective = JumpReLUObjective(threshold=5.0, pre_act=pre_act, bandwidth=1e-6)
        d, batch = prepared(objective)
        objective.loss(d, batch, a_step(d, dead=dead)).total.backward()
        found[pre_act] = d
    without, with_it = (found[p].b_enc.grad for p in (0.0, 1.0))
    assert torch.equal(without[~dead], with_it[~dead])
    assert (with_it[dead] < without[dead]).all()  # down the gradient b_enc rises
    by_threshold = found[1.0].extra["log_threshold"].grad
    assert (by_threshold[dead] > 0).all()


# -- shares and warm-up ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", PENALISED, ids=by_name)
def test_losses_of_two_replicas_add_up_to_the_loss_of_the_batch(objective):
    d, whole = prepared(objective)
    parts = [
        Batch(whole.x[rows], whole.x[rows], whole.tokens, rows.start, whole.variance)
        for rows in (slice(0, 24), slice(24, 64))
    ]
    step = a_step(d, number=3)
    losses = [objective.loss(d, part, step) for part in parts]
    agree(losses[0].total + losses[1].total, objective.loss(d, whole, step).total, d)


@pytest.mark.parametrize("objective", PENALISED, ids=by_name)
def test_the_penalty_rises_linearly_and_stays(objective):
    d, batch = prepared(objective)

    def total(warm, number):
        return replace(objective, warm=warm).loss(d, batch, a_step(d, number)).total.item()

    full = total(0.0, 0)
    bare = total(1.0, 0)
    bare = (100 * bare - full) / 99  # the first of 100 steps has a hundredth of the penalty
    for number in (0, 9, 19, 20, 60):
        expected = bare + (full - bare) * min(1, (number + 1) / 20)
        assert total(0.2, number) == pytest.approx(expected, rel=1e-9)


# -- what they are for ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", TARGETED, ids=by_name)
def test_target_l0_is_reached_within_a_tenth(objective):
    _, logs = reached(objective)
    l0 = sum(log["l0"] for log in logs[-20:]) / 20
    assert l0 == pytest.approx(objective.target_l0, rel=0.1)
    begins_there = objective == JumpReLUObjective(target_l0=4.0)
    assert begins_there or logs[0]["l0"] > 3 * objective.target_l0


@pytest.mark.parametrize("l1", [0.01, 0.5])
@pytest.mark.parametrize("objective", TARGETED[:2], ids=by_name)
def test_target_l0_is_reached_from_a_poor_start(objective, l1):
    _, logs = reached(replace(objective, l1=l1), 300)
    l0 = sum(log["l0"] for log in logs[-20:]) / 20
    assert l0 == pytest.approx(4.0, rel=0.1)


def test_control_survives_a_batch_without_activations():
    objective = ReLUL1Objective(target_l0=4.0, l1=0.05, warm=0.0)
    d, batch = prepared(objective)
    with torch.no_grad():
        d.b_enc.fill_(-100)
    objective.loss(d, batch, a_step(d))
    assert 0 < d.state["coefficient"] < 0.05


def test_gated_shrinks_less_than_l1_at_the_same_l0():
    """γ = argmin E‖x̂/γ − x‖² (Rajamanoharan et al. 2024a): 1 without shrinkage."""
    x = planted(4096, seed=5)
    centred = x - x.mean(0)
    bias = {}
    for objective in TARGETED[:2]:
        training, _ = reached(objective)
        found = exported(objective, training.dictionary)(x)
        found = found - x.mean(0)
        bias[objective.name] = (found.square().sum() / (found * centred).sum()).item()
    assert bias["relu_l1"] < 0.6 and bias["gated"] > 0.8


def test_jumprelu_starts_where_the_first_batch_has_the_target_l0():
    batch, d = a_batch(planted(500).double()), a_dictionary(dtype=DOUBLE)

    def start(**options):
        JumpReLUObjective(**options).prepare(d, batch)
        return d.extra["log_threshold"].detach().exp()

    for target in (1.0, 4.0, 7.4):
        theta = start(target_l0=target)
        active = (d.scores(batch.x) > theta).double().sum(1).mean().item()
        assert active == pytest.approx(round(target), abs=2 / 500)
        torch.testing.assert_close(theta, d.state["bandwidth"].expand_as(theta))
    for options in ({}, {"target_l0": 48.0}):  # so many scores are not positive
        torch.testing.assert_close(start(**options), torch.full_like(d.b_enc, 0.001))
        assert d.state["bandwidth"] == 0.001
    theta = start(target_l0=4.0, threshold=0.2, bandwidth=0.1)
    torch.testing.assert_close(theta, torch.full_like(theta, 0.2))
    assert d.state["bandwidth"] == 0.1


def test_jumprelu_nears_its_target_in_a_short_run_and_from_the_papers_start_does_not():
    from_target, from_papers = (
        trained(JumpReLUObjective(target_l0=4.0, threshold=threshold), 200)[1]
        for threshold in (None, 0.001)
    )
    assert from_target[-1]["l0"] == pytest.approx(4.0, rel=0.2)
    assert from_papers[-1]["l0"] > 16


def test_jumprelu_thresholds_move():
    training, logs = reached(TARGETED[2])
    theta = training.dictionary.extra["log_threshold"].exp()
    assert (theta / 0.2 - 1).abs().median() > 0.1
    assert logs[-1]["threshold"] == pytest.approx(theta.mean().item(), rel=0.05)


# -- Llama Scope ----------------------------------------------------------------------------------


def test_llama_scope_is_the_dense_formula_without_b_dec_in_the_encoder():
    """Trap 10: b_dec is not subtracted; decoder norms rank, but do not scale, activations."""
    objective = LlamaScopeObjective(k=3)
    d, batch = prepared(objective)
    x = batch.x
    a = (x @ d.W_enc.T + d.b_enc).relu()
    weighted = a * d.W_dec.norm(dim=-1)
    kept = weighted >= weighted.topk(3, dim=-1).values[:, -1:]
    assert (kept.sum(-1) == 3).all()
    assert (kept != (a >= a.topk(3, dim=-1).values[:, -1:])).any(), "norms do not matter here"
    estimate = (a * kept) @ d.W_dec + d.b_dec
    norm = (x - x.mean(0)).norm(dim=-1)
    plain = ((estimate - x).square().mean(-1) / norm).mean()
    loss = objective.loss(d, batch, a_step(d, number=50))
    agree(loss.total, plain, d)
    torch.testing.assert_close(loss.fvu, fvu(x, estimate).detach())


def test_llama_scope_decodes_as_many_latents_as_k_at_says():
    objective = LlamaScopeObjective(k=3)
    d, batch = prepared(objective)
    with torch.no_grad():
        d.b_enc.fill_(50.0)  # so that every score is positive
    for number, k in ((0, 8), (5, 6), (10, 3), (99, 3)):
        assert objective.loss(d, batch, a_step(d, number)).active == k * batch.tokens


def test_llama_scope_k_falls_from_half_d_to_k_and_stays():
    objective = LlamaScopeObjective(k=50)
    d = a_dictionary()
    k = [objective.k_at(a_step(d, number, 1000), 4096) for number in range(1000)]
    assert k[0] == 2048 and k[99] > 50 and set(k[100:]) == {50}
    assert all(a > b for a, b in zip(k[:100], k[1:101], strict=True))
    assert k[50] == 1049  # ⌈(k₀ + (1 − k₀) / 2) · 50⌉, k₀ = 2048/50
    narrow = [objective.k_at(a_step(d, number, 1000), 64) for number in range(1000)]
    assert set(narrow) == {50}  # d/2 = 32 is less than k
    assert {replace(objective, warm=0.0).k_at(a_step(d, n), 4096) for n in range(100)} == {50}


def test_llama_scope_survives_a_token_at_the_mean():
    objective = LlamaScopeObjective(k=3, warm=0.0)
    d, _ = prepared(objective)
    objective.loss(d, a_batch(torch.ones(1, D_IN, dtype=DOUBLE)), a_step(d)).total.backward()
    assert d.W_dec.grad.isfinite().all()


def test_llama_scope_threshold_on_folded_weights_is_the_selection_of_training():
    """Trap 10: θ compares folded scores ReLU(a_i) · ‖d_i‖, not pre-activations."""
    objective = LlamaScopeObjective(k=4)
    d, _ = prepared(objective)
    batch = a_batch(planted(500, seed=7).double())
    objective.calibrate(d, batch)
    a = (batch.x @ d.W_enc.T + d.b_enc).relu().detach()
    weighted = a * d.W_dec.norm(dim=-1).detach()
    theta = weighted.flatten().sort(descending=True).values[500 * 4 - 1]
    torch.testing.assert_close(d.state["threshold"], theta)

    sae = exported(objective, d)
    assert isinstance(sae.activation, JumpReLU)
    code = sae.encode(batch.x).to_dense()
    # ties with θ itself may round to either side of it
    clear = (weighted - theta).abs() > 1e-9
    assert torch.equal((code > 0)[clear], (weighted > theta)[clear])
    assert (code > 0).sum().item() in (500 * 4 - 1, 500 * 4)
    estimate = (a * (code > 0)) @ d.W_dec + d.b_dec
    torch.testing.assert_close(sae(batch.x), estimate.detach())
    assert ((a > theta) != (weighted > theta)).any(), "unfolded scores would have done"


def test_llama_scope_calibrates_exactly_where_one_token_has_most_of_the_activations():
    objective = LlamaScopeObjective(k=2)
    d, _ = prepared(objective)
    x = planted(20, seed=7).double()
    x[:2] *= 40
    objective.calibrate(d, a_batch(x))
    weighted = (x @ d.W_enc.T + d.b_enc).relu() * d.W_dec.norm(dim=-1)
    theta = weighted.flatten().sort(descending=True).values[39]
    torch.testing.assert_close(d.state["threshold"], theta.detach())
    assert (weighted[0] >= theta).sum() > 8, "the first width was enough"


def test_llama_scope_calibrates_on_candidates_by_weighted_score():
    objective = LlamaScopeObjective(k=1)
    d = a_dictionary(D_IN, dtype=DOUBLE, subtract_b_dec=False)
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(D_IN))
        d.W_dec.copy_(torch.eye(D_IN))
        d.W_dec[10] *= 10_000  # the eleventh largest score of each token decides
    x = torch.arange(8, 18, dtype=DOUBLE)[:, None] / 2.0 ** torch.arange(D_IN)
    objective.calibrate(d, a_batch(x))
    assert d.state["threshold"].item() == pytest.approx(8 / 2**10 * 10_000)


def test_llama_scope_topk_export_is_the_code_of_training():
    objective = LlamaScopeObjective(k=3, jumprelu=False)
    d, batch = prepared(objective)
    sae = exported(objective, d)
    assert isinstance(sae.activation, TopK)
    norm = d.decoder_norm().detach()
    code = d.topk(batch.x, 3, weight=norm)
    assert torch.equal(sae.encode(batch.x).indices, code.indices)
    torch.testing.assert_close(sae.encode(batch.x).values, code.values * norm[code.indices])
    torch.testing.assert_close(sae(batch.x), d.decode(code).detach())


def test_llama_scope_trains_with_free_decoder_norms():
    objective = LlamaScopeObjective(k=3)
    d = a_dictionary(subtract_b_dec=False)
    with torch.no_grad():
        d.W_dec *= objective.decoder_norm
    training = Training(d, objective, OptimiserConfig(lr=2e-4), 200)
    logs = [training.step(a_batch(planted(256, seed=n)), n) for n in range(200)]
    assert logs[0]["k"] == 8 and logs[-1]["k"] == 3 and logs[-1]["l0"] <= 3
    assert logs[-1]["fvu"] < 0.45
    assert d.decoder_norm().std() > 0.01
    objective.calibrate(d, a_batch(planted(4096, seed=400)))
    x = planted(2048, seed=401)
    sae = exported(objective, d)
    assert fvu(x, sae(x)) < 0.45
    assert (sae.encode(x).values > 0).sum() / 2048 == pytest.approx(3, rel=0.1)


def test_llama_scope_without_calibration_says_what_to_do():
    d, _ = prepared(LlamaScopeObjective())
    with pytest.raises(ValueError, match="calibrate"):
        LlamaScopeObjective().activation(d.whole())


# -- export and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", PENALISED, ids=by_name)
def test_exported_activation_is_what_training_computed(objective):
    d, batch = prepared(objective)
    kinds = {"relu_l1": ReLU, "gated": Gated, "jumprelu": JumpReLU}
    sae = exported(objective, d)
    assert type(sae.activation) is kinds[objective.name]
    loss = objective.loss(d, batch, a_step(d))
    torch.testing.assert_close(fvu(batch.x, sae(batch.x)), loss.fvu)
    code = sae.encode(batch.x).to_dense()
    assert (code > 0).sum() == loss.active and 0 < loss.active < code.numel()
    assert torch.equal((code > 1e-3).any(0), loss.fired)


@pytest.mark.parametrize("objective", EVERY, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(objective, dtype):
    d = a_dictionary(dtype=dtype, subtract_b_dec=objective.subtract_b_dec)
    batch = a_batch(planted(64).to(dtype))
    objective.prepare(d, batch)
    loss = objective.loss(d, batch, a_step(d, number=50))
    loss.total.backward()
    objective.calibrate(d, batch)
    assert loss.total.dtype == dtype
    assert {t.dtype for t in d.tensors().values()} == {dtype}
    assert isinstance(d.extra, nn.ParameterDict) and Mesh() == d.mesh


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ReLUL1Objective(l1=0.0), r"relu_l1: l1 is 0\.0, expected a positive"),
        (lambda: ReLUL1Objective(warm=1.5), r"relu_l1: warm is 1\.5, .*\[0, 1\]"),
        (lambda: ReLUL1Objective(gain=-1.0), r"relu_l1: gain is -1\.0"),
        (lambda: GatedObjective(aux=-1.0), r"gated: aux is -1\.0, expected at least 0"),
        (lambda: GatedObjective(target_l0=0.0), r"gated: target_l0 is 0\.0"),
        (lambda: JumpReLUObjective(bandwidth=0.0), r"jumprelu: bandwidth is 0\.0"),
        (lambda: JumpReLUObjective(threshold=-0.1), r"jumprelu: threshold is -0\.1"),
        (lambda: JumpReLUObjective(l0=float("nan")), r"jumprelu: l0 is nan"),
        (lambda: JumpReLUObjective(pre_act=-1.0), r"jumprelu: pre_act is -1\.0"),
        (lambda: LlamaScopeObjective(k=0), r"llama_scope: k is 0, expected at least 1"),
        (lambda: LlamaScopeObjective(warm=-0.1), r"llama_scope: warm is -0\.1"),
    ],
)
def test_bad_hyper_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
