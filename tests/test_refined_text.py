"""Refinement of one text, token by token, against the report over text, `refine` and `attach`."""

import pytest
import torch
from sae_cases import make
from tiny_models import HIDDEN, tiny

from saert import attach, refine
from saert.capture import capture
from saert.measure.passes import sites
from saert.measure.reports.refined_text import refined_text
from saert.measure.reports.refinement import refinement_report

IDS = torch.arange(5, 16)
CASES = [
    ("gpt2", "relu", "resid_post.1", {}),
    ("gpt2", "jumprelu", "resid_post.1", {"transform": "layer_norm"}),
    ("llama", "topk", "mlp_in.1", {"target_hookpoint": "mlp_out.1"}),
]


def sae_at(hookpoint, act, transform="none", **options):
    return make(
        act, transform, d_in=HIDDEN, n=40, dtype=torch.float32, hookpoint=hookpoint, **options
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case[:3]))
def case(request):
    name, act, hookpoint, options = request.param
    model, sae = tiny(name), sae_at(hookpoint, act, **options)
    return model, sae, refined_text(model, sae, IDS)


def test_totals_are_those_of_the_report(case):
    model, sae, found = case
    want = refinement_report(model, sae, IDS[None], progress=False)
    for got, expected in (
        (found.spliced.fvu, want.fvu),
        (found.respliced.fvu, want.fvu_refined),
        (found.shrinkage, want.shrinkage),
        (found.model.ce.mean(), want.ce),
        (found.spliced.ce.mean(), want.ce_spliced),
        (found.respliced.ce.mean(), want.ce_refined),
        (found.spliced.kl[:-1].mean(), want.kl_spliced),
        (found.respliced.kl[:-1].mean(), want.kl_refined),
        (found.code.l0().double().mean(), want.l0),
        (found.refined.l0().double().mean(), want.l0_refined),
    ):
        assert float(got) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found.converged and (found.model.kl == 0).all() and found.model.fvu == 0


def test_each_token_is_what_attach_makes_of_it(case):
    model, sae, found = case
    states = capture(model, IDS[None], sites(sae), batch=1)
    x, y = (states[place] for place in sites(sae))
    want = refine(sae, x, target=y if sae.is_transcoder else None)
    torch.testing.assert_close(found.refined.to_dense(), want.code.to_dense())
    bare = run(model)
    for one, code, refined in (
        (found.spliced, found.code, False), (found.respliced, found.refined, True)
    ):  # fmt: skip
        torch.testing.assert_close(
            one.error, (y - sae.decode(code, x)).double().norm(dim=-1), rtol=1e-4, atol=1e-5
        )
        with attach(model, sae, splice=True, refine=refined):
            new = run(model)
        p, q = bare.log_softmax(-1), new.log_softmax(-1)
        torch.testing.assert_close(one.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
        ce = -q[:-1].gather(-1, IDS[1:, None]).squeeze(-1)
        torch.testing.assert_close(one.ce, ce, rtol=1e-4, atol=1e-5)
        assert torch.equal(one.top, q.topk(5).indices)
        torch.testing.assert_close(one.top_p, q.exp().topk(5).values, rtol=1e-3, atol=1e-6)
    rows = found.latents(3)
    before, after = found.code.to_dense()[3], found.refined.to_dense()[3]
    assert {latent for latent, *_ in rows} == set(before.nonzero().flatten().tolist())
    assert all((before[j], after[j]) == (old, new) for j, old, new in rows)
    assert [old for _, old, _ in rows] == sorted((old for _, old, _ in rows), reverse=True)
    norms = sae.W_dec.double().norm(dim=-1)
    change = (after.double() @ norms) / (before.double() @ norms) - 1
    assert float(found.shrinkage_by_token[3]) == pytest.approx(float(change), rel=1e-4)


def test_special_tokens_stay_as_they_are():
    model, sae = tiny("gpt2"), sae_at("resid_post.1", "topk")

    def special(rows):
        return (rows == 5) | (rows == 9)

    found = refined_text(model, sae, IDS[None], special=special)
    want = refinement_report(model, sae, IDS[None], special=special, progress=False)
    assert found.spliced.fvu == pytest.approx(want.fvu, rel=1e-5)
    assert float(found.respliced.ce.mean()) == pytest.approx(want.ce_refined, rel=1e-5)
    assert found.shrinkage == pytest.approx(want.shrinkage, rel=1e-4)
    assert found.latents(0) == found.latents(4) == [] and found.latents(1)
    assert found.spliced.error[[0, 4]].isnan().all() and not found.spliced.error[1].isnan()
    assert found.shrinkage_by_token[[0, 4]].isnan().all()
    assert float(found.spliced.kl[0]) == 0  # nothing before it was replaced
    with pytest.raises(ValueError, match="all are special"):
        refined_text(model, sae, IDS, special=lambda rows: rows > 0)


def test_one_token_has_no_loss_and_no_variance():
    model, sae = tiny("gpt2"), sae_at("resid_post.1", "topk")
    found = refined_text(model, sae, IDS[:1], top=200)
    assert found.spliced.ce.shape == (0,) and found.spliced.kl.shape == (1,)
    assert found.spliced.fvu != found.spliced.fvu and float(found.spliced.error) > 0
    assert found.spliced.top.shape == (1, 97)


def test_what_cannot_be_refined_is_refused():
    model, sae = tiny("gpt2"), sae_at("resid_post.1", "topk")
    with pytest.raises(ValueError, match="AbsTopK gives signed activations"):
        refined_text(model, sae_at("resid_post.1", "abstopk"), IDS)
    with pytest.raises(ValueError, match="found 2 rows"):
        refined_text(model, sae, IDS.expand(2, -1))
    with pytest.raises(ValueError, match="top is 0"):
        refined_text(model, sae, IDS, top=0)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        refined_text(model, sae, IDS)


@torch.no_grad()
def run(model):
    return model(IDS[None], use_cache=False).logits[0].double()
