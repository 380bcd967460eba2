"""Reconstruction reports against dense float64 formulas on everything at once."""

import math

import pytest
import sae_cases
import torch
from tiny_models import HIDDEN, VOCAB, tiny

from saert.activations import TopK
from saert.capture import capture
from saert.measure.passes import sites
from saert.measure.reports.reconstruction import (
    DENSITY_EDGES,
    Unexplained,
    position_buckets,
    reconstruction_report,
    reconstruction_reports,
)
from saert.runtime import attach
from saert.sae import SAE

CONTEXT = 40


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").double()


def some_rows(count=5, context=CONTEXT):
    return torch.randint(3, VOCAB, (count, context), generator=torch.Generator().manual_seed(0))


def begins(rows):
    """BOS, wherever it stands, and one frequent token."""
    special = (rows == 5) | (rows == 17)
    special[:, 0] = True
    return special


def report(model, sae, rows, **options):
    return reconstruction_report(model, sae, rows, progress=False, **options)


CASES = [(act, "none", "sae") for act in sae_cases.ACTIVATIONS] + [
    ("topk", "layer_norm", "sae"),
    ("jumprelu", "unit_norm", "sae"),
    ("relu", "dataset_scale", "sae_skip"),
    ("batchtopk", "none", "transcoder_square"),
]


def a_case(act, transform, kind):
    read = {"hookpoint": "mlp_in.1", "target_hookpoint": "mlp_out.1"}
    where = read if kind.startswith("transcoder") else {"hookpoint": "resid_post.1"}
    return sae_cases.make(act, transform, kind, d_in=HIDDEN, **where)


@torch.no_grad()
@pytest.mark.parametrize("act, transform, kind", CASES)
def test_every_number_is_the_dense_formula(model, act, transform, kind):
    sae, rows = a_case(act, transform, kind), some_rows()
    found = report(model, sae, rows, special=begins, batch=2, buckets=[0, 7, 30])
    read, write = sites(sae)
    hidden = capture(model, rows, (read, write))
    used = ~begins(rows).flatten()
    x, y = hidden[read][used], hidden[write][used]
    f = sae_cases.latents(sae, x)
    estimate = sae_cases.reconstruct(sae, f, x)
    position = torch.arange(CONTEXT).repeat(len(rows))[used]
    error, power = (y - estimate).square().sum(-1), y.square().sum(-1)
    spread = (y - y.mean(0)).square().sum(-1)

    def holds(part, mask):
        expected = {
            "tokens": mask.sum(),
            "fvu": error[mask].sum() / spread[mask].sum(),
            "explained_variance": 1 - error[mask].sum() / spread[mask].sum(),
            "normalised_mse": (error / power)[mask].mean(),
            "cosine": torch.cosine_similarity(y, estimate)[mask].mean(),
            "norm_ratio": (estimate.norm(dim=-1) / y.norm(dim=-1))[mask].mean(),
            "relative_bias": estimate[mask].square().sum() / (estimate * y)[mask].sum(),
            "l0": (f > 0).sum(-1)[mask].double().mean(),
        }
        for name, value in expected.items():
            assert getattr(part, name) == pytest.approx(value.item(), rel=1e-9), name

    holds(found, torch.ones_like(error, dtype=torch.bool))
    assert [(p.start, p.stop) for p in found.positions] == [(0, 7), (7, 30), (30, CONTEXT)]
    for part in found.positions:
        holds(part, (position >= part.start) & (position < part.stop))
    assert found.dead == pytest.approx((~(f > 1e-3).any(0)).double().mean().item())
    counts = torch.bincount((f > 0).sum(-1))
    assert list(found.l0_counts) == counts.tolist()
    share = (f > 0).double().mean(0)
    for low, high, n in zip(DENSITY_EDGES, DENSITY_EDGES[1:], found.density, strict=False):
        last = high == 0
        inside = (share >= 10**low) & ((share <= 1) if last else (share < 10**high)) & (share > 0)
        assert n == int(inside.sum())


def test_buckets_add_up_to_the_total(model):
    found = report(model, a_case("topk", "none", "sae"), some_rows(), special=begins)
    assert [(p.start, p.stop) for p in found.positions] == [(0, 16), (16, 32), (32, 40)]
    assert sum(p.tokens for p in found.positions) == found.tokens
    for name in ("cosine", "norm_ratio", "normalised_mse", "l0"):
        total = sum(p.tokens * getattr(p, name) for p in found.positions)
        assert total / found.tokens == pytest.approx(getattr(found, name), rel=1e-12)
    hidden = capture(model, some_rows(), [a_case("topk", "none", "sae").hookpoint])
    used = ~begins(some_rows())
    y = next(iter(hidden.values())).view(*used.shape, -1)
    spread = (y - y[used].mean(0)).square().sum(-1).where(used, 0).sum(0)
    weights = [spread[p.start : p.stop].sum() for p in found.positions]
    total = sum(w * p.fvu for w, p in zip(weights, found.positions, strict=True)) / sum(weights)
    assert total.item() == pytest.approx(found.fvu, rel=1e-12)


def test_batches_of_any_size_give_the_same(model):
    sae, rows = a_case("jumprelu", "layer_norm", "sae"), some_rows()
    whole = report(model, sae, rows, special=begins, batch=5).to_dict()
    for batch in (1, 2, 3):
        parts = report(model, sae, rows, special=begins, batch=batch).to_dict()
        for name in ("tokens", "l0_counts", "density", "dead"):
            assert parts[name] == whole[name]
        for name in ("fvu", "cosine", "norm_ratio", "relative_bias", "normalised_mse", "l0"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-12)


def test_several_saes_share_a_pass_and_do_not_meet(model):
    rows, calls = some_rows(), []
    saes = [a_case(*case) for case in CASES[-3:]]
    handle = model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    together = reconstruction_reports(model, saes, rows, special=begins, batch=3, progress=False)
    assert len(calls) == 2
    handle.remove()
    assert together == [report(model, sae, rows, special=begins, batch=3) for sae in saes]


def test_a_bfloat16_model_is_summed_without_loss():
    model = tiny("llama").to(torch.bfloat16)
    sae, rows = a_case("topk", "none", "sae").to(torch.bfloat16), some_rows()
    found = report(model, sae, rows, batch=2)
    y = capture(model, rows, [sae.hookpoint])[sae.hookpoint]
    estimate = sae(y).double()
    y = y.double()
    direct = (y - estimate).square().sum() / (y - y.mean(0)).square().sum()
    assert found.fvu == pytest.approx(direct.item(), rel=1e-6)


def eye(**options):
    return SAE.from_weights(
        torch.eye(HIDDEN), torch.eye(HIDDEN), activation=TopK(2), hookpoint="resid_post.0",
        **options,
    ).double()  # fmt: skip


def test_a_silent_sae_and_a_single_token(model):
    silent = eye(b_enc=torch.full((HIDDEN,), -1e6))
    found = report(model, silent, some_rows())
    assert found.dead == 1 and found.l0 == 0 and sum(found.density) == 0
    assert found.l0_counts == (found.tokens,) and found.norm_ratio == 0 and found.cosine == 0
    assert found.normalised_mse == 1 and math.isnan(found.relative_bias)
    one = report(model, eye(), some_rows(1, 1))
    assert one.tokens == 1 and math.isnan(one.fvu) and 0 < one.cosine <= 1


def test_a_latent_that_barely_fires_is_active_but_dead(model):
    faint = SAE.from_weights(
        torch.eye(HIDDEN) * 1e-6, torch.eye(HIDDEN), activation=TopK(2), hookpoint="resid_post.0"
    ).double()
    found = report(model, faint, some_rows())
    assert found.dead == 1 and found.l0 == 2 and sum(found.density) > 0


def test_buckets_without_tokens_are_left_out(model):
    found = report(model, eye(), some_rows(), special=lambda r: torch.arange(CONTEXT) < r * 0 + 20)
    assert [(p.start, p.tokens) for p in found.positions] == [(16, 12 * 5), (32, 8 * 5)]


@pytest.mark.parametrize(
    "rows, error, message",
    [
        (torch.full((2, 8), math.nan), TypeError, "torch.float32, expected token ids"),
        ([[1, 2]], TypeError, "rows are list"),
        (torch.zeros(8, dtype=torch.int64), ValueError, r"rows are \[8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), ValueError, r"rows are \[0, 8\]"),
        (torch.full((2, 8), VOCAB), ValueError, "token id 97, but the model knows 0 to 96"),
        (torch.full((2, 8), -1), ValueError, "token id -1"),
    ],
)
def test_rows_that_are_none(model, rows, error, message):
    with pytest.raises(error, match=message):
        report(model, eye(), rows)


def test_other_refusals(model):
    rows = some_rows()
    with pytest.raises(ValueError, match="no token is left to measure at resid_post.0"):
        report(model, eye(), rows, special=lambda r: r >= 0)
    with pytest.raises(ValueError, match="special: found"):
        report(model, eye(), rows, special=lambda r: r[:, 0] == 3)
    with pytest.raises(ValueError, match="rising positions from 0 to below the context, 40"):
        report(model, eye(), rows, buckets=[0, 50])
    with pytest.raises(ValueError, match="does not say where it reads"):
        report(model, SAE.from_weights(*[torch.eye(HIDDEN)] * 2, activation=TopK(2)), rows)
    with pytest.raises(ValueError, match="reads width 10"):
        report(model, sae_cases.make(), rows)
    with pytest.raises(ValueError, match="training mode"):
        report(tiny("gpt2").train(), eye(), rows)
    with attach(model, eye()), pytest.raises(ValueError, match="attached"):
        report(model, eye(), rows)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "gptj", "opt"])
def test_rows_longer_than_a_table_of_positions_are_refused(name):
    model = tiny(name)
    with pytest.raises(ValueError, match="129 tokens long, .* a table of 128 positions"):
        report(model, eye(), some_rows(1, 129))
    assert report(model, eye(), some_rows(1, 128)).tokens == 128


@pytest.mark.parametrize("name", ["llama", "falcon_new", "bloom", "mamba"])
def test_models_without_a_table_go_further(name):
    assert report(tiny(name), eye(), some_rows(1, 129)).tokens == 129


def test_an_offloaded_model_is_measured_as_it_would_be_here(model):
    accelerate = pytest.importorskip("accelerate")
    away = accelerate.cpu_offload(tiny("gpt2"), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in away.parameters())
    assert report(away, eye(), some_rows()) == report(tiny("gpt2"), eye(), some_rows())


def test_nan_in_the_model_is_refused():
    sae = a_case("relu", "none", "transcoder_square")
    broken = tiny("gpt2").double()
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.bias[3] = math.nan  # behind what the transcoder reads
    with pytest.raises(ValueError, match=r"at mlp_out.1 have NaN"):
        report(broken, sae, some_rows())
    with torch.no_grad():
        broken.transformer.wte.weight[some_rows()[0, 0], 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        report(broken, eye(), some_rows())


def test_default_buckets_double():
    assert position_buckets(16) == ((0, 16),)
    assert position_buckets(17) == ((0, 16), (16, 17))
    assert [start for start, _ in position_buckets(8192)][-2:] == [2048, 4096]


def test_streamed_fvu_is_the_direct_one():
    target = torch.randn(1000, 8) * 3 + 5
    reconstruction = target + torch.randn(1000, 8)
    streamed = Unexplained()
    for part in (slice(0, 300), slice(300, 301), slice(301, 1000)):
        streamed.add(target[part], reconstruction[part])
    t, r = target.double(), reconstruction.double()
    direct = (t - r).square().sum() / (t - t.mean(0)).square().sum()
    assert streamed.fvu == pytest.approx(direct.item(), rel=1e-10)
