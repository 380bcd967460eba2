"""verify: planted mistakes are caught and named, right SAEs pass, inputs of every kind are read."""

import json
import math
import re
import warnings

import pytest
import sae_cases
import torch
from fault_cases import FAULTS, RIGHT, measured, model, rows, topk, trained
from tiny_models import tiny

from saert import FormatError, VerificationError, load, save, verify
from saert.activations import BatchTopK, JumpReLU, ReLU, TopK
from saert.capture import capture
from saert.hookpoint import Hookpoint
from saert.hub import bundled
from saert.hub.format import save as write
from saert.hub.verifying.declared import Tolerance, declared
from saert.hub.verifying.fit import fit
from saert.hub.verifying.readings import changed, places
from saert.hub.verifying.static_checks import alignment, static_checks
from saert.hub.verifying.verify_text import rows_of
from saert.runtime import attach
from saert.sae import SAE
from saert.train.objectives.topk import TopKObjective
from saert.transforms import LayerNorm, UnitNorm

TRAINED = ("layer_norm", "square", "mlp_out")  # seconds each


def marked(items, name, right):
    slow = [pytest.mark.slow]
    return [pytest.param(one, id=name(one), marks=slow * (right(one) in TRAINED)) for one in items]


# -- planted faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", marked(FAULTS, lambda f: f.name, lambda f: f.right))
def test_a_planted_fault_is_refused_and_its_cause_named(fault):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VerificationError, match="probable cause: ") as refusal:
            verify(fault.sae(), fault.model(), rows())
    found = refusal.value.verification
    assert not found.ok and re.search(fault.cause, found.cause)
    assert found.mismatches and str(refusal.value).startswith(found.name)


@pytest.mark.parametrize("name", marked(RIGHT, str, str))
def test_a_right_sae_passes_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verify(RIGHT[name](), model(), rows())
    assert found.ok and found.cause is None and not found.warnings


@pytest.mark.parametrize("hookpoint", bundled.HOOKPOINTS)
@pytest.mark.parametrize("knows", [True, False])
def test_the_bundled_saes_pass_with_and_without_what_they_declare(hookpoint, knows):
    sae = bundled.sae(hookpoint)
    if not knows:
        del sae.metadata["metrics"]
    found = verify(sae, model(), rows(), on_mismatch="report")
    assert found.ok and found.cause is None and not found.warnings
    assert (found["fvu"].declared is not None) is knows


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [LayerNorm(), UnitNorm(3.0)], ids=str)
def test_a_trained_sae_with_a_transform_passes(normalise):
    sae = trained("resid_post.1", 192, TopKObjective(k=12), normalise)
    assert verify(sae, model(), rows()).ok


# -- what is measured ------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["topk", "jumprelu", "relu", "gated", "batchtopk"])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_the_numbers_are_those_of_dense_formulas(act, kind):
    sae = sae_cases.make(act, "layer_norm" if kind == "sae" else "none", kind)
    x = sae_cases.inputs(40)
    y = x if kind == "sae" else x[:, : sae.d_out] * 2
    f = sae_cases.latents(sae, x)
    estimate = sae_cases.reconstruct(sae, f, x)
    error, centred = y - estimate, y - y.mean(0)
    found = fit(sae, x, y)
    assert found.tokens == 40
    assert found.fvu == pytest.approx((error.square().sum() / centred.square().sum()).item())
    l0 = (f != 0).sum(-1).double()
    assert found.l0 == pytest.approx(l0.mean().item())
    assert found.silent == pytest.approx((l0 == 0).double().mean().item())
    assert found.idle == pytest.approx((f == 0).all(0).double().mean().item())
    ratio = (estimate.norm(dim=-1) / y.norm(dim=-1)).mean().item()
    assert found.norm_ratio == pytest.approx(ratio)
    constant = 40 * error.mean(0).square().sum() / error.square().sum()
    assert found.constant == pytest.approx(constant.item())
    shape = estimate - estimate.mean(0)
    gain = ((shape * centred).sum() / shape.square().sum()).item()
    left = (centred - gain * shape).square().sum() / centred.square().sum()
    assert found.gain == pytest.approx(gain) and found.affine_fvu == pytest.approx(left.item())
    full = (l0 >= sae_cases.K).double().mean().item()
    assert math.isnan(found.full) if act != "topk" else found.full == pytest.approx(full)


def test_a_fit_in_parts_is_the_fit_at_once(monkeypatch):
    sae, x = sae_cases.make("relu"), sae_cases.inputs(40)
    whole = fit(sae, x, x)
    monkeypatch.setattr("saert.hub.verifying.fit.CELLS", 7 * sae.num_latents)
    for name, value in vars(fit(sae, x, x)).items():
        assert value == pytest.approx(getattr(whole, name), nan_ok=True)


def test_another_reading_shares_the_weights_and_leaves_the_sae_alone():
    sae = sae_cases.make("jumprelu")
    other = changed(sae, activation=ReLU(), subtract_b_dec=False)
    assert other.W_enc.data_ptr() == sae.W_enc.data_ptr()
    assert isinstance(sae.activation, JumpReLU) and sae.subtract_b_dec
    x = sae_cases.inputs(5)
    assert torch.equal(changed(sae)(x), sae(x)) and not torch.equal(other(x), sae(x))


def test_the_places_near_a_hookpoint():
    post = Hookpoint.parse("resid_post.1")
    near = places(model(), post, post)
    assert len(set(near)) == len(near) and (post, post) not in near
    assert {str(r) for r, _ in near} >= {"resid_pre.1", "resid_post.0", "resid_post.2", "mlp_out.1"}
    far = {str(r) for r, _ in places(model(), post, post, far=True)}
    assert far == {"resid_post.3"}
    path = Hookpoint.parse("transformer.h.1")
    assert {str(r) for r, _ in places(model(), path, path)} == {str(r) for r, _ in near}
    read, write = Hookpoint.parse("mlp_in.2"), Hookpoint.parse("mlp_out.2")
    pairs = {(str(r), str(w)) for r, w in places(model(), read, write)}
    assert {("resid_mid.2", "mlp_out.2"), ("mlp_in.2", "resid_post.2")} <= pairs
    assert ("mlp_in.1", "mlp_out.1") in pairs
    inner = Hookpoint.parse("transformer.h.1.mlp.act")
    assert places(model(), inner, inner) == []


def test_a_module_path_is_verified_like_the_site_it_is():
    found = verify(changed(topk(), hookpoint=Hookpoint.parse("transformer.h.2")), model(), rows())
    assert found.ok
    wrong = changed(topk(), hookpoint=Hookpoint.parse("h.1"))
    with pytest.raises(VerificationError, match="read at resid_post.2"):
        verify(wrong, model(), rows())


# -- what is declared ------------------------------------------------------------------------------


def test_the_caller_knows_best_then_the_format_then_training():
    sae = sae_cases.make()
    sae.metadata = {"metrics": {"l0": 1.0, "fvu": 0.1, "dead": 0.0, "ce": 3.0}}
    assert declared(sae) == {"l0": 1.0, "fvu": 0.1, "dead": 0.0}
    sae.metadata["declared"] = {"l0": 2, "explained_variance": 0.7, "unit_norm_decoder": True}
    assert declared(sae)["l0"] == 2 and declared(sae)["fvu"] == pytest.approx(0.3)
    assert declared(sae)["unit_norm_decoder"] == 1
    assert declared(sae, {"l0": 3})["l0"] == 3
    sae.metadata = {"metrics": None, "declared": {"l0": "many", "fvu": math.nan}}
    assert declared(sae) == {}


def test_expectations_and_tolerances():
    sae = topk()
    with pytest.raises(VerificationError, match="l0 is 16, declared 30 .expected 23.1 to 39"):
        verify(sae, model(), rows(), expect={"l0": 30})
    assert verify(sae, model(), rows(), expect={"l0": 30}, tolerance=Tolerance(l0=2)).ok
    close = Tolerance(fvu=1.01, fvu_slack=0)
    found = verify(sae, model(), rows(), tolerance=close, on_mismatch="report")
    assert not found.ok and not found["fvu"].ok
    found = verify(sae, model(), rows(), expect={"fvu": 0.9}, on_mismatch="report")
    assert not found["fvu"].ok and "closer than declared" in found["fvu"].hint
    with pytest.raises(ValueError, match=r"unknown facts \['size'\]"):
        verify(sae, model(), rows(), expect={"size": 1})
    with pytest.raises(ValueError, match="l0 is 'x'"):
        verify(sae, model(), rows(), expect={"l0": "x"})
    with pytest.raises(ValueError, match="factor of at least 1"):
        Tolerance(l0=0.5)


def test_a_mismatch_is_refused_warned_of_or_reported():
    wrong = changed(topk(), activation=TopK(64))
    with pytest.warns(UserWarning, match="TopK") as caught:
        found = verify(wrong, model(), rows(), on_mismatch="warn")
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = verify(wrong, model(), rows(), on_mismatch="report")
    assert report == found and not report.ok
    with pytest.raises(ValueError, match="on_mismatch is 'ignore'"):
        verify(wrong, model(), rows(), on_mismatch="ignore")
    shown = str(report)
    assert "✗  l0" in shown and "probable cause: TopK(k=16)" in shown
    json.dumps(report.to_dict(), allow_nan=False)
    with pytest.raises(KeyError, match="there are"):
        report["size"]


def test_another_model_by_name_is_a_mismatch():
    sae = changed(topk(), metadata={"base_model": "gpt2-xl", "declared": {}})
    model().config._name_or_path, before = "gpt2", model().config._name_or_path
    try:
        found = verify(sae, model(), rows(), on_mismatch="report")
    finally:
        model().config._name_or_path = before
    assert not found["model"].ok and "gpt2-xl" in found["model"].hint and found.cause is None


def test_what_nobody_declares_is_only_implausible():
    sae = changed(topk(), b_dec=torch.zeros_like(topk().b_dec), metadata={})
    with pytest.warns(UserWarning, match="constant part of error"):
        assert verify(sae, model(), rows()).ok
    noise = SAE.from_weights(
        torch.randn(200, 128), torch.randn(200, 128), activation=ReLU(), hookpoint="resid_post.1"
    )
    with pytest.raises(VerificationError, match="fvu is"):
        verify(noise, model(), rows())


# -- tokens ----------------------------------------------------------------------------------------


def test_first_special_and_padded_tokens_do_not_count():
    ids = torch.tensor([[5, 6, 0, 7, 8], [9, 9, 9, 9, 9]])
    found = rows_of(model(), bundled.tokenizer(), ids, 100)
    assert 0 in bundled.tokenizer().all_special_ids
    assert found.used.int().tolist() == [[0, 1, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert found.real.all() and torch.equal(found.ids, ids)
    assert torch.equal(rows_of(model(), None, ids, 100).used, found.used)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    found = rows_of(model(), None, {"input_ids": ids, "attention_mask": mask}, 100)
    assert found.ids[0, :3].tolist() == [0, 7, 8]
    assert found.real.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert found.used.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    assert len(rows_of(model(), None, ids, 2).ids) == 1
    texts = rows_of(model(), bundled.tokenizer(), ["Once upon a time", "A dog"], 100)
    assert texts.real.sum(1).tolist() == [
        len(bundled.tokenizer()(t)["input_ids"]) for t in ("Once upon a time", "A dog")
    ]


def test_padding_on_either_side_gives_the_same_numbers():
    ids, n = rows()[:4, 1:31], 24
    right, left = ids.clone(), ids.clone()
    masks = torch.ones_like(ids), torch.ones_like(ids)
    right[1, n:], masks[0][1, n:] = 3, 0
    left[1, -n:], left[1, :-n], masks[1][1, :-n] = ids[1, :n], 3, 0
    a, b = (
        verify(topk(), model(), {"input_ids": i, "attention_mask": m}, on_mismatch="report")
        for i, m in zip((right, left), masks, strict=True)
    )
    assert a == b
    short = verify(topk(), model(), ids[[0, 2, 3]], on_mismatch="report")
    assert a.tokens == short.tokens + int((ids[1, 1:n] != 0).sum())


def test_massive_states_are_left_out(monkeypatch):
    at = Hookpoint.parse("resid_post.2")

    def spiked(network, part, hookpoints, batch):
        found = capture(network, part, hookpoints, batch)
        return {h: t.clone().index_fill_(0, torch.tensor([20]), 500.0) for h, t in found.items()}

    plain = verify(topk(), model(), rows(), on_mismatch="report")
    monkeypatch.setattr("saert.hub.verifying.measured.capture", spiked)
    found = verify(topk(), model(), rows(), on_mismatch="report")
    assert found.tokens == plain.tokens - 1 and found.ok
    assert found["fvu"].measured == pytest.approx(plain["fvu"].measured, rel=0.01)
    assert abs(found["fvu, all tokens"].measured - plain["fvu, all tokens"].measured) > 0.05
    assert at == topk().hookpoint


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "no token"),
        (torch.zeros(0, 4, dtype=torch.int64), ValueError, "no token"),
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, "no token"),
        (torch.tensor([[5]]), ValueError, "no token"),
        (torch.tensor([5, 6, 7]), ValueError, r"expected token ids int64 \[rows, context\]"),
        (torch.rand(2, 4), ValueError, "expected token ids"),
        (torch.tensor([[5, 99999]]), ValueError, "its own tokenizer"),
        (torch.tensor([[5, -100]]), ValueError, "its own tokenizer"),
        (["a text"], ValueError, "pass tokenizer="),
        ([], TypeError, "expected token ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "return_tensors"),
    ],
)
def test_inputs_that_cannot_be_measured_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        verify(topk(), model(), inputs)


def test_hidden_states_with_nan_are_refused():
    network = bundled.model()
    with torch.no_grad():
        network.transformer.h[1].mlp.c_proj.bias[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        verify(topk(), network, rows())


def test_a_model_that_is_not_ready_is_refused():
    sae = changed(topk())
    sae.hookpoint = None
    with pytest.raises(ValueError, match="where it reads"):
        verify(sae, model(), rows())
    with attach(model(), topk()), pytest.raises(ValueError, match="detach"):
        verify(topk(), model(), rows())
    model().train()
    try:
        with pytest.raises(ValueError, match="eval"):
            verify(topk(), model(), rows())
    finally:
        model().eval()
    with pytest.raises(ValueError, match="tokens is 0"):
        verify(topk(), model(), rows(), tokens=0)
    with pytest.raises(ValueError, match="width 10"):
        verify(sae_cases.make(hookpoint="resid_post.1"), model(), rows())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj", "mamba", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_is_measured(name, dtype):
    network = tiny(name).to(dtype)
    sae = sae_cases.make("topk", d_in=32, n=48, hookpoint="resid_post.1", dtype=torch.float32)
    ids = torch.randint(3, 97, (3, 12))
    found = verify(sae, network, ids, on_mismatch="report")
    assert found.tokens == 33 and math.isfinite(found["fvu"].measured) and found.fits


def test_text_of_the_models_own():
    found = verify(topk(), model(), tokens=100)
    assert found.ok and 100 <= found.tokens <= 127


# -- the weights alone -----------------------------------------------------------------------------


def sae(W_enc=None, W_dec=None, declares=None, **options):
    torch.manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(64, 16), dim=-1)
    options = {"activation": TopK(4)} | options
    made = SAE.from_weights(W if W_enc is None else W_enc, W if W_dec is None else W_dec, **options)
    made.metadata = {"declared": declares or {}}
    return made


SQUARE = torch.nn.functional.normalize(
    torch.randn(64, 64, generator=torch.Generator().manual_seed(5)), dim=-1
)
TIED = SQUARE + 0.02
REACH = "latents out of reach"
UNIT = {"unit_norm_decoder": True}
HALF = torch.ones(64, 1).index_fill_(0, torch.arange(20, 64), 0)
RAMP = torch.linspace(-3, 0.5, 64)


def thresholds(theta, **options):
    return sae(activation=JumpReLU(theta), **options)


FACTS = [
    ("norm of W_dec rows", True, lambda: sae(W_dec=torch.randn(64, 16), declares=UNIT)),
    ("cos(W_enc[i], W_dec[i])", False, lambda: sae(TIED.T.contiguous(), SQUARE)),
    ("cos(W_enc[i], W_dec[i])", False, lambda: sae(TIED, SQUARE.T.contiguous())),
    ("zero rows of W_dec", True, lambda: sae(W_dec=torch.zeros(64, 16))),
    ("zero rows of W_enc", False, lambda: sae(W_enc=torch.randn(64, 16) * HALF)),
    ("thresholds", False, lambda: thresholds(torch.zeros(64))),
    ("thresholds", False, lambda: thresholds(RAMP)),
    ("thresholds", False, lambda: sae(activation=BatchTopK(-1.0))),
    ("k / num_latents", False, lambda: sae(activation=TopK(40))),
    (REACH, True, lambda: thresholds(torch.full((64,), 4.1), input_transform=UnitNorm())),
    (REACH, False, lambda: thresholds(RAMP + 6, input_transform=LayerNorm())),
]


@pytest.mark.parametrize(("fact", "serious", "make"), FACTS)
def test_weights_alone_contradict(fact, serious, make):
    wrong = [check for check in static_checks(make()) if not check.ok]
    assert [(check.fact, check.serious) for check in wrong] == [(fact, serious)]
    assert wrong[0].hint


@pytest.mark.parametrize(
    "make",
    [
        lambda: sae(declares={"unit_norm_decoder": True}),
        lambda: sae(TIED, SQUARE),
        lambda: sae(torch.randn(64, 64), torch.randn(64, 64)),
        lambda: sae(W_dec=torch.randn(64, 16)),
        lambda: sae(activation=JumpReLU(torch.full((64,), 3.9)), input_transform=UnitNorm()),
        lambda: sae(activation=BatchTopK(0.4)),
        lambda: sae(
            W_dec=torch.nn.functional.normalize(torch.randn(64, 16), dim=-1).bfloat16(),
            W_enc=torch.randn(64, 16).bfloat16(),
            declares={"unit_norm_decoder": True},
        ),
        *(
            lambda k=kind, a=act: sae_cases.make(a, kind=k)
            for kind in sae_cases.KINDS
            for act in ("relu", "gated", "jumprelu")
        ),
    ],
)
def test_weights_alone_pass(make):
    assert all(check.ok for check in static_checks(make()))


def test_a_latent_out_of_reach_never_fires():
    made = FACTS[-1][2]()
    mute = next(c for c in static_checks(made) if c.fact == "latents out of reach").measured
    x = torch.cat([made.W_enc, torch.randn(4096, 16)])  # the best input of each, and others
    fired = (made.encode(x * 100).to_dense() > 0).any(0).double().mean().item()
    assert fired <= 1 - mute


def test_encoder_and_decoder_belong_together_or_not():
    made = topk()
    shuffled = changed(made, W_dec=made.W_dec[torch.randperm(made.num_latents)])
    assert alignment(made) > 0.3 and abs(alignment(shuffled)) < 0.05
    assert math.isnan(alignment(RIGHT["transcoder"]()))


def test_loading_refuses_warns_or_does_not_look(tmp_path):
    contradicted, odd = sae(W_dec=torch.randn(64, 16)), sae(activation=TopK(40))
    contradicted.metadata = {"declared": {"unit_norm_decoder": True}}
    contradicted.hookpoint = odd.hookpoint = Hookpoint.parse("resid_post.3")
    save(contradicted, tmp_path / "wrong")
    save(odd, tmp_path / "odd")
    with pytest.raises(VerificationError, match="norm of W_dec rows") as refusal:
        load(tmp_path / "wrong")
    assert isinstance(refusal.value, FormatError) and "resid_post.3" in str(refusal.value)
    with pytest.warns(UserWarning, match="norm of W_dec rows") as caught:
        load(tmp_path / "wrong", verify="warn")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="hardly sparse"):
        load(tmp_path / "odd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "wrong", verify=False).num_latents == 64
        load(tmp_path / "odd", verify=False)
    for wrong in ("yes", 1, None):
        with pytest.raises(ValueError, match="expected True, False or 'warn'"):
            load(tmp_path / "odd", verify=wrong)


def test_looking_at_the_weights_does_not_grow_with_them():
    W = torch.randn(60_000, 32)
    large = SAE.from_weights(W, W, activation=TopK(4), hookpoint="resid_post.0")
    seen = []
    original = torch.Tensor.float

    def counting(tensor, *args):
        seen.append(tensor.numel())
        return original(tensor, *args)

    torch.Tensor.float, before = counting, torch.Tensor.float
    try:
        static_checks(large)
    finally:
        torch.Tensor.float = before
    assert seen and max(seen) <= 512 * 32


def test_a_published_declaration_survives_the_file(tmp_path):
    made = measured(changed(topk()))
    write(made, tmp_path)
    assert declared(load(tmp_path)) == declared(made) != {}
