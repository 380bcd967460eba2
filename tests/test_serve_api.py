"""The server as the real `openai` client sees it: answers, streams, edits, codes, monitors."""

import json

import httpx
import openai
import pytest
import torch
from serve_cases import FOOD, KEY, PROMPT, running

from saert.edits import ablate, active, add, clamp
from saert.engines.server.shelf import Shelf
from saert.hub import bundled
from saert.hub.session import open_session
from saert.measure.features import FeatureIndex, feature_index
from saert.runtime import attach

AT = "resid_post.2"


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def model():
    return bundled.model()


@pytest.fixture(scope="module")
def tokenizer():
    return bundled.tokenizer()


def greedy(model, tokenizer, tokens, edits=(), *, prompt=PROMPT, splice=False, sae=None):
    """The text that saert on transformers writes."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with attach(model, sae or bundled.sae(AT), list(edits), splice=splice):
        out = model.generate(**inputs, max_new_tokens=tokens, max_length=None, do_sample=False)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def complete(client, tokens=16, saert=None, prompt=PROMPT, **options):
    extra = {} if saert is None else {"extra_body": {"saert": saert}}
    options = {"temperature": 0, "max_tokens": tokens} | extra | options
    return client.completions.create(model="bundled", prompt=prompt, **options)


def test_completion_is_what_the_model_writes(client, model, tokenizer):
    answer = complete(client)
    assert answer.choices[0].text == greedy(model, tokenizer, 16)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == len(tokenizer(PROMPT).input_ids)
    assert "saert" not in answer.model_extra


EDITS = {
    "add": ([{"latent": FOOD, "amount": 9.0, "sae": AT}], [add(FOOD, 9.0)]),
    "label": ([{"latent": "Food", "amount": 9.0, "sae": AT}], [add(FOOD, 9.0)]),
    "clamp, generated": (
        [{"latent": FOOD, "op": "clamp", "amount": 12, "phase": "generated", "sae": AT}],
        [clamp(FOOD, 12.0, phase="generated")],
    ),
    "when": (
        [{"latent": FOOD, "amount": 30, "when": 124, "above": 0.5, "sae": AT}],
        [add(FOOD, 30.0, when=active(124, 0.5))],
    ),
    "two": (
        [
            {"latent": FOOD, "amount": 9.0, "sae": AT, "phase": "prompt"},
            {"latent": 546, "op": "ablate", "sae": AT},
        ],
        [add(FOOD, 9.0, phase="prompt"), ablate(546)],
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_attach(client, model, tokenizer, name):
    given, edits = EDITS[name]
    text = complete(client, 24, {"edits": given}).choices[0].text
    assert text == greedy(model, tokenizer, 24, edits)


def test_edits_change_something(client):
    plain, *edited = [
        complete(client, 24, {"edits": e}).choices[0].text for e in ([], EDITS["add"][0])
    ]
    assert edited[0] != plain


@pytest.mark.parametrize("at", [AT, "mlp_in.2"])
def test_splice(client, model, tokenizer, at):
    text = complete(client, 16, {"splice": [at]}).choices[0].text
    assert text == greedy(model, tokenizer, 16, splice=True, sae=bundled.sae(at))


def test_a_stream_says_the_same(client):
    saert = {"edits": EDITS["add"][0], "monitors": [{"sae": AT, "latent": FOOD, "threshold": 1}]}
    whole = complete(client, 24, saert)
    chunks = list(complete(client, 24, saert, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length" and not chunks[-1].choices
    assert chunks[-1].usage == whole.usage
    events = [e for c in chunks for e in (c.model_extra.get("saert") or {"events": []})["events"]]
    assert events == whole.saert["events"]


def test_codes(client, model, tokenizer):
    wanted = {"sae": AT, "top": 3}
    answer = complete(client, 6, {"return_codes": wanted})
    codes = answer.saert["codes"]
    ids = tokenizer(PROMPT).input_ids
    read = len(ids) + 5  # the last token drawn is never read
    assert [code["position"] for code in codes] == list(range(read))
    assert [code["token_id"] for code in codes[: len(ids)]] == ids
    assert {code["phase"] for code in codes[len(ids) :]} == {"generated"}
    sae = bundled.sae(AT)
    with attach(model, sae, record="last") as seen, torch.no_grad():
        model(torch.tensor([[code["token_id"] for code in codes]]))
    dense = seen.codes[AT].to_dense()[0]
    for code, row in zip(codes, dense, strict=True):
        values, latents = row.topk(3)
        assert [one["latent"] for one in code["latents"]] == latents.tolist()
        assert [one["activation"] for one in code["latents"]] == pytest.approx(
            values.tolist(), rel=1e-4
        )
    only = complete(client, 6, {"return_codes": [wanted | {"phase": "generated"}]}).saert["codes"]
    assert only == codes[len(ids) :]


def test_monitors(client, model, tokenizer):
    food = {"sae": AT, "latent": "food", "threshold": 2.0}
    prompt = 'Mom said, "Let us eat some'
    base = complete(client, 24, {"return_codes": {"sae": AT, "top": 64}}, prompt)
    fires = [
        code
        for code in base.saert["codes"]
        if any(one["latent"] == FOOD and one["activation"] > 2.0 for one in code["latents"])
    ]
    written = [code for code in fires if code["phase"] == "generated"]
    assert written, "this prompt is meant to end in food"

    flagged = complete(client, 24, {"monitors": [food]}, prompt)
    assert flagged.choices[0].text == base.choices[0].text
    events = flagged.saert["events"]
    assert [e["position"] for e in events] == [code["position"] for code in fires]
    assert events[0]["label"] == "food" and events[0]["activation"] > 2.0

    only = {"phase": "generated"}
    stopped = complete(client, 24, {"monitors": [food | only | {"action": "stop"}]}, prompt)
    assert stopped.choices[0].finish_reason == "content_filter"
    (event,) = stopped.saert["events"]
    assert event["position"] == written[0]["position"]
    assert base.choices[0].text.startswith(stopped.choices[0].text)
    asked = len(tokenizer(prompt).input_ids)
    assert stopped.usage.completion_tokens == written[0]["position"] - asked + 1

    # to clamp is the conditional edit of `attach`
    clamped = complete(client, 24, {"monitors": [food | {"action": "clamp", "value": 0}]}, prompt)
    edits = [clamp(FOOD, 0.0, when=active(FOOD, 2.0))]
    assert clamped.choices[0].text == greedy(model, tokenizer, 24, edits, prompt=prompt)
    assert clamped.saert["events"][0]["action"] == "clamp"


def test_chat(client, model, tokenizer):
    messages = [
        {"role": "system", "content": "Once upon a time"},
        {"role": "user", "content": [{"type": "text", "text": "a dog"}]},
    ]
    options = dict(model="bundled", messages=messages, temperature=0, max_completion_tokens=12)
    answer = client.chat.completions.create(**options)
    ids = tokenizer("Once upon a time a dog ", add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, max_length=None, do_sample=False)
    expected = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == expected
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_stop_texts_and_seeds(client):
    whole = complete(client, 40).choices[0].text
    word = whole.split()[6]
    cut = complete(client, 40, stop=["never said", word])
    assert cut.choices[0].text == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = complete(client, 40, stop=word, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == cut.choices[0].text
    drawn = [
        complete(client, 20, temperature=1.0, top_p=0.9, seed=s).choices[0].text for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logprobs(client, model, tokenizer):
    answer = complete(client, 5, logprobs=2).choices[0].logprobs
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    logits[model.generation_config.suppress_tokens] = -torch.inf
    scores, ids = logits.log_softmax(-1).topk(2)
    assert answer.token_logprobs[0] == pytest.approx(float(scores[0]), abs=1e-4)
    assert list(answer.top_logprobs[0]) == [tokenizer.decode([i]) for i in ids]
    assert len(answer.tokens) == 5
    chat = client.chat.completions.create(
        model="bundled", messages=[{"role": "user", "content": "A dog"}], max_tokens=3,
        logprobs=True, top_logprobs=1, temperature=0,
    )  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert len(content) == 3
    assert content[0].top_logprobs[0].token == content[0].token


def test_models_sources_and_features(server, client):
    assert [one.id for one in client.models.list()] == ["bundled"]
    headers = {"authorization": f"Bearer {KEY}"}
    get = lambda path: httpx.get(server.address + path, headers=headers)  # noqa: E731
    sources = get("/v1/saert/sources").json()["data"]
    assert [one["id"] for one in sources] == [AT, "mlp_in.2"]
    assert sources[1]["target_hookpoint"] == "mlp_out.2"
    by_number, by_label = (get(f"/v1/saert/features/{AT}/{one}").json() for one in (FOOD, "food"))
    assert by_number == by_label and by_number["label"] == "food" and by_number["promoted"]
    for wrong in (f"{AT}/99999", f"{AT}/no such thing", "resid_post.9/1", "71"):
        answer = get(f"/v1/saert/features/{wrong}")
        assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_cards_of_an_index(tmp_path, model, tokenizer):
    session = open_session(None, [f"bundled:{AT}"])
    rows = torch.tensor([(tokenizer(PROMPT).input_ids * 3)[:32]] * 2)
    feature_index(model, session.saes[0].sae, rows, tmp_path, tokenizer=tokenizer)
    index = FeatureIndex.open(tmp_path, AT)
    shelf = Shelf(session.saes, model, tokenizer, {AT: index})
    found = shelf.feature("food")
    assert json.loads(json.dumps(found, allow_nan=False))["card"]["count"] == index.counts[FOOD]
    assert shelf.describe()[0]["cards"]


REFUSED = {
    "n": ({"n": 2}, "n: this server supports 1 only"),
    "best_of": ({"best_of": 3}, "best_of"),
    "penalty": ({"presence_penalty": 0.5}, "presence_penalty"),
    "unknown field": ({"extra_body": {"nonsense": 1}}, "nonsense"),
    "temperature": ({"temperature": 3}, "temperature"),
    "too many tokens": ({"max_tokens": 255}, "the model holds 256"),
    "several prompts": ({"prompt": ["a", "b"]}, "one per request"),
    "token ids": ({"prompt": [1, 10**9]}, "token ids"),
    "no prompt": ({"prompt": []}, "prompt"),
}
REFUSED |= {
    name: ({"extra_body": {"saert": saert}}, says)
    for name, saert, says in (
        ("unknown sae", {"edits": [{"sae": "resid_post.7", "latent": 1}]}, "resid_post.7"),
        ("which sae", {"edits": [{"latent": 1}]}, "which SAE"),
        ("latent", {"edits": [{"sae": AT, "latent": 10**6}]}, "does not exist"),
        ("label", {"edits": [{"sae": AT, "latent": "fod"}]}, "nearest: food"),
        ("op", {"edits": [{"sae": AT, "latent": 1, "op": "explode"}]}, "explode"),
        ("amount", {"edits": [{"sae": AT, "latent": 1, "amount": "much"}]}, "amount"),
        ("edit field", {"edits": [{"sae": AT, "latent": 1, "rows": 3}]}, "rows"),
        ("saert field", {"edit": []}, "edit"),
        ("monitor", {"monitors": [{"sae": AT, "latent": 1, "action": "shout"}]}, "action"),
        ("slots", {"edits": [{"sae": AT, "latent": i} for i in range(17)]}, "16 slots"),
        ("top", {"return_codes": {"sae": AT, "top": 0}}, "top"),
    )
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(client, name):
    options, says = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**({"model": "bundled", "prompt": "A dog"} | options))
    assert says in refusal.value.message and refusal.value.status_code == 400


def test_wrong_model(client):
    with pytest.raises(openai.NotFoundError, match="gpt-99"):
        client.completions.create(model="gpt-99", prompt="A dog")


def test_edits_too_strong_fail_alone(server, client):
    """A hidden state that overflows ends its own request; the next is as ever."""
    plain = complete(client, 8).choices[0].text
    huge = {"edits": [{"sae": AT, "latent": FOOD, "amount": 3e38}]}
    with pytest.raises(openai.InternalServerError, match="not finite"):
        complete(client, 8, huge)
    assert complete(client, 8).choices[0].text == plain
    server.wait_idle()
