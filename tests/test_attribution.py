"""Attribution against what it estimates: finite differences, true ablations, exact sums."""

from types import SimpleNamespace

import pytest
import sae_cases
import tiny_models
import torch
from torch import nn

from saert import SAE, SparseCode, TopK, ablate, add, attach, attribute
from saert.hooks import hooked
from saert.measure import (
    attribution_agreement,
    logit_difference,
    next_token_loss,
)
from saert.measure.attribution.nodes import union

D = tiny_models.HIDDEN
IDS = torch.randint(3, tiny_models.VOCAB, (2, 6), generator=torch.Generator().manual_seed(5))


class LinearLM(nn.Module):
    """Embedding, a causal mean of the tokens, a head: linear behind `mid`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(tiny_models.VOCAB, sae_cases.D_IN)
        self.mid = nn.Identity()
        self.mix = nn.Linear(sae_cases.D_IN, sae_cases.D_IN)
        self.head = nn.Linear(sae_cases.D_IN, tiny_models.VOCAB)
        self.double()

    def forward(self, input_ids, use_cache=None):
        hidden = self.mid(1.5 * self.embed(input_ids) + 0.4)
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=self.head(hidden + self.mix(past)))


@pytest.fixture(scope="module")
def gpt2():
    return tiny_models.tiny("gpt2").double()


def sae_at(hookpoint, act="topk", transform="none", kind="sae", **options):
    return sae_cases.make(act, transform, kind, d_in=D, hookpoint=hookpoint, **options)


@torch.no_grad()
def judged(model, metric, saes=(), edits=(), *, inputs=IDS, splice=False):
    """The metric of the model, with SAEs attached if there are any: [rows]."""
    call = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    if not saes:
        return metric(model(**call).logits)
    with attach(model, saes, edits, splice=splice, record=False):
        return metric(model(**call).logits)


def active(effects, n=6):
    """(row, position, latent) of some active latents, the same every time."""
    slots = (effects.values != 0).nonzero()
    chosen = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(1))[:n]]
    return [(int(r), int(p), int(effects.indices[r, p, s])) for r, p, s in chosen]


def check_slopes(model, sae, metric, found, n=3, h=1e-5, **tolerance):
    """Effects are -f times the central difference of adding h · W_dec[latent] at a token."""
    at = sae.target_hookpoint or sae.hookpoint
    for row, position, latent in active(found[at], n):
        up, down = (
            judged(model, metric, sae, add(latent, step, rows=row, positions=position))[row].item()
            for step in (h, -h)
        )
        effect, f = (
            code[row, position].at(torch.tensor([latent])).item()
            for code in (found[at], found.codes[at])
        )
        expected = -f * (up - down) / (2 * h)
        assert f and effect == pytest.approx(expected, **tolerance or {"rel": 1e-5, "abs": 1e-8})


# -- where everything behind is linear -----------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "layer_norm", "dataset_scale"])
@pytest.mark.parametrize("act", sae_cases.ACTIVATIONS)
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_behind_a_linear_model_effects_are_those_of_ablation(act, transform, method):
    model, sae = LinearLM(), sae_cases.make(act, transform, hookpoint="mid")
    metric = logit_difference(IDS, 7, [8, 9])
    found = attribute(model, sae, IDS, metric, method=method, steps=3, progress=False)
    clean = judged(model, metric)
    torch.testing.assert_close(found.metric, clean)
    for row, position, latent in active(found["mid"]):
        edit = ablate(latent, rows=row, positions=position)
        true = judged(model, metric, sae, edit)[row] - clean[row]
        one = [torch.tensor([i]) for i in (row, position, latent)]
        torch.testing.assert_close(found.at("mid", *one)[0], true)
    dropped = judged(model, metric, sae, splice=True) - clean
    torch.testing.assert_close(found.errors["mid"].sum(-1), dropped)


@pytest.mark.parametrize("transform", ["none", "layer_norm"])
def test_a_patch_is_explained_completely_by_latents_and_error(transform):
    model, sae = LinearLM(), sae_cases.make("topk", transform, hookpoint="mid")
    metric, other = logit_difference(IDS, 7, 8), IDS.flip(0)
    found = attribute(model, sae, IDS, metric, patch=other)
    total = found["mid"].values.sum((1, 2)) + found.errors["mid"].sum(-1)
    torch.testing.assert_close(total, judged(model, metric, inputs=other) - judged(model, metric))


def test_a_patch_moves_the_latents_of_both_inputs():
    model, sae = LinearLM(), sae_cases.make("topk", hookpoint="mid")
    metric, other = logit_difference(IDS, 7, 8), IDS.flip(0)
    found = attribute(model, sae, IDS, metric, patch=other)
    states = [1.5 * model.embed(ids).detach() + 0.4 for ids in (IDS, other)]
    f, g = (sae_cases.latents(sae, x) for x in states)
    torch.testing.assert_close(found.codes["mid"].to_dense(), f)
    leaf = torch.zeros_like(states[0], requires_grad=True)
    past = (states[0] + leaf).cumsum(1) / torch.arange(1, 7)[:, None]
    (grad,) = torch.autograd.grad(
        metric(model.head(states[0] + leaf + model.mix(past))).sum(), leaf
    )
    torch.testing.assert_close(found["mid"].to_dense(), (g - f) * (grad @ sae.W_dec.T))


def test_the_union_of_two_codes_holds_both():
    torch.manual_seed(3)
    dense = [(torch.randn(4, 5, 12) * (torch.rand(4, 5, 12) < p)) for p in (0.4, 0.2)]
    dense[0][0, 0] = dense[1][0, 0] = 0
    first, second = union(*map(SparseCode.from_dense, dense))
    assert torch.equal(first.to_dense(), dense[0]) and torch.equal(second.to_dense(), dense[1])
    assert torch.equal(first.indices, second.indices)
    either = ((dense[0] != 0) | (dense[1] != 0)).sum(-1)
    assert first.k == either.max()
    none = SparseCode.from_dense(torch.zeros(2, 3, 12))
    assert union(none, none)[0].l0().sum() == 0


# -- gradients -----------------------------------------------------------------------------------

SITES = ["resid_mid.0", "mlp_out.1", "resid_post.1", "attn_out.2", "resid_pre.2"]


def test_gradients_at_several_sites_are_finite_differences(gpt2):
    saes = [sae_at(at, act) for at, act in zip(SITES, sae_cases.ACTIVATIONS, strict=False)]
    metric = next_token_loss(IDS)
    found = attribute(gpt2, saes, IDS, metric)
    assert [str(at) for at in found] == SITES
    for sae in saes:
        check_slopes(gpt2, sae, metric, found)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "falcon_new", "mixtral", "mamba"])
def test_gradients_of_other_architectures(name):
    model = tiny_models.tiny(name)  # float32, in which some norms compute anyway: wider differences
    sae = sae_at("resid_post.1", "jumprelu", "layer_norm", dtype=torch.float32)
    metric = logit_difference(IDS, 7, 8)
    found = attribute(model, sae, IDS, metric)
    check_slopes(model, sae, metric, found, h=1e-2, rel=0.01, abs=1e-4)


def by_hand(model, sae, metric, move=None):
    """Hidden state of block 1 and its gradient, by a hook written here."""
    kept = []

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = (hidden if move is None else hidden + move).detach().requires_grad_()
        kept.append(new)
        return (new + 0, *output[1:]) if isinstance(output, tuple) else new + 0

    handle = model.transformer.h[1].register_forward_hook(hook)
    value = metric(model(IDS).logits)
    handle.remove()
    (grad,) = torch.autograd.grad(value.sum(), kept[0])
    return kept[0].detach(), grad, value.detach()


@pytest.mark.parametrize("act", sae_cases.ACTIVATIONS)
@pytest.mark.parametrize("transform", ["none", "layer_norm"])
def test_every_activation_against_dense_formulas(gpt2, act, transform):
    sae = sae_at("resid_post.1", act, transform)
    metric = next_token_loss(IDS)
    found = attribute(gpt2, sae, IDS, metric)
    y, grad, _ = by_hand(gpt2, sae, metric)
    f, scale = sae_cases.latents(sae, y), sae_cases.transformed(sae, y)[2]
    torch.testing.assert_close(
        found["resid_post.1"].to_dense(), -f * scale * (grad @ sae.W_dec.double().T)
    )
    error = y - sae_cases.reconstruct(sae, f, y)
    torch.testing.assert_close(found.errors["resid_post.1"], -(grad * error).sum(-1))


@pytest.mark.parametrize("steps", [2, 5])
def test_integrated_gradients_are_a_left_riemann_sum(gpt2, steps):
    sae, metric = sae_at("resid_post.1"), next_token_loss(IDS)
    saes = [sae_at("mlp_out.0", "relu"), sae, sae_at("resid_post.2", "gated")]
    found = attribute(gpt2, saes, IDS, metric, method="ig", steps=steps, progress=False)
    y, grad, _ = by_hand(gpt2, sae, metric)
    f = sae_cases.latents(sae, y)
    nothing = sae_cases.reconstruct(sae, torch.zeros_like(f), y)
    for j in range(1, steps):
        grad = grad + by_hand(gpt2, sae, metric, move=j / steps * (nothing - y))[1]
    torch.testing.assert_close(found["resid_post.1"].to_dense(), -f * (grad / steps @ sae.W_dec.T))


def test_one_step_of_integrated_gradients_is_attribution_patching(gpt2):
    saes = {at: sae_at(at) for at in ("resid_post.0", "mlp_out.1")}
    a, b = (
        attribute(gpt2, saes, IDS, next_token_loss(IDS), **kw)
        for kw in ({}, {"method": "ig", "steps": 1})
    )
    for at in saes:
        assert torch.equal(a[at].values, b[at].values) and torch.equal(a.errors[at], b.errors[at])


@pytest.mark.parametrize("at", ["resid_post.1", "resid_mid.1"])
def test_integrated_gradients_add_up_to_the_whole_change(gpt2, at):
    sae, metric = sae_at(at, "relu"), next_token_loss(IDS)
    nothing = ablate(range(sae.num_latents))
    true = judged(gpt2, metric, sae, nothing, splice=True) - judged(gpt2, metric)
    off = []
    for steps in (8, 64):
        found = attribute(gpt2, sae, IDS, metric, method="ig", steps=steps, progress=False)
        total = found[at].values.sum((1, 2)) + found.errors[at].sum(-1)
        off.append((total - true).abs().max().item())
    # a Riemann sum's error falls as 1 / steps
    assert off[1] < 0.2 * off[0] and off[1] < 0.05 * true.abs().max()


def test_gradients_pass_through_an_sae_downstream(gpt2):
    metric = next_token_loss(IDS)
    first, second = sae_at("resid_post.0"), sae_at("resid_post.1", "relu")
    alone = attribute(gpt2, first, IDS, metric)
    both = attribute(gpt2, [first, second], IDS, metric)
    assert torch.equal(alone["resid_post.0"].values, both["resid_post.0"].values)
    assert torch.equal(alone.errors["resid_post.0"], both.errors["resid_post.0"])
    # through a splice, where they do not, they differ: the check can fail
    with hooked(gpt2, second.hookpoint, second):
        through = attribute(gpt2, first, IDS, metric)
    assert not torch.allclose(alone["resid_post.0"].values, through["resid_post.0"].values)


def test_two_names_of_one_tensor_have_one_gradient(gpt2):
    sae, metric = sae_at("resid_post.1"), next_token_loss(IDS)
    found = attribute(gpt2, {"resid_post.1": sae, "resid_pre.2": sae, "h.1": sae}, IDS, metric)
    effects = [found[at].values for at in found]
    assert len(effects) == 3
    torch.testing.assert_close(effects[0], effects[1])
    torch.testing.assert_close(effects[0], effects[2])


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_latents_are_nodes_where_it_writes(gpt2, skip):
    sae = sae_at("mlp_in.1", kind="transcoder_square", target_hookpoint="mlp_out.1")
    if skip:
        sae.W_skip = nn.Parameter(torch.randn(D, D, dtype=torch.float64), requires_grad=False)
    metric = next_token_loss(IDS)
    found = attribute(gpt2, {"mlp_in.1": sae, "resid_post.1": sae_at(None)}, IDS, metric)
    assert [str(at) for at in found] == ["mlp_out.1", "resid_post.1"]
    check_slopes(gpt2, sae, metric, found, n=4)
    # the error: what a splice drops, to first order
    model = gpt2.transformer.h[1].mlp
    states = []
    handle = model.register_forward_hook(lambda m, i, o: states.extend([i[0], o]))
    judged(gpt2, metric)
    handle.remove()
    x, y = states
    error = y - sae_cases.reconstruct(sae, sae_cases.latents(sae, x), x)
    leaf = torch.zeros_like(error, requires_grad=True)
    handle = model.register_forward_hook(lambda m, i, o: o + leaf)
    (grad,) = torch.autograd.grad(metric(gpt2(IDS).logits).sum(), leaf)
    handle.remove()
    torch.testing.assert_close(found.errors["mlp_out.1"], -(grad * error).sum(-1))


def test_peft_and_bfloat16_models(gpt2):
    pytest.importorskip("peft")
    wrapped = tiny_models.peft_wrap(tiny_models.tiny("gpt2")).double()
    sae, metric = sae_at("resid_post.0"), next_token_loss(IDS)
    found = attribute(wrapped, sae, IDS, metric)
    check_slopes(wrapped, sae, metric, found)
    half = tiny_models.tiny("gpt2").bfloat16()
    wide = tiny_models.tiny("gpt2")
    wide.load_state_dict(half.state_dict())
    single = sae_at("resid_post.0", "relu", dtype=torch.float32)
    for method in ("atp", "ig"):
        a, b = (
            attribute(model, single, IDS, metric, method=method, steps=3, progress=False)
            for model in (half, wide)
        )
        assert a["resid_post.0"].values.dtype == torch.float32
        agreement = attribution_agreement(
            a["resid_post.0"].to_dense().flatten(), b["resid_post.0"].to_dense().flatten()
        )
        assert agreement.pearson > 0.99


# -- padding, state, refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_padding_on_either_side_changes_nothing(name, method):
    model = tiny_models.tiny(name).double()
    sae, row = sae_at("resid_post.1", "relu"), IDS[:1, :4]
    kw = dict(method=method, steps=3, progress=False)

    def effects(ids, mask, metric_of):
        inputs = {"input_ids": ids, "attention_mask": mask}
        return attribute(model, sae, inputs, metric_of(inputs), **kw)

    pads = torch.zeros(1, 2, dtype=torch.int64)
    ones = torch.ones_like(row)
    for metric_of in (next_token_loss, lambda i: logit_difference(i, 7, 8)):
        bare = attribute(model, sae, row, metric_of(row), **kw)
        for side in ("left", "right"):
            order = slice(None, None, -1 if side == "left" else 1)
            ids = torch.cat([torch.cat([row, pads][order], 1), IDS[1:, :6]])
            mask = torch.cat([torch.cat([ones, pads][order], 1), torch.ones(1, 6).long()])
            found = effects(ids, mask, metric_of)
            real = mask[0].bool()
            torch.testing.assert_close(
                found["resid_post.1"][0].to_dense()[real], bare["resid_post.1"][0].to_dense()
            )
            torch.testing.assert_close(
                found.errors["resid_post.1"][0, real], bare.errors["resid_post.1"][0]
            )
            torch.testing.assert_close(found.metric[0], bare.metric[0])
            for padded in (found["resid_post.1"], found.codes["resid_post.1"]):
                assert (padded.values[0, ~real] == 0).all()
            assert (found.errors["resid_post.1"][0, ~real] == 0).all()


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_left_as_it_was():
    model = tiny_models.tiny("gpt2").train()  # with dropout
    model.transformer.h[0].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    sae = sae_at("resid_mid.1", dtype=torch.float32)

    def untouched():
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters()) and hooks_on(model) == 0

    with torch.no_grad():
        found = [attribute(model, sae, IDS, next_token_loss(IDS)) for _ in range(2)]
    untouched()
    assert torch.equal(found[0]["resid_mid.1"].values, found[1]["resid_mid.1"].values)
    assert not found[0]["resid_mid.1"].values.requires_grad

    def broken(logits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(model, sae, IDS, broken)
    untouched()
    with pytest.raises(ValueError, match="width"):
        attribute(model, sae_cases.make(hookpoint="resid_mid.1"), IDS, next_token_loss(IDS))
    untouched()
    frozen = tiny_models.tiny("gpt2").requires_grad_(False)
    again = attribute(frozen, sae, IDS, next_token_loss(IDS))
    torch.testing.assert_close(again["resid_mid.1"].values, found[0]["resid_mid.1"].values)


def test_what_is_refused(gpt2):
    sae, metric = sae_at("resid_post.1"), next_token_loss(IDS)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        attribute(gpt2, sae, IDS, metric)

    def refused(match, error=ValueError, saes=sae, inputs=IDS, m=metric, **kw):
        with pytest.raises(error, match=match):
            attribute(gpt2, saes, inputs, m, **kw)

    refused("method: found 'eap'", method="eap")
    refused("steps: found 0", steps=0, method="ig")
    refused("one value for a row", m=lambda logits: logits)
    refused("found float", m=lambda logits: 1.0)
    refused("no gradient", m=lambda logits: torch.zeros(2))
    refused("finite", m=lambda logits: logits.sum() / 0)
    refused("gradient contains NaN", m=lambda logits: (0 * logits.sum()).abs().sqrt())
    refused("patch: ", patch=IDS[:, :4])
    refused("patch: ", patch={"input_ids": IDS, "attention_mask": torch.eye(2, 6).long()})
    refused("float64", TypeError, inputs=IDS.double())
    refused("expected .rows, tokens", inputs=IDS[0])
    refused("all padding", inputs={"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)})
    refused("no SAE given", saes=[])
    refused("found str", TypeError, saes=["bundled:resid_post.2"])
    refused("does not say where", saes=sae_at(None))
    refused("2 SAEs write to resid_post.1", saes=[sae, sae_at("resid_post.1", "relu")])
    coder = sae_at("mlp_in.1", kind="transcoder_square", target_hookpoint="mlp_out.1")
    refused("cannot read at mlp_in.0", saes={"mlp_in.0": coder})
    refused("no resid_post.9", ValueError, saes=sae_at("resid_post.9"))
    refused("made for", m=next_token_loss(IDS[:, :4]))
    twice = LinearLM()
    twice.mid = nn.Sequential(shared := nn.Identity(), shared)
    with pytest.raises(RuntimeError, match="mid.0 runs more than once"):
        attribute(twice, {"mid.0": sae_cases.make()}, IDS, metric)
    twice.unused = nn.Identity()
    with pytest.raises(RuntimeError, match="unused: .* never came there"):
        attribute(twice, {"unused": sae_cases.make()}, IDS, metric)
    with pytest.raises(TypeError, match="without logits"):
        attribute(gpt2.transformer, sae, IDS, metric)
    with pytest.raises(ValueError, match="row 0 has one token"):
        next_token_loss(IDS[:, :1])


# -- lookups, metrics, agreement -------------------------------------------------------------------


def test_a_model_with_saes_attached_is_refused(gpt2):
    sae = sae_at("resid_post.1")
    with attach(gpt2, sae, splice=True), pytest.raises(ValueError, match="attached"):
        attribute(gpt2, sae, IDS, next_token_loss(IDS))


@pytest.mark.parametrize("method", ["atp", "ig"])
def test_an_offloaded_model_has_the_same_effects(method):
    accelerate = pytest.importorskip("accelerate")
    sae = sae_at("resid_post.1", dtype=torch.float32)
    away = accelerate.cpu_offload(tiny_models.tiny("gpt2"), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in away.parameters())
    found, want = (
        attribute(m, sae, IDS, next_token_loss(IDS), method=method, steps=3, progress=False)
        for m in (away, tiny_models.tiny("gpt2"))
    )
    at = "resid_post.1"
    assert torch.equal(found[at].indices, want[at].indices)
    torch.testing.assert_close(found[at].values, want[at].values)
    assert want[at].values.any()


def test_lookups_find_what_is_there(gpt2):
    found = attribute(gpt2, sae_at("resid_post.1", "relu"), IDS, next_token_loss(IDS))
    dense = found["blocks.1.hook_resid_post"].to_dense()
    rows, positions, latents = (torch.randint(n, (50,)) for n in dense.shape)
    looked_up = found.at("resid_post.1", rows, positions, latents)
    assert torch.equal(looked_up, dense[rows, positions, latents]) and (looked_up == 0).any()
    for n in (1, 4, 10_000):
        rows, positions, latents = found.top("resid_post.1", n)
        for row in range(2):
            mine = rows == row
            expected = dense[row].flatten().abs().sort(descending=True).values
            expected = expected[expected > 0][:n]
            torch.testing.assert_close(dense[row, positions[mine], latents[mine]].abs(), expected)
    assert "resid_post.1" in found and "resid_post.0" not in found and "nonsense.1.x:y" not in found
    with pytest.raises(KeyError, match=r"resid_post\.0: found resid_post\.1"):
        found["resid_post.0"]
    with pytest.raises(ValueError, match="positions are 6 to 6"):
        found.at("resid_post.1", *(torch.tensor([i]) for i in (0, 6, 0)))


def test_metrics_of_rows_with_padding(gpt2):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    inputs = {"input_ids": IDS, "attention_mask": mask}
    logits = torch.randn(2, 6, tiny_models.VOCAB)
    log_p = logits.log_softmax(-1)
    for row, (first, last) in enumerate([(2, 5), (0, 4)]):
        loss = -sum(log_p[row, t, IDS[row, t + 1]] for t in range(first, last))
        torch.testing.assert_close(next_token_loss(inputs)(logits)[row], loss)
        difference = logits[row, last, 7 + row] - logits[row, last, 9]
        found = logit_difference(inputs, torch.tensor([7, 8]), 9)(logits)[row]
        torch.testing.assert_close(found, difference)


def test_a_scalar_metric_and_a_metric_of_rows_agree(gpt2):
    sae, metric = sae_at("resid_post.1"), next_token_loss(IDS)
    rows = attribute(gpt2, sae, IDS, metric)
    scalar = attribute(gpt2, sae, IDS, lambda logits: metric(logits).sum())
    assert torch.equal(rows["resid_post.1"].values, scalar["resid_post.1"].values)
    alone = attribute(gpt2, sae, IDS[1:], next_token_loss(IDS[1:]))
    torch.testing.assert_close(
        rows["resid_post.1"][1].to_dense(), alone["resid_post.1"][0].to_dense()
    )


def test_agreement_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.randn(40).round(decimals=1), torch.randn(40).round(decimals=1)
    y = x + y
    found = attribution_agreement(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.count == 40 and "40 effects" in str(found)
    constant = attribution_agreement(x, torch.ones(40))
    assert constant.pearson != constant.pearson  # NaN
    for bad in ((x, y[:3]), (x[:1], y[:1]), (x, y / 0)):
        with pytest.raises(ValueError, match="attribution_agreement"):
            attribution_agreement(*bad)


def test_attribution_predicts_ablation_on_the_bundled_model():
    from saert.hub import bundled

    model, tokenizer = bundled.model(), bundled.tokenizer()
    inputs = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt")
    sae, metric = bundled.sae("resid_post.3"), next_token_loss(inputs)
    found = attribute(model, sae, inputs, metric)
    rows, positions, latents = found.top("resid_post.3", 80)
    clean = judged(model, metric, inputs=inputs)
    true = [
        judged(model, metric, sae, ablate(j, positions=p), inputs=inputs) - clean
        for p, j in zip(positions.tolist(), latents.tolist(), strict=True)
    ]
    estimated = found.at("resid_post.3", rows, positions, latents)
    agreement = attribution_agreement(estimated, torch.cat(true))
    assert agreement.pearson > 0.85 and agreement.spearman > 0.85


def test_an_sae_of_your_own_needs_no_hookpoint(gpt2):
    W = torch.randn(40, D, dtype=torch.float64)
    sae = SAE.from_weights(W, W, activation=TopK(3))
    found = attribute(gpt2, {"transformer.h.0": sae}, IDS, next_token_loss(IDS))
    assert found["transformer.h.0"].shape == (2, 6, 3)
