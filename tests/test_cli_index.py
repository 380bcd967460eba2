"""`saert index` and `saert card`, on the bundled model."""

import json

import pytest
from typer.testing import CliRunner

from saert.cli import app
from saert.measure.features import FeatureIndex

SAE = "bundled:resid_post.2"
STORY = "Tom and Lily went to the park. They ate a big apple pie with their mom and the dog ran. "


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    (folder / "story.txt").write_text(STORY * 12)
    result = run(
        "index", SAE, "--out", folder / "out", "--data", folder / "story.txt", "--rows", 4,
        "--context", 32, "--batch", 4, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def test_an_index_of_a_file(made):
    folder, answer = made
    index = FeatureIndex.open(folder / "out")
    assert answer["rows"] == 4 and answer["hookpoint"] == "resid_post.2"
    assert answer["tokens"] == index.tokens_seen == 4 * 31  # the begin of each row is left out
    assert answer["activations"] == int(index.counts.sum()) and answer["exports"] == {}
    assert index.labels[71] == "food"
    assert index.config["model_name"] == "saert/bundled-tinystories"
    assert index.config["dataset_repo"] == str(folder / "story.txt")


def test_more_rows_are_added_and_exports_written(made):
    folder, _ = made
    more = run(
        "index", SAE, "--out", folder / "out", "--data", folder / "story.txt", "--rows", 6,
        "--context", 32, "--batch", 4, "--export", "openai", "--export", "neuronpedia",
        "--export", "saedashboard", "--no-progress",
    )  # fmt: skip
    assert more.exit_code == 0, more.stderr
    index = FeatureIndex.open(folder / "out")
    assert len(index.rows) == 6 and "saert card" in more.stdout
    assert len(list((index.place / "export" / "openai" / "atoms").iterdir())) == len(index)
    assert (index.place / "export" / "neuronpedia" / "upload-batch-0.json").is_file()
    assert (index.place / "export" / "saedashboard" / "batch-0.json").is_file()


def test_a_card_shows_text_logits_and_neighbours(made):
    folder, _ = made
    index = FeatureIndex.open(folder / "out")
    latent = int(index.counts.argmax())
    shown = run("card", folder / "out", latent, "--top", 2)
    assert shown.exit_code == 0, shown.stderr
    assert f"#{latent}" in shown.stdout and "promotes" in shown.stdout and "near" in shown.stdout
    answer = json.loads(run("card", folder / "out", latent, "--top", 2, "--json").stdout)
    (card,) = answer["cards"]
    assert card["count"] == index.counts[latent] and len(card["top"]) <= 2
    dead = int(index.dead[0])
    assert "dead" in run("card", folder / "out", dead).stdout


def test_search_by_a_word(made):
    folder, _ = made
    answer = json.loads(run("card", folder / "out", "--text", "park", "--json").stdout)
    assert answer["found"][0]["coverage"] > 0.5 and len(answer["found"]) <= 8
    assert "park" in run("card", folder / "out", "--text", "park").stdout


def test_without_data_the_model_writes(tmp_path):
    result = run("index", SAE, "-o", tmp_path, "--rows", 2, "--context", 8, "--json")
    assert "wrote itself" in json.loads(result.stdout)["text"]
    again = run(
        "index", "bundled:resid_post.1", "-o", tmp_path, "--rows", 2, "--context", 8, "--json"
    )
    assert again.exit_code == 0
    both = run("card", tmp_path, 0)
    assert both.exit_code == 2 and "resid_post.1, resid_post.2" in both.stderr
    assert run("card", tmp_path, 0, "--hookpoint", "resid_post.1").exit_code == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["index", SAE, "--rows", "1", "-m", "./nowhere"], "no such file"),
        (["card", "./nowhere", "3"], "no feature index"),
        (["card", "{made}", "99999"], "0 to 1023"),
        (["card", "{made}"], "give latents"),
        (["card", "{made}", "3", "--text", "park"], "not both"),
        (["card", "{made}", "--text", "parkparkpark"], "no token is spelt"),
        (["index", SAE, "-o", "{made}", "--rows", "2", "--context", "8"], "there 32, now 8"),
    ],
)  # fmt: skip
def test_errors_are_short_and_say_what_to_do(args, told, made):
    result = run(*(arg.format(made=made[0] / "out") for arg in args))
    assert result.exit_code == 2 and told in result.stderr and "Traceback" not in result.stderr
