"""The contract of `attach`: what an attached model computes, and what is left after it."""

import copy
import pickle

import pytest
import torch
from tiny_models import ARCHITECTURES, HIDDEN, LAYERS, peft_wrap, tiny, tiny_multimodal
from torch import nn

from saert import (
    SAE,
    BatchTopK,
    Gated,
    Hookpoint,
    HookpointError,
    JumpReLU,
    ReLU,
    TopK,
    ablate,
    active,
    add,
    add_vector,
    attach,
    clamp,
    scale,
)
from saert.edits import apply
from saert.transforms import DatasetScale, LayerNorm, MeanCentre, UnitNorm

LATENTS = 48
IDS = torch.tensor([[5, 9, 11, 3, 60, 41, 8], [7, 7, 23, 90, 14, 2, 33]])
ACTIVATIONS = {
    "topk": lambda: TopK(6),
    "relu": lambda: ReLU(),
    "jumprelu": lambda: JumpReLU(torch.full((LATENTS,), 0.2)),
    "batchtopk": lambda: BatchTopK(0.3),
    "gated": lambda: Gated(*(0.1 * torch.randn(3, LATENTS))),
}
TRANSFORMS = [None, LayerNorm(), MeanCentre(), UnitNorm(), DatasetScale(0.4)]


def make_sae(at="resid_post.1", activation="topk", width=HIDDEN, out=None, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    out = width if out is None else out
    return SAE.from_weights(
        random(LATENTS, width) / width**0.5,
        random(LATENTS, out) / out**0.5,
        None if activation == "gated" else 0.1 * random(LATENTS),
        0.1 * random(out),
        activation=ACTIVATIONS[activation](),
        hookpoint=at,
        **options,
    )


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def stream(model, at, ids=IDS, **inputs):
    """The hidden state at a hookpoint, as a plain PyTorch hook sees it after all others."""
    location, seen = Hookpoint.parse(at).resolve(model), []
    if location.side == "out":
        handle = location.module.register_forward_hook(lambda m, a, out: seen.append(out))
    else:
        handle = location.module.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else next(iter(k.values()))), with_kwargs=True
        )
    try:
        logits(model, ids, **inputs)
    finally:
        handle.remove()
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return hidden.reshape(*ids.shape, -1)


def hooks_of(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    names += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        (path, name): list(getattr(module, name))
        for path, module in model.named_modules()
        for name in names
        if getattr(module, name)
    }


def state_of(model):
    return hooks_of(model), {path: sorted(m.__dict__) for path, m in model.named_modules()}


# -- nothing to change: nothing changes ------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_edits_logits_are_bit_identical_and_detach_leaves_no_trace(name, dtype):
    model = copy.deepcopy(tiny(name)).to(dtype)
    before, untouched = logits(model), state_of(model)
    with attach(model, make_sae()) as attachment:
        assert torch.equal(logits(model), before)
        assert attachment.codes["resid_post.1"].shape == (2, 7, 6)
    assert torch.equal(logits(model), before)
    assert state_of(model) == untouched


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_add_writes_the_decoder_direction_into_the_stream(name):
    model, sae = tiny(name), make_sae()
    clean, before = stream(model, "resid_post.1"), logits(model)
    with attach(model, sae, add(3, 2.5)):
        torch.testing.assert_close(stream(model, "resid_post.1"), clean + 2.5 * sae.W_dec[3])
        assert not torch.allclose(logits(model), before, atol=1e-4)
    assert torch.equal(logits(model), before)


SITES = ["embed", "resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "attn_z.1"]
SITES += ["mlp_in.1", "mlp_out.1", "mlp_act.1"]


@pytest.mark.parametrize("at", SITES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "olmo2", "bloom", "falcon_new"])
def test_every_site_can_be_observed_edited_and_given_back(name, at):
    model = tiny(name)
    if (name, at) == ("falcon_new", "resid_mid.1"):  # parallel: no stream between the two
        with pytest.raises(HookpointError, match="parallel"):
            attach(model, make_sae(at))
        return
    width = Hookpoint.parse(at).resolve(model).width
    sae, before = make_sae(at, width=width), logits(model)
    clean = stream(model, at)
    with attach(model, sae) as attachment:
        assert torch.equal(logits(model), before)
        assert attachment.codes[at].shape == (2, 7, 6)
        attachment.edits = add(3, 2.5)
        torch.testing.assert_close(stream(model, at), clean + 2.5 * sae.W_dec[3])
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma2", "olmo2", "granite", "glm4"])
def test_an_edit_of_resid_mid_moves_the_stream_and_not_only_what_the_mlp_reads(name):
    """Adding the same vector to attention's contribution is the other way to move that stream."""
    model, sae = tiny(name), make_sae("resid_mid.1")
    direction = 2.5 * sae.W_dec[3]
    block = model.config.get_text_config()
    multiplier = getattr(block, "residual_multiplier", 1.0)
    location = Hookpoint.parse("attn_out.1").resolve(model)

    def shift(module, args, out):
        if isinstance(out, tuple):
            return (out[0] + direction / multiplier, *out[1:])
        return out + direction / multiplier

    handle = location.module.register_forward_hook(shift)
    expected = stream(model, "resid_post.1")
    handle.remove()
    with attach(model, sae, add(3, 2.5)):
        torch.testing.assert_close(stream(model, "resid_post.1"), expected, atol=2e-5, rtol=1e-4)


# -- what edits mean -------------------------------------------------------------------------------

EDITS = {
    "clamp": [clamp(3, 1.5)],
    "scale": [scale(5, -2.0)],
    "ablate": [ablate(range(20))],
    "ablate to": [ablate([1, 2], to=0.7)],
    "in order": [add(4, 1.0), scale(4, 3.0), clamp(9, 2.0), add(9, 1.0), ablate(4, to=0.5)],
    "when": [add(3, 2.0, when=active(7)), scale(5, 0.0, when=active(5, above=0.5))],
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_edits_add_the_difference_of_two_decodes(activation, transform, edits):
    """hidden + decode(edited) - decode(code): the error survives, b_dec cancels."""
    model, sae = tiny("gpt2"), make_sae(activation=activation, input_transform=transform)
    x = stream(model, "resid_post.1")
    code = sae.encode(x)
    expected = x + sae.decode(apply(edits, code), x) - sae.decode(code, x)
    assert not torch.allclose(expected, x)
    for record in ("last", False):  # with the recorded code, and with dot products of its own
        with attach(model, sae, edits, record=record):
            torch.testing.assert_close(
                stream(model, "resid_post.1"), expected, atol=2e-5, rtol=1e-4
            )


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_splice_replaces_the_stream_by_the_reconstruction_of_the_edited_code(activation, transform):
    model, sae = tiny("llama"), make_sae(activation=activation, input_transform=transform)
    x = stream(model, "resid_post.1")
    with attach(model, sae, splice=True) as attachment:
        assert attachment.splice == (Hookpoint.parse("resid_post.1"),)
        torch.testing.assert_close(stream(model, "resid_post.1"), sae(x), atol=2e-5, rtol=1e-4)
        attachment.edits = EDITS["in order"]
        expected = sae.decode(apply(EDITS["in order"], sae.encode(x)), x)
        torch.testing.assert_close(stream(model, "resid_post.1"), expected, atol=2e-5, rtol=1e-4)
        attachment.splice = False
        assert not torch.allclose(stream(model, "resid_post.1"), expected, atol=1e-3)


def test_add_alone_never_encodes(monkeypatch):
    model, sae = tiny("gpt2"), make_sae()
    monkeypatch.setattr(SAE, "encode", lambda self, x: pytest.fail("encoded"))
    with attach(model, sae, [add(3, 1.0), add_vector(torch.ones(HIDDEN))], record=False):
        logits(model)


def test_a_few_latents_of_a_threshold_sae_never_rank_the_dictionary(monkeypatch):
    model, sae = tiny("gpt2"), make_sae(activation="jumprelu")
    monkeypatch.setattr(SAE, "encode", lambda self, x: pytest.fail("encoded"))
    with attach(model, sae, [clamp(3, 1.0), ablate([4, 5]), scale(6, 2.0)], record=False):
        logits(model)


def test_add_vector_is_in_the_models_own_units():
    model, sae = tiny("gpt2"), make_sae(input_transform=LayerNorm())
    x, vector = stream(model, "resid_post.1"), torch.randn(HIDDEN)
    with attach(model, sae, add_vector(vector, 0.5)):
        torch.testing.assert_close(stream(model, "resid_post.1"), x + 0.5 * vector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_hidden_dtype_is_kept_whatever_the_saes(dtype, weights):
    model, sae = copy.deepcopy(tiny("llama")).to(dtype), make_sae().to(weights)
    x = stream(model, "resid_post.1")
    for edits, splice in (([add(3, 2.0)], False), ([scale(3, 2.0)], True)):
        with attach(model, sae, edits, splice=splice):
            assert stream(model, "resid_post.1").dtype == dtype
    with attach(model, sae, add(3, 2.0)):
        expected = (x.float() + 2.0 * sae.W_dec[3].float()).to(dtype)
        torch.testing.assert_close(stream(model, "resid_post.1"), expected)
    assert sae.dtype == weights


def test_the_selection_is_the_same_under_autocast():
    model, sae = tiny("llama"), make_sae()
    with attach(model, sae) as attachment, torch.autocast("cpu", torch.bfloat16):
        logits(model)
        x = stream(model, "resid_post.1")
        code = attachment.codes["resid_post.1"]
    assert torch.equal(code.indices, sae.encode(x).indices)


# -- which tokens ----------------------------------------------------------------------------------


def moved(model, sae, edits, at="resid_post.1", **inputs):
    """Where edits changed the stream: bool [rows, T]."""
    clean = stream(model, at, **inputs)
    with attach(model, sae, edits):
        return (stream(model, at, **inputs) != clean).any(-1)


@pytest.mark.parametrize(
    "positions, expected",
    [
        (0, [0]),
        ([1, 3], [1, 3]),
        (-1, [6]),
        ([0, -2], [0, 5]),
        (slice(2, 5), [2, 3, 4]),
        (slice(-2, None), [5, 6]),
        (slice(None, -4), [0, 1, 2]),
        (slice(1, None, 3), [1, 4]),
        (slice(-99, 2), [0, 1]),
        (50, []),
    ],
)
def test_positions_select_tokens(positions, expected):
    where = moved(tiny("gpt2"), make_sae(), add(3, 1.0, positions=positions))
    assert where[0].nonzero().flatten().tolist() == expected
    assert torch.equal(where[0], where[1])


def test_positions_count_real_tokens_in_padded_rows():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    model, sae = tiny("llama"), make_sae()
    where = moved(model, sae, add(3, 1.0, positions=[0, -1]), attention_mask=mask)
    assert where.int().tolist() == [[0, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1]]
    right = mask.flip(-1)
    where = moved(model, sae, add(3, 1.0, positions=[0, -1]), attention_mask=right)
    assert where.int().tolist() == [[1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]]


def test_padding_is_never_edited_and_has_empty_codes():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    model, sae = tiny("llama"), make_sae()
    assert moved(model, sae, add(3, 1.0), attention_mask=mask).int().tolist() == mask.tolist()
    with attach(model, sae) as attachment:
        logits(model, attention_mask=mask)
    assert ((attachment.codes["resid_post.1"].l0() > 0) == mask.bool()).all()
    assert attachment.report()["resid_post.1"].tokens == int(mask.sum())


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_nan_at_padding_harms_nobody(activation, splice):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    model, sae = copy.deepcopy(tiny("llama")), make_sae(activation=activation)

    def codes():
        with attach(model, sae, clamp(3, 1.0), splice=splice) as attachment:
            logits(model, attention_mask=mask)
            report = attachment.report()["resid_post.1"]
            return attachment.codes["resid_post.1"], [report.fvu, report.error_norm]

    plain, fvu = codes()
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: out.masked_fill(~mask.bool().unsqueeze(-1), torch.nan)
    )
    found, same = codes()
    torch.testing.assert_close(found.to_dense(), plain.to_dense())
    assert same == pytest.approx(fvu) and not found.l0()[0, :2].any()


@pytest.mark.parametrize("rows, expected", [(0, [0]), ([1], [1]), ([0, 1], [0, 1])])
def test_rows_select_rows_of_the_batch(rows, expected):
    where = moved(tiny("gpt2"), make_sae(), add(3, 1.0, rows=rows))
    assert where.all(-1).nonzero().flatten().tolist() == expected
    assert where.any(-1).nonzero().flatten().tolist() == expected


def test_a_row_the_batch_does_not_have_is_refused_in_the_pass_that_lacks_it():
    model = tiny("gpt2")
    before = logits(model)
    with attach(model, make_sae(), add(3, 1.0, rows=2)) as attachment:
        with pytest.raises(ValueError, match="row 2.*has 2 rows"):
            logits(model)
        attachment.edits = ()
        assert torch.equal(logits(model), before)  # the failed pass left nothing half done


def test_when_acts_only_where_the_condition_held_before_any_edit():
    model, sae = tiny("gpt2"), make_sae(activation="relu")
    x = stream(model, "resid_post.1")
    fires = sae.activations(x)[..., 7] > 0.3
    assert fires.any() and not fires.all()
    edits = [clamp(7, 0.0), add(3, 1.0, when=active(7, above=0.3))]
    with attach(model, sae, edits):
        change = stream(model, "resid_post.1") - x
    silenced = -sae.activations(x)[..., 7:8] * sae.W_dec[7]
    torch.testing.assert_close(
        change, silenced + fires[..., None] * sae.W_dec[3], atol=1e-5, rtol=0
    )


# -- edits while attached --------------------------------------------------------------------------


def test_edits_are_live_and_nothing_is_hooked_again():
    model, sae = tiny("gpt2"), make_sae()
    before = logits(model)
    with attach(model, sae, add(3, 1.0)) as attachment:
        steered, hooks = logits(model), hooks_of(model)
        attachment.edits = [add(3, 2.0)]
        assert not torch.allclose(logits(model), steered, atol=1e-4)
        attachment.edits = []
        assert torch.equal(logits(model), before)
        assert hooks_of(model) == hooks


def test_a_refused_assignment_leaves_the_old_edits_in_force():
    model = tiny("gpt2")
    with attach(model, make_sae(), add(3, 1.0)) as attachment:
        steered = logits(model)
        with pytest.raises(ValueError, match=f"latent {LATENTS} .* {LATENTS} latents"):
            attachment.edits = [add(1, 1.0), add(LATENTS, 1.0)]
        assert torch.equal(logits(model), steered) and len(attachment.edits) == 1


# -- several SAEs ----------------------------------------------------------------------------------


def test_saes_at_one_hookpoint_apply_in_attach_order_each_on_what_the_last_left():
    model, first, second = tiny("gpt2"), make_sae(seed=1), make_sae(seed=2)
    x = stream(model, "resid_post.1")
    edits = [scale(5, 3.0, sae=first), add(3, 4.0, sae=second)]
    y = first(x + 0)
    y = first.decode(apply(edits[:1], first.encode(x)), x)
    expected = second.decode(apply(edits[1:], second.encode(y)), y)
    with attach(model, [first, second], edits, splice=True) as attachment:
        torch.testing.assert_close(stream(model, "resid_post.1"), expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            attachment.codes[second].to_dense(), second.encode(y).to_dense(), atol=2e-5, rtol=1e-4
        )
        with pytest.raises(KeyError, match=r"codes\[sae\]"):
            attachment.codes["resid_post.1"]
    with (
        attach(model, first, edits[:1], splice=True),
        attach(model, second, edits[1:], splice=True),
    ):
        torch.testing.assert_close(stream(model, "resid_post.1"), expected, atol=2e-5, rtol=1e-4)


def test_attachments_come_off_in_any_order():
    model, first, second = tiny("gpt2"), make_sae(seed=1), make_sae("resid_post.0", seed=2)
    before, untouched = logits(model), state_of(model)
    one, two = attach(model, first, add(1, 1.0)), attach(model, second, add(2, 1.0))
    both = logits(model)
    one.detach()
    assert not torch.equal(logits(model), both)
    with attach(model, second, add(2, 1.0)):
        pass
    two.detach()
    two.detach()
    assert torch.equal(logits(model), before) and state_of(model) == untouched


def test_an_edit_must_say_which_of_several_saes_it_means():
    model = tiny("gpt2")
    saes = {"resid_post.0": make_sae(seed=1), "resid_post.1": make_sae(seed=2)}
    with pytest.raises(ValueError, match="2 SAEs are attached.*sae="):
        attach(model, saes, add(3, 1.0))
    assert not hooks_of(model)
    clean = stream(model, "resid_post.0")
    for which in ("blocks.0.hook_resid_post", "transformer.h.0", saes["resid_post.0"]):
        with attach(model, saes, add(3, 1.0, sae=which)):
            changed = stream(model, "resid_post.0") - clean
        torch.testing.assert_close(changed, saes["resid_post.0"].W_dec[3].expand_as(changed))
    with pytest.raises(ValueError, match="resid_post.2 is not attached; attached: resid_post.0"):
        attach(model, saes, add(3, 1.0, sae="resid_post.2"))


def test_a_mid_stream_edit_reaches_an_sae_attached_earlier_to_the_block_output():
    model, post, mid = tiny("gpt2"), make_sae("resid_post.1"), make_sae("resid_mid.1", seed=3)
    with attach(model, mid, add(3, 2.5)):
        expected = post.encode(stream(model, "resid_post.1"))
    with attach(model, [post, mid], add(3, 2.5, sae="resid_mid.1")) as attachment:
        logits(model)
        code = attachment.codes["resid_post.1"]
    torch.testing.assert_close(code.to_dense(), expected.to_dense(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "mixtral"])
def test_a_transcoder_reads_at_its_hookpoint_and_writes_at_its_target(name, skip):
    model = tiny(name)
    W_skip = torch.randn(HIDDEN, HIDDEN) / 6 if skip else None
    coder = make_sae("mlp_in.1", target_hookpoint="mlp_out.1", W_skip=W_skip)
    x, y, before = stream(model, "mlp_in.1"), stream(model, "mlp_out.1"), logits(model)
    with attach(model, coder) as attachment:
        assert torch.equal(logits(model), before)
        torch.testing.assert_close(
            attachment.codes["mlp_in.1"].to_dense(), coder.encode(x).to_dense()
        )
        attachment.edits = [add(3, 2.0), scale(5, 2.0)]
        change = coder.decode(apply(attachment.edits, coder.encode(x)), x) - coder(x)
        torch.testing.assert_close(stream(model, "mlp_out.1"), y + change, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            stream(model, "mlp_in.1"), x
        )  # nothing is written where it reads
        attachment.edits, attachment.splice = (), True
        torch.testing.assert_close(stream(model, "mlp_out.1"), coder(x), atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(model), before)


# -- other hooks -----------------------------------------------------------------------------------


def test_the_users_hooks_keep_firing_and_see_the_edit():
    model, sae, seen = tiny("gpt2"), make_sae(), []
    block = model.transformer.h[1]
    block.register_forward_hook(lambda m, a, out: seen.append(out))
    clean = logits(model) is not None and seen.pop()
    with attach(model, sae, add(3, 1.0)):
        block.register_forward_hook(lambda m, a, out: seen.append(out))
        logits(model)
    first, second = (out[0] if isinstance(out, tuple) else out for out in seen)
    clean = clean[0] if isinstance(clean, tuple) else clean
    torch.testing.assert_close(first, clean + sae.W_dec[3])
    torch.testing.assert_close(second, clean + sae.W_dec[3])
    assert len(block._forward_hooks) == 2


def test_output_hidden_states_show_the_edit():
    model, sae = tiny("llama"), make_sae("resid_post.0")
    logits(model, output_hidden_states=True)  # transformers installs its own hooks at this point
    clean = model(IDS, output_hidden_states=True).hidden_states[1]
    with attach(model, sae, add(3, 1.0)):
        seen = model(IDS, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen, clean + sae.W_dec[3])


# -- gradients -------------------------------------------------------------------------------------


def test_gradients_reach_amounts_and_weights_through_edit_and_splice():
    model = copy.deepcopy(tiny("gpt2")).double()
    sae = make_sae(activation="relu").double().requires_grad_(True)
    amount = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weight = model.transformer.h[0].mlp.c_fc.weight

    def loss(splice, scaled):
        edits = [add(3, amount), *(scale(latent, scaled) for latent in range(12))]
        with attach(model, sae, edits, splice=splice):
            return model(IDS).logits.square().mean()

    for splice in (False, True):
        value = loss(splice, 2.0)
        grads = torch.autograd.grad(value, [amount, weight, sae.W_dec, sae.W_enc])
        assert all(grad.abs().sum() > 0 for grad in grads)
        with torch.no_grad():
            step = 1e-5
            for tensor, grad in ((amount, grads[0]), (weight, grads[1])):
                flat, at = tensor.view(-1), int(grad.abs().argmax())
                flat[at] += step
                up = loss(splice, 2.0)
                flat[at] -= 2 * step
                down = loss(splice, 2.0)
                flat[at] += step
                torch.testing.assert_close(
                    (up - down) / (2 * step), grad.view(-1)[at], atol=1e-8, rtol=1e-3
                )


def test_the_error_term_passes_its_gradient():
    """With an edit of one latent, the gradient is that of the stream plus the latent's own path."""
    model, sae = tiny("gpt2"), make_sae(activation="relu")
    inputs = model.transformer.wte(IDS).detach().requires_grad_(True)
    with attach(model, sae, clamp(3, 0.0)):
        edited = model(inputs_embeds=inputs).logits.sum()
    gradient = torch.autograd.grad(edited, inputs)[0]

    def by_hand(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        f = torch.relu((x - sae.b_dec) @ sae.W_enc[3] + sae.b_enc[3])
        y = x - f[..., None] * sae.W_dec[3]
        return (y, *out[1:]) if isinstance(out, tuple) else y

    handle = model.transformer.h[1].register_forward_hook(by_hand)
    expected = torch.autograd.grad(model(inputs_embeds=inputs).logits.sum(), inputs)[0]
    handle.remove()
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_and_records_once(reentrant):
    def run(checkpointing):
        model = copy.deepcopy(tiny("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        edits = [add(3, 1.0, positions=slice(2, None)), scale(5, 2.0, phase="prompt")]
        with attach(model, make_sae(), edits, record="all") as attachment:
            model(IDS, use_cache=False).logits.square().mean().backward()
        assert attachment.codes["resid_post.1"].shape[:2] == (2, 7)
        assert attachment.report()["resid_post.1"].tokens == 14
        return [p.grad for p in model.model.layers[0].parameters()]

    for plain, checkpointed in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_checkpointing_refuses_to_guess_which_of_two_passes_it_recomputes():
    model = copy.deepcopy(tiny("llama")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

    def loss(**inputs):
        return model(IDS, use_cache=False, **inputs).logits.square().mean()

    with attach(model, make_sae("mlp_in.1"), add(3, 1.0, positions=0)) as attachment:
        with pytest.raises(RuntimeError, match="cannot tell which"):
            (loss() + loss(attention_mask=mask)).backward()
        loss().backward()
        loss(attention_mask=mask).backward()
        attachment.edits = add(3, 1.0)  # the same at every token of every pass: nothing to tell
        (loss() + loss()).backward()


# -- wrappers and copies ---------------------------------------------------------------------------


def test_a_peft_model_is_edited_like_the_model_inside_it():
    model = peft_wrap(copy.deepcopy(tiny("llama")))
    inner, sae, before = model.get_base_model(), make_sae(), logits(model)
    with attach(model, sae, add(3, 1.0)):
        steered = logits(model)
        assert not torch.allclose(steered, before, atol=1e-4)
        new = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    with attach(inner, sae, add(3, 1.0)):
        assert torch.equal(logits(model), steered)
        assert torch.equal(inner.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), new)
    assert torch.equal(logits(model), before)


def test_a_multimodal_model_is_edited_in_its_language_model():
    model, sae = tiny_multimodal(), make_sae()
    before = logits(model)
    clean = stream(model, "resid_post.1")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    with attach(model, sae, add(3, 1.0, positions=0)) as attachment:
        changed = (stream(model, "resid_post.1") != clean).any(-1)
        assert changed.int().tolist() == [[1, 0, 0, 0, 0, 0, 0]] * 2
        logits(model, attention_mask=mask)
        assert attachment.codes["resid_post.1"].l0()[0, :2].sum() == 0
    assert torch.equal(logits(model), before)


def test_a_bare_backbone_and_a_plain_module_can_be_attached_to():
    model, sae = tiny("gpt2"), make_sae()
    clean = model.transformer(IDS).last_hidden_state
    with attach(model.transformer, sae, add(3, 1.0, positions=-1)):
        edited = model.transformer(IDS).last_hidden_state
    assert (edited != clean).any(-1).int().tolist() == [[0, 0, 0, 0, 0, 0, 1]] * 2
    plain = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN))
    x = torch.randn(2, 5, HIDDEN)
    hidden = plain[0](x)
    with attach(plain, sae, add(3, 1.0, rows=1), hookpoint="0") as attachment:
        expected = hidden.clone()
        expected[1] += sae.W_dec[3]
        torch.testing.assert_close(plain(x), plain[1](expected))
        assert attachment.codes["0"].shape == (2, 5, 6)


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
def test_an_attached_model_refuses_to_be_copied_and_a_detached_one_does_not(copier):
    model = copy.deepcopy(tiny("gpt2"))
    with (
        attach(model, make_sae(), add(3, 1.0)) as attachment,
        pytest.raises(TypeError, match="Detach first"),
    ):
        copier(model)
    with pytest.raises(TypeError, match="Detach first"):
        copier(attachment)
    copier(model)


def test_an_exception_inside_the_block_restores_the_model():
    model = tiny("gpt2")
    before, untouched = logits(model), state_of(model)
    with pytest.raises(RuntimeError, match="mine"), attach(model, make_sae(), add(3, 1.0)):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), before) and state_of(model) == untouched


def test_an_exception_inside_the_forward_pass_does_not_stick():
    model = copy.deepcopy(tiny("gpt2"))
    block, before = model.transformer.h[2], logits(model)
    with attach(model, make_sae()):
        handle = block.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), before)


def test_a_pass_that_broke_off_leaves_nothing_to_carry():
    model = copy.deepcopy(tiny("gpt2"))
    before = logits(model)
    with attach(model, make_sae("resid_mid.1"), add(3, 1.0)) as attachment:
        handle = model.transformer.h[1].mlp.register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model)
        handle.remove()
        attachment.edits = ()
        assert torch.equal(logits(model), before)


# -- recording -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_record_all_is_every_token_since_attach_in_order(activation):
    model, sae = tiny("gpt2"), make_sae(activation=activation)
    new = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with attach(model, sae, record="all") as attachment:
        model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
        code = attachment.codes["resid_post.1"]
    expected = sae.encode(stream(model, "resid_post.1", ids=new[:, :-1]))
    torch.testing.assert_close(code.to_dense(), expected.to_dense(), atol=1e-4, rtol=1e-4)
    assert code.num_latents == LATENTS


def test_record_last_keeps_the_latest_pass_and_record_false_none():
    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae) as attachment:
        logits(model)
        logits(model, ids=IDS[:, :3])
        assert attachment.codes["resid_post.1"].shape[:2] == (2, 3)
        assert list(attachment.codes) == ["resid_post.1"]
    with attach(model, sae, record=False) as attachment:
        logits(model)
        with pytest.raises(KeyError, match="record=False"):
            attachment.codes["resid_post.1"]
        assert attachment.report()["resid_post.1"].l0 is None


def test_the_report_is_the_papers_fvu_and_the_mean_l0():
    model, sae = tiny("gpt2"), make_sae(activation="relu")
    with attach(model, sae) as attachment:
        logits(model)
        logits(model, ids=IDS[:, :4])
        report = attachment.report()["resid_post.1"]
        attachment.clear()
        assert attachment.report()["resid_post.1"].tokens == 0
    x = torch.cat([stream(model, "resid_post.1").flatten(0, 1)] * 1)
    y = stream(model, "resid_post.1", ids=IDS[:, :4]).flatten(0, 1)
    x = torch.cat([x, y]).double()
    errors = x - sae(x.float()).double()
    error = errors.square().sum()
    spread = (x - x.mean(0)).square().sum()
    assert report.error_norm == pytest.approx(float(errors.norm(dim=-1).mean()), rel=1e-5)
    assert report.tokens == len(x) == 22 and report.milliseconds > 0
    assert report.fvu == pytest.approx(float(error / spread), rel=1e-5)
    assert report.l0 == pytest.approx(float(sae.encode(x.float()).l0().double().mean()))


def test_codes_answer_to_every_spelling():
    model = tiny("gpt2")
    with attach(model, make_sae()) as attachment:
        logits(model)
    spellings = ["resid_post.1", "blocks.1.hook_resid_post", "transformer.h.1", "h.1"]
    for spelling in [*spellings, Hookpoint.parse("resid_post.1")]:
        assert attachment.codes[spelling].shape == (2, 7, 6)
    with pytest.raises(KeyError, match="attached: resid_post.1"):
        attachment.codes["resid_post.0"]


# -- bad input -------------------------------------------------------------------------------------

REFUSED = {
    "wrong width": (lambda: make_sae(width=HIDDEN - 1), {}, "width 32.*reads width 31"),
    "layer out of range": (lambda: make_sae(f"resid_post.{LAYERS}"), {}, "layers 0 to 2"),
    "unknown site": (lambda: make_sae(), {"hookpoint": "resid_pots.1"}, "resid_post"),
    "unknown path": (lambda: make_sae(), {"hookpoint": "transformer.g.1"}, "transformer.h.1"),
    "latent": (lambda: make_sae(), {"edits": add(99, 1.0)}, "latent 99.*0 to 47"),
    "condition": (lambda: make_sae(), {"edits": add(1, 1.0, when=active(99))}, "latent 99"),
    "vector": (lambda: make_sae(), {"edits": add_vector(torch.ones(5))}, "5 entries.*width 32"),
    "not an edit": (lambda: make_sae(), {"edits": [3]}, "found int, expected add"),
    "record": (lambda: make_sae(), {"record": "everything"}, "'last' or 'all'"),
    "splice": (lambda: make_sae(), {"splice": "resid_post.0"}, "attached: resid_post.1"),
    "no SAE": (lambda: [], {}, "no SAE given"),
    "not an SAE": (lambda: nn.Linear(3, 3), {}, "Linear"),
    "homeless": (lambda: make_sae(None), {}, "does not say where it reads"),
    "other model": (
        lambda: make_sae(metadata={"base_model_config": {"model_type": "llama"}}),
        {},
        "'gpt2' instead of 'llama'.*strict=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_and_leaves_the_model_as_it_was(case):
    make, options, message = REFUSED[case]
    model = tiny("gpt2")
    before, untouched = logits(model), state_of(model)
    with pytest.raises((ValueError, TypeError), match=message):
        attach(model, make(), **options)
    assert torch.equal(logits(model), before) and state_of(model) == untouched


def test_another_models_sae_attaches_when_told_to(monkeypatch):
    model = copy.deepcopy(tiny("gpt2"))
    model.config._name_or_path = "openai-community/gpt2"
    attach(model, make_sae(metadata={"base_model": "gpt2-small"})).detach()
    other = make_sae(metadata={"base_model": "EleutherAI/pythia-70m"})
    with pytest.raises(ValueError, match="pythia-70m.*openai-community/gpt2.*strict=False"):
        attach(model, other)
    attach(model, other, strict=False).detach()


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="splcie"):
        attach(tiny("gpt2"), make_sae(), splcie=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_hidden_state_is_named_where_it_is(value):
    model = tiny("gpt2")
    embeds = model.transformer.wte(IDS).detach().clone()
    embeds[1, 4, 0] = value
    with (
        attach(model, make_sae("resid_pre.0")),
        pytest.raises(ValueError, match="resid_pre.0.*row 1 at column 4"),
    ):
        model(inputs_embeds=embeds)


def test_nan_in_weights_is_refused_when_the_sae_is_made():
    W = torch.randn(4, 8)
    W[1, 2] = float("nan")
    with pytest.raises(ValueError, match="W_dec contains NaN or inf"):
        SAE.from_weights(torch.randn(4, 8), W, activation=ReLU())


def test_a_closed_attachment_says_so_but_its_records_can_be_read():
    model = tiny("gpt2")
    attachment = attach(model, make_sae())
    logits(model)
    attachment.detach()
    attachment.detach()
    assert attachment.codes["resid_post.1"].shape == (2, 7, 6)
    assert attachment.report()["resid_post.1"].tokens == 14
    with pytest.raises(RuntimeError, match="call attach again"):
        attachment.edits = []
    with pytest.raises(RuntimeError, match="call attach again"):
        attachment.splice = True
    with pytest.raises(RuntimeError, match="call attach again"), attachment:
        pass


# -- what reviewers broke --------------------------------------------------------------------------


def test_checkpointing_recomputes_with_the_pass_that_had_gradients():
    model = copy.deepcopy(tiny("llama")).train()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])

    def gradients(between):
        model.zero_grad()
        with attach(model, make_sae("mlp_in.1"), clamp(3, 5.0, positions=0)):
            loss = model(IDS, attention_mask=mask, use_cache=False).logits.square().mean()
            if between:
                logits(model, ids=IDS.flip(0))
            loss.backward()
        return [p.grad.clone() for p in model.model.layers[0].parameters()]

    expected = gradients(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for plain, checkpointed in zip(expected, gradients(True), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_an_sae_on_the_embedding_refuses_calls_that_skip_it():
    model = tiny("gpt2")
    embeds = model.transformer.wte(IDS).detach()
    with attach(model, make_sae("embed"), add(3, 5.0)):
        logits(model)
        with pytest.raises(ValueError, match="attach at resid_pre.0"):
            model(inputs_embeds=embeds)
    with attach(model, make_sae("resid_pre.0"), add(3, 5.0)):
        model(inputs_embeds=embeds)


def test_a_transcoder_is_not_half_moved_to_another_layer():
    model, coder = tiny("gpt2"), make_sae("mlp_in.1", target_hookpoint="mlp_out.1")
    for moved in ({"hookpoint": "mlp_in.0"}, {}):
        with pytest.raises(ValueError, match="still write at mlp_out.1"):
            attach(model, coder if moved else {"mlp_in.0": coder}, **moved)
    attach(model, coder, hookpoint="transformer.h.1.mlp:in").detach()


def test_a_model_nobody_refers_to_goes_although_it_is_attached():
    import gc
    import weakref

    model = copy.deepcopy(tiny("gpt2"))
    attachment, gone = attach(model, make_sae(), add(3, 1.0)), weakref.ref(model)
    logits(model)
    del model, attachment
    gc.collect()
    assert gone() is None


def test_edits_made_in_inference_mode_can_be_trained_through():
    model, sae = copy.deepcopy(tiny("gpt2")), make_sae()
    with attach(model, sae) as attachment:
        with torch.inference_mode():
            attachment.edits = [clamp(3, 2.0), scale(4, 2.0)]
            logits(model)
        model(IDS, labels=IDS).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_sae_may_change_dtype_while_attached(dtype):
    model, sae = tiny("gpt2"), make_sae()
    with attach(model, sae, [clamp(3, 2.0), scale(4, 2.0), clamp(4, 1.0)]):
        expected = logits(model)
        sae.to(dtype)
        torch.testing.assert_close(logits(model), expected, atol=0.1, rtol=0.1)


def test_someone_elses_generate_survives_detach():
    model = copy.deepcopy(tiny("gpt2"))
    attachment = attach(model, make_sae())
    model.generate = mine = lambda *args, **kwargs: "mine"
    attachment.detach()
    assert model.generate is mine
