"""Steering across models, activations and prompts: chat, no BOS, one token, long prompts, ids."""

import logging

import pytest
import torch
from sae_cases import make
from test_feature_index import byte_tokenizer
from test_steering import FIRST, FOOD, GREEDY, generated, ids_of, setup
from tiny_models import HIDDEN, tiny

from saert import attach
from saert.hub import bundled
from saert.hub.load import load
from saert.measure.steering import EditSpec, Sampling, Setup, encode_prompt, side_by_side
from saert.measure.steering import compare as compare_module
from saert.measure.steering.setup import MAX_PROMPT
from saert.own_text import own_text

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


def writer(name, bos=False):
    """A tiny model that never ends, and a tokenizer of bytes, with nothing before a text."""
    model, tokenizer = tiny(name), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = None
    if not bos:
        model.generation_config.bos_token_id = model.config.bos_token_id = None
        tokenizer.bos_token = None
    return model, tokenizer


def sae_at(act, **options):
    return make(
        act, d_in=HIDDEN, n=40, dtype=torch.float32, hookpoint="resid_post.1", **options
    )  # fmt: skip


def strongest(model, ids, sae):
    with attach(model, sae) as attachment:
        model(ids, use_cache=False)
    return int(next(iter(attachment.codes.values())).to_dense()[0].amax(0).argmax())


def run(model, tokenizer, sae, prompt, chat=False, **options):
    ids = encode_prompt(tokenizer, prompt, chat)["input_ids"]
    spec = EditSpec("mine", strongest(model, ids, sae), amount=6.0, **options)
    one = setup(spec, prompt=prompt, chat=chat)
    steps = list(side_by_side(model, tokenizer, one, {"mine": sae}))
    with attach(model, sae, spec.edit(sae)):
        steered = generated(model, ids, GREEDY).tolist()
    assert ids_of(steps) == [generated(model, ids, GREEDY).tolist(), steered]
    return ids, steps


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk", "batchtopk", "gated"])
def test_any_activation_steers_as_attach_does(act):
    model, tokenizer = writer("llama")
    sae = sae_at(act)
    _, steps = run(model, tokenizer, sae, "abcdef")
    assert max(step.steered.kl for step in steps) > 0 and steps[-1].live["mine"].l0 > 0


def test_a_chat_is_answered_in_the_models_template():
    model, tokenizer = writer("llama")
    tokenizer.chat_template = TEMPLATE
    ids, steps = run(model, tokenizer, sae_at("relu"), "Hi", chat=True)
    assert tokenizer.decode(ids[0]) == "[user]Hi[answer]"
    assert "".join(token.text for token in steps[0].prompt) == "[user]Hi[answer]"


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
@pytest.mark.parametrize("phase", ["all", "generated"])
def test_a_prompt_of_one_token_without_bos(name, phase):
    model, tokenizer = writer(name)
    ids, steps = run(model, tokenizer, sae_at("jumprelu"), "a", phase=phase)
    assert ids.shape == (1, 1) and len(steps[0].prompt) == 1
    assert steps[0].prompt[0].change is None and steps[0].prompt[0].text == "a"
    assert (steps[0].steered.kl > 0) == (phase == "all")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mamba"])
def test_a_long_prompt_is_compared_in_parts(name, monkeypatch):
    model, tokenizer = writer(name)
    sae, one = sae_at("relu"), setup(EditSpec("mine", 3, amount=4.0), prompt="abcdefghijk")
    whole = next(side_by_side(model, tokenizer, one, {"mine": sae}))
    held, compare = [], compare_module.compare
    monkeypatch.setattr(
        compare_module, "compare", lambda p, q, ids: held.append(len(p)) or compare(p, q, ids)
    )
    monkeypatch.setattr(compare_module, "PASS", 4)
    parts = next(side_by_side(model, tokenizer, one, {"mine": sae}))
    assert held[:-2] == ([10] if name == "mamba" else [4, 4, 2])
    assert max(abs(token.change) for token in whole.prompt[1:]) > 1e-3
    for token, other in zip(parts.prompt[1:], whole.prompt[1:], strict=True):
        assert (token.id, token.text) == (other.id, other.text)
        for field in ("logprob", "default_logprob", "kl"):
            assert getattr(token, field) == pytest.approx(getattr(other, field), abs=1e-4)
    monkeypatch.setattr(compare_module, "PASS", 256)
    monkeypatch.setattr(compare_module, "ROWS", 3)
    held.clear()
    assert next(side_by_side(model, tokenizer, one, {"mine": sae})).prompt == whole.prompt
    assert held[:-2] == [3, 3, 3, 1]


def test_tokens_can_be_continued_instead_of_a_text():
    model, tokenizer = bundled.model(), bundled.tokenizer()
    saes = {FIRST: load(FIRST)}
    ids = tokenizer("a \N{SNOWMAN}", return_tensors="pt")["input_ids"][:, :-1]  # cut within it
    steps = list(side_by_side(model, tokenizer, setup(FOOD, prompt=""), saes, ids=ids))
    assert [token.id for token in steps[0].prompt] == ids[0].tolist()
    assert ids_of(steps)[0] == generated(model, ids, GREEDY).tolist()
    for wrong, said in (
        (ids.repeat(2, 1), "found 2 rows, expected one"),
        (ids[0], "expected"),
        (ids.float(), "rows are torch.float32"),
        (ids + 10**6, "the model knows 0 to 2047"),
        (ids[:, :0], "expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            next(side_by_side(model, tokenizer, setup(FOOD), saes, ids=wrong))


def test_a_prompt_of_any_characters_comes_back_from_a_link():
    for char in ("a", "\n", "é", "\N{SNOWMAN}"):
        one = Setup("bundled", char * MAX_PROMPT)
        assert Setup.from_json(one.to_json()) == one == Setup.from_link(one.to_link())


def test_nothing_is_logged_for_each_request(caplog):
    """transformers warns of a missing mask, and at each call where both lengths are set."""
    model, tokenizer = bundled.model(), bundled.tokenizer()
    assert model.generation_config.max_length  # or there would be nothing to warn of
    noise = logging.getLogger("transformers")
    caplog.set_level(logging.WARNING, logger="transformers")  # other tests silence it
    noise.addHandler(caplog.handler)
    try:
        one = setup(FOOD, sampling=Sampling(2))
        list(side_by_side(model, tokenizer, one, {FIRST: load(FIRST)}))
        own_text(model, 0, 2, 4)
        assert caplog.messages == []
        model.generate(torch.tensor([[0, 5]]), max_new_tokens=1)
        assert [said for said in caplog.messages if "max_length" in said]
    finally:
        noise.removeHandler(caplog.handler)
