"""What an SAE keeps: captured activations, and the metrics on them."""

import pytest
import torch
from tiny_models import FALCON, HIDDEN, VOCAB, build, tiny
from torch.nn import functional as F

from saert.activations import TopK
from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hooks import hooked
from saert.sae import SAE
from saert.train.downstream import gradients
from saert.train.evaluate import DENSITY_EDGES, Unexplained, evaluate


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


def some_rows(count=4, context=16):
    return torch.randint(3, VOCAB, (count, context), generator=torch.Generator().manual_seed(0))


def an_sae(hookpoint="resid_post.0", k=4, **options):
    draw = torch.Generator().manual_seed(1)
    W = torch.randn(64, HIDDEN, generator=draw)
    W /= W.norm(dim=-1, keepdim=True)
    return SAE.from_weights(
        W,
        W,
        torch.zeros(64),
        torch.zeros(HIDDEN),
        activation=TopK(k),
        hookpoint=hookpoint,
        **options,
    )


def test_capture_reads_what_transformers_returns(model):
    rows, hookpoint = some_rows(), Hookpoint.parse("resid_post.0")
    states = model(rows, output_hidden_states=True).hidden_states
    assert torch.equal(
        capture(model, rows, [hookpoint], batch=3)[hookpoint], states[1].flatten(0, 1)
    )


def test_a_model_that_adds_in_place_is_captured_as_it_was():
    """Falcon adds attention's output to the MLP's tensor after the hook has seen it."""
    model = build("Falcon", **(FALCON | dict(parallel_attn=True, new_decoder_architecture=False)))
    rows, site = some_rows(), Hookpoint.parse("mlp_out.1")
    seen = []
    with hooked(model, site, lambda state: seen.append(state.clone())):
        model(rows)
    expected = seen[0].flatten(0, -2)
    assert torch.equal(capture(model, rows, [site])[site], expected)
    x, _ = gradients(model, rows, [site])[site]
    torch.testing.assert_close(x, expected)


def test_capture_runs_no_further_than_it_has_to(model):
    calls = []
    handle = model.transformer.h[2].register_forward_hook(lambda *_: calls.append(1))
    capture(model, some_rows(), [Hookpoint.parse("resid_post.1"), Hookpoint.parse("mlp_in.0")])
    assert not calls
    capture(model, some_rows(), [Hookpoint.parse("resid_post.2")])
    assert calls
    handle.remove()


def test_hooks_leave_nothing_behind(model):
    rows = some_rows()
    before = model(rows).logits
    with hooked(model, Hookpoint.parse("resid_post.0"), torch.zeros_like):
        assert not torch.equal(model(rows).logits, before)
    assert torch.equal(model(rows).logits, before)


def test_streamed_fvu_is_the_direct_one():
    target = torch.randn(1000, 8) * 3 + 5
    reconstruction = target + torch.randn(1000, 8)
    streamed = Unexplained()
    for part in (slice(0, 300), slice(300, 301), slice(301, 1000)):
        streamed.add(target[part], reconstruction[part])
    t, r = target.double(), reconstruction.double()
    direct = (t - r).square().sum() / (t - t.mean(0)).square().sum()
    assert streamed.fvu == pytest.approx(direct.item(), rel=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("pair", [("resid_post.1", None), ("mlp_in.1", "mlp_out.1")])
def test_every_metric_is_the_direct_one(name, pair):
    model, rows = tiny(name), some_rows()
    read, write = pair[0], pair[1] or pair[0]
    sae = an_sae(read, target_hookpoint=pair[1])
    special = rows == rows[0, 3]  # some token, at several positions
    found = evaluate(model, sae, rows, batch=3, special=lambda part: part == rows[0, 3])
    sites = [Hookpoint.parse(read), Hookpoint.parse(write)]
    hidden = capture(model, rows, sites)
    used = ~special.flatten()
    x, y = (hidden[site][used].double() for site in sites)
    code = sae.encode(x.float())
    dense, estimate = code.to_dense(), sae.decode(code, x.float()).double()
    assert found.tokens == int(used.sum()) < rows.numel()
    assert found.fvu == pytest.approx(
        ((y - estimate).square().sum() / (y - y.mean(0)).square().sum()).item(), rel=1e-5
    )
    assert found.l0 == pytest.approx((dense > 0).sum(-1).double().mean().item())
    assert found.dead == pytest.approx((~(dense > 1e-3).any(0)).double().mean().item())
    assert sum(found.density) == int((dense > 0).any(0).sum())
    share = (dense > 0).double().mean(0)
    above = sum(n for low, n in zip(DENSITY_EDGES, found.density, strict=False) if low >= -1)
    assert above == int((share >= 0.1).sum())

    def spliced(new):
        def act(state):
            flat = state.flatten(0, -2).clone()
            flat[used] = new.to(flat.dtype)
            return flat.view_as(state)

        with hooked(model, sites[1], act):
            return model(rows).logits[:, :-1].double().log_softmax(-1)

    plain = model(rows).logits[:, :-1].double().log_softmax(-1)
    for suffix, new in (("spliced", estimate), ("zero", torch.zeros_like(y))):
        log_q = spliced(new)
        ce = F.nll_loss(log_q.flatten(0, 1), rows[:, 1:].flatten()).item()
        kl = (plain.exp() * (plain - log_q)).sum(-1).mean().item()
        assert getattr(found, f"ce_{suffix}") == pytest.approx(ce, rel=1e-4)
        assert getattr(found, f"kl_{suffix}") == pytest.approx(kl, rel=1e-3)
    ce = F.nll_loss(plain.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert found.ce == pytest.approx(ce, rel=1e-5)
    recovered = (found.ce_zero - found.ce_spliced) / (found.ce_zero - found.ce)
    assert found.ce_recovered == pytest.approx(recovered, rel=1e-6)
    assert found.kl_recovered == pytest.approx(1 - found.kl_spliced / found.kl_zero)


def test_a_perfect_and_a_useless_sae(model):
    rows, eye = some_rows(), torch.eye(HIDDEN)
    perfect = SAE.from_weights(
        torch.cat([eye, -eye]),
        torch.cat([eye, -eye]),
        activation=TopK(2 * HIDDEN),
        hookpoint="resid_post.0",
    )
    metrics = evaluate(model, perfect, rows, batch=3)
    assert metrics.fvu < 1e-10 and metrics.tokens == rows.numel()
    assert metrics.ce_recovered == pytest.approx(1, abs=1e-4)
    assert metrics.kl_recovered == pytest.approx(1, abs=1e-4)
    silent = SAE.from_weights(
        eye,
        eye,
        -1e6 * torch.ones(HIDDEN),
        torch.zeros(HIDDEN),
        activation=TopK(2),
        hookpoint="resid_post.0",
    )
    metrics = evaluate(model, silent, rows)
    assert metrics.dead == 1 and metrics.l0 == 0 and sum(metrics.density) == 0
    assert metrics.ce_recovered == pytest.approx(0, abs=1e-6)
