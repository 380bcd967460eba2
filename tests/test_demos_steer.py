"""The Steer tab without a browser: strengths, rows, presets, links, and its endpoints."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos.app import build, open_default  # noqa: E402
from saert.demos.steer import presets, strength  # noqa: E402
from saert.demos.steer import rows as steer_rows  # noqa: E402
from saert.demos.steer import share as steer_share  # noqa: E402
from saert.demos.steer import text as steer_text  # noqa: E402
from saert.demos.steer.setup import (  # noqa: E402
    CHAT,
    COMPLETION,
    GENERATED,
    PROMPT,
    checked,
    compose,
    controls,
    steps,
)  # fmt: skip
from saert.demos.workbench import Workbench  # noqa: E402
from saert.hub.session import UserError  # noqa: E402
from saert.measure.steering import EditSpec, Sampling, Setup  # noqa: E402

SAE = "bundled:resid_post.2"
HOW = (SAE, "Once upon a time", COMPLETION, [PROMPT, GENERATED], True, 0.0, 1.0, 6, 0)


@pytest.fixture(scope="module")
def bench():
    found = Workbench(open_default(None, [SAE]))
    found.index = lambda source: None  # no thread that writes text beside the tests
    found.gathering = lambda source, again=False: Nothing()
    return found


class Nothing:
    index = None

    def name(self, latent):
        return ""


def written(bench, setup):
    texts = steer_text.Texts()
    for step in steps(bench, checked(bench, setup)):
        texts.add(step)
    return texts


def text(tokens):
    return "".join(one.text for one in tokens)


# -- strength ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [0.3, 1.0, 10.77])
def test_slider_means_what_its_ticks_say(unit):
    ticks = {-10: -100, -1: -50, 0: 0, 1: 50, 10: 100}
    assert {n: strength.position(n * unit, unit) for n in ticks} == ticks
    for place in range(-100, 101):
        amount = math.copysign(unit * (9 ** (abs(place) / 50) - 1) / 8, place)
        assert strength.position(amount, unit) == place
    assert strength.position(1e6, 10.0) == 100
    assert strength.position(-1e6, 10.0) == -100


def test_unit_says_where_it_is_from(bench):
    known = bench.sae(SAE).labels[71]["max_activation"]
    assert strength.unit(bench, EditSpec(SAE, 71))[0] == known
    assert strength.unit(bench, EditSpec(SAE, 71, "scale"))[0] == 1
    unknown = next(n for n in range(1024) if n not in bench.sae(SAE).labels)
    value, why = strength.unit(bench, EditSpec(SAE, unknown))
    assert value == strength.ASSUMED and "assumed" in why
    fires, highest = strength.strongest_here(bench, SAE, presets.STORY)
    here = next(n for n in fires if n not in bench.sae(SAE).labels)
    value, why = strength.unit(bench, EditSpec(SAE, here), presets.STORY)
    assert value == pytest.approx(float(highest[here])) and "prompt" in why


# -- rows --------------------------------------------------------------------------------------


def test_added_at_its_own_strongest(bench):
    (row,) = steer_rows.add(bench, [], SAE, "71", "")
    assert EditSpec.from_dict(row) == EditSpec(SAE, 71, "add", 10.8)
    assert steer_rows.add(bench, [], SAE, "#71 · food", "") == [row]
    assert steer_rows.add(bench, [], SAE, "to the park", "")[0]["latent"] == 546


def test_several_latents_are_offered_and_one_twice_is_said(bench, monkeypatch):
    with pytest.raises(steer_rows.Several, match="is in .* labels or names") as several:
        steer_rows.add(bench, [], SAE, "to", "")
    listed = steer_rows.choices(bench.sae(SAE), several.value.hits)
    first = [f"#{hit.latent} · {hit.label}" for hit in several.value.hits]
    assert [name for name, _ in listed[: len(first)]] == first
    assert len({value for _, value in listed}) == len(listed) == len(bench.sae(SAE).labels)
    said = []
    monkeypatch.setattr(steer_rows, "warn", lambda words, title: said.append(words))
    now = steer_rows.add(bench, [], SAE, "71", "")
    assert not said
    assert len(steer_rows.add(bench, now, SAE, "71", "")) == 2 and "twice" in said[0]


def test_modes_keep_or_change_the_strength(bench):
    now = steer_rows.add(bench, [], SAE, "71", "")
    assert steer_rows.changed(bench, now, 0, "clamp", "")[0]["amount"] == 10.8
    scaled = steer_rows.changed(bench, now, 0, "scale", "")
    assert scaled[0]["amount"] == 2
    assert steer_rows.changed(bench, scaled, 0, "add", "")[0]["amount"] == 10.8
    assert steer_rows.changed(bench, now, 0, "ablate", "")[0]["amount"] == 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", "which latent"),
        ("1024", "0 to 1023"),
        ("-1", "0 to 1023"),
        ("1.5", "whole ones from 0 to 1023"),
        ("0x10", "whole ones"),
        ("9" * 5000, "0 to 1023"),
    ],
)
def test_no_such_latent(bench, asked, said):
    with pytest.raises(UserError, match=said):
        steer_rows.add(bench, [], SAE, asked, "")


def test_no_more_rows_than_fit(bench):
    full = [EditSpec(SAE, n, "add", 1.0).to_dict() for n in range(steer_rows.ROWS)]
    with pytest.raises(UserError, match="room for 8"):
        steer_rows.add(bench, full, SAE, "71", "")


def test_only_what_changed_is_drawn(bench):
    first, second = (EditSpec(SAE, n, "add", 5.0).to_dict() for n in (71, 349))
    kept, drawn, *parts = steer_rows.draw(bench, [first, second], [first], [], "")
    assert kept == drawn == [first, second]
    rows = [parts[i : i + 8] for i in range(0, len(parts), 8)]
    assert all(one == gr.skip() for one in rows[0])
    assert "349" in rows[1][1] and "sad" in rows[1][1]
    assert rows[1][5]["value"] == 5.0
    assert "data-unit='" in rows[1][1]
    assert all(one == gr.skip() for row in rows[2:] for one in row)
    *_, gone = [steer_rows.draw(bench, [first], [first, second], [], "")[2:][8]]
    assert gone["visible"] is False


def test_what_the_page_began_with_gives_way(bench):
    began, other = (EditSpec(SAE, n, "add", 5.0).to_dict() for n in (71, 349))
    assert steer_rows.draw(bench, [began, other], [began], [began], "")[0] == [other]
    assert steer_rows.draw(bench, [began, other], [began], [], "")[0] == [began, other]
    moved = began | {"amount": 6.0}
    assert steer_rows.draw(bench, [moved, other], [moved], [began], "")[0] == [moved, other]
    assert steer_rows.draw(bench, [began], [], [began], "")[0] == [began]


def test_what_a_row_says_goes_into_its_edit():
    now = [EditSpec(SAE, n, "add", 5.0).to_dict() for n in (71, 349)]
    both = steer_rows._put(1, "when")(now, 532)
    assert both[0] == both[1] and both[0][1]["when"] == 532 and both[0][0] == now[0]
    assert steer_rows._put(0, "amount")(now, 100, 77)[0][0]["amount"] == 100
    for field in ("amount", "above"):
        assert steer_rows._put(0, field)(now, None) == (now, now)  # an empty box
    assert steer_rows._put(1, "when")(both[0], None)[0] == now
    assert steer_rows._put(5, "when")(now, 1) == (now, now)  # removed meanwhile


# -- setups ------------------------------------------------------------------------------------


def test_controls_and_setup_are_the_same_thing(bench):
    edits = [EditSpec(SAE, 71, "add", 6.0).to_dict()]
    for how in (
        HOW,
        (SAE, "x y", COMPLETION, [GENERATED], False, 0.7, 0.9, 9, 3),
        (SAE, "x y", COMPLETION, [PROMPT], True, 0.0, 1.0, 9, 3),
    ):
        setup = compose(bench, edits, *how)
        assert tuple(controls(setup)) == how
        assert setup.edits[0].phase == {2: "all", 1: setup.edits[0].phase}[len(how[3])]
        assert compose(bench, *steer_share.state(setup)) == setup
    assert compose(bench, edits, *HOW[:3], [GENERATED], *HOW[4:]).edits[0].phase == "generated"


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (1, "  ", "prompt is empty"),
        (2, CHAT, "no chat template"),
        (3, [], "which tokens"),
        (5, 1e9, "temperature"),
    ],
)
def test_what_cannot_be_meant_is_said(bench, at, value, said):
    edits = [EditSpec(SAE, 71, "add", 6.0).to_dict()]
    with pytest.raises((UserError, ValueError), match=said):
        compose(bench, edits, *HOW[:at], value, *HOW[at + 1 :])


def test_no_latent_only_where_the_error_goes(bench):
    with pytest.raises(UserError, match="add a latent"):
        compose(bench, [], *HOW)
    setup = compose(bench, [], *HOW[:4], False, *HOW[5:])
    assert setup.splice and setup.saes == (SAE,)
    assert len(written(bench, setup).steered) == 6


def test_condition_on_a_latent_that_does_not_exist(bench):
    edit = EditSpec(SAE, 71, "add", 6.0).to_dict() | {"when": 5000}
    with pytest.raises(UserError, match="latent 5000"):
        compose(bench, [edit], *HOW)


def test_prompt_too_long(bench):
    setup = Setup("bundled", "one " * 300, edits=(EditSpec(SAE, 71, "add", 6.0),))
    with pytest.raises(UserError, match="holds 256"):
        written(bench, setup)
    with pytest.raises(UserError, match="holds 256"):
        presets.strongest(bench, SAE, "one " * 300)
    with pytest.raises(ValueError, match="max_new_tokens"):
        checked(bench, replace(setup, sampling=Sampling(401)))


# -- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.OURS)
def test_presets_change_the_text_and_keep_it_text(bench, name):
    setup = presets.OURS[name]
    texts = written(bench, setup)
    assert text(texts.default) != text(texts.steered)
    assert all(math.isfinite(one.kl) for one in texts.steered)
    words = text(texts.steered).split()
    repeats = [words[i : i + 3] == words[i + 3 : i + 6] for i in range(len(words) - 5)]
    assert len(words) > 25 and not any(repeats)
    likely = [one.default_logprob for one in texts.steered]
    assert sum(likely) / len(likely) > -3.0  # the model itself finds it plausible
    assert compose(bench, *steer_share.state(setup)) == setup


def test_presets_say_what_they_do(bench):
    said = {name: text(written(bench, one).steered) for name, one in presets.OURS.items()}
    assert "apple" in said["Hungry"] or "eat" in said["Hungry"]
    assert "sad" in said["Sad"]
    name = "Not “to the park”"
    assert "park" not in said[name]
    assert "park" in text(written(bench, presets.OURS[name]).default)
    assert presets.start(bench).edits == presets.OURS["Hungry"].edits
    assert "sad" in said["Sad, but only near trees"]
    assert said["Sad, but only near trees"].index("sad") > said["Sad, but only near trees"].index(
        "tree"
    )


def test_strongest_latents_of_a_prompt(bench):
    specs = presets.strongest(bench, SAE, presets.STORY)
    fires, highest = strength.strongest_here(bench, SAE, presets.STORY)
    assert [one.latent for one in specs] == fires[:3]
    assert specs[0].amount == float(f"{highest.max():.3g}")
    assert len(specs) == 3 and specs[0].amount >= specs[1].amount >= specs[2].amount > 0
    with pytest.raises(UserError, match="no text"):
        presets.strongest(bench, SAE, " ")


# -- heat and figures ----------------------------------------------------------------------------


def test_titles_and_heat_are_the_numbers(bench):
    setup = presets.OURS["Hungry"]
    texts = written(bench, replace(setup, sampling=Sampling(8)))
    tokens = steer_text.heated(texts, steer_text.CHANGE)[len(texts.prompt) :]
    for shown, one in zip(tokens, texts.steered, strict=True):
        assert f"change {one.change:+.2f}" in shown["title"]
        assert shown["heat"] == pytest.approx(max(-1, min(1, one.change / 3)))
    assert any(one["heat"] < 0 for one in tokens)
    kl = steer_text.heated(texts, steer_text.KL)
    assert all(0 <= one.get("heat", 0) <= 1 for one in kl)
    assert not any("heat" in one for one in steer_text.heated(texts, steer_text.NONE))
    assert not any("heat" in one for one in steer_text.plain(texts))
    notes = {one["name"]: one["note"] for one in steer_text.figures(texts)}
    assert {"mean KL, nats", "L0 · resid_post.2", "FVU · resid_post.2"} <= notes.keys()
    assert "over 8 tokens written" in notes["mean KL, nats"]
    assert f"over {texts.live[SAE].tokens} tokens" in notes["L0 · resid_post.2"]
    given = steer_text.plain(texts)
    assert [one.get("muted", False) for one in given] == [True] * len(texts.prompt) + [False] * 8


# -- sharing -----------------------------------------------------------------------------------


def test_link_json_and_script_are_of_what_is_set(bench, tmp_path):
    edits = [EditSpec(SAE, 71, "clamp", 6.0, when=532, above=0.5).to_dict()]
    link, data, script = steer_share.share(bench, edits, *HOW)
    setup = compose(bench, edits, *HOW)
    assert steer_share.from_link(bench, link.removeprefix("?setup=")) == setup
    assert steer_share.from_json(bench, data) == setup
    file = tmp_path / "setup.json"
    file.write_text(data)
    assert steer_share.from_file(bench, str(file)) == setup
    compile(script, "snippet", "exec")
    assert steer_share.share(bench, [], *HOW)[2].startswith("# not yet")
    nothing = steer_share.share(bench, edits, SAE, "x", COMPLETION, [], *HOW[4:])[2]
    assert all(line.startswith("#") for line in nothing.splitlines())


def test_bad_links_are_refused(bench, tmp_path):
    other = Setup("gpt2", "x", edits=(EditSpec(SAE, 71),)).to_link()
    cut = presets.start(bench).to_link()[:-9]
    changed = "this link does not hold a setup: it was not made by saert, or changed on the way$"
    for link, said in (
        ("nonsense!", changed), ("bm9uc2Vuc2U", changed), (cut, "some of it is missing"),
        (other, "for the model gpt2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            steer_share.from_link(bench, link)
    mixed = (EditSpec(SAE, 71, phase="prompt"), EditSpec(SAE, 72, phase="generated"))
    with pytest.raises(UserError, match="one choice for all"):
        steer_share.state(Setup("bundled", "x", edits=mixed))
    for given, said in (
        ("{", "not JSON from line 1, column 2 on"), ("[]", "no object with a model"),
        ('{"model": "bundled"}', "'prompt' is missing"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"this JSON does not hold a setup: .*{said}"):
            steer_share.from_json(bench, given)
    file = tmp_path / "not.json"
    for content, said in ((b"\xff\xfe\x00", "not made by saert"), (b"x" * 100_001, "too large")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"this file does not hold a setup: .*{said}"):
            steer_share.from_file(bench, str(file))


# -- endpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url():
    app = build(open_default(None, [SAE])).queue(default_concurrency_limit=8)
    app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_port=None)
    yield app.local_url
    app.close()


def test_two_visitors_do_not_mix(bench, url):
    from gradio_client import Client

    setups = [replace(presets.OURS[name], sampling=Sampling(12)) for name in ("Hungry", "Sad")]
    alone = [written(bench, one) for one in setups]
    clients = [Client(url, verbose=False) for _ in setups]
    found = [None, None]

    def ask(i):
        found[i] = clients[i].predict(setups[i].to_json(), api_name="/steer")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(found, alone, strict=True):
        assert got["steered"] == text(expected.steered)
        assert got["default"] == text(expected.default)
        assert [one["id"] for one in got["steered_tokens"]] == [t.id for t in expected.steered]
        assert got["live"][SAE]["tokens"] > 0
    assert found[0]["steered"] != found[1]["steered"]
    script = clients[0].predict(setups[0].to_json(), api_name="/snippet")
    assert script == setups[0].snippet()
    with pytest.raises(Exception, match="for the model gpt2"):
        clients[0].predict(Setup("gpt2", "x").to_json(), api_name="/snippet")
