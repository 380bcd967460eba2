"""`saert compare` and `saert probe` print what the library says; mistakes are one line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from saert import SAE, TopK, load, save
from saert.cli import app
from saert.hub import bundled
from saert.measure import consistency, feature_splitting, probe_suite, read_suite


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def answer(*args):
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    """Folders of two SAEs of one size and a larger one, all of the bundled model's width."""
    root = tmp_path_factory.mktemp("saes")
    base = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(144, 128, generator=torch.Generator().manual_seed(1))
    kinds = {"a": base, "b": base[torch.arange(47, -1, -1)] + 0.5 * noise[:48]}
    kinds["large"] = torch.cat((base[:24], noise))
    for name, W in kinds.items():
        sae = SAE.from_weights(W, W, activation=TopK(4), hookpoint="resid_post.2")
        save(sae, root / name)
    return root


def test_compare_says_what_consistency_says(saes):
    found = answer("compare", saes / "a", saes / "b")
    a, b = (load(str(saes / name)) for name in "ab")
    expected = consistency(a, b, names=[str(saes / "a"), str(saes / "b")])
    (matched,) = found["matched"]
    histograms = matched.pop("histograms")
    assert matched == json.loads(json.dumps(expected.as_dict()))
    assert histograms == [expected.pairs[0].histogram()] and found["splitting"] == []
    shown = invoke("compare", saes / "a", saes / "b", "--no-progress").stdout
    assert f"{expected.pw_mcc:.4f}" in shown and "█" in shown


def test_sizes_that_differ_are_looked_up_in_each_other(saes):
    found = answer("compare", saes / "large", saes / "a", saes / "b", "--threshold", 0.8)
    assert [len(one["pairs"]) for one in found["matched"]] == [1]
    assert len(found["splitting"]) == 2
    first = next(row for row in found["splitting"] if row["small_source"].endswith("a"))
    expected = feature_splitting(load(str(saes / "a")), load(str(saes / "large")), 0.8).as_dict()
    assert {key: first[key] for key in expected} == expected and first["found"] == 0.5
    assert "feature splitting" in invoke("compare", saes / "large", saes / "a").stdout


def test_compare_runs_on_what_is_bundled():
    found = answer("compare", "bundled:resid_post.1", "bundled:resid_post.2")
    assert [one["hookpoint"] for one in found["saes"]] == ["resid_post.1", "resid_post.2"]
    assert 0.3 < found["matched"][0]["pw_mcc"] < 0.9


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bundled:resid_post.1"], "name two or more"),
        (["bundled:resid_post.1", "bundled:mlp_in.2"], "bundled:mlp_in.2 is a transcoder"),
        (["bundled:resid_post.1", "/nowhere/at/all"], "no such file or folder"),
    ],
)
def test_mistakes_are_one_line(args, says):
    result = invoke("compare", *args)
    assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1


# -- probe ---------------------------------------------------------------------------------------

TEXTS = ["the dog ran to the park", "she was very sad", "a big dog", "Lily was happy"] * 6


@pytest.fixture
def suite(tmp_path):
    rows = [{"text": f"{text} {i}", "label": int("dog" in text)} for i, text in enumerate(TEXTS)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.toml").write_text('[[task]]\nname = "dogs"\nfile = "t.jsonl"\n')
    return tmp_path / "suite.toml"


def test_probe_says_what_probe_suite_says(suite, tmp_path):
    found = answer("probe", suite, "--k", "2", "--out", tmp_path / "out")
    model, tokenizer = bundled.model(), bundled.tokenizer()
    expected = probe_suite(
        model, tokenizer, bundled.sae("resid_post.2"), read_suite(suite), ks=(2,), dense=True
    )
    (one,) = found["saes"]
    assert one["probes"] == [probe.as_dict() for probe in expected]
    assert one["hookpoint"] == "resid_post.2" and found["suite"] == "suite"
    assert (tmp_path / "out" / "dogs.json").is_file()
    again = answer("probe", suite, "--k", "2", "--out", tmp_path / "out")
    assert again == found
    shown = invoke("probe", suite, "--k", "", "--no-dense", "--no-progress").stdout
    assert "dogs" in shown and f"{expected.mean_score:.4f}" in shown


def test_probe_refuses_in_one_line(suite, saes):
    for args, says in (
        ([suite, "--k", "x"], "expected numbers"),
        ([suite.parent / "none.toml"], "none.toml"),
        ([suite, "--data", suite.parent / "none"], "no file"),
        ([suite, "--sae", "bundled:resid_post.2", "--k", "5000"], "expected between 1 and 1024"),
    ):
        result = invoke("probe", *args)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
