"""`saert explain`: what it prints is what saert.measure.explain finds."""

import json

import pytest
from typer.testing import CliRunner

from saert.cli import app
from saert.hub import bundled
from saert.measure import Explanations

SAE = "bundled:resid_post.2"
STORY = "Tom and Lily went to the park. They ate a big apple pie with their mom and the dog ran. "


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(STORY * 12)
    return file


def small(story, *args):
    """A command on six rows of 32 tokens, of which one is set apart."""
    return (
        "explain", SAE, "--data", story, "--rows", 5, "--context", 32, "--train", 3,
        "--heldout", 3, "--device", "cpu", *args,
    )  # fmt: skip


def answer(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_answer_holds_what_the_file_holds(story, tmp_path):
    out = tmp_path / "n2g.jsonl"
    first = answer(*small(story, "--latents", 3, "--out", out, "--reconstruction"))
    saved = Explanations.load(out)
    assert [one["latent"] for one in first["explanations"]] == saved.latents
    assert len(saved) == 3 == first["summary"]["latents"]
    for shown, one in zip(first["explanations"], saved, strict=True):
        assert one.to_dict().items() <= shown.items()
        assert shown["lines"] == one.lines(bundled.tokenizer())
        assert one.train + one.heldout == min(6, one.active) and one.tokens == 5 * 31
    assert first["rows"] == 5 and first["settings"] == saved.settings
    assert bundled.tokenizer().decode([saved.settings["pad_token"]]) == "_"
    assert saved.settings["bos"] == bundled.tokenizer().bos_token_id
    loss = first["reconstruction"]
    assert (loss["others"], loss["latents"], loss["tokens"]) == ("drop", 3, 31)
    assert loss["ce"] < loss["spliced"]["ce"] < loss["empty"]["ce"]
    # more latents later: those that are there stay as they are
    more = answer(*small(story, "--latents", 5, "--out", out))
    assert len(more["explanations"]) == 5 and more["reconstruction"] is None
    assert all(one in more["explanations"] for one in first["explanations"])


def test_a_table_for_people(story):
    result = run(
        *small(story, "--latent", 546, "--latent", 71, "--no-progress", "--reconstruction"),
        "--others", "keep", "--patterns", 1, "--no-bos", "--pad-token", ",",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for part in ("#546 to the park", "#71 food", "recall", "recovered", "as they are"):
        assert part in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (("--latents", "few"), "--latents few: expected a number"),
        (("--latent", "99999"), "has 1024 latents"),
        (("--pad-token", "99999"), "2048 tokens"),
        (("--pad-token", "once upon a time"), "expected one"),
    ],
)
def test_errors_are_one_line(story, options, message):
    result = run(*small(story, *options))
    assert result.exit_code == 2 and message in result.stderr


def test_a_file_of_other_settings_is_left_alone(story, tmp_path):
    out = tmp_path / "n2g.jsonl"
    assert run(*small(story, "--latents", 1, "--out", out, "--no-progress")).exit_code == 0
    before = out.read_text()
    result = run(*small(story, "--latents", 1, "--out", out, "--seed", 1))
    assert result.exit_code == 2 and "seed=0, found 1" in result.stderr
    assert out.read_text() == before
