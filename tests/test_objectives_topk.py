"""TopK, AuxK and Multi-TopK against dense float64 formulas; the step that objectives share."""

import pytest
import torch
from objective_cases import a_batch, a_dictionary, a_step, planted, trained

from saert.hookpoint import Hookpoint
from saert.sae import SAE
from saert.train.dictionary import Dictionary
from saert.train.export import to_sae
from saert.train.mesh import Mesh
from saert.train.objectives.base import Batch, aux_loss, k_aux_for, unexplained, variance
from saert.train.objectives.topk import TopKObjective
from saert.train.training import OptimiserConfig, Training, clip_gradient, default_rate
from saert.train.units import Units


def random_dictionary(num_latents=24, **options):
    """float64, with an encoder that is not the decoder and biases that are not zero."""
    d = a_dictionary(num_latents, dtype=torch.float64, **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        d.W_enc += 0.3 * torch.randn(d.W_enc.shape, generator=draw, dtype=torch.float64)
        d.b_enc += 0.1 * torch.randn(d.b_enc.shape, generator=draw, dtype=torch.float64)
    return d


def dense_topk(scores, k, among=None):
    """ReLU of the k largest scores of each row, dense."""
    if among is not None:
        scores = scores.masked_fill(~among, -torch.inf)
    best = scores.topk(min(k, scores.shape[-1]))
    return torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())


def fvu(y, estimate):
    return (y - estimate).square().sum() / (y - y.mean(0)).square().sum()


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("multi", [0.0, 1 / 8])
def test_loss_and_gradients_are_the_plain_formula(multi, subtract):
    d = random_dictionary(subtract_b_dec=subtract)
    x = planted(50).double()
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[1, 5, 7, 9, 11]] = True
    objective = TopKObjective(k=3, k_aux=2, multi=multi)
    loss = objective.loss(d, a_batch(x), a_step(d, dead=dead))

    scores = (x - d.b_dec if subtract else x) @ d.W_enc.T + d.b_enc
    f = dense_topk(scores, 3)
    main = fvu(x, f @ d.W_dec + d.b_dec)
    residual = (x - f @ d.W_dec - d.b_dec).detach()
    aux = fvu(residual, dense_topk(scores, 2, dead) @ d.W_dec)
    total = main + aux / 32
    if multi:
        wide = fvu(x, dense_topk(scores, 12) @ d.W_dec + d.b_dec)
        total = total + wide / 8
        torch.testing.assert_close(loss.parts["multi_fvu"], wide.detach())

    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.fvu, main.detach())
    torch.testing.assert_close(loss.parts["aux"], aux.detach())
    assert loss.fired.tolist() == (f > 1e-3).any(0).tolist()
    assert int(loss.active) == int((f > 0).sum())
    parameters = [d.W_enc, d.W_dec, d.b_enc, d.b_dec]
    ours = torch.autograd.grad(loss.total, parameters)
    plain = torch.autograd.grad(total, parameters)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_aux_gradient_reaches_the_encoder_of_dead_latents_only():
    d, batch = random_dictionary(), a_batch(planted(50).double())
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[2, 3]] = True
    aux_loss(d, batch, d.decode(d.topk(batch.x, 3)), dead, 2).backward()
    moved = d.W_enc.grad.abs().sum(-1) > 0
    assert moved[dead].all() and not moved[~dead].any()


def test_multi_topk_trains_the_encoder_of_latents_that_only_the_wide_code_has():
    """sparsify's fused encoder gives them no gradient (ALGORITHMS.md section 12, trap 2)."""
    d, x = (
        random_dictionary(),
        planted(1).double().repeat(3, 1) + 0.01 * torch.randn(3, 16).double(),
    )
    TopKObjective(k=2, multi=1.0).loss(d, a_batch(x), a_step(d)).total.backward()
    narrow, wide = (set(d.topk(x, k).indices.flatten().tolist()) for k in (2, 8))
    assert wide - narrow
    assert all(d.W_enc.grad[i].abs().sum() > 0 for i in wide - narrow)


def test_aux_is_exactly_zero_when_no_latent_is_dead():
    d, batch = random_dictionary(), a_batch(planted(5).double())
    loss = TopKObjective(k=3).loss(d, batch, a_step(d))
    assert loss.parts["aux"] == 0 and torch.equal(loss.total, loss.fvu)


def test_a_dead_latent_without_a_positive_score_leaves_a_finite_loss():
    d, batch = random_dictionary(), a_batch(planted(5).double())
    with torch.no_grad():
        d.b_enc.fill_(-100)
    every = torch.ones(24, dtype=torch.bool)
    loss = TopKObjective(k=3).loss(d, batch, a_step(d, dead=every))
    loss.total.backward()
    assert loss.total.isfinite() and int(loss.active) == 0
    assert all(p.grad.isfinite().all() for p in d.parameters())


def test_a_constant_target_is_no_nan():
    y = torch.ones(4, 3)
    assert unexplained(y, y, variance(y, 4, Mesh())) == 0


def test_a_selected_zero_has_not_fired():
    """dictionary_learning and sparsify count it as alive (trap 5)."""
    d = random_dictionary()
    with torch.no_grad():
        d.b_enc[4:].fill_(-100)
    loss = TopKObjective(k=8).loss(d, a_batch(planted(50).double()), a_step(d))
    assert not loss.fired[4:].any() and loss.active <= 4 * 50


def test_aux_is_normalised_like_the_main_loss():
    """Scaling the activations changes neither term's size against the other (trap 4)."""
    dead = torch.arange(24) < 6
    found = []
    for scale in (1.0, 100.0):
        d = random_dictionary()
        with torch.no_grad():
            d.b_enc *= scale
            d.b_dec *= scale
        batch = a_batch(planted(50).double() * scale)
        found.append(TopKObjective(k=3).loss(d, batch, a_step(d, dead=dead)).total)
    torch.testing.assert_close(*found)


def test_k_aux_is_a_power_of_two_near_half_the_width():
    assert [k_aux_for(d) for d in (768, 1024, 128, 16)] == [512, 512, 64, 8]


def test_the_exported_activation_is_what_training_computed():
    training, _ = trained(TopKObjective(k=4), steps=20)
    sae = to_sae(training, Units(), Hookpoint.parse("resid_post.0"), None)
    x = planted(64, seed=7)
    d = training.dictionary
    torch.testing.assert_close(sae(x), d.decode(d.topk(x, 4)), rtol=1e-4, atol=1e-5)
    assert isinstance(sae, SAE) and sae.subtract_b_dec


# -- the step --------------------------------------------------------------------------------


def test_decoder_directions_keep_unit_norm_and_their_gradient_is_tangent():
    d = a_dictionary()
    training = Training(d, TopKObjective(k=4), OptimiserConfig(lr=1e-3), 5)
    for step in range(5):
        before = d.W_dec.detach().clone()
        training.step(a_batch(planted(64, step)), step)
        assert (d.W_dec.grad * before).sum(-1).abs().max() < 1e-6
        torch.testing.assert_close(d.W_dec.norm(dim=-1), torch.ones(48))


def test_a_silent_latent_is_declared_dead_by_tokens():
    d = a_dictionary()
    with torch.no_grad():
        d.b_enc[0] = -100
    training = Training(d, TopKObjective(k=4), OptimiserConfig(dead_tokens=100), 5)
    for step, dead in ((0, False), (1, True)):  # 64 and 128 tokens
        training.step(a_batch(planted(64, step)), step)
        assert bool(training.dead[0]) == dead
    assert training.since[training.since > 0].min() >= 64


def test_auxk_revives_latents_and_lowers_the_dead_fraction():
    """Latents that lose every contest, though their scores are positive: what AuxK is for."""
    dead = {}
    for aux in (0.0, 1 / 32):
        d = a_dictionary(96)
        with torch.no_grad():
            d.W_enc[48:] *= 0.05
        training = Training(
            d, TopKObjective(k=4, aux=aux), OptimiserConfig(lr=2e-4, dead_tokens=2000), 300
        )
        for step in range(300):
            logs = training.step(a_batch(planted(256, step)), step)
        dead[aux] = logs["dead"].item()
    assert dead[0.0] > 0.3 and dead[1 / 32] < 0.5 * dead[0.0], dead


def test_clipping_scales_the_whole_gradient():
    grads = []
    for clip in (None, 1e-3):
        d = a_dictionary()
        training = Training(d, TopKObjective(k=4), OptimiserConfig(clip=clip), 5)
        norm = training.step(a_batch(planted(64)), 0)["gradient_norm"]
        grads.append(torch.cat([p.grad.flatten() for p in d.parameters()]))
    torch.testing.assert_close(grads[1], grads[0] * (1e-3 / norm), rtol=1e-5, atol=1e-9)
    assert norm > 1e-3


def test_the_moving_average_is_bias_corrected():
    d = a_dictionary()
    training = Training(d, TopKObjective(k=4), OptimiserConfig(lr=1e-2, ema=0.5), 3)
    seen = []
    for step in range(3):
        training.step(a_batch(planted(64, step)), step)
        seen.append(d.W_enc.detach().clone())
    expected = (0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]) / 0.875
    torch.testing.assert_close(training.weights()["W_enc"], expected)
    training.finish()
    torch.testing.assert_close(d.W_enc.detach(), expected)
    torch.testing.assert_close(training.weights()["W_enc"], expected)


def test_the_rate_falls_with_the_root_of_the_latents():
    rates = [
        Training(a_dictionary(n), TopKObjective(k=4), OptimiserConfig(lr=1e-3), 5).rate
        for n in (48, 192)
    ]
    assert rates[0] == pytest.approx(2 * rates[1]) and rates[0] == pytest.approx(
        1e-3 * (2**14 / 48) ** 0.5
    )


def test_without_a_rate_narrow_models_and_short_runs_get_a_larger_one():
    assert default_rate(2e-4, 2**14, 768, 50_000) == pytest.approx(2e-4)
    assert default_rate(2e-4, 2**12, 192, 1250) == pytest.approx(2e-4 * 2 * 2 * 2)
    assert default_rate(2e-4, 64, 16, 10) == 0.016
    d = a_dictionary()
    training = Training(d, TopKObjective(k=4), OptimiserConfig(), 100)
    assert training.rate == default_rate(2e-4, 48, 16, 100)


def test_the_gradient_norm_is_exact_for_large_gradients():
    big = Dictionary(
        *(torch.randn(20_000, 256) for _ in range(2)), torch.zeros(20_000), torch.zeros(256)
    )
    for p in big.parameters():
        p.grad = torch.randn_like(p) + 1
    exact = torch.stack([p.grad.double().square().sum() for p in big.parameters()]).sum().sqrt()
    assert clip_gradient(big, None).item() == pytest.approx(exact.item(), rel=1e-6)


def test_shares_of_replicas_add_up():
    """Two replicas' losses and gradients, one after the other in one process, sum to the whole."""
    x = planted(64).double()
    whole = random_dictionary()
    batch = a_batch(x)
    TopKObjective(k=3).loss(whole, batch, a_step(whole)).total.backward()
    halves = random_dictionary()
    for i in range(2):
        part = x[32 * i : 32 * i + 32]
        share = Batch(part, part, tokens=64, first=32 * i, variance=batch.variance)
        TopKObjective(k=3).loss(halves, share, a_step(halves)).total.backward()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
