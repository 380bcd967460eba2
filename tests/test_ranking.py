"""Latents of one token by effect, and what one does to the logits, against the whole measures."""

import pytest
import torch
from sae_cases import make
from tiny_models import HIDDEN, tiny

from saert import ablate, attach
from saert.hub import bundled
from saert.measure import ablation_effects, attribute, next_token_loss
from saert.measure.ablation.ranking import likeliest, logit_changes, rank_latents
from saert.measure.attribution.metric import token_logit

IDS = torch.arange(5, 16)[None]
CASES = [("resid_post.1", {}), ("mlp_in.1", {"target_hookpoint": "mlp_out.1"})]


def sae_at(hookpoint, act="topk", **options):
    return make(act, d_in=HIDDEN, n=40, dtype=torch.float32, hookpoint=hookpoint, **options)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(("hookpoint", "options"), CASES)
@pytest.mark.parametrize("by", ["kl", "loss_change"])
def test_true_effects_are_those_of_ablation_effects(model, hookpoint, options, by):
    sae, seen = sae_at(hookpoint, "relu", **options), []
    found = rank_latents(
        model, sae, IDS, 4, by=by, horizon=3, report=lambda *done: seen.append(done)
    )
    whole = ablation_effects(model, sae, IDS, positions=4, horizon=3, progress=False)
    column = getattr(whole, by)
    order = column.abs().argsort(descending=True)
    assert found.active == len(whole) == len(found.latents) and found.position == 4
    torch.testing.assert_close(found.scores, column[order], rtol=1e-3, atol=1e-7)
    by_latent = dict(zip(whole.latents.tolist(), column.tolist(), strict=True))
    values = dict(zip(whole.latents.tolist(), whole.values.tolist(), strict=True))
    for latent, score, value in zip(found.latents, found.scores, found.values, strict=True):
        assert float(score) == pytest.approx(by_latent[int(latent)], rel=1e-3, abs=1e-7)
        assert float(value) == pytest.approx(values[int(latent)])
    assert torch.equal(found.effects.latents, found.latents)
    assert seen == [(i, found.active) for i in range(0, found.active, 16)]


@pytest.mark.parametrize(("hookpoint", "options"), CASES)
def test_attribution_is_that_of_attribute(model, hookpoint, options):
    sae = sae_at(hookpoint, **options)
    token = int(logits(model)[0, 4].argmax())
    assert likeliest(model, IDS, 4) == token
    for by, metric in (
        ("attributed_loss", next_token_loss(IDS)),
        ("attributed_logit", token_logit(IDS, token, 4)),
    ):
        found = rank_latents(model, sae, IDS, -7, by=by)
        want = attribute(model, sae, IDS, metric, progress=False)[
            options.get("target_hookpoint", hookpoint)
        ].to_dense()[0, 4]
        torch.testing.assert_close(found.scores.float(), want[found.latents].float())
        assert found.effects is None and int((want != 0).sum()) == found.active
        assert found.scores.abs().diff().max() <= 0
    other = rank_latents(model, sae, IDS, 4, by="attributed_logit", token=token - 1)
    assert not torch.equal(other.scores, found.scores)


def test_the_limit_keeps_the_strongest(model):
    sae = sae_at("resid_post.1", "relu")
    whole, some = (rank_latents(model, sae, IDS, by="kl", limit=n) for n in (99, 3))
    strength = whole.values * sae.W_dec.norm(dim=-1)[whole.latents]
    strongest = whole.latents[strength.topk(3).indices]
    assert set(some.latents.tolist()) == set(strongest.tolist())
    assert some.active == whole.active == len(whole.latents) > 3


@pytest.mark.parametrize(("hookpoint", "options"), CASES)
def test_logit_changes_are_of_the_edit_alone(model, hookpoint, options):
    sae = sae_at(hookpoint, **options)
    effects = ablation_effects(model, sae, IDS, positions=4, horizon=3, top=5, progress=False)
    bare = logits(model)
    for i in range(3):
        latent = int(effects.latents[i])
        found = logit_changes(model, sae, IDS, -7, latent, horizon=3)
        with attach(model, sae, ablate(latent, positions=4)):
            delta = (logits(model) - bare)[0, 4:7].double()
        want = delta - delta.median(-1, keepdim=True).values
        torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.sum(0).topk(5).indices, effects.top_suppressed[i])
        assert torch.equal(found.sum(0).topk(5, largest=False).indices, effects.top_promoted[i])
    both = effects.latents[:2].tolist()
    assert logit_changes(model, sae, IDS, 9, both, horizon=8).shape == (2, 97)
    torch.testing.assert_close(logits(model), bare)  # nothing stays attached


def test_the_token_logit_is_centred_and_checked(model):
    bare = logits(model).double()
    metric = token_logit(IDS, 7, -2)
    want = bare[0, -2, 7] - bare[0, -2].mean()
    assert float(metric(bare)) == pytest.approx(float(want))
    assert float(metric(bare + 3)) == pytest.approx(float(want))
    with pytest.raises(ValueError, match="position 11 of 11 tokens"):
        token_logit(IDS, 7, 11)
    with pytest.raises(ValueError, match="token 97 of 97"):
        token_logit(IDS, 97, 0)(bare)


def test_what_cannot_be_ranked_is_refused(model):
    sae = sae_at("resid_post.1")
    for by in ("loss_change", "attributed_loss"):
        with pytest.raises(ValueError, match="nothing comes after the last token"):
            rank_latents(model, sae, IDS, by=by)
    with pytest.raises(ValueError, match="outside a text of 11 tokens"):
        rank_latents(model, sae, IDS, 11)
    with pytest.raises(ValueError, match="expected kl"):
        rank_latents(model, sae, IDS, by="size")
    with pytest.raises(ValueError, match="expected one text"):
        rank_latents(model, sae, IDS.expand(2, -1))
    for wrong, error in ((0, "horizon is 0"), (2.5, "found 2.5, expected a whole number")):
        with pytest.raises((ValueError, TypeError), match=error):
            logit_changes(model, sae, IDS, 0, 1, horizon=wrong)
        with pytest.raises((ValueError, TypeError), match=error):
            rank_latents(model, sae, IDS, horizon=wrong)
    with pytest.raises(TypeError, match="position: found 1.5, expected a whole number"):
        rank_latents(model, sae, IDS, 1.5)
    with torch.no_grad():
        silent = sae_at("resid_post.1", "relu")
        silent.b_enc.fill_(-1e9)
    with pytest.raises(ValueError, match="no latent is active at token 10"):
        rank_latents(model, silent, IDS)


def test_a_horizon_ends_with_the_text(model):
    sae = sae_at("resid_post.1")
    some, far = (rank_latents(model, sae, IDS, 8, horizon=n) for n in (3, 10**9))
    assert far.effects.kl_by_token.shape == some.effects.kl_by_token.shape  # not [n, 10**9]
    assert torch.equal(far.scores, some.scores) and torch.equal(far.latents, some.latents)


def test_one_token_has_kl_and_nothing_after():
    model, ids = bundled.model(), torch.tensor([[437]])
    found = rank_latents(model, bundled.sae("resid_post.2"), ids)
    assert found.position == 0 and float(found.scores[0]) > 0
    assert found.effects.loss_change.isnan().all()
