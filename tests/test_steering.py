"""Two texts side by side: those of `generate`, with numbers that say what the edits did."""

import threading

import pytest
import torch
from test_feature_index import byte_tokenizer
from tiny_models import HIDDEN, peft_wrap, tiny

from saert import TopK, attach
from saert.hub import bundled
from saert.hub.load import load
from saert.measure.steering import EditSpec, Sampling, Setup, encode_prompt, side_by_side
from saert.measure.steering import compare as compare_module
from saert.measure.steering.compare import compare
from saert.measure.steering.stream import Stream
from saert.sae import SAE
from saert.tracker import is_attached
from saert.twin import twin

PROMPT = "Once upon a time, Lily's “friend”\nsaid:"
FIRST, SECOND = "bundled:resid_post.2", "bundled:resid_post.1"
FOOD = EditSpec(FIRST, 71, amount=9.0)
EDITS = (
    EditSpec(FIRST, 71, amount=4.0, phase="generated"),
    EditSpec(SECOND, 5, "clamp", 3.0, phase="prompt"),
    EditSpec(FIRST, 546, "ablate"),
    EditSpec(SECOND, 12, "scale", 2.5, when=7, above=0.25),
)
GREEDY = Sampling(8)
DRAWN = Sampling(8, temperature=0.9, top_p=0.8, seed=3)


@pytest.fixture(scope="module")
def bench():
    saes = {source: load(source) for source in (FIRST, SECOND)}
    return bundled.model(), bundled.tokenizer(), saes


def setup(*edits, prompt=PROMPT, sampling=GREEDY, **others):
    return Setup("bundled", prompt, edits=edits, sampling=sampling, **others)


def ids_of(steps):
    """Of the default text and the steered one."""
    return [
        [token.id for step in steps if (token := getattr(step, name)) is not None]
        for name in ("default", "steered")
    ]


def whole_texts(steps):
    prompt = "".join(token.text for token in steps[0].prompt)
    return [
        prompt + "".join(token.text for step in steps if (token := getattr(step, name)))
        for name in ("default", "steered")
    ]


def generated(model, ids, sampling):
    torch.manual_seed(sampling.seed)
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, **sampling.options())[0, ids.shape[1] :]


# -- the texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_the_texts_are_those_of_generate(bench, sampling):
    model, tokenizer, saes = bench
    one = setup(*EDITS, sampling=sampling)
    steps = list(side_by_side(model, tokenizer, one, saes))
    default, steered = ids_of(steps)
    ids = encode_prompt(tokenizer, PROMPT)["input_ids"]
    assert default == generated(model, ids, sampling).tolist()
    with attach(model, list(saes.values()), [edit.edit(saes[edit.sae]) for edit in EDITS]):
        assert steered == generated(model, ids, sampling).tolist()
    assert steered != default
    decode = tokenizer.decode
    assert whole_texts(steps) == [decode(ids[0].tolist() + text) for text in (default, steered)]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("gpt2", DRAWN), *((name, GREEDY) for name in ("llama", "gemma2", "mamba", "peft"))],
)
def test_a_stream_gives_the_logits_of_generate_to_the_bit(name, sampling):
    model = peft_wrap(tiny("llama")) if name == "peft" else tiny(name)
    ids = torch.arange(3, 12)[None]
    torch.manual_seed(sampling.seed)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), **sampling.options(),
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    stream, logits = Stream(twin(model), ids, sampling), []
    while not stream.ended:
        torch.rand(3)  # somebody else draws
        logits.append(stream.read())
        stream.write(stream.draw(logits[-1]))
    assert torch.equal(stream.ids, wanted.sequences)
    assert torch.equal(torch.stack(logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
@pytest.mark.parametrize("phase", ["prompt", "generated"])
def test_the_phases_are_those_of_the_runtime(name, phase):
    model, tokenizer = tiny(name), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    weights = torch.randn(2, 24, HIDDEN)
    sae = SAE.from_weights(*weights, activation=TopK(4), hookpoint="resid_post.1")
    spec = EditSpec("mine", 3, amount=4.0, phase=phase)
    steps = list(side_by_side(model, tokenizer, setup(spec, prompt="abcdef"), {"mine": sae}))
    ids = encode_prompt(tokenizer, "abcdef")["input_ids"]
    with attach(model, sae, spec.edit(sae)):
        wanted = generated(model, ids, GREEDY).tolist()
    default, steered = ids_of(steps)
    assert steered == wanted and steered != default
    assert any(token.change for token in steps[0].prompt[1:]) == (phase == "prompt")
    assert (steps[0].steered.kl > 0) == (phase == "prompt")


def test_the_models_own_generation_config_holds(bench):
    model, tokenizer, saes = bench
    model = twin(model)
    ids = encode_prompt(tokenizer, PROMPT)["input_ids"]
    plain = generated(model, ids, GREEDY).tolist()
    stop = plain[5]
    first = plain.index(stop)
    model.generation_config.eos_token_id = [0, stop]
    steps = list(side_by_side(model, tokenizer, setup(FOOD), saes))
    assert ids_of(steps)[0] == plain[: first + 1] == generated(model, ids, GREEDY).tolist()
    assert steps[-1].default is None or len(steps) == first + 1
    model.generation_config.eos_token_id = 0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.suppress_tokens = plain[:2]
    default = ids_of(list(side_by_side(model, tokenizer, setup(FOOD), saes)))[0]
    assert default == generated(model, ids, GREEDY).tolist() != plain
    assert not set(default) & set(plain[:2])


def test_one_text_may_end_before_the_other(bench):
    model, tokenizer, saes = twin(bench[0]), *bench[1:]
    steered = ids_of(list(side_by_side(model, tokenizer, setup(FOOD), saes)))[1]
    default = ids_of(list(side_by_side(model, tokenizer, setup(), {})))[0]
    stop = next(token for token in steered if token not in default)
    model.generation_config.eos_token_id = stop
    steps = list(side_by_side(model, tokenizer, setup(FOOD), saes))
    assert len(steps) == GREEDY.max_new_tokens
    assert steps[-1].steered is None and steps[-1].default is not None
    assert ids_of(steps) == [default, steered[: steered.index(stop) + 1]]
    assert steps[-1].live[FIRST] == steps[steered.index(stop)].live[FIRST]


# -- the numbers -----------------------------------------------------------------------------------


def test_change_and_kl_are_those_of_whole_passes(bench):
    model, tokenizer, saes = bench
    steps = list(side_by_side(model, tokenizer, setup(*EDITS), saes))
    tokens = [*steps[0].prompt, *(step.steered for step in steps)]
    whole = torch.tensor([[token.id for token in tokens]])
    length = len(steps[0].prompt)
    positions = {
        "all": slice(None), "prompt": slice(0, length), "generated": slice(length, None)
    }  # fmt: skip
    edits = []
    for spec in EDITS:  # where each applies, said without phases
        made = EditSpec(**spec.to_dict() | {"phase": "all"}).edit(saes[spec.sae])
        object.__setattr__(made.select, "positions", positions[spec.phase])
        edits.append(made)
    with torch.no_grad():
        bare = model(whole).logits[0].double()
        with attach(model, list(saes.values()), edits):
            new = model(whole).logits[0].double()
    p, q = new.softmax(-1), bare.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert tokens[0].logprob is tokens[0].default_logprob is tokens[0].kl is None
    assert tokens[0].change is None
    for at, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(float(p[at, token.id].log()), abs=2e-4)
        assert token.default_logprob == pytest.approx(float(q[at, token.id].log()), abs=2e-4)
        assert token.change == token.logprob - token.default_logprob
        assert token.kl == pytest.approx(float(kl[at]), abs=2e-4)
    assert max(abs(token.change) for token in tokens[1:]) > 0.1
    assert all(step.default.change == step.default.kl == 0 for step in steps)


def test_without_edits_nothing_changes_at_all(bench):
    model, tokenizer, saes = bench
    steps = list(side_by_side(model, tokenizer, setup(sampling=DRAWN), saes))
    default, steered = ids_of(steps)
    assert default == steered and set(steps[-1].live) == {FIRST, SECOND}
    for token in [*steps[0].prompt[1:], *(step.steered for step in steps)]:
        assert token.change == token.kl == 0
    steps = list(side_by_side(model, tokenizer, setup(sampling=DRAWN), {}))
    assert ids_of(steps) == [default, default] and steps[-1].live == {}


def test_a_splice_needs_no_edit(bench):
    model, tokenizer, saes = bench
    one = setup(splice=True, saes=(SECOND,))
    steps = list(side_by_side(model, tokenizer, one, saes))
    assert set(steps[-1].live) == {SECOND} and steps[-1].steered.kl > 0
    ids = encode_prompt(tokenizer, PROMPT)["input_ids"]
    with attach(model, saes[SECOND], splice=True):
        assert ids_of(steps)[1] == generated(model, ids, GREEDY).tolist()


def test_live_is_the_report_over_the_steered_text(bench):
    model, tokenizer, saes = bench
    steps = list(side_by_side(model, tokenizer, setup(*EDITS), saes))
    ids = encode_prompt(tokenizer, PROMPT)["input_ids"]
    with attach(model, list(saes.values()), [e.edit(saes[e.sae]) for e in EDITS]) as attachment:
        generated(model, ids, GREEDY)
    for source, seen in zip(saes, attachment.report().values(), strict=True):
        found = steps[-1].live[source]
        assert found.tokens == seen.tokens == ids.shape[1] + GREEDY.max_new_tokens - 1
        wanted = pytest.approx([seen.l0, seen.fvu, seen.error_norm], rel=1e-9)
        assert [found.l0, found.fvu, found.error_norm] == wanted
    assert steps[0].live[FIRST].tokens == ids.shape[1]
    assert steps[-1].default_ms > 0 and steps[-1].steered_ms > 0


@pytest.mark.parametrize("again", ["the same object", "loaded again"])
def test_two_names_of_one_sae_are_refused(bench, again):
    model, tokenizer, saes = bench
    other = saes[FIRST] if again == "the same object" else load(FIRST)
    both = {"a": saes[FIRST], SECOND: saes[SECOND], "b": other}
    specs = [EditSpec("a", 71, amount=4.0), EditSpec("b", 71, amount=5.0)]
    for one in (setup(*specs), setup()):
        with pytest.raises(ValueError, match="a and b are the same SAE: use one name"):
            next(side_by_side(model, tokenizer, one, both))
    next(side_by_side(model, tokenizer, setup(specs[0]), both))  # b is not asked for


def test_the_default_sae_has_one_name(bench):
    model, tokenizer, saes = bench
    short = [EditSpec(name, 71, amount=4.5) for name in ("bundled", f" {FIRST} ")]
    one = setup(*short, saes=(" bundled",))
    assert one.sources == (FIRST,) and all(edit.sae == FIRST for edit in one.edits)
    assert one.snippet().count("load(") == 1
    steps = list(side_by_side(model, tokenizer, one, saes))
    assert ids_of(steps) == ids_of(list(side_by_side(model, tokenizer, setup(FOOD), saes)))


def test_kl_of_tokens_that_cannot_be_said():
    inf = torch.inf
    steered, bare = torch.tensor([[0.0, 1.0, -inf]]), torch.tensor([[0.0, 0.5, -inf]])
    p, q = steered[0, :2].double().softmax(0), bare[0, :2].double().softmax(0)
    _, _, (kl,) = compare(steered, bare, [1])
    assert kl == pytest.approx(float((p * (p / q).log()).sum()))
    assert compare(steered, torch.tensor([[0.0, -inf, -inf]]), [1])[1:] == ([-inf], [inf])


# -- what is left behind ---------------------------------------------------------------------------


def untouched(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return not is_attached(model) and not any(
        getattr(one, name) for one in model.modules() for name in hooks
    )


@pytest.mark.parametrize("end", ["close", "finish", "fail"])
def test_nothing_is_left_on_the_model_or_in_the_thread(bench, end, monkeypatch):
    model, tokenizer, saes = bench
    made = []
    monkeypatch.setattr(compare_module, "twin", lambda one: made.append(twin(one)) or made[-1])
    stepping = side_by_side(model, tokenizer, setup(FOOD), saes)
    next(stepping)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert is_attached(made[0]) and untouched(model)
    if end == "close":
        stepping.close()
    elif end == "finish":
        for _ in stepping:
            assert torch.is_grad_enabled() and untouched(model)
    else:
        monkeypatch.setattr(Stream, "draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stepping)
    assert untouched(model) and untouched(made[0]) and torch.is_grad_enabled()
    assert "generate" not in made[0].__dict__


def test_each_step_may_run_in_another_thread(bench):
    model, tokenizer, saes = bench
    alone = ids_of(list(side_by_side(model, tokenizer, setup(FOOD, sampling=DRAWN), saes)))
    stepping, steps = side_by_side(model, tokenizer, setup(FOOD, sampling=DRAWN), saes), []
    for _ in range(DRAWN.max_new_tokens):
        thread = threading.Thread(target=lambda: steps.append(next(stepping)))
        thread.start()
        thread.join()
    stepping.close()
    assert ids_of(steps) == alone


def test_two_at_once_do_not_mix(bench):
    model, tokenizer, saes = bench
    setups = [setup(FOOD, sampling=DRAWN), setup(*EDITS), setup(sampling=DRAWN)]
    alone = [ids_of(list(side_by_side(model, tokenizer, one, saes))) for one in setups]
    stepping = [side_by_side(model, tokenizer, one, saes) for one in setups]
    steps = list(zip(*stepping, strict=True))
    assert [ids_of(column) for column in zip(*steps, strict=True)] == alone


# -- refusals --------------------------------------------------------------------------------------


def first(bench, one, **options):
    model, tokenizer, saes = bench
    try:
        return next(side_by_side(model, tokenizer, one, saes, **options))
    finally:
        assert untouched(model)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (setup(EditSpec("other", 1)), "other is not among the SAEs given: bundled:resid_post.2"),
        (setup(EditSpec(FIRST, 1024)), "latent 1024 does not exist"),
        (setup(EditSpec(FIRST, 1, phase="generated", when=9999)), "latent 9999 does not exist"),
        (setup(prompt="word " * 300), "more were asked for; the model holds 256"),
        (setup(sampling=Sampling(256)), "tokens and 256 more were asked for; the model holds 256"),
        (setup(chat=True), "no chat template"),
        (setup(EditSpec(FIRST, 71, amount=3e38)), "NaN"),
    ],
)
def test_what_cannot_be_done_is_refused(bench, one, message):
    with pytest.raises(ValueError, match=message):
        first(bench, one)


def test_models_that_cannot_write_are_refused(bench):
    model, tokenizer, saes = bench
    with pytest.raises(TypeError, match="found GPT2Model"):
        next(side_by_side(model.transformer, tokenizer, setup(), saes))
    with attach(model, saes[FIRST]), pytest.raises(TypeError, match="cannot be copied"):
        next(side_by_side(model, tokenizer, setup(), saes))
    with pytest.raises(ValueError, match="no tokens"):
        encode_prompt(byte_tokenizer(), "")


def test_chat_is_the_models_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    encoded = encode_prompt(tokenizer, "Hi “you”", chat=True)
    assert tokenizer.decode(encoded["input_ids"][0]) == "[user]Hi “you”[answer]"
    assert encoded["attention_mask"].tolist() == [[1] * encoded["input_ids"].shape[1]]
