"""A setup as plain data: JSON, links, the script that does the same, and text in pieces."""

import base64
import contextlib
import io
import json
import zlib

import pytest
import torch
from test_feature_index import byte_tokenizer
from test_steering import DRAWN, EDITS, FIRST, FOOD, GREEDY, PROMPT, SECOND, setup, whole_texts
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saert.hub import bundled
from saert.hub.load import load
from saert.measure.steering import EditSpec, Setup, side_by_side
from saert.measure.steering.prompt import Pieces


@pytest.fixture(scope="module")
def bench():
    saes = {source: load(source) for source in (FIRST, SECOND)}
    return bundled.model(), bundled.tokenizer(), saes


# -- pieces of text --------------------------------------------------------------------------------


def metaspace_tokenizer():
    """Words that begin with a space, which decoding takes off the first one."""
    words = {"<unk>": 0, "▁a": 1, "▁b": 2, "c": 3, "▁": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_pieces_join_to_the_text():
    tokenizer = byte_tokenizer()
    text = "é👩‍👩‍👧 “ok” �!"
    ids = tokenizer(text)["input_ids"]
    pieces = Pieces(tokenizer)
    told = [pieces.add(token, i == len(ids)) for i, token in enumerate(ids, 1)]
    assert "".join(told) == text
    assert told[:6] == ["", "é", "", "", "", "👩"]
    half = Pieces(tokenizer)
    assert [half.add(ids[0], last=True)] == [tokenizer.decode(ids[:1])] == ["�"]


@pytest.mark.parametrize("ids", [[1, 2, 3, 1, 1], [3, 2], [4, 1], [2]])
def test_pieces_of_a_tokenizer_that_strips_the_first_space(ids):
    tokenizer = metaspace_tokenizer()
    pieces = Pieces(tokenizer)
    assert "".join(map(pieces.add, ids)) == tokenizer.decode(ids)
    after = Pieces(tokenizer, [1, 2])
    assert tokenizer.decode([1, 2]) + "".join(map(after.add, ids)) == tokenizer.decode([1, 2, *ids])


# -- plain data ------------------------------------------------------------------------------------

FULL = setup(
    *EDITS, sampling=DRAWN, splice=True, chat=True, saes=(SECOND,), prompt="é\n'\"👩 \\ {}"
)


def test_json_and_links_give_the_same_setup_back():
    for one in (FULL, Setup("org/model", "")):
        assert Setup.from_json(one.to_json()) == one == Setup.from_link(one.to_link())
        assert set(one.to_link()) <= set(map(chr, [*range(48, 58), *range(65, 91), 95, 45])) | set(
            map(chr, range(97, 123))
        )
    assert [EditSpec.from_dict(edit.to_dict()) for edit in EDITS] == list(EDITS)
    one = EditSpec(FIRST, 3, amount=4)
    assert isinstance(one.amount, float) and one == EditSpec(FIRST, 3, amount=4.0)
    assert FULL.sources == (FIRST, SECOND)


def changed(**parts):
    whole = json.loads(FULL.to_json())
    for name, value in parts.items():
        *way, last = name.split("__")
        place = whole
        for key in way:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value
    return json.dumps(whole)


BAD = [
    ("[]", "found list, expected a mapping"),
    ("{}", "'model' is missing"),
    ("[" * 100_000, "nested too deep"),
    ("nonsense", "Expecting value"),
    (changed(colour="red"), "unknown key 'colour'"),
    (changed(edits__0__colour=1), "unknown key 'colour'"),
    (changed(sampling__top_k=4), "unknown key 'top_k'"),
    (changed(model=""), "model: found nothing"),
    (changed(model=3), "model: found int"),
    (changed(prompt=None), "prompt: found NoneType"),
    (changed(prompt="\ud800"), "half of a UTF-16 pair"),
    (changed(chat=1), "chat: found 1"),
    (changed(splice="no"), "splice: found 'no'"),
    (changed(edits={}), "edits: found {}"),
    (changed(edits=[3]), "edits: found"),
    (changed(edits=[EditSpec(FIRST, 1).to_dict()] * 65), "edits: found"),
    (changed(saes="bundled"), "saes: found 'bundled'"),
    (changed(saes=[""]), "saes: found nothing"),
    (changed(saes=["a" * 2000]), r"saes: found 2000 characters \('a{58}…\)"),
    (changed(sampling=[]), "sampling: found list"),
    (changed(sampling__max_new_tokens=0), "max_new_tokens: found 0"),
    (changed(sampling__max_new_tokens=10**9), "found 1000000000, expected 1 to 8192"),
    (changed(sampling__max_new_tokens=2.5), "expected a whole number"),
    (changed(sampling__max_new_tokens=True), "expected a whole number"),
    (changed(sampling__temperature=-1), "temperature: found -1"),
    (changed(sampling__temperature=1e-9), "temperature: found 1e-09"),
    (changed(sampling__temperature=float("nan")), "NaN"),
    (changed(sampling__top_p=0), "top_p: found 0"),
    (changed(sampling__top_p=1.5), "top_p: found 1.5"),
    (changed(sampling__seed=-1), "seed: found -1"),
    (changed(sampling__seed=2**70), "seed: found"),
    (changed(edits__0__sae=" "), "sae: found nothing"),
    (changed(edits__0__sae="x/" * 2500), r"sae: found 5000 characters \('(x/){29}…\)"),
    (changed(model="m" * 5000), r"model: found 5000 characters \('m{58}…\)"),
    (changed(prompt="a" * 40_000), "prompt: found 40,000 characters, expected at most 32,768"),
    (changed(edits__0__latent=-1), "latent: found -1"),
    (changed(edits__0__latent=10**400), "latent: found 10{58}…, expected 0"),
    (changed(edits__0__latent=2**64), "latent: found 18446744073709551616, expected 0"),
    (changed(edits__0__op="explode" * 99), r"op: found '(explode){8}exp?l?…, expected one of"),
    (changed(edits__0__latent="7"), "expected a whole number"),
    (changed(edits__0__latent=7.0), "expected a whole number"),
    (changed(edits__0__op="explode"), "op: found 'explode'"),
    (changed(edits__0__op=[]), "op: found"),
    (changed(edits__0__phase="later"), "phase: found 'later'"),
    (changed(edits__0__amount=float("inf")), "Infinity"),
    (changed(edits__0__amount=0).replace('"amount": 0', '"amount": 1e999', 1), "finite"),
    (changed(edits__0__amount=10**400), "finite"),
    (changed(edits__0__amount="4"), "amount: found '4'"),
    (changed(edits__0__amount=None), "amount: found None"),
    (changed(edits__0__amount=False), "amount: found False"),
    (changed(edits__0__when=-2), "when: found -2"),
    (changed(edits__0__above=None), "above: found None"),
    (" " * 300_000, "at most"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_json_that_cannot_be_meant_is_refused(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Setup.from_json(text)
    if len(text) < 2**17:
        packed = base64.urlsafe_b64encode(zlib.compress(text.encode())).decode().rstrip("=")
        with pytest.raises((ValueError, TypeError), match=message):
            Setup.from_link(packed)


def pack(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("", "not a whole link"),
        ("a", "not a link"),
        ("!!!!", "not a link"),
        ("é" * 4, "not a link"),
        (pack(b"hello world"), "not a link"),
        (pack(zlib.compress(b"\xff\xfe")), "utf-8"),
        (pack(zlib.compress(b" " * 10**8, 9)), "unpacks to more than"),
        (FULL.to_link()[:-20], "not a whole link"),
        (pack(zlib.compress(FULL.to_json().encode()) + b"more"), "not a whole link"),
        ("a" * 300_000, "at most"),
    ],
)
def test_links_that_saert_did_not_make_are_refused(link, message):
    with pytest.raises(ValueError, match=message):
        Setup.from_link(link)


# -- the script ------------------------------------------------------------------------------------


def printed(script):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script, "snippet", "exec"), {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("edits", [EDITS, ()])
def test_the_snippet_prints_the_same_texts(bench, sampling, edits):
    model, tokenizer, saes = bench
    one = setup(*edits, sampling=sampling, splice=True, saes=(SECOND,))
    default, steered = whole_texts(list(side_by_side(model, tokenizer, one, saes)))
    assert printed(one.snippet()) == f"Default:\n{default}\n\nSteered:\n{steered}\n\n"
    assert default != steered or not edits


def test_the_snippet_of_another_model(tmp_path, monkeypatch):
    model, tokenizer = tiny("llama"), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = None
    tokenizer.chat_template = "{{ messages[0].content }}:"
    folder = tmp_path / 'it\'s "new"'
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for chat in (True, False):
        one = Setup(str(folder), PROMPT + "\\ \N{RIGHT-TO-LEFT OVERRIDE}", chat, sampling=DRAWN)
        default, _ = whole_texts(list(side_by_side(model, tokenizer, one, {})))
        assert printed(one.snippet()) == f"Default:\n{default}\n\nSteered:\n{default}\n\n"
        assert one.snippet().isascii() or "\N{RIGHT-TO-LEFT OVERRIDE}" not in one.snippet()


def test_the_snippet_says_what_attach_was_told():
    assert "strict=False" in setup(FOOD).snippet(strict=False)
    assert 'load("bundled:resid_post.2")' in setup(EditSpec("bundled", 1)).snippet()
    with pytest.raises(ValueError, match="no SAE is named"):
        setup(splice=True).snippet()
