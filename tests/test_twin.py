"""A twin is another module tree on the same weights: nothing done to one is done to the other."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tiny_models import VOCAB, peft_wrap, tiny

from saert import TopK, add, attach, twin
from saert.hookpoint import Hookpoint
from saert.hooks import eager, hooked
from saert.hub import bundled
from saert.sae import SAE

IDS = torch.arange(3, 12)[None]
MODELS = {name: lambda name=name: tiny(name) for name in ("gpt2", "llama", "gemma2", "mamba")}
MODELS["peft"] = lambda: peft_wrap(tiny("llama"))


def tensors(model):
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights_and_the_same_logits(name):
    model = MODELS[name]()
    copy = twin(model)
    before, after = tensors(model), tensors(copy)
    assert list(before) == list(after)
    assert all(after[key] is before[key] for key in before)
    modules, others = dict(model.named_modules()), dict(copy.named_modules())
    assert list(modules) == list(others)
    assert not {id(one) for one in modules.values()} & {id(one) for one in others.values()}
    with torch.no_grad():
        assert torch.equal(copy(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch.equal(
            copy.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
            model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
        )


def test_tied_weights_stay_tied_and_the_mode_is_kept():
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    copy = twin(model)
    assert copy.lm_head.weight is copy.transformer.wte.weight is model.lm_head.weight
    assert [one.training for one in copy.modules()] == [one.training for one in model.modules()]


def test_a_gradient_reaches_the_weights_of_both():
    model = tiny("llama")
    twin(model)(input_ids=IDS).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_hooks_of_one_never_fire_in_the_other():
    model = tiny("llama")
    copy, seen = twin(model), []
    hook = copy.model.layers[1].register_forward_hook(lambda *_: seen.append("twin"))
    model.model.layers[1].register_forward_hook(lambda *_: seen.append("model"))
    model(input_ids=IDS)
    assert seen == ["model"]
    copy(input_ids=IDS)
    assert seen == ["model", "twin"]
    hook.remove()
    assert len(model.model.layers[1]._forward_hooks) == 1


def test_a_model_with_something_attached_is_refused():
    model, sae = bundled.model(), bundled.sae("resid_post.2")
    with attach(model, sae), pytest.raises(TypeError, match="cannot be copied"):
        twin(model)
    twin(model)


@pytest.mark.parametrize("place", ["resid_post.1", "mlp_in.1"])
def test_a_model_whose_hidden_states_are_read_is_refused(place):
    model = tiny("llama")
    reading = hooked(model, Hookpoint.parse(place), lambda hidden: None)
    with reading, pytest.raises(TypeError, match="cannot be copied"):
        twin(model)
    twin(model)


def test_threads_that_overlap_leave_compiled_models_compiled():
    from torch._dynamo import eval_frame

    def stance():
        return eval_frame._stance.stance

    assert "torch._dynamo" in sys.modules and stance() == "default"
    first, second = eager(), eager()
    first.__enter__()
    second.__enter__()
    assert stance() == "force_eager"
    first.__exit__(None, None, None)  # in the order of threads, not of nesting
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == "default"
    ready = Barrier(4)

    def work(_):
        ready.wait()
        for _ in range(50):
            with eager():
                assert stance() == "force_eager"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert stance() == "default"


def steer(model, sae, latent):
    with attach(model, sae, add(latent, 6.0)):
        return model.generate(IDS, max_new_tokens=12, do_sample=False)


def test_four_threads_steer_four_twins_as_if_alone():
    model = tiny("gpt2")
    torch.manual_seed(0)
    sae = SAE.from_weights(
        torch.randn(24, 32), torch.randn(24, 32), activation=TopK(4), hookpoint="resid_post.1"
    )
    alone = [steer(twin(model), sae, latent) for latent in range(4)]
    assert len({tuple(one[0].tolist()) for one in alone}) > 1 and VOCAB > 4
    ready = Barrier(4)

    def work(latent):
        copy = twin(model)
        ready.wait()
        return [steer(copy, sae, latent) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for latent, found in enumerate(pool.map(work, range(4))):
            assert all(torch.equal(one, alone[latent]) for one in found)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
