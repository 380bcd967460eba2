"""`saert eval`: the numbers are the reports', the page stands alone, and a stopped one goes on."""

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import saert._cli_eval_run as work
from saert.cli import app
from saert.hub import bundled
from saert.measure.reports.downstream import measure
from saert.measure.reports.plots import compared

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
SMALL = ["--rows", "3", "--context", "24", "--no-progress"]
LAW = {"a": 1, "b": 2, "c": 0.1}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    story = "Once upon a time, Tom saw {} birds in a tree. He was happy to see them fly away."
    path.write_text("\n".join(json.dumps({"text": story.format(i)}) for i in range(40)))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])


@pytest.fixture
def no_page(monkeypatch):
    """Tests that do not look at the page need not wait for its pictures."""
    monkeypatch.setattr(work, "render", lambda evaluation: "a page")


@pytest.fixture
def calls(monkeypatch):
    """How many SAEs each call of `measure` was given."""
    seen = []

    def counted(model, saes, rows, **options):
        seen.append(len(saes))
        return measure(model, saes, rows, **options)

    monkeypatch.setattr(work, "measure", counted)
    return seen


def read(folder):
    return json.loads((folder / "eval.json").read_text())


def test_the_numbers_are_those_of_the_reports(text, tmp_path, no_page):
    chosen = ["bundled:resid_post.2", "bundled:mlp_in.2"]
    found = run(*chosen, "--data", text, *SMALL, "-o", tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert answer == read(tmp_path / "out") | {"folder": str(tmp_path / "out")}
    facts = answer["facts"]
    assert facts["text"]["tokens"] == 72 and text in facts["text"]["source"]
    assert facts["model"]["name"] == "bundled" and facts["model"]["dtype"] == "float32"
    assert {"saert", "torch", "transformers", "Python"} == set(facts["versions"])
    assert [sae["name"] for sae in answer["saes"]] == ["resid_post.2", "mlp_in.2 → mlp_out.2"]
    assert facts["command"].split()[0] == "saert" and facts["date"].startswith("20")
    from saert._cli_text import read_text
    from saert.hub.session import open_session

    session = open_session(None, chosen)
    given = read_text(session, [text], 3, 24)
    saes = [one.sae for one in session.saes]
    direct = measure(session.model, saes, given.rows, special=given.special, progress=False)
    for sae, expected in zip(answer["saes"], direct, strict=True):
        plain = json.loads(json.dumps(expected.to_dict()))
        assert {key: sae[key] for key in plain} == plain
    assert facts["text"]["special"] == int(given.special(given.rows).sum()) > 0


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_speaks(text, tmp_path):
    two = ["bundled:resid_post.0", "bundled:mlp_in.2"]
    assert run(*two, "--data", text, *SMALL, "-o", tmp_path).exit_code == 0
    html = (tmp_path / "eval.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    for tag, attributes in page.tags:
        for key in ("href", "xlink:href", "src"):
            assert attributes.get(key, "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", html)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a[k][1:] for _, a in page.tags for k in ("href", "xlink:href") if k in a}
    assert targets | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert len(pictures) == 2 + 2 * 4
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    assert names.count("caption") == names.count("table") > 5
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags and len(html) < 60_000 * 3
    for sae in read(tmp_path)["saes"]:
        assert f"{sae['reconstruction']['fvu']:#.4g}" in html and sae["source"] in html


def test_a_name_with_dollars_is_drawn_as_it_is():
    names = ["./runs/$HOME$/a", "./runs/$x_{$/b", "a$b"]
    svg = compared(names, [0.1, 0.2, 0.3], "FVU", "fvu")
    drawn = unescape("".join(re.findall(r"<text[^>]*>(.*?)</text>", svg, re.S)))
    assert all(name in drawn for name in names)


def test_what_was_measured_is_not_measured_again(text, tmp_path, calls, no_page):
    command = ["--data", text, *SMALL, "-o", tmp_path]
    assert run("bundled:resid_post.2", *command).exit_code == 0
    first = read(tmp_path)["saes"]
    assert run("bundled:resid_post.2", *command).exit_code == 0
    assert calls == [1] and read(tmp_path)["saes"] == first
    (tmp_path / "eval.html").unlink()
    assert run("bundled:resid_post.1", "bundled:resid_post.2", *command).exit_code == 0
    assert calls == [1, 1] and (tmp_path / "eval.html").exists()
    names = [sae["name"] for sae in read(tmp_path)["saes"]]
    assert names == ["resid_post.1", "resid_post.2"] and read(tmp_path)["saes"][1] == first[0]
    assert run("bundled:resid_post.1", *command).exit_code == 0  # the other one stays
    assert {sae["name"] for sae in read(tmp_path)["saes"]} == set(names) and calls == [1, 1]


def test_a_stopped_evaluation_goes_on(text, tmp_path, monkeypatch, no_page):
    monkeypatch.setattr(work, "AT_ONCE", 1)
    seen = []

    def stopped(model, saes, rows, **options):
        seen.append(str(saes[0].hookpoint))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(model, saes, rows, **options)

    monkeypatch.setattr(work, "measure", stopped)
    command = ["bundled:resid_post.0", "bundled:resid_post.1", "--data", text, *SMALL]
    assert run(*command, "-o", tmp_path / "a").exit_code != 0
    assert [sae["name"] for sae in read(tmp_path / "a")["saes"]] == ["resid_post.0"]
    assert run(*command, "-o", tmp_path / "a").exit_code == 0
    assert seen == ["resid_post.0", "resid_post.1", "resid_post.1"]
    assert run(*command, "-o", tmp_path / "b").exit_code == 0
    a, b = (read(tmp_path / name)["saes"] for name in "ab")
    assert a == b


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    work.write(tmp_path / "eval.json", {"old": 1})
    monkeypatch.setattr(work.os, "replace", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        work.write(tmp_path / "eval.json", {"new": 2})
    assert read(tmp_path) == {"old": 1}


def test_without_arguments_everything_bundled_is_measured(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    found = run("--rows", "2", "--context", "12", "--no-progress")
    assert found.exit_code == 0, found.output
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("eval-bundled-") and f"{folder.name}/eval.html" in found.output
    names = {sae["hookpoint"] for sae in read(folder)["saes"]}
    assert names == set(bundled.HOOKPOINTS) and "text that the model wrote itself" in found.output
    assert run("--rows", "2", "--context", "12", "--no-progress").exit_code == 0
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tuned_model_and_compute(text, tmp_path):
    model, tokenizer = bundled.model(), bundled.tokenizer()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"a": 0.1, "b": 3.0, "c": 0.4}))
    command = ["bundled:resid_post.2", "--data", text, *SMALL, "--tuned", tmp_path / "tuned"]
    found = run(*command, "--scaling", law, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.output
    answer = read(tmp_path / "out")
    (sae,) = answer["saes"]
    change = sae["tuned"]["reconstruction"]["fvu"] - sae["reconstruction"]["fvu"]
    assert sae["difference"]["fvu"] == change != 0
    losses = sae["downstream"]
    ratio = (losses["ce_spliced"] - 0.1) / (losses["ce"] - 0.1)
    assert sae["compute_equivalent"]["fraction"] == pytest.approx(ratio ** (-1 / 0.4), rel=1e-9)
    html = (tmp_path / "out" / "eval.html").read_text()
    assert "of the pretraining compute" in html and "On " + str(tmp_path / "tuned") in html
    law.write_text(json.dumps({"a": 50, "b": 3.0, "c": 0.4}))
    assert run(*command, "--scaling", law, "-o", tmp_path / "out").exit_code == 0
    (sae,) = read(tmp_path / "out")["saes"]
    assert sae["compute_equivalent"]["fraction"] is None
    assert "irreducible" in sae["compute_equivalent"]["refused"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bundled:resid_post.9"], "resid_post.9"),
        (["./no-such-sae"], "no such file or folder"),
        (["bundled:resid_post.2", "--data", "no-such.jsonl"], "no-such"),
        (["bundled:resid_post.2", "--context", "4096"], "holds"),
        (["bundled:resid_post.2", "--scaling", {"slope": 1}], "expected a, b, c"),
        (["bundled:resid_post.2", "--scaling", [1]], "expected a, b, c"),
        (["bundled:resid_post.2", "--scaling", LAW | {"b": "1"}], 'b is "1", expected a number'),
        (["bundled:resid_post.2", "--scaling", LAW | {"whole": [2]}], "whole is [2]"),
        (
            ["bundled:resid_post.2", "--scaling", {"compute": [1, None], "loss": [2, 3]}],
            "compute is [1, null], expected a list of numbers",
        ),
        (["bundled:resid_post.2", "--scaling", {"compute": 1, "loss": [2]}], "compute is 1"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments, message, text, tmp_path):
    law = tmp_path / "law.json"
    for content in (a for a in arguments if not isinstance(a, str)):
        law.write_text(json.dumps(content))
    given = [a if isinstance(a, str) else str(law) for a in arguments]
    data = [] if "--data" in given or "--context" in given else ["--data", text]
    found = run(*given, *data, *([] if "--context" in given else SMALL), "-o", tmp_path / "out")
    assert found.exit_code == 2, found.output
    assert message in " ".join(found.output.split()) and "Traceback" not in found.output
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_to_one_text_and_model(text, tmp_path, no_page):
    command = ["bundled:resid_post.2", "--data", text, "--context", "24", "-o", tmp_path]
    assert run(*command, "--rows", "3").exit_code == 0
    found = run(*command, "--rows", "2")
    assert found.exit_code == 2 and "another text; choose another --out" in found.output
    (tmp_path / "eval.json").write_text("{")
    found = run(*command, "--rows", "3")
    assert found.exit_code == 2 and "is no evaluation" in found.output
