"""Models that accelerate spreads over devices, memory and disk, with SAEs attached."""

import copy
import functools

import pytest
import torch
from test_attach import IDS, logits, make_sae
from test_generate import greedy
from tiny_models import LAYERS, tiny

from saert import Hookpoint, add, attach, scale, twin
from saert.capture import capture
from saert.hooks import device_of

EDITS = [add(3, 2.0, sae="resid_post.0"), scale(5, 2.0, sae="mlp_in.2")]
ENDS = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], "cpu")
MAPS = {
    "one place": {"": "cpu"},
    "layers": ENDS | {f"model.layers.{i}": "cpu" for i in range(LAYERS)},
    "one on disk": ENDS
    | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"},
    "all on disk": ENDS | {f"model.layers.{i}": "disk" for i in range(LAYERS)},
    "an attention on disk": ENDS
    | {f"model.layers.{i}": "cpu" for i in (0, 1)}
    | {f"model.layers.2.{part}": "cpu" for part in ("mlp", "input_layernorm")}
    | {"model.layers.2.self_attn": "disk", "model.layers.2.post_attention_layernorm": "disk"},
}


def two():
    return [make_sae("resid_post.0"), make_sae("mlp_in.2", seed=1)]


def state(model):
    """Everything of accelerate's, and every hook, in order."""
    return [
        (
            name,
            getattr(module, "_hf_hook", None),
            module.__dict__.get("forward"),
            module.__dict__.get("_old_forward"),
            list(module._forward_hooks.items()),
            list(module._forward_pre_hooks.items()),
            [(key, value.device) for key, value in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


@pytest.fixture
def placed(tmp_path):
    """A copy of tiny llama, spread by a device map."""
    from accelerate import dispatch_model

    def make(places):
        return dispatch_model(
            copy.deepcopy(tiny("llama")),
            places,
            main_device="cpu",
            offload_dir=tmp_path / "offload",
            force_hooks=True,
        )

    return make


@pytest.mark.parametrize("places", MAPS)
def test_two_saes_on_a_model_in_several_places(placed, places):
    whole, model = tiny("llama"), placed(MAPS[places])
    before = state(model)
    assert any(hook is not None for _, hook, *_ in before)
    with attach(whole, two(), EDITS) as theirs, attach(model, two(), EDITS) as ours:
        assert torch.equal(logits(model), logits(whole))
        assert torch.equal(greedy(model), greedy(whole))
        for at in ("resid_post.0", "mlp_in.2"):
            assert torch.equal(ours.codes[at].to_dense(), theirs.codes[at].to_dense())
    assert state(model) == before
    assert torch.equal(logits(model), logits(whole))
    points = [Hookpoint.parse(at) for at in ("attn_z.1", "mlp_act.2", "resid_mid.1")]
    for a, b in zip(*(capture(m, IDS, points).values() for m in (whole, model)), strict=True):
        assert torch.equal(a, b)


def test_accelerates_hook_runs_inside_ours(placed):
    """An input is read before accelerate moves it, an output after accelerate has moved it."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def pre_forward(self, module, hidden, *args, **kwargs):
            return (2 * hidden, *args), kwargs

        def post_forward(self, module, output):
            return output + 1.0

    model = tiny("llama")
    sae, plain = make_sae("resid_pre.1"), logits(model)
    points = [Hookpoint.parse(at) for at in ("resid_pre.1", "resid_post.1")]
    before, _ = capture(model, IDS, points).values()
    add_hook_to_module(model.model.layers[1], Doubled())
    assert not torch.equal(logits(model), plain)
    hooked_before, hooked_after = capture(model, IDS, points).values()
    assert torch.equal(hooked_before, before)
    raw = []
    inner = model.model.layers[1]._old_forward
    model.model.layers[1]._old_forward = lambda *a, **k: raw.append(inner(*a, **k)) or raw[-1]
    with attach(model, sae, add(3, 2.0)) as attachment, torch.no_grad():
        model(IDS)
        code = attachment.codes["resid_pre.1"]
    shaped = before.view(*IDS.shape, -1)
    torch.testing.assert_close(code.to_dense(), sae.encode(shaped).to_dense())
    with torch.no_grad():
        expected = inner(2 * (shaped + 2.0 * sae.W_dec[3]), **rotary(model, shaped))
    torch.testing.assert_close(raw[0], expected)
    model.model.layers[1]._old_forward = inner
    torch.testing.assert_close(capture(model, IDS, points)[points[1]], hooked_after, rtol=0, atol=0)


def rotary(model, hidden):
    positions = torch.arange(IDS.shape[1])[None]
    return {"position_embeddings": model.model.rotary_emb(hidden, positions)}


def test_a_twin_shares_what_is_offloaded():
    from accelerate import cpu_offload

    whole = tiny("llama")
    model = cpu_offload(copy.deepcopy(whole), torch.device("cpu"))
    other = twin(model)
    hooks = [(m._hf_hook, t._hf_hook) for m, t in zip(model.modules(), other.modules(), strict=True)
             if hasattr(m, "_hf_hook")]  # fmt: skip
    maps = [(_maps(one), _maps(same)) for one, same in hooks]
    assert any(mine for mine, _ in maps)
    assert all(a is b for mine, theirs in maps for a, b in zip(mine, theirs, strict=True))
    with attach(whole, two(), EDITS):
        expected = logits(whole)
    with attach(other, two(), EDITS):
        assert torch.equal(logits(other), expected)
        assert torch.equal(logits(model), logits(whole))


def _maps(hook):
    return [
        one.weights_map
        for one in getattr(hook, "hooks", (hook,))
        if getattr(one, "weights_map", None) is not None
    ]


def test_a_twin_of_a_model_whose_block_runs_by_itself_is_refused():
    model = tiny("llama")
    block, inner = model.model.layers[1], model.model.layers[1].forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    block.forward = forward
    with pytest.raises(TypeError, match=r"model.layers.1: its forward was replaced .* take the"):
        twin(model)
    del block.forward
    leaf = model.model.layers[1].mlp.up_proj  # as transformers' tensor parallelism does
    leaf.forward = lambda x: torch.nn.functional.linear(x, leaf.weight, leaf.bias)
    with attach(twin(model), make_sae("mlp_out.1"), add(3, 2.0)) as attachment:
        assert torch.equal(logits(attachment._model), edited_logits())


def edited_logits():
    model = tiny("llama")
    with attach(model, make_sae("mlp_out.1"), add(3, 2.0)):
        return logits(model)


def test_a_model_on_meta_says_where_it_takes_its_inputs(placed):
    assert device_of(placed(MAPS["all on disk"])) == torch.device("cpu")


# -- with a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_each_sae_follows_its_hidden_state():
    from accelerate import dispatch_model

    places = ENDS | {"model.layers.0": "cpu", "model.layers.1": 0, "model.layers.2": 0}
    whole, model = tiny("llama"), dispatch_model(tiny("llama"), places, main_device="cpu")
    saes = two()
    with attach(whole, two(), EDITS) as theirs, attach(model, saes, EDITS) as ours:
        torch.testing.assert_close(logits(model), logits(whole), rtol=1e-3, atol=1e-3)
        assert torch.equal(greedy(model), greedy(whole))
        for at in ("resid_post.0", "mlp_in.2"):
            torch.testing.assert_close(
                ours.codes[at].to_dense().cpu(), theirs.codes[at].to_dense(), rtol=1e-3, atol=1e-3
            )
    assert [sae.device.type for sae in saes] == ["cpu", "cuda"]


@pytest.mark.gpu
def test_a_transcoder_reads_on_one_device_and_writes_on_another():
    from accelerate import dispatch_model

    places = ENDS | {"model.layers.0": "cpu", "model.layers.1": 0, "model.layers.2": 0}
    whole, model = tiny("llama"), dispatch_model(tiny("llama"), places, main_device="cpu")

    def coder():
        return make_sae("mlp_in.0", target_hookpoint="mlp_out.1")

    with attach(whole, coder(), add(3, 2.0), splice=True):
        expected = logits(whole)
    with attach(model, coder(), add(3, 2.0), splice=True):
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
