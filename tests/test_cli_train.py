"""`saert train` and `saert scale`: what they leave behind, and what they refuse."""

import json

import pytest
import torch
from typer.testing import CliRunner

from saert import attach, load
from saert.cli import app
from saert.hub import bundled

TRAIN = ["train", "bundled", "--data"]
SMALL = [
    "--num-latents", "64", "-k", "4", "--tokens", "6e3", "--batch-tokens", "512", "--context", "32",
    "--set", "stream.buffer_tokens=2048", "--set", "evaluation.rows=8", "--no-progress",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    story = "Once upon a time, Tom saw {} birds in the {} tree. He was happy to see them fly away."
    colours = ("red", "big", "old", "green", "tall")
    lines = [json.dumps({"text": story.format(i, colours[i % 5])}) for i in range(1500)]
    path.write_text("\n".join(lines))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_train_leaves_saes_that_load_and_attach(text, tmp_path):
    both = "resid_post.1,mlp_in.2->mlp_out.2"
    command = [*TRAIN, text, "--hookpoints", both, *SMALL, "-o", tmp_path / "run"]
    found = run(*command, "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert set(answer["saes"]) == {"resid_post.1", "mlp_in.2"}
    assert answer["saes"]["resid_post.1"]["l0"] == pytest.approx(4, abs=0.2)
    model, tokenizer = bundled.model(), bundled.tokenizer()
    saes = [load(tmp_path / "run" / "saes", name) for name in answer["saes"]]
    with attach(model, saes) as attachment, torch.no_grad():
        model(**tokenizer("Tom saw birds in the tree", return_tensors="pt"))
        assert attachment.codes["resid_post.1"].l0().max() == 4
    again = run(*command)
    assert again.exit_code == 0 and "nothing to do" in again.output
    other = run(*command, "--seed", 3)
    assert other.exit_code == 2 and "seed" in other.output


def test_the_table_names_what_was_measured(text, tmp_path):
    objective = ["--objective", "jumprelu", "--set", "objective.target_l0=8", "-o", tmp_path]
    command = [*TRAIN, text, "--hookpoints", "resid_post.1", *objective]
    found = run(*command, *SMALL)  # -k belongs to other objectives
    assert found.exit_code == 2 and "unknown key objective.k" in found.output
    found = run(*command, *(part for part in SMALL if part not in ("-k", "4")))
    assert found.exit_code == 0, found.output
    assert "KL recovered" in found.output and "resid_post.1" in found.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train"], "missing: data"),
        (["train", "bundled", "--data", "TEXT"], "missing: sae"),
        (
            ["train", "bundled", "--data", "no-such.jsonl", "--hookpoints", "resid_post.1"],
            "no-such",
        ),
        (["train", "bundled", "--data", "TEXT", "--hookpoints", "resid_post.9"], "resid_post.9"),
        (["train", "bundled", "--data", "TEXT", "--hookpoints", "nowhere"], "nowhere"),
        (["train", "--recipe", "gpt3"], "recipe 'gpt3': no such file, and none of gemma-2-2b"),
        (["train", "--recipe", "gpt2-small", "--set", "optimiser.emma=1"], "did you mean ema"),
        (["scale", "bundled", "--data", "TEXT", "--hookpoint", "resid_post.1", "-k", "a"], "'a'"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(arguments, message, text, tmp_path):
    given = [text if a == "TEXT" else a for a in arguments]
    found = run(*given, "-o", tmp_path / "run", "--no-progress")
    assert found.exit_code == 2, found.output
    assert message in found.output and "Traceback" not in found.output


def test_recipes_are_listed_and_a_dry_run_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("train", "--recipes")
    assert found.exit_code == 0 and "gpt2-small" in found.output
    found = run("train", "--recipe", "gpt2-small", "-k", 64, "--dry-run")
    config = json.loads(found.stdout)
    assert config["objective"]["k"] == 64 and config["model"]["name"] == "openai-community/gpt2"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_scale_sweeps_fits_and_goes_on(text, tmp_path):
    sizes = ["--num-latents", "32,64,128,256", "-k", "4,8"]
    small = [part for part in SMALL if part not in ("--num-latents", "64", "-k", "4")]
    command = ["scale", "bundled", "--data", text, "--hookpoint", "resid_post.1", *sizes, *small,
               "--at-once", 3, "-o", tmp_path / "sweep"]  # fmt: skip
    found = run(*command)
    assert found.exit_code == 0, found.output
    folder = tmp_path / "sweep"
    points = json.loads((folder / "points.json").read_text())
    assert {(p["num_latents"], p["k"]) for p in points} == {
        (n, k) for n in (32, 64, 128, 256) for k in (4, 8)
    }
    final = {(p["num_latents"], p["k"]): p["loss"] for p in points}  # the last of each curve
    assert final[256, 8] < final[32, 8] and final[256, 8] < final[256, 4]
    fits = json.loads((folder / "fits.json").read_text())
    assert {"compute", "joint", "latents-k4", "latents-k8"} == set(fits)
    assert (folder / "compute.png").stat().st_size > 10_000 and not (folder / "cache").exists()

    (folder / "part-02" / "curves.json").unlink()  # as if it had been stopped before the last part
    again = run(*command)
    assert again.exit_code == 0 and json.loads((folder / "points.json").read_text()) == points
    other = run(*[*command, "--set", "seed=1"])
    assert other.exit_code == 2 and "another sweep" in other.output
