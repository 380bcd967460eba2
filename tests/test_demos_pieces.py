"""What every tab asks of a visitor's text, and the pieces between numbers and widgets."""

from types import SimpleNamespace

import pytest

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from demo_tab import bench as make_bench  # noqa: E402 - after the check for gradio
from sae_cases import make  # noqa: E402
from test_steering_models import TEMPLATE, writer  # noqa: E402
from tiny_models import HIDDEN  # noqa: E402
from torch import float32  # noqa: E402

from saert.demos import markup, pieces  # noqa: E402
from saert.demos.ablate import data as ablate  # noqa: E402
from saert.demos.ablate.text import continued, joined  # noqa: E402
from saert.demos.ablate.view import RANKS  # noqa: E402
from saert.demos.explore import looking  # noqa: E402
from saert.demos.refine.data import refinement  # noqa: E402
from saert.hub.session import Loaded, Session, UserError  # noqa: E402
from saert.measure.ablation.ranking import By  # noqa: E402

SAE = "bundled:resid_post.2"


@pytest.fixture(scope="module")
def bench():
    return make_bench()


def test_a_text_that_fits_is_its_tokens(bench, monkeypatch):
    ids = pieces.ids_of(bench, "Once upon a time")
    assert ids.tolist() == [bench.tokenizer("Once upon a time")["input_ids"]]
    monkeypatch.setattr(bench.tokenizer, "chat_template", TEMPLATE)
    chat = pieces.ids_of(bench, "Once", chat=True)
    assert bench.tokenizer.decode(chat[0]).endswith("[user]Once[answer]")


def test_texts_that_do_not_fit_are_refused(bench, monkeypatch):
    for nothing in ("", " \n"):
        with pytest.raises(UserError, match="at least one word"):
            pieces.ids_of(bench, nothing)
    with pytest.raises(TypeError, match="the text is int"):
        pieces.ids_of(bench, 3)
    text = "dog" + " dog" * 199
    tokens = len(bench.tokenizer(text)["input_ids"])
    said = f"has {tokens} tokens and {257 - tokens} more were asked for.*holds 256"
    with pytest.raises(UserError, match=said):
        pieces.ids_of(bench, text, more=257 - tokens)
    assert pieces.ids_of(bench, text, more=256 - tokens).shape == (1, tokens)
    with pytest.raises(ValueError, match="no chat template"):
        pieces.ids_of(bench, "dog", chat=True)
    monkeypatch.setattr(pieces, "LONGEST", 8)
    with pytest.raises(UserError, match="the text has 1[0-9] tokens; at most 8"):
        pieces.ids_of(bench, "dog" + " dog" * 9)


def test_a_huge_text_is_refused_before_it_is_tokenised(bench, monkeypatch):
    monkeypatch.setattr(
        pieces, "encode_prompt", lambda *_: pytest.fail("tokenised")
    )  # fmt: skip
    text = "dog " * 5000
    for use in (
        lambda: pieces.ids_of(bench, text),
        lambda: looking.looked(bench, text, SAE),
        lambda: refinement(bench, SAE, text),
    ):
        with pytest.raises(UserError, match="20,000 characters; at most 16,384"):
            use()


@pytest.mark.parametrize("count", [0, 401, 10**400])
def test_new_tokens_are_bounded(count):
    with pytest.raises(ValueError, match="max_new_tokens: found .*, expected 1 to 400"):
        pieces.new_tokens(count)


def test_paced_keeps_the_first_and_the_last(monkeypatch):
    assert list(pieces.paced(iter(range(5)), every=60)) == [0, 4]
    assert list(pieces.paced(iter(range(5)), every=0)) == [0, 1, 2, 3, 4]
    assert list(pieces.paced(iter([7]), every=60)) == [7]
    assert list(pieces.paced(iter([]), every=60)) == []
    now = iter([0.0, 0.0, 0.04, 0.11, 0.11, 0.2])
    monkeypatch.setattr(pieces.time, "monotonic", lambda: next(now))
    assert list(pieces.paced(iter("abcd"), every=0.1)) == ["a", "c", "d"]


def test_a_paced_text_ends_with_its_reader():
    ended = []

    def states():
        try:
            yield from range(9)
        finally:
            ended.append(True)

    reading = pieces.paced(states(), every=0)
    next(reading)
    reading.close()
    assert ended == [True]


def test_what_cannot_be_seen_looks_the_same_as_text_and_as_html():
    text = " a<\n\t\r\x02\u00a0"
    assert pieces.spelled(text) == "·a<↵→␍U+0002U+00A0"
    shown = markup.spelled(text).replace("<span class='mark'>", "").replace("</span>", "")
    assert shown == pieces.spelled(text).replace("<", "&lt;")


def test_a_choice_of_a_list_that_has_changed_is_refused(bench):
    listed = [looking.bar(bench, SAE, 546, "", 0.0)]
    assert looking.chosen(listed, SimpleNamespace(index=0)) == 546
    for gone in (None, [], listed):
        with pytest.raises(UserError, match="choose again"):
            looking.chosen(gone, SimpleNamespace(index=1))


def test_the_ablate_tab_offers_every_way_to_rank():
    assert set(RANKS) == set(By.__args__)


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("text", ["a", "a park"])
def test_models_without_bos_and_any_activation_are_shown(act, text):
    model, tokenizer = writer("llama")
    sae = make(act, d_in=HIDDEN, n=40, dtype=float32, hookpoint="resid_post.1")
    bench = make_bench(Session("tiny", model, tokenizer, [Loaded("mine", sae)]))
    seen = looking.looked(bench, text, "mine")
    assert seen.look.used.all() and len(seen.strings) == len(text)
    assert looking.at_token(bench, seen, 0) and len(looking.heat(bench, seen)) == len(text)
    found = ablate.ablation(bench, "mine", text, 0)
    one = ablate.effect(bench, "mine", text, found["latents"][0]["latent"], 0)
    assert one["kl"] == pytest.approx(found["latents"][0]["kl"], rel=1e-3)
    both = list(continued(bench, "mine", text, [one["latent"]], max_new_tokens=3, every=0))
    assert len(both) == 3 and joined(both[-1].default)
    refined = refinement(bench, "mine", text)
    assert not any(refined["left_out"]) and refined["l0"] > 0
    assert (refined["spliced"]["fvu"] is None) == (len(text) == 1)
