"""Downstream losses against full materialisation in float64, and against `attach(splice=True)`."""

import dataclasses
import json
import math

import pytest
import sae_cases
import torch
from tiny_models import HIDDEN, VOCAB, tiny
from torch.nn import functional as F

from saert.activations import TopK
from saert.capture import capture
from saert.hooks import hooked
from saert.measure.passes import sites
from saert.measure.reports import splices
from saert.measure.reports.downstream import Losses, downstream_report, measure
from saert.measure.reports.evaluate import evaluate
from saert.measure.reports.reconstruction import reconstruction_report
from saert.measure.reports.transfer import transfer_report
from saert.runtime import attach
from saert.sae import SAE

CONTEXT = 24
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").double()


def some_rows(count=5, context=CONTEXT):
    return torch.randint(3, VOCAB, (count, context), generator=torch.Generator().manual_seed(0))


def five(rows):
    return (rows % 9) == 5


def tail(rows):
    """Rows of unequal length: the r-th lacks r + 1 tokens."""
    lengths = rows.shape[1] - 1 - torch.arange(len(rows)) if len(rows) == 5 else None
    assert lengths is not None, "this rule is for one batch of five"
    return torch.arange(rows.shape[1]) >= lengths[:, None]


def a_case(act="topk", transform="none", kind="sae", d_in=HIDDEN):
    read = {"hookpoint": "mlp_in.1", "target_hookpoint": "mlp_out.1"}
    where = read if kind.startswith("transcoder") else {"hookpoint": "resid_post.1"}
    return sae_cases.make(act, transform, kind, d_in=d_in, **where)


@torch.no_grad()
def log_probabilities(model, rows, place=None, new=None, used=None):
    def act(state):
        flat = state.flatten(0, -2).clone()
        flat[used] = new.to(flat.dtype)
        return flat.view_as(state)

    if place is None:
        return model(rows).logits[:, :-1].log_softmax(-1)
    with hooked(model, place, act):
        return model(rows).logits[:, :-1].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "case",
    [("topk",), ("jumprelu", "layer_norm"), ("gated",), ("batchtopk", "none", "transcoder_square")],
)
@pytest.mark.parametrize("padding", [None, tail])
def test_every_loss_is_the_direct_one(name, case, padding):
    model, sae, rows = tiny(name).double(), a_case(*case), some_rows()
    found = downstream_report(
        model, sae, rows, batch=5, special=five, padding=padding, buckets=[0, 5, 12], **QUIET
    )
    text = torch.ones_like(rows, dtype=torch.bool) if padding is None else ~padding(rows)
    used = (text & ~five(rows)).flatten()
    scored = text[:, :-1] & text[:, 1:]
    read, write = sites(sae)
    hidden = capture(model, rows, (read, write))
    x, y = hidden[read][used], hidden[write][used]
    estimate = sae_cases.reconstruct(sae, sae_cases.latents(sae, x), x)
    plain = log_probabilities(model, rows)

    def ce(log_p):
        return F.nll_loss(log_p.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(
            scored.shape
        )

    new = {"spliced": estimate, "zero": torch.zeros_like(y), "mean": y.mean(0).expand_as(y)}
    losses = {"ce": ce(plain)}
    for kind, state in new.items():
        log_q = log_probabilities(model, rows, write, state, used)
        losses[f"ce_{kind}"] = ce(log_q)
        losses[f"kl_{kind}"] = (plain.exp() * (plain - log_q)).sum(-1)
        if kind == "spliced":
            losses["agreement"] = (plain.argmax(-1) == log_q.argmax(-1)).double()

    def holds(part, mask):
        mean = {key: value[mask].mean().item() for key, value in losses.items()}
        assert part.tokens == int(mask.sum())
        for key, value in mean.items():
            assert getattr(part, key) == pytest.approx(value, rel=1e-9), key
        assert part.delta_ce == pytest.approx(mean["ce_spliced"] - mean["ce"], rel=1e-6)
        for base, end in (("zero", ""), ("mean", "_mean")):
            gap = mean[f"ce_{base}"] - mean["ce"]
            expected = (mean[f"ce_{base}"] - mean["ce_spliced"]) / gap
            assert getattr(part, f"ce_recovered{end}") == pytest.approx(expected, rel=1e-6)
            expected = 1 - mean["kl_spliced"] / mean[f"kl_{base}"]
            assert getattr(part, f"kl_recovered{end}") == pytest.approx(expected, rel=1e-6)

    holds(found, scored)
    column = torch.arange(CONTEXT - 1).expand_as(scored)
    assert [(p.start, p.stop) for p in found.positions] == [(0, 5), (5, 12), (12, CONTEXT)]
    for part in found.positions:
        holds(part, scored & (column >= part.start) & (column < part.stop))


@torch.no_grad()
@pytest.mark.parametrize("case", [("topk",), ("relu", "none", "transcoder_square")])
def test_a_splice_is_that_of_attach(case):
    model, sae, rows = tiny("llama"), a_case(*case).float(), some_rows()
    found = downstream_report(model, sae, rows, batch=2, **QUIET)
    with attach(model, sae, splice=True) as attachment:
        logits = model(rows).logits
        fvu = attachment.report()[str(sae.hookpoint)].fvu
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert found.ce_spliced == pytest.approx(ce.item(), rel=1e-6)
    clean = model(rows).logits
    same = (clean.argmax(-1) == logits.argmax(-1))[:, :-1].double().mean()
    assert found.agreement == pytest.approx(same.item())
    assert reconstruction_report(model, sae, rows, **QUIET).fvu == pytest.approx(fvu, rel=1e-5)


def numbers(part):
    return {k: v for k, v in part.to_dict().items() if k != "positions"}


def test_batches_and_slices_of_any_size_give_the_same(model, monkeypatch):
    sae, rows = a_case("jumprelu"), some_rows()
    whole = numbers(downstream_report(model, sae, rows, special=five, batch=5, **QUIET))
    for batch, most, slice_ in ((2, 2**28, 2**24), (5, 3 * CONTEXT * VOCAB, 7 * VOCAB), (1, 1, 1)):
        monkeypatch.setattr(splices, "LOGITS", most)
        monkeypatch.setattr(splices, "SLICE", slice_)
        part = numbers(downstream_report(model, sae, rows, special=five, batch=batch, **QUIET))
        assert part == pytest.approx(whole, rel=1e-9)


def test_buckets_add_up_to_the_total(model):
    found = downstream_report(model, a_case(), some_rows(), special=five, **QUIET)
    assert sum(p.tokens for p in found.positions) == found.tokens == 5 * (CONTEXT - 1)
    for field in dataclasses.fields(Losses):
        if field.name.startswith(("ce", "kl", "agreement")) and "recovered" not in field.name:
            total = sum(p.tokens * getattr(p, field.name) for p in found.positions)
            assert total / found.tokens == pytest.approx(getattr(found, field.name), rel=1e-12)


def test_saes_at_one_place_share_passes_and_do_not_meet(model):
    calls, rows = [], some_rows()
    saes = [a_case("topk"), a_case("relu"), a_case("relu", "none", "transcoder_square")]
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    together = measure(model, saes, rows, batch=5, special=five, **QUIET)
    assert len(calls) == 1 + 3 + 2 * 2  # clean, three splices, two baselines at each of two places
    handle.remove()
    for sae, one in zip(saes, together, strict=True):
        alone = downstream_report(model, sae, rows, batch=5, special=five, **QUIET)
        assert one.downstream == alone
        report = reconstruction_report(model, sae, rows, batch=5, special=five, **QUIET)
        assert one.reconstruction == report
    json.dumps(together[0].to_dict(), allow_nan=False)


def test_padding_is_in_no_statistic(model):
    sae, rows = a_case("relu"), some_rows()
    (found,) = measure(model, [sae], rows, special=five, padding=tail, batch=5, **QUIET)
    left_out = splices.either(five, tail)
    alone = reconstruction_report(model, sae, rows, special=left_out, batch=5, **QUIET)
    assert found.reconstruction == alone
    blank = rows.masked_fill(tail(rows), 0)  # whatever stands there
    (other,) = measure(model, [sae], blank, special=five, padding=tail, batch=5, **QUIET)
    assert other.downstream == found.downstream


def test_the_model_is_left_as_it_was(model):
    rows = some_rows()
    before = model(rows).logits
    downstream_report(model, a_case(), rows, **QUIET)
    assert torch.equal(model(rows).logits, before)


def a_perfect_one():
    both = torch.cat([torch.eye(HIDDEN), -torch.eye(HIDDEN)])
    return SAE.from_weights(both, both, activation=TopK(2 * HIDDEN), hookpoint="resid_post.0")


def test_a_perfect_and_a_useless_sae():
    model, rows, eye = tiny("gpt2"), some_rows(), torch.eye(HIDDEN)
    found = downstream_report(model, a_perfect_one(), rows, **QUIET)
    assert found.agreement == 1 and found.kl_spliced < 1e-9
    assert found.ce_recovered == pytest.approx(1, abs=1e-4)
    assert found.kl_recovered_mean == pytest.approx(1, abs=1e-4)
    silent = SAE.from_weights(
        eye, eye, torch.full((HIDDEN,), -1e6), activation=TopK(2), hookpoint="resid_post.0"
    )
    found = downstream_report(model, silent, rows, **QUIET)
    assert found.ce_recovered == 0 and found.kl_recovered == 0
    metrics = evaluate(model, silent, rows)
    assert metrics.dead == 1 and metrics.l0 == 0 and sum(metrics.density) == 0


@pytest.mark.parametrize("case", [("topk",), ("relu", "none", "transcoder_square")])
def test_the_metrics_of_training_are_those_of_the_reports(model, case):
    sae, rows = a_case(*case), some_rows()
    found = evaluate(model, sae, rows, batch=3, special=five)
    (one,) = measure(model, [sae], rows, special=five, **QUIET)
    for field in dataclasses.fields(found):
        in_first = hasattr(one.reconstruction, field.name)
        expected = getattr(one.reconstruction if in_first else one.downstream, field.name)
        assert getattr(found, field.name) == pytest.approx(expected, rel=1e-9), field.name


def test_a_bfloat16_model_and_tokens_it_rules_out():
    model, sae, rows = tiny("llama").to(torch.bfloat16), a_case().float(), some_rows()
    wide = downstream_report(tiny("llama").double(), a_case(), rows, **QUIET)
    found = downstream_report(model, sae, rows, **QUIET)
    assert found.ce_zero == pytest.approx(wide.ce_zero, rel=0.02)
    never = next(i for i in range(VOCAB) if i not in set(rows.flatten().tolist()))

    def drop(module, args, out):
        out.logits[..., never] = -torch.inf

    handle = model.register_forward_hook(drop)
    found = downstream_report(model, sae, rows, **QUIET)
    handle.remove()
    assert math.isfinite(found.kl_spliced) and found.kl_spliced > 0


def test_an_offloaded_model_has_the_same_losses():
    accelerate = pytest.importorskip("accelerate")
    away = accelerate.cpu_offload(tiny("gpt2").double(), execution_device=torch.device("cpu"))
    found, want = (
        downstream_report(m, a_case(), some_rows(), **QUIET) for m in (away, tiny("gpt2").double())
    )
    assert found == want


def test_refusals(model):
    with pytest.raises(ValueError, match="2 tokens or more in each"):
        downstream_report(model, a_case(), some_rows(context=1), **QUIET)
    with pytest.raises(TypeError, match="expected token ids"):
        downstream_report(model, a_case(), torch.full((2, 4), math.nan), **QUIET)
    with pytest.raises(ValueError, match="no token is left"):
        downstream_report(model, a_case(), some_rows(), padding=lambda r: r >= 0, **QUIET)
    with pytest.raises(ValueError, match="no prediction is left"):  # a token here and there
        every_other = lambda r: (torch.arange(CONTEXT) % 2 == 0).expand_as(r)  # noqa: E731
        downstream_report(model, a_case(), some_rows(), padding=every_other, **QUIET)
    with pytest.raises(ValueError, match="training mode"):
        downstream_report(tiny("gpt2").train(), a_case(), some_rows(), **QUIET)
    with attach(model, a_case(), splice=True), pytest.raises(ValueError, match="attached"):
        downstream_report(model, a_case(), some_rows(), **QUIET)
    broken = tiny("gpt2").double()
    with torch.no_grad():
        broken.transformer.h[2].mlp.c_proj.bias[3] = math.nan  # after the SAE
    with pytest.raises(ValueError, match="losses around resid_post.1 have NaN"):
        downstream_report(broken, a_case(), some_rows(), **QUIET)


def test_a_tuned_model_is_measured_beside_its_base(model):
    tuned, sae, rows = tiny("gpt2").double(), a_case(), some_rows()
    with torch.no_grad():
        for p in tuned.transformer.h[0].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    found = transfer_report(model, tuned, sae, rows, tuned_rows=rows[:3], special=five, **QUIET)
    (base,) = measure(model, [sae], rows, special=five, **QUIET)
    (after,) = measure(tuned, [sae], rows[:3], special=five, **QUIET)
    assert (found.base, found.tuned) == (base, after)
    change = after.reconstruction.fvu - base.reconstruction.fvu
    assert change != 0 and found.difference["fvu"] == change
    assert found.difference["dead"] == after.reconstruction.dead - base.reconstruction.dead
    assert found.difference["agreement"] == after.downstream.agreement - base.downstream.agreement
    assert "tokens" not in found.difference and "positions" not in found.difference
    json.dumps(found.to_dict(), allow_nan=False)
    same = transfer_report(model, model, sae, rows, **QUIET)
    assert set(same.difference.values()) == {0.0}
    with pytest.raises(ValueError, match="reads width"):
        transfer_report(model, model, a_case(d_in=10), rows, **QUIET)
