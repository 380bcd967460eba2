"""What publish makes ready and refuses before anything is sent; nothing here has a network."""

import json
from pathlib import Path

import pytest
from publish_cases import KINDS, METRICS, MODEL, a_folder, an_sae
from typer.testing import CliRunner

from saert.cli import app
from saert.hub.format import read, save
from saert.hub.identity import fingerprint
from saert.hub.publish import publish
from saert.hub.publishing.stage import Settings, stage
from saert.transforms import MeanCentre, NoTransform


@pytest.fixture
def folder(tmp_path) -> Path:
    return a_folder(tmp_path / "in")


def staged(saes, tmp_path, **settings):
    return stage(saes, tmp_path / "out", Settings("someone/saes", **settings))


def test_a_dry_run_checks_everything_and_says_what_would_be_written(folder, monkeypatch):
    monkeypatch.setattr("saert.hub.publish.Remote", None)
    found = publish(folder, "someone/saes", dry_run=True)
    assert found.saes == ("mlp_in.0", *KINDS)
    per_sae = {"cfg.json", "sae_weights.safetensors", "metrics.json"}
    assert {*found.files} >= {f"{path}/{name}" for path in found.saes for name in per_sae}
    assert {"README.md", "saes.json"} <= {*found.files}
    assert (found.commit, found.url, found.unmeasured) == (None, None, ())
    assert found.card.startswith("---\n")


def test_what_is_written_is_what_was_given(folder, tmp_path):
    found = staged(folder, tmp_path)
    for path in found.entries:
        assert fingerprint(read(found.files[f"{path}/cfg.json"].parent)) == fingerprint(
            read(folder / path)
        )
        assert json.loads(found.files[f"{path}/metrics.json"].read_text()) == METRICS
        assert found.entries[path].metrics == METRICS


def test_names_are_hookpoints_or_paths_or_those_of_a_dict(tmp_path):
    save(an_sae(at="resid_post.4"), tmp_path / "in" / "k5" / "first")
    save(an_sae(at="resid_post.4", mark=1.0), tmp_path / "in" / "k8" / "second")
    save(an_sae(at="transformer.h.3.attn:in"), tmp_path / "in" / "third")
    assert list(staged(tmp_path / "in", tmp_path).entries) == [
        "k5/first", "k8/second", "transformer.h.3.attn-in"
    ]  # fmt: skip
    assert list(staged(an_sae(), tmp_path, into="small/").entries) == ["small/resid_post.0"]
    assert list(staged({"a/b": an_sae()}, tmp_path).entries) == ["a/b"]


@pytest.mark.parametrize("name", ["../x", "/x", "a b", "", ".", "x/../y", "é", "a//b/..", ".git"])
def test_names_that_are_no_paths_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="expected a path of letters"):
        staged({name: an_sae()}, tmp_path)


@pytest.mark.parametrize(
    "repo", ["saes", "a/b/c", "a/b--c", "a/..", "a/b.git", "/b", "a/", "a b/c", "a/" + "b" * 96]
)
def test_repo_ids_the_hub_refuses_are_refused(repo):
    with pytest.raises(ValueError, match="expected 'USER/NAME'"):
        publish(an_sae(), repo, dry_run=True)


@pytest.mark.parametrize("name", ["a b", "../x", "-x", "0" * 40, "v1:x", ""])
def test_branches_and_tags_have_names_that_git_takes(name):
    for wrong in ({"revision": name}, {"tags": [name]}):
        with pytest.raises(ValueError, match="a name for a branch or tag"):
            publish(an_sae(), "a/b", dry_run=True, **wrong)
    with pytest.raises(ValueError, match="a pull request goes to main"):
        publish(an_sae(), "a/b", dry_run=True, create_pr=True, tags=["v1"])


@pytest.mark.parametrize("base", [None, "/home/me/model", "./model", "a/b/c", "", 3])
def test_a_base_model_that_nobody_can_find_is_refused(base, tmp_path):
    sae = an_sae()
    sae.metadata["base_model"] = base
    with pytest.raises(ValueError, match="resid_post.0: base_model is .*--base-model") as error:
        staged(sae, tmp_path)
    assert "/home" not in str(error.value)
    assert staged(sae, tmp_path, base_model=MODEL).entries["resid_post.0"].base_model == MODEL


def test_what_contradicts_itself_is_refused(tmp_path):
    other = an_sae(at="resid_post.1")
    other.metadata["base_model"] = "someone/else"
    for saes, why in [
        ({"a": an_sae(), "b": other}, "several models"),
        ({}, "the dict is empty"),
        (an_sae(at=None), "does not say where it reads"),
    ]:
        with pytest.raises(ValueError, match=why):
            staged(saes, tmp_path)
    with pytest.raises(TypeError, match="'a' is a str, expected an SAE"):
        staged({"a": "resid_post.0"}, tmp_path)
    with pytest.raises(ValueError, match="two SAEs would be called"):
        staged({"h.0": an_sae(), "./h.0": an_sae()}, tmp_path)


def test_a_folder_without_saes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        staged(tmp_path / "nowhere", tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no SAE in a layout"):
        staged(tmp_path / "in", tmp_path)
    (tmp_path / "in" / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        staged(tmp_path / "in", tmp_path)


@pytest.mark.parametrize("name", ["metrics.json", "cfg.json", "sae_weights.safetensors"])
def test_links_out_of_the_folder_are_not_followed(folder, tmp_path, name):
    outside, inside = tmp_path / "outside", folder / "resid_post.0" / name
    outside.write_bytes(inside.read_bytes() if inside.exists() else b'{"fvu": 0.5}')
    inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    with pytest.raises(ValueError, match="link"):
        staged(folder, tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"fvu": -1}, {"dead": 1.5}, {"l0": "5"}, {"fvu": True}, {"ce": float("inf")}]
)
def test_numbers_that_nobody_measured_are_refused(wrong, tmp_path):
    sae = an_sae()
    sae.metadata["metrics"] |= wrong
    with pytest.raises(ValueError, match=f"metrics.json: {next(iter(wrong))} is"):
        staged(sae, tmp_path)


def test_paths_of_this_machine_stay_here(tmp_path):
    sae = an_sae()
    sae.metadata |= {
        "training": {"data": str(tmp_path / "text" / "stories.jsonl"), "out": "~/runs/7"},
        "command": f"saert train --out {tmp_path}/x --cache=/scratch/me/cache",
        "datasets": ["roneneldan/TinyStories", "https://example.org/a/b"],
    }
    save(sae, tmp_path / "in")
    record = {"config": {"sae": {"init": "/scratch/me/old"}}, "data": {"dataset": "a/b"}}
    (tmp_path / "in" / "training.json").write_text(json.dumps(record))
    found = staged(tmp_path / "in", tmp_path)
    said = "".join(p.read_text() for p in found.files.values() if p.suffix == ".json")
    for part in (str(tmp_path), "scratch", "~", "/tmp"):
        assert part not in said
    config = json.loads(found.files["resid_post.0/cfg.json"].read_text())["metadata"]
    assert config["training"] == {"data": "stories.jsonl", "out": "7"}
    assert config["command"] == "saert train --out x --cache=cache"
    assert config["datasets"] == sae.metadata["datasets"]
    entry = found.entries["resid_post.0"]
    assert entry.training == {"sae": {"init": "old"}}
    assert (entry.dataset, entry.measured_on) == ("a/b", "a/b, held out")


@pytest.mark.parametrize(
    "secret",
    [
        {"note": "log in with hf_" + "aB3" * 10},
        {"env": {"WANDB_API_KEY": "12345"}},
        {"nested": [{"password": "x"}]},
        {"url": "https://me:pass@example.org/x"},
        {"note": "the token of this call: secret-of-mine"},
    ],
)
def test_secrets_are_refused_and_not_repeated(secret, tmp_path):
    sae = an_sae()
    sae.metadata |= {"training": secret, "eos_token": "</s>", "dead_tokens": 5}
    with pytest.raises(ValueError, match="take it out before publishing") as error:
        staged(sae, tmp_path, secrets=("secret-of-mine",))
    for text in ("aB3", "12345", "me:pass", "secret-of-mine"):
        assert text not in str(error.value)
    del sae.metadata["training"]
    staged(sae, tmp_path, secrets=("secret-of-mine",))


def test_an_sae_from_elsewhere_says_where_it_came_from(tmp_path):
    sae = an_sae()
    sae.metadata |= {"source": "other/saes", "path": "a", "revision": "c0ffee"}
    for repo, said in [("someone/saes", "other/saes/a@c0ffee"), ("other/saes", None)]:
        found = stage(sae, tmp_path / repo, Settings(repo))
        config = json.loads(found.files["resid_post.0/cfg.json"].read_text())["metadata"]
        assert config.get("converted_from") == said
        assert not {"source", "revision"} & set(config)
    assert sae.metadata["source"] == "other/saes"  # the caller's own is left alone


@pytest.mark.parametrize("where", ["eval.json", "eval-gpt2-abc/eval.json"])
def test_an_evaluation_belongs_to_the_sae_it_measured(tmp_path, where):
    sae, other = an_sae(), an_sae(at="resid_post.1")
    for one, name in ((sae, "a"), (other, "b")):
        del one.metadata["metrics"]
        save(one, tmp_path / "in" / name)
    measured = {
        "fingerprint": fingerprint(sae),
        "reconstruction": METRICS | {"l0_counts": []},
        "downstream": METRICS | {"delta_ce": 0.5},
    }
    place = tmp_path / "in" / where
    place.parent.mkdir(exist_ok=True)
    facts = {"text": {"source": "/data/me/stories.jsonl"}, "command": "saert eval /data/me"}
    place.write_text(json.dumps({"facts": facts, "saes": [measured]}))
    found = staged(tmp_path / "in", tmp_path)
    assert found.entries["resid_post.0"].metrics == METRICS | {"text": "stories.jsonl"}
    assert found.entries["resid_post.0"].measured_on == "stories.jsonl"
    assert found.entries["resid_post.1"].metrics is None
    assert publish(tmp_path / "in", "a/b", dry_run=True).unmeasured == ("resid_post.1",)
    # other weights: another SAE
    sae.W_dec.data[0, 0] += 1
    save(sae, tmp_path / "in" / "a")
    assert staged(tmp_path / "in", tmp_path / "2").entries["resid_post.0"].metrics is None
    place.write_text("{}")
    with pytest.raises(ValueError, match="expected what `saert eval` writes"):
        staged(tmp_path / "in", tmp_path / "3")


def test_of_two_measurements_the_one_on_more_tokens_counts(tmp_path):
    for tokens, fvu in [(4095, 0.25), (4097, 0.5)]:
        sae = an_sae()
        measured = METRICS | {"tokens": tokens, "fvu": 0.5}
        entry = {"fingerprint": fingerprint(sae), "reconstruction": measured, "downstream": METRICS}
        save(sae, tmp_path / "in")
        content = {"facts": {"text": {"source": "x"}}, "saes": [entry]}
        (tmp_path / "in" / "eval.json").write_text(json.dumps(content))
        assert staged(tmp_path / "in", tmp_path).entries["resid_post.0"].metrics["fvu"] == fvu


def test_without_a_token_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("saert.hub.publish.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        publish(an_sae(), "someone/saes")


def test_the_command_shows_what_it_would_do(folder):
    run = CliRunner().invoke(app, ["publish", str(folder), "someone/saes", "--dry-run", "--json"])
    answer = json.loads(run.stdout)
    assert answer["dry_run"] and answer["commit"] is None
    assert answer["saes"] == ["mlp_in.0", *KINDS]
    run = CliRunner().invoke(app, ["publish", str(folder), "someone/saes", "--dry-run"])
    assert "nothing was sent" in run.stdout and "resid_post.3/cfg.json" in run.stdout
    run = CliRunner().invoke(app, ["publish", str(folder), "saes"])
    assert run.exit_code == 2 and "expected 'USER/NAME'" in run.stderr


def test_what_load_would_refuse_is_not_published(tmp_path):
    sae = an_sae()
    sae.W_dec.data.zero_()
    with pytest.raises(ValueError, match="zero rows of W_dec"):
        staged(sae, tmp_path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), Path("/a/b"), {1, 2}, b"x"])
def test_what_is_no_json_is_refused_by_its_key(wrong, tmp_path):
    for place in ("metadata", "metrics"):
        sae = an_sae()
        (sae.metadata if place == "metadata" else sae.metadata["metrics"])["deep"] = [{"it": wrong}]
        with pytest.raises(ValueError, match=r"json\S*deep\[0\].it is"):
            staged(sae, tmp_path)
    sae.metadata = {"base_model": MODEL, 1.5: 0}
    with pytest.raises(ValueError, match="a key is a float"):
        staged(sae, tmp_path)


@pytest.mark.parametrize("wrong", [[1], "good", {"text": 5}, {"tokens": "many"}])
def test_metrics_of_other_types_are_refused(wrong, tmp_path):
    sae = an_sae()
    sae.metadata["metrics"] = wrong
    with pytest.raises(ValueError, match="resid_post.0: metrics.json"):
        staged(sae, tmp_path)


def test_the_short_name_of_an_original_is_not_its_copys(tmp_path):
    sae = an_sae()
    sae.metadata |= {"name": "gpt2:res-jb/0", "load_as": "gpt2:res-jb/0"}
    for transform, kept in [(NoTransform(), {"load_as"}), (MeanCentre(), set())]:
        sae.input_transform = transform
        found = staged(sae, tmp_path / type(transform).__name__)
        config = json.loads(found.files["resid_post.0/cfg.json"].read_text())["metadata"]
        assert {"name", "load_as"} & set(config) == kept  # a reading that is still to be done


@pytest.mark.parametrize(
    "name",
    ["README.md", "saes.json", "readme.MD/x", "a.", "a/b.lock", "x" * 201, "aux", "a/cfg.json"],
)
def test_names_that_not_every_system_takes_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="expected a path of letters"):
        staged({name: an_sae()}, tmp_path)


def test_names_that_differ_in_case_only_are_refused(tmp_path):
    for pair in (("A", "a"), ("x/A/b", "x/a/c")):
        with pytest.raises(ValueError, match="differ in case only"):
            staged(dict.fromkeys(pair, an_sae()), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [dict(tags=["v1", "v1"]), dict(tags=["main"]), dict(tags=["dev"], revision="dev"),
     dict(tags="v1"), dict(tags=["x.lock"]), dict(revision="a/"), dict(revision="a.")],
)  # fmt: skip
def test_tags_that_cannot_be_are_refused_before_anything_is_sent(wrong):
    with pytest.raises(ValueError, match="v1|main|dev|x.lock|a/|a\\."):
        publish(an_sae(), "a/b", dry_run=True, **wrong)


def test_sparsify_s_folder_has_to_name_the_module(tmp_path):
    sae = an_sae(at="resid_post.2")
    for name in ("foo", "h.3", "h.2.attn"):
        with pytest.raises(ValueError, match=r"for resid_post.2 call it 'h.2'"):
            staged({name: sae}, tmp_path, format="sparsify", model_type="gpt2")
    for name in ("foo", "h.3"):
        with pytest.raises(ValueError, match="call it 'h.2', as the model calls"):
            staged({name: sae}, tmp_path, format="sparsify")
    for name in ("h.2", "k8/h.2", "h.2/seed1"):
        found = staged({name: sae}, tmp_path / name, format="sparsify", model_type="gpt2")
        assert str(read(found.files[f"{name}/cfg.json"].parent).hookpoint) == "h.2"


def test_labels_may_be_long_and_lose_their_paths(tmp_path):
    save(an_sae(), tmp_path / "in")
    labels = {str(i): "x" * 200 for i in range(25_000)} | {"source": "made by /home/me/x/label.py"}
    (tmp_path / "in" / "labels.json").write_text(json.dumps(labels))
    found = staged(tmp_path / "in", tmp_path)
    written = json.loads(found.files["resid_post.0/labels.json"].read_text())
    assert written == labels | {"source": "made by label.py"}
    (tmp_path / "in" / "labels.json").write_text(json.dumps({"note": "hf_" + "aB3" * 10}))
    with pytest.raises(ValueError, match="labels.json.note: this looks like a secret"):
        staged(tmp_path / "in", tmp_path / "2")


def test_a_user_that_is_not_here_is_a_usage_error():
    run = CliRunner().invoke(app, ["publish", "~nosuchuser/x", "a/b", "--dry-run"])
    assert run.exit_code == 2 and "no such user" in run.stderr
