"""The model card: what the Hub parses, what stays the owner's, what is never invented."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from publish_cases import METRICS

from saert.hub.publishing import plots as card_plots
from saert.hub.publishing.card import BEGIN, END, RESULTS, render, usage
from saert.hub.publishing.entry import Entry
from saert.hub.publishing.private import without_paths
from saert.hub.publishing.push import natural
from saert.measure.reports.reconstruction import DENSITY_EDGES

SAE = Entry(
    hookpoint="resid_post.2",
    target_hookpoint=None,
    d_in=16,
    d_out=16,
    num_latents=24,
    activation="TopK(k=5)",
    dtype="float32",
    base_model="someone/model",
    layout="saelens",
    dataset="a/b",
    measured_on="a/b, held out",
    metrics=METRICS,
    training={"tokens": 1000, "seed": 0},
)
TRANSCODER = replace(
    SAE, hookpoint="mlp_in.0", target_hookpoint="mlp_out.0", d_out=8, layout="saert", metrics=None
)
REPO = "someone/saes"


def parsed(text):
    """As YAML without huggingface_hub, and as huggingface_hub reads it."""
    header = yaml.safe_load(text.split("---\n")[1])
    return header, ModelCard(text)


def test_the_metadata_are_what_was_measured():
    header, card = parsed(render({"resid_post.2": SAE}, REPO, license="mit"))
    assert header["library_name"] == "saert" and header["license"] == "mit"
    assert header["base_model"] == "someone/model" and header["datasets"] == ["a/b"]
    assert "sparse-autoencoder" in header["tags"] and "transcoder" not in header["tags"]
    (index,) = header["model-index"]
    assert index["name"] == "saes"
    found = {m["type"]: m["value"] for result in index["results"] for m in result["metrics"]}
    assert found == {key: METRICS[key] for key in RESULTS}
    assert {r.dataset_name for r in card.data.eval_results} == {"a/b, held out"}
    assert {r.dataset_type for r in card.data.eval_results} == {"a/b"}


def test_what_was_not_measured_is_not_claimed():
    header, card = parsed(render({"t": TRANSCODER}, REPO))
    assert "model-index" not in header and "license" not in header
    assert "transcoder" in header["tags"]
    assert "No measurements were published" in card.text and "FVU:" not in card.text
    assert "| `t` | `mlp_in.0` | `mlp_out.0` | 24 | 16 → 8 | TopK(k=5) | – | – |" in card.text
    partly = replace(SAE, metrics={"fvu": 0.5, "l0": None}, measured_on=None)
    header, card = parsed(render({"a": partly}, REPO))
    (result,) = header["model-index"][0]["results"]
    assert [m["type"] for m in result["metrics"]] == ["fvu"]
    assert result["dataset"] == {"type": "text", "name": "text not recorded"}
    assert "CE of the model |" not in card.text


def test_other_libraries_are_named_for_what_they_can_read():
    entries = {"a": SAE, "t": TRANSCODER, "h.2": replace(SAE, layout="sparsify")}
    text = render(entries, REPO)
    assert 'SAELens reads `a`: `SAE.from_pretrained("someone/saes", "a")`' in text
    assert 'sparsify reads `h.2`: `SparseCoder.load_from_hub("someone/saes", "h.2")`' in text
    assert "SAELens" not in render({"t": TRANSCODER}, REPO)


def test_the_same_card_again_is_the_same():
    once = render({"a": SAE}, REPO, license="mit")
    assert render({"a": SAE}, REPO, before=once) == once  # the licence stays


def test_the_owner_s_words_and_keys_stay():
    before = render({"a": SAE}, REPO)
    edited = before.replace("library_name", "language: en\nmuch: [1, {x: y}]\nlibrary_name")
    edited = edited.replace("# saes\n", "# Ours\n\nIn front.\n").replace(
        "- saert\n", "- saert\n- mine\n"
    )
    edited += "\nBehind.\n"
    after = render({"a": SAE, "b": TRANSCODER}, REPO, before=edited)
    header, card = parsed(after)
    assert header["language"] == "en" and header["much"] == [1, {"x": "y"}]
    assert header["tags"][3:] == ["mine", "transcoder"]
    assert card.text.strip().startswith("# Ours\n\nIn front.")
    assert card.text.strip().endswith("Behind.")
    assert after.count(BEGIN) == after.count(END) == 1
    assert "| `b` |" in after and after.count("| `a` |") == before.count("| `a` |")


def test_a_strangers_card_is_added_to():
    before = (
        "---\ntags: gpt2\nbase_model: other/base\nmodel-index:\n- name: theirs\n  results:\n"
        "  - task: {type: text-generation}\n    dataset: {type: x, name: X}\n"
        "    metrics: [{type: accuracy, value: 0.5}]\n---\nHello.\n"
    )
    for _ in range(2):  # and the second time it is not doubled
        header, card = parsed(before := render({"a": SAE}, REPO, before=before))
        assert card.text.count("Hello.") == 1 and card.text.count(BEGIN) == 1
        assert header["tags"][0] == "gpt2" and header["tags"].count("saert") == 1
        assert header["base_model"] == ["other/base", "someone/model"]
        (index,) = header["model-index"]
        types = [m["type"] for r in index["results"] for m in r["metrics"]]
        assert index["name"] == "theirs" and types == ["accuracy", *RESULTS]
    plain = render({"a": SAE}, REPO, before="Just text.\n")
    assert parsed(plain)[1].text.count("Just text.") == 1


@pytest.mark.parametrize(
    "before", ["---\n{\n---\n", "---\nmodel-index: [{}]\n---\nx", "---\n- a\n---\n"]
)
def test_metadata_that_cannot_be_read_are_not_overwritten(before):
    with pytest.raises(ValueError, match="the metadata of its README.md"):
        render({"a": SAE}, REPO, before=before)


def test_what_others_wrote_cannot_break_out():
    sly = replace(
        SAE,
        measured_on="x | <!-- saert: end --> <script>",
        activation="A|B\n<b>",
        training={"note": "```\n<!-- saert: end -->"},
    )
    text = render({"a": sly}, REPO)
    body = text.split("---\n", 2)[2]
    assert body.count(END) == 1 and "<script>" not in body and body.count("```") % 2 == 0
    again = render({"a": SAE}, REPO, before=text)
    assert again == render({"a": SAE}, REPO)


def test_settings_are_shown_once_with_the_saes_they_made():
    other = replace(SAE, training={"tokens": 5})
    text = render({"a": SAE, "b": SAE, "c": other, "d": replace(SAE, training=None)}, REPO)
    assert text.count('"tokens": 1000') == 1 and "`a`, `b`:" in text and "`c`:" in text
    assert "Not recorded." in render({"a": replace(SAE, training=None)}, REPO)


def test_the_example_is_python_and_names_the_branch():
    for entries in ({"a": SAE}, {"a": replace(SAE, base_model="saert/bundled-tinystories")}):
        compile(usage(entries, REPO, "dev"), "card", "exec")
        assert 'load("someone/saes", "a", revision="dev")' in usage(entries, REPO, "dev")


def test_an_entry_survives_json_and_nothing_else_does():
    assert Entry.from_dict(SAE.to_dict(), "x") == SAE
    good = SAE.to_dict()
    for wrong in (
        [],
        {},
        good | {"more": 1},
        good | {"d_in": "16"},
        good | {"d_in": True},
        good | {"activation": None},
        good | {"metrics": []},
        good | {"metrics": {"fvu": -1}},
        good | {"metrics": {"fvu": float("nan")}},
    ):
        with pytest.raises(ValueError, match="x: "):
            Entry.from_dict(wrong, "x")


def test_pictures_only_of_what_was_measured():
    pytest.importorskip("matplotlib")
    assert card_plots.EDGES == DENSITY_EDGES
    assert card_plots.draw({"t": TRANSCODER}) == {}
    assert set(card_plots.draw({"a": SAE})) == {"density.png"}
    few = {"a": SAE, "b": replace(SAE, metrics={"fvu": 0.5})}
    assert set(card_plots.draw(few)) == {"density.png", "measured.png"}
    assert set(card_plots.draw({"b": few["b"]})) == set()
    assert card_plots.draw({str(i): SAE for i in range(65)}) == {}
    for counts in ([1] * 11, [0] * 12, ["1"] * 12, [-1] * 12, [25] + [0] * 11, "x" * 12):
        assert card_plots.draw({"a": replace(SAE, metrics={"density": counts})}) == {}
    first, second = card_plots.draw(few), card_plots.draw(few)
    assert first == second and first["density.png"].startswith(b"\x89PNG")
    shown = render(few, REPO, plots=first)
    assert "](density.png)" in shown and "](measured.png)" in shown
    assert ".png" not in render(few, REPO)


def test_without_matplotlib_there_are_none(monkeypatch):
    monkeypatch.setattr("saert.hub.publishing.plots.find_spec", lambda name: None)
    assert card_plots.draw({"a": SAE}) == {}


def test_paths_are_in_the_order_people_count():
    assert sorted(["a.10", "a.2", "b", "a"], key=natural) == ["a", "a.2", "a.10", "b"]


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/models/gpt2", "gpt2"),
        ("~/x/y", "y"),
        ("../z", "z"),
        ("C:\\Users\\me\\x y", "x y"),
        ("file:///home/me/x", "x"),
        ("saert train --out /tmp/me/x --data=/a/b/c.txt", "saert train --out x --data=c.txt"),
        ("a/b", "a/b"),
        ("https://huggingface.co/a/b/c", "https://huggingface.co/a/b/c"),
        ("transformer.h.6:in", "transformer.h.6:in"),
        ("and/or 1/2", "and/or 1/2"),
    ],
)
def test_paths_of_a_machine_are_cut_to_their_last_part(text, public):
    assert without_paths({text: [text, (text, 1, None)]}) == {public: [public, [public, 1, None]]}
