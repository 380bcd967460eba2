"""Refinement: its optimum, what it is of, and the refined reconstruction on a live model."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sae_cases
import torch
from sae_cases import ACTIVATIONS, KINDS, TRANSFORMS
from test_attach import IDS, LATENTS, logits, make_sae, state_of, stream
from tiny_models import HIDDEN, tiny
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from saert import (
    SAE,
    ReLU,
    SparseCode,
    TopK,
    ablate,
    active,
    add,
    attach,
    clamp,
    refine,
    save,
    scale,
)
from saert.cli import app
from saert.edits import apply
from saert.hub import bundled
from saert.kernels.refine import refine as sweeps
from saert.kernels.refit import active_set, refit
from saert.measure.passes import sites
from saert.measure.reports.refinement import refinement_report
from saert.refine import refit as refit_code
from saert.refine import unexplained
from saert.transforms import LayerNorm, UnitNorm

F64 = torch.float64


def scipy_residuals(rows, used, target):
    """‖target − z·rows‖ at the optimum, token by token: rows [T, k, d], used [T, k] -> [T]."""
    nnls = pytest.importorskip("scipy.optimize").nnls
    found = []
    for t in range(len(target)):
        if not used[t].any():  # scipy 1.17 crashes without columns
            found.append(float(target[t].norm()))
            continue
        A, b = rows[t][used[t]].double().T.contiguous(), target[t].double()
        found.append(nnls(A.numpy(), b.numpy(), maxiter=10_000)[1])
    return torch.tensor(found, dtype=F64)


def residuals(rows, values, target):
    error = target.double() - (values.double().unsqueeze(-2) @ rows.double()).squeeze(-2)
    return error.norm(dim=-1)


def random_sae(num_latents, d, *, common=0.0, activation=None, dtype=F64, seed=0):
    """Rows that share `common` times one direction, of unequal norms."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(num_latents, d, generator=generator, dtype=F64)
    W = F.normalize(W + common * W[:1] * d**0.5 / W[:1].norm(), dim=-1)
    size = 0.5 + torch.rand(num_latents, 1, generator=generator, dtype=F64)
    b_dec = torch.randn(d, generator=generator, dtype=F64)
    weights = (W / size, W * size, torch.zeros(num_latents, dtype=F64), b_dec)
    return SAE.from_weights(
        *(w.to(dtype) for w in weights), activation=activation or ReLU(), hookpoint="resid_post.1"
    )


# -- the optimum -----------------------------------------------------------------------------------

SHAPES = [(1, 24), (4, 24), (16, 24), (24, 24), (40, 24)]  # k, d: few, as many as d, and more


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("common", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_residuals_are_those_of_nnls(k, d, common, dtype):
    sae = random_sae(96, d, common=common, activation=TopK(k), dtype=dtype)
    x = torch.randn(25, d, dtype=dtype) + sae.b_dec
    found = refine(sae, x)
    rows, target = sae.W_dec[found.code.indices], x - sae.b_dec
    used = sae.encode(x).values > 0
    best = scipy_residuals(rows, used, target)
    gap = (residuals(rows, found.code.values, target) - best) / target.norm(dim=-1)
    assert found.converged and gap.abs().max() < 1e-3
    start = (residuals(rows, sae.encode(x).values, target) - best) / target.norm(dim=-1)
    assert start.max() > 0.01 or k == 1  # W_enc's rows are W_dec's: one alone is right already


@pytest.mark.parametrize("seed", range(3))
def test_more_active_latents_than_dimensions(seed):
    """Half of a random ReLU dictionary fires: coordinate descent alone is off by up to 1e-2."""
    sae = random_sae(64, 16, seed=seed)
    x = torch.randn(30, 16, dtype=F64) + sae.b_dec
    found, code = refine(sae, x), sae.encode(x)
    rows, target = sae.W_dec[code.indices], x - sae.b_dec
    best = scipy_residuals(rows, code.values > 0, target)
    gap = (residuals(rows, found.code.values, target) - best) / target.norm(dim=-1)
    assert found.converged and gap.abs().max() < 1e-3
    alone = sweeps(code.indices, code.values, sae.W_dec, target, max_steps=100, tol=1e-5)
    assert (alone.residual > 1e-5).any() and found.steps.max() < 300


def test_projected_gradient_reaches_the_same_point():
    """The paper's way to it: z ← max(0, z + η D(t − Dᵀz)), η = 1/λ_max."""
    sae = random_sae(32, 20, common=1.0, activation=TopK(6))
    x = torch.randn(8, 20, dtype=F64) + sae.b_dec
    code = sae.encode(x)
    rows, target = sae.W_dec[code.indices], (x - sae.b_dec).unsqueeze(-2)
    z, step = code.values, 1 / torch.linalg.eigvalsh(rows @ rows.mT)[:, -1:]
    for _ in range(20_000):
        slope = ((target - z.unsqueeze(-2) @ rows) @ rows.mT).squeeze(-2)
        z = (z + step * slope * (code.values > 0)).clamp_min(0)
    torch.testing.assert_close(refine(sae, x, tol=1e-9).code.values, z, atol=1e-6, rtol=1e-5)


def test_the_active_set_method_never_makes_it_worse_and_stops_at_the_optimum():
    rows = F.normalize(torch.randn(20, 30, 12, dtype=F64), dim=-1)
    gram, linear = rows @ rows.mT, (rows @ torch.randn(20, 12, 1, dtype=F64)).squeeze(-1)
    gram[:, 3], gram[:, :, 3], linear[:, 3] = 0, 0, 0  # an unused slot

    def height(y):
        return ((y.unsqueeze(-2) @ gram).squeeze(-2) / 2 - linear).mul(y).sum(-1)

    start = torch.rand(20, 30, dtype=F64)
    start[:, 3] = 0
    heights = [height(active_set(gram, linear, start, n, 1e-9)[0]) for n in range(12)]
    assert all((b <= a + 1e-12).all() for a, b in zip(heights, heights[1:], strict=False))
    y, left, steps = active_set(gram, linear, start, 1000, 1e-9)
    slope = linear - (gram @ y.unsqueeze(-1)).squeeze(-1)
    assert left.max() <= 1e-9 and steps.max() < 200 and not y[:, 3].any()
    assert y.min() >= 0 and slope.max() <= 1e-9 and torch.minimum(y, -slope).max() <= 1e-9


def test_unfinished_tokens_are_told():
    sae = random_sae(64, 16)
    x = torch.randn(20, 16, dtype=F64)
    none = refine(sae, x, max_steps=0)
    assert torch.equal(none.code.values, sae.encode(x).values) and not none.converged
    few = refine(sae, x, max_steps=3)
    assert not few.converged and few.steps.max() == 3
    assert refine(sae, x).fvu_after < few.fvu_after < none.fvu_after == none.fvu_before


# -- what is refined -------------------------------------------------------------------------------


def problem(sae, tokens=(2, 6), dtype=F64):
    x = sae_cases.inputs(*tokens, dtype=dtype)
    target = torch.randn(*tokens, sae.d_out, dtype=F64).to(dtype)
    return (x, target) if sae.is_transcoder else (x, None)


def what_latents_write(sae, x, y):
    """What is left for latents, in the SAE's units, from `sae_cases`' formulas in float64."""
    x, y = x.double(), y.double()
    _, shift, scale = sae_cases.transformed(sae, x)
    if sae.W_skip is not None:
        y = y - x @ sae.W_skip.double().T
    if sae.is_transcoder:
        shift, scale = 0.0, 1.0
    elif isinstance(sae.input_transform, LayerNorm):  # its way in divides by std + eps
        scale = scale + sae.input_transform.eps
    return (y - shift) / scale - sae.b_dec.double()


COMBINATIONS = [(act, transform, "sae") for act in ACTIVATIONS for transform in TRANSFORMS]
COMBINATIONS += [
    ("relu", transform, kind) for kind in KINDS if kind != "sae" for transform in TRANSFORMS
]


@pytest.mark.parametrize(("act", "transform", "kind"), COMBINATIONS)
def test_every_kind_of_sae_is_refined_in_its_own_units(act, transform, kind):
    sae = sae_cases.make(act, transform, kind)
    x, target = problem(sae)
    found = refine(sae, x, target=target)
    y = x if target is None else target
    code = sae.encode(x)
    assert torch.equal(found.code.indices, code.indices)
    assert not found.code.values[code.values == 0].any() and found.code.values.min() >= 0
    t, rows = what_latents_write(sae, x, y), sae.W_dec[code.indices]
    if kind != "sae_skip":  # eps and a skip path do not commute
        torch.testing.assert_close(unexplained(sae, x, y), t, atol=1e-9, rtol=1e-9)
    slope = ((t.unsqueeze(-2) - found.code.values.unsqueeze(-2) @ rows) @ rows.mT).squeeze(-2)
    slope = slope / (rows.norm(dim=-1) * t.norm(dim=-1, keepdim=True))
    used, z = code.values > 0, found.code.values * rows.norm(dim=-1) / t.norm(dim=-1, keepdim=True)
    assert (slope[used] < 1e-4).all() and (torch.minimum(z, -slope)[used] < 1e-4).all()
    for fvu, values in ((found.fvu_before, code.values), (found.fvu_after, found.code.values)):
        dense = SparseCode(code.indices, values, code.num_latents).to_dense()
        estimate = sae_cases.reconstruct(sae, dense, x).flatten(0, 1)
        spread = (y - y.flatten(0, 1).mean(0)).square().sum()
        assert fvu == pytest.approx(
            float((y.flatten(0, 1) - estimate).square().sum() / spread), rel=1e-6
        )
    assert found.fvu_after < found.fvu_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["sae", "transcoder_skip"])
def test_weights_of_less_precision(kind, dtype):
    sae = sae_cases.make("relu", "layer_norm", kind, dtype=dtype)
    x, target = problem(sae, dtype=dtype)
    found = refine(sae, x, target=target)
    assert found.code.values.dtype == torch.float32 and found.fvu_after < found.fvu_before
    exact = copy.deepcopy(sae).double()
    y = x if target is None else target
    best = refine(
        exact, x.double(), sae.encode(x).to(F64), target=None if target is None else y.double()
    )
    tight = 1e-4 if dtype == torch.float32 else 0.02
    assert found.fvu_after == pytest.approx(best.fvu_after, abs=tight)


def test_shrinkage_is_the_relative_change_weighted_by_strength():
    sae = random_sae(48, 16, activation=TopK(5))
    x = torch.randn(40, 16, dtype=F64) + sae.b_dec
    code = sae.encode(x)
    half = SparseCode(code.indices, code.values / 2, code.num_latents)
    found, from_half = refine(sae, x, code, tol=1e-9), refine(sae, x, half, tol=1e-9)
    torch.testing.assert_close(from_half.code.values, found.code.values, atol=1e-6, rtol=1e-6)
    assert 1 + from_half.shrinkage == pytest.approx(2 * (1 + found.shrinkage), rel=1e-5)
    total = [
        sum(
            float(c.values[t, j] * sae.W_dec[c.indices[t, j]].norm())
            for t in range(40)
            for j in range(5)
        )
        for c in (code, found.code)
    ]
    assert found.shrinkage == pytest.approx(total[1] / total[0] - 1, rel=1e-9)
    # the dictionary's scale is no activation: f·c with W_dec/c says the same
    other = SAE.from_weights(sae.W_enc * 3, sae.W_dec / 3, sae.b_enc, sae.b_dec, activation=TopK(5))
    assert refine(other, x, tol=1e-9).shrinkage == pytest.approx(found.shrinkage, rel=1e-6)


def test_a_true_sparse_code_is_found_again():
    sae = random_sae(64, 32, activation=TopK(4))
    truth = SparseCode(torch.rand(50, 64).topk(4).indices, torch.rand(50, 4, dtype=F64) + 0.1, 64)
    x = sae.decode(truth)
    shrunk = SparseCode(truth.indices, truth.values * 0.7, 64)
    found = refine(sae, x, shrunk, tol=1e-10)
    torch.testing.assert_close(found.code.values, truth.values, atol=1e-7, rtol=1e-7)
    assert found.shrinkage == pytest.approx(1 / 0.7 - 1, rel=1e-6) and found.fvu_after < 1e-12


def test_slots_that_are_unused_or_name_a_latent_twice():
    sae = random_sae(16, 8)
    x = torch.randn(3, 8, dtype=F64) + sae.b_dec
    indices = torch.tensor([[0, 3, 0, 0], [3, 3, 5, 0], [0, 0, 0, 0]])
    values = torch.tensor([[1.0, 2, 0, 0], [0.5, 0.5, 1, 0], [0, 0, 0, 0]], dtype=F64)
    found = refine(sae, x, SparseCode(indices, values, 16), tol=1e-9).code
    alone = refine(sae, x[:1], SparseCode(indices[:1, :2], values[:1, :2], 16), tol=1e-9).code
    torch.testing.assert_close(found.values[0], F.pad(alone.values[0], (0, 2)))
    twice = refine(
        sae, x[1:2], SparseCode(torch.tensor([[3, 5]]), torch.ones(1, 2, dtype=F64), 16), tol=1e-9
    )
    torch.testing.assert_close(found[1:2].to_dense(), twice.code.to_dense(), atol=1e-7, rtol=1e-7)
    assert not found.values[2].any()


def test_tokens_that_say_nothing():
    sae = sae_cases.make("relu", "layer_norm")
    one = refine(sae, sae_cases.inputs())
    assert one.code.shape == (one.code.k,) and one.fvu_before != one.fvu_before
    none = refine(sae, torch.zeros(0, sae.d_in, dtype=F64))
    assert none.code.shape[0] == 0 and none.shrinkage != none.shrinkage and none.converged
    flat = refine(sae, torch.ones(3, sae.d_in, dtype=F64))  # no variance to normalise by
    assert flat.code.values.isfinite().all() and flat.fvu_after != flat.fvu_after
    zero = refine(sae_cases.make("relu", "unit_norm"), torch.zeros(3, sae.d_in, dtype=F64))
    assert zero.code.values.isfinite().all()


def negative(code):
    return SparseCode(code.indices, code.values - 10, code.num_latents)


def elsewhere(code):
    return SparseCode(code.indices + 1000, code.values, code.num_latents)


def broken(x):
    x = x.clone()
    x[0, 0, 0] = torch.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (lambda s, x, c: dict(x=x[..., :5]), r"expected floating \[\*tokens, 10\]"),
        (lambda s, x, c: dict(x=x.long()), "torch.int64"),
        (lambda s, x, c: dict(x=broken(x)), "1 of 12 tokens of x have a NaN"),
        (lambda s, x, c: dict(x=x.to("meta")), "x is on meta, but the SAE is on cpu"),
        (lambda s, x, c: dict(x=x, code=c[0]), "does not belong to x"),
        (lambda s, x, c: dict(x=x, code=SparseCode(c.indices, c.values, 99)), "24 latents"),
        (lambda s, x, c: dict(x=x, code=negative(c)), "negative, NaN or infinite"),
        (lambda s, x, c: dict(x=x, code=elsewhere(c)), "latents 1000 to"),
        (lambda s, x, c: dict(x=x, target=x), "target= is for transcoders"),
        (lambda s, x, c: dict(x=x, max_steps=-1), "max_steps is -1"),
        (lambda s, x, c: dict(x=x, tol=float("nan")), "tol is nan"),
    ],
)
def test_what_is_refused(arguments, complaint):
    sae = sae_cases.make("topk")
    x = sae_cases.inputs(2, 6)
    with pytest.raises(ValueError, match=complaint):
        refine(sae, **arguments(sae, x, sae.encode(x)))


def test_a_transcoder_needs_its_target():
    sae = sae_cases.make("relu", "none", "transcoder")
    x, target = problem(sae)
    with pytest.raises(ValueError, match=r"hidden state at mlp_out.0; pass it as target="):
        refine(sae, x)
    with pytest.raises(ValueError, match=r"target is .*expected floating \[\*tokens, 7\]"):
        refine(sae, x, target=x)
    with pytest.raises(ValueError, match="the same tokens"):
        refine(sae, x, target=target[:1])


# -- attached --------------------------------------------------------------------------------------


def refined_stream(model, sae, x, target=None):
    """The reconstruction that a refined splice writes."""
    found = refine(sae, x, target=target)
    return found.code, sae.decode(found.code, x)


@pytest.mark.parametrize("activation", ["topk", "relu", "gated"])
@pytest.mark.parametrize("transform", [None, LayerNorm(), UnitNorm()])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_refined_reconstruction_is_spliced_and_its_code_recorded(name, transform, activation):
    model, sae = tiny(name), make_sae(activation=activation, input_transform=transform)
    before, untouched = logits(model), state_of(model)
    x = stream(model, "resid_post.1")
    code, want = refined_stream(model, sae, x)
    with attach(model, sae, splice=True, refine=True) as attachment:
        torch.testing.assert_close(stream(model, "resid_post.1"), want, atol=2e-5, rtol=1e-4)
        seen = attachment.codes["resid_post.1"]
        torch.testing.assert_close(seen.to_dense(), code.to_dense(), atol=2e-5, rtol=1e-4)
        report = attachment.report()["resid_post.1"]
    found = refine(sae, x)
    assert report.fvu == pytest.approx(found.fvu_after, rel=1e-3)
    assert report.fvu < found.fvu_before and report.tokens == IDS.numel()
    assert torch.equal(logits(model), before) and state_of(model) == untouched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observing_refined_codes_leaves_the_model_as_it_is(dtype):
    model, sae = tiny("gpt2").to(dtype), make_sae()
    before = logits(model)
    with attach(model, sae, refine=True) as attachment:
        assert torch.equal(logits(model), before)
        refined = attachment.codes["resid_post.1"]
        attachment.refine = False
        assert torch.equal(logits(model), before)
        plain = attachment.codes["resid_post.1"]
    assert torch.equal(refined.indices, plain.indices)
    assert not torch.allclose(refined.values, plain.values, atol=1e-3)
    assert attachment.codes["resid_post.1"] is plain


def test_refine_is_read_and_assigned_like_splice():
    model, saes = tiny("gpt2"), [make_sae("resid_post.0"), make_sae("resid_post.1")]
    with attach(model, saes, splice=True, refine="blocks.1.hook_resid_post") as attachment:
        assert [str(at) for at in attachment.refine] == ["resid_post.1"]
        one = logits(model)
        attachment.refine = True
        assert [str(at) for at in attachment.refine] == ["resid_post.0", "resid_post.1"]
        both = logits(model)
        attachment.refine = ()
        neither = logits(model)
        attachment.splice = False
        attachment.refine = ["resid_post.0"]
        assert torch.equal(logits(model), logits(model))
        with pytest.raises(ValueError, match=r"refine: resid_post.2 is not attached"):
            attachment.refine = "resid_post.2"
        assert [str(at) for at in attachment.refine] == ["resid_post.0"]
    assert not torch.equal(one, both) and not torch.equal(one, neither)
    with pytest.raises(RuntimeError, match="refine a detached attachment"):
        attachment.refine = True
    clean = state_of(model)
    with pytest.raises(ValueError, match="not attached"):
        attach(model, saes[0], refine="mlp_out.0")
    assert state_of(model) == clean


@pytest.mark.parametrize("spliced", [True, False])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_edits_act_on_the_refined_code(activation, spliced):
    model, sae = tiny("llama"), make_sae(activation=activation)
    x = stream(model, "resid_post.1")
    code, reconstruction = refined_stream(model, sae, x)
    latent = int(code.indices[0, 0, 0])
    edits = [scale(latent, 3.0), clamp(5, 1.5, when=active(latent)), add(7, 0.5), ablate(9)]
    change = (apply(edits, code).to_dense() - code.to_dense()) @ sae.W_dec
    want = (reconstruction if spliced else x) + change
    for record in (False, "last"):
        with attach(model, sae, edits, splice=spliced, refine=True, record=record):
            torch.testing.assert_close(stream(model, "resid_post.1"), want, atol=5e-5, rtol=1e-4)


def test_a_transcoder_is_refitted_to_what_the_model_writes():
    model = tiny("gpt2")
    sae = make_sae("mlp_in.1", "relu", target_hookpoint="mlp_out.1")
    x, y = stream(model, "mlp_in.1"), stream(model, "mlp_out.1")
    code, want = refined_stream(model, sae, x, y)
    with attach(model, sae, splice=True, refine=True) as attachment:
        torch.testing.assert_close(stream(model, "mlp_out.1"), want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            attachment.codes["mlp_in.1"].to_dense(), code.to_dense(), atol=2e-5, rtol=1e-4
        )
    module = model.get_submodule(sae.target_hookpoint.resolve(model).path)

    def overflow(module, args, out):
        return torch.full_like(out, torch.inf)

    handle = module.register_forward_hook(overflow, prepend=True)
    with attach(model, sae, refine=True):
        module._forward_hooks.move_to_end(handle.id, last=False)
        with pytest.raises(ValueError, match="contains NaN or inf"):
            logits(model)
    handle.remove()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_generating_with_a_cache_is_a_full_forward_again(activation):
    model, sae = tiny("llama"), make_sae(activation=activation)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])  # left padding
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    options |= dict(eos_token_id=None)
    with attach(model, sae, splice=True, refine=True, record="all") as attachment:
        cached = model.generate(IDS, **options)
        codes = attachment.codes["resid_post.1"]
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
        attachment.clear()
        whole = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
        logits(model, cached[:, :-1], attention_mask=whole)
        again = attachment.codes["resid_post.1"]
    assert not codes.values[0, :2].any()
    torch.testing.assert_close(codes.to_dense(), again.to_dense(), atol=1e-3, rtol=1e-3)
    with attach(model, sae, splice=True):
        unrefined = model.generate(IDS, **options)
    assert not torch.equal(cached, unrefined)


def test_padding_of_any_value_does_no_harm():
    model, sae = tiny("gpt2"), make_sae()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])

    def spoil(module, args, out):
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden.masked_fill(~mask.bool()[..., None], torch.nan)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    with attach(model, sae, splice=True, refine=True) as attachment:
        handle = model.transformer.h[1].register_forward_hook(spoil, prepend=True)
        model.transformer.h[1]._forward_hooks.move_to_end(handle.id, last=False)
        assert logits(model, attention_mask=mask)[1].isfinite().all()
        assert attachment.report()["resid_post.1"].tokens == 12
        assert not attachment.codes["resid_post.1"].values[0, :2].any()
        handle.remove()


def test_gradients_are_refused_through_refined_activations_and_flow_beside_them():
    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae, splice=True, refine=True) as attachment:
        loss = model(IDS, labels=IDS).loss
        with pytest.raises(RuntimeError, match="refined activations are not differentiable"):
            loss.backward()
        model.requires_grad_(False)
        amount = torch.tensor(0.5, requires_grad=True)
        attachment.edits = add(3, amount)
        model(IDS, labels=IDS).loss.backward()
    step = 1e-2
    with attach(model, sae, splice=True, refine=True) as attachment, torch.no_grad():
        ends = []
        for value in (0.5 - step, 0.5 + step):
            attachment.edits = add(3, value)
            ends.append(model(IDS, labels=IDS).loss.item())
    assert amount.grad.item() == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=0.02)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_compiled_models_run_refined(activation):
    """TopK without a break in the graph; others with one, and refused without."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN))
    x = torch.randn(2, 7, HIDDEN)
    with (
        torch.no_grad(),
        attach(model, make_sae("0", activation), splice=True, refine=True) as attachment,
    ):
        want, codes = model(x), attachment.codes["0"]
        attachment.clear()
        compiled = torch.compile(model, backend="eager", fullgraph=activation == "topk")
        torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(attachment.codes["0"].to_dense(), codes.to_dense())
        assert attachment.report()["0"].tokens == 14
        attachment.refine = False
        assert not torch.allclose(compiled(x), want, atol=1e-3)
        if activation == "relu":
            attachment.refine = True
            with pytest.raises(Exception, match="raise NotImplementedError"):
                torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_the_operator_has_a_fake_and_runs_under_autocast():
    sae = random_sae(48, 16, dtype=torch.float32, activation=TopK(5))
    x = torch.randn(4, 16)
    code, t = sae.encode(x), x - sae.b_dec
    inputs = (code.indices, code.values, sae.W_dec.detach(), t, 50, 1e-5)
    torch.library.opcheck(torch.ops.saert.refit.default, inputs)
    want = refit(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        again = refit_code(sae, code, x, x, 50, 1e-5)
    assert torch.equal(want.values, again.values)


# -- over text -------------------------------------------------------------------------------------


def test_the_report_over_text_is_what_refine_and_attach_say():
    model, sae = tiny("gpt2"), make_sae(activation="relu")
    rows = torch.randint(3, 97, (5, 9))
    x = stream(model, "resid_post.1", rows)
    found = refinement_report(model, sae, rows, batch=2, progress=False)
    want, code = refine(sae, x), sae.encode(x)
    assert found.fvu == pytest.approx(want.fvu_before, rel=1e-5)
    assert found.fvu_refined == pytest.approx(want.fvu_after, rel=1e-3)
    assert found.shrinkage == pytest.approx(want.shrinkage, rel=1e-3)
    assert found.l0 == pytest.approx(float(code.l0().double().mean()))
    assert found.l0_refined <= found.l0 and found.tokens == 45 and found.unfinished == 0
    assert found.residual <= 1e-5

    def losses(clean, new):
        p, q = (t[:, :-1].double().log_softmax(-1) for t in (clean, new))
        ce = F.nll_loss(q.flatten(0, 1), rows[:, 1:].flatten())
        return float(ce), float((p.exp() * (p - q)).sum(-1).mean())

    bare = logits(model, rows)
    assert found.ce == pytest.approx(losses(bare, bare)[0], rel=1e-5)
    for refined, ce, kl in (
        (False, found.ce_spliced, found.kl_spliced),
        (True, found.ce_refined, found.kl_refined),
    ):
        with attach(model, sae, splice=True, refine=refined):
            assert losses(bare, logits(model, rows)) == pytest.approx((ce, kl), rel=1e-3)
    assert refinement_report(model, sae, rows, progress=False).ce_refined == pytest.approx(
        found.ce_refined, rel=1e-5
    )


def test_the_report_leaves_special_tokens_alone():
    model = tiny("gpt2")
    sae = make_sae("mlp_in.1", "topk", target_hookpoint="mlp_out.1")
    rows = torch.randint(3, 97, (3, 8))
    rows[:, 0] = 1
    found = refinement_report(
        model, sae, rows, special=lambda part: part == 1, progress=False, max_steps=2
    )
    assert found.tokens == 21 and found.unfinished > 0 and found.residual > 1e-5
    assert sites(sae)[0] != sites(sae)[1] and found.fvu_refined < found.fvu
    with pytest.raises(ValueError, match="no token is left"):
        refinement_report(model, sae, rows, special=lambda part: part > 0, progress=False)


def test_an_encoder_that_shrinks_is_told_from_one_that_does_not():
    """Activations of the bundled TopK SAE are right on average; 0.8 times them are not."""
    sae, model = bundled.sae("resid_post.2"), bundled.model()
    ids = bundled.tokenizer()("Once upon a time there was a small dog who ran", return_tensors="pt")
    x = stream(model, "resid_post.2", ids["input_ids"])[:, 1:]
    code = sae.encode(x)
    shrunk = SparseCode(code.indices, 0.8 * code.values, code.num_latents)
    assert abs(refine(sae, x, code).shrinkage) < 0.06
    assert 0.2 < refine(sae, x, shrunk).shrinkage < 0.33


# -- the command -----------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["refine", *map(str, arguments)])


def test_the_command_prints_the_report(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a big dog. The dog saw a cat in the tree. " * 40)
    options = ["--data", text, "--rows", 2, "--context", 32, "--no-progress", "--device", "cpu"]
    done = command("bundled:resid_post.2", *options, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["hookpoint"] == "resid_post.2" and found["text"] == str(text)
    assert 0 < found["fvu_refined"] < found["fvu"] and found["unfinished"] == 0
    assert found["kl_refined"] > 0 and abs(found["shrinkage"]) < 0.1
    shown = command("bundled:resid_post.2", *options)
    assert shown.exit_code == 0 and "shrinkage" in shown.output and "refined" in shown.output
    assert f"{found['fvu_refined']:.4f}" in shown.output


def test_the_command_refuses_what_does_not_fit(tmp_path):
    other = make_sae(at="resid_post.1", width=HIDDEN)
    assert other.num_latents == LATENTS
    save(other, tmp_path / "sae")
    done = command(tmp_path / "sae", "--model", "bundled", "--rows", 1, "--context", 8)
    assert done.exit_code == 2 and "width 32" in done.stderr


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    text = tmp_path / "text.jsonl"
    story = "Once upon a time, Tom saw {} birds in the tree. He was happy to see them fly away."
    text.write_text("\n".join(json.dumps({"text": story.format(i)}) for i in range(1500)))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "benchmarks/refinement.py", "--quick", "--data", str(text)],
        cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("ReLU, L1 λ 0.05", "Gated", "JumpReLU", "BatchTopK", "TopK, k 4"):
        assert name in done.stdout
