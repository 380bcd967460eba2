"""Sources and how they are spelled; what lies on this machine. No network."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_cases import make

from saert.hub.checkpoint import Family
from saert.hub.errors import FormatError
from saert.hub.format import save
from saert.hub.formats.saelens import WEIGHTS
from saert.hub.load import load, load_all, load_string
from saert.hub.sources.address import HubAddress, file_url, hub_address, shown
from saert.hub.sources.source import open_source
from saert.hub.sources.web import configs_beside

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# -- spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", ("org/repo", None, None)),
        ("org/repo:a/b", ("org/repo", None, "a/b")),
        ("org/repo:blocks.6:hook_z", ("org/repo", None, "blocks.6:hook_z")),
        ("org/repo@v1", ("org/repo", "v1", None)),
        ("org/repo@refs/pr/1:a", ("org/repo", "refs/pr/1", "a")),
        ("hf://org/repo", ("org/repo", None, None)),
        ("hf://models/org/repo/a/b", ("org/repo", None, "a/b")),
        (f"hf://org/repo@{COMMIT}/a.pt", ("org/repo", COMMIT, "a.pt")),
        ("hf://org/repo:a/b", ("org/repo", None, "a/b")),
        ("hf://models/org/repo:a", ("org/repo", None, "a")),
        ("hf://models/org/repo", ("org/repo", None, None)),
        ("hf://org/repo@main:a/b", ("org/repo", "main", "a/b")),
        ("hf://org/repo@refs/pr/1:a/b", ("org/repo", "refs/pr/1", "a/b")),
        ("hf://org/repo/blocks.6:hook_z", ("org/repo", None, "blocks.6:hook_z")),
        ("https://huggingface.co/org/repo:a/b", ("org/repo", None, "a/b")),
        ("hf://org/repo@refs/pr/1/a", ("org/repo", "refs/pr/1", "a")),
        ("hf://org/repo@feature%2Fx/a", ("org/repo", "feature/x", "a")),
        ("https://huggingface.co/org/repo", ("org/repo", None, None)),
        ("https://huggingface.co/org/repo/", ("org/repo", None, None)),
        ("http://www.huggingface.co/org/repo/tree/main", ("org/repo", "main", None)),
        ("https://hf.co/org/repo/tree/v1/a/b/", ("org/repo", "v1", "a/b")),
        ("https://huggingface.co/org/repo/tree/refs%2Fpr%2F1/a", ("org/repo", "refs/pr/1", "a")),
        (
            "https://huggingface.co/org/repo/resolve/main/a%20b/x.pt?download=true#top",
            ("org/repo", "main", "a b/x.pt"),
        ),
        ("https://huggingface.co/org/repo/blob/v1/x.pt", ("org/repo", "v1", "x.pt")),
        ("https://example.org/org/repo/x.pt", None),
        ("repo", None),
        ("a/b/c", None),
        ("org/", None),
    ],
)
def test_how_the_hub_is_spelled(text, expected):
    assert hub_address(text) == (None if expected is None else HubAddress(*expected))


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/org/data",
        "https://huggingface.co/spaces/org/space",
        "https://huggingface.co/org",
        "https://huggingface.co/org/repo/discussions/1",
        "https://huggingface.co/org/repo/tree",
        "hf://datasets/org/data/x",
        "hf://buckets/org/b",
        "hf://org",
        "org/repo:../x",
        "org/repo@../../x:a",
        "https://huggingface.co/org/repo/tree/main/%2e%2e/x",
        "hf://org/repo:../x",
        "hf://org/re po:x",
    ],
)
def test_what_is_no_model_repo_is_refused(text):
    with pytest.raises(ValueError, match="model repo|inside the source|tree/REVISION|ORG/REPO"):
        hub_address(text)


def test_a_direct_address_is_https_and_a_weights_file():
    blob = "sparse-autoencoder/gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt"
    azure = f"https://openaipublic.blob.core.windows.net/{blob}"
    assert file_url(f"az://openaipublic/{blob}") == azure
    assert file_url(azure + "#x") == azure
    assert file_url("http://127.0.0.1:80/x.pt") == "http://127.0.0.1:80/x.pt"
    for wrong in (
        "http://example.org/x.pt",
        "ftp://h/x.pt",
        "file:///x.pt",
        "s3://b/x.pt",
        "az://a",
    ):
        with pytest.raises(ValueError, match="expected"):
            file_url(wrong)
    for wrong in ("https://h/cfg.json", "https://h", "https://h/../x.pt", "https://h/%2e%2e/x.pt"):
        with pytest.raises(ValueError, match="weights file|inside the source"):
            open_source(wrong)


SECRET = "hf_AbCdEfGhIjKlMnOpQrStUv"


@pytest.mark.parametrize(
    "source",
    [
        f"https://user:{SECRET}@huggingface.co/org/repo",
        f"https://{SECRET}@example.org/x.pt",
        f"https://user:{SECRET}/x.pt",
        f"az://{SECRET}@account/x.pt",
        f"ftp://user:{SECRET}@host/x.pt",
        f"user:{SECRET}@huggingface.co/org/repo",
        f"http://example.org/x.pt?token={SECRET}",
        f"https://example.org/cfg.json?token={SECRET}",
        f"./{SECRET}",
        SECRET,
    ],
)
def test_no_message_repeats_a_token(source):
    for call in (load, load_all):
        with pytest.raises((ValueError, OSError)) as raised:
            call(source)
        assert SECRET[4:] not in str(raised.value)
    assert SECRET[4:] not in shown(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nosuch", "nosuch: no folder or file of that name, and no Hub repo.*'bundled'"),
        ("resid_post.2", "no Hub repo"),
        ("out/sae.safetensors", "out/sae.safetensors: no such folder or file"),
        ("runs/1/", "no such folder"),
        ("~/nosuch/x", "no such folder"),
        ("a\\b", "no such folder"),
        ("org/repo/layers.6", "a folder of a Hub repo is org/repo:layers.6"),
        (Path("org/repo"), "no such folder"),
    ],
)
def test_a_wrong_name_is_one_clear_error_and_asks_nobody(source, text):
    with pytest.raises(FileNotFoundError, match=text):
        load(source)


def test_a_revision_is_said_once():
    assert open_source("org/repo@v1", "v1")[0].revision == "v1"
    with pytest.raises(ValueError, match="revision='v2', but the source itself says 'v1'"):
        open_source("org/repo@v1", "v2")


# -- local ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for layer in (0, 1):
        sae = make("topk", hookpoint=f"resid_post.{layer}", dtype=torch.float32)
        save(sae, tmp_path / "saes" / f"l.{layer}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "saes"


@pytest.mark.parametrize(
    "source",
    ["./saes:l.1", "saes:l.1", "saes/l.1", "~/saes/l.1", "~/saes:l.1", f"saes/l.1/{WEIGHTS}",
     f"saes:l.1/{WEIGHTS}", Path("saes/l.1"), Path(f"saes/l.1/{WEIGHTS}")],
    ids=str,
)  # fmt: skip
def test_a_local_place_is_spelled_in_many_ways(folder, source):
    assert str(load(source).hookpoint) == "resid_post.1"
    assert "revision" not in load(source).metadata


def test_the_package_s_own_saes_are_one_string():
    assert str(load_string("bundled:resid_post.2").hookpoint) == "resid_post.2"
    with pytest.raises(FormatError, match="inside the source"):
        load("bundled:../x")


def test_load_all_below_a_folder_and_of_one_file(folder):
    assert list(load_all("./saes", "l.*")) == ["resid_post.0", "resid_post.1"]
    assert list(load_all("saes:l.1")) == ["resid_post.1"]
    assert list(load_all(folder / "l.0" / WEIGHTS)) == ["resid_post.0"]
    (folder.parent / "more").mkdir()
    folder.rename(folder.parent / "more" / "saes")
    assert list(load_all("more:saes", "*.0")) == ["resid_post.0"]


def test_a_file_finds_its_configs_beside_it_and_one_folder_above(tmp_path):
    layout = tmp_path / "X" / "checkpoints"
    layout.mkdir(parents=True)
    (layout / "final.safetensors").write_bytes(b"")
    (layout.parent / "hyperparams.json").write_text("{}")
    (layout.parent / "deep" / "down").mkdir(parents=True)
    (layout.parent / "deep" / "x.json").write_text("{}")
    source, inside = open_source(layout / "final.safetensors")
    seen = set(source.names())
    assert inside == "checkpoints/final.safetensors"
    assert seen == {"checkpoints/final.safetensors", "hyperparams.json"}
    assert source.name == str(tmp_path / "X")


def test_the_configs_that_an_address_may_have_come_from_the_families():
    family = Family(
        "x", r"(?P<stem>\w+)\.pt", read=lambda c: None, needs=("{stem}.json",), may=("^root.yaml",)
    )
    other = Family("y", r"ckpt/final\.pt", read=lambda c: None, needs=("hyper.json",))
    found = configs_beside("a/b/c/ckpt/final.pt", (family, other))
    above = [f"{folder}/root.yaml" for folder in ("a/b/c/ckpt", "a/b/c", "a/b")]
    assert found == ["a/b/c/ckpt/final.json", *above, "a/b/c/hyper.json"]


@pytest.mark.parametrize("source", ["~nosuchuser/x", "a" * 5000, "a/" + "b" * 300, "a\0b"])
def test_a_name_that_no_disk_can_hold_is_not_there(source):
    for call in (load, load_all):
        with pytest.raises((FileNotFoundError, ValueError)) as raised:
            call(source)
        assert len(str(raised.value)) < 600


def test_a_folder_called_like_a_model_goes_before_the_registry(folder):
    folder.rename(folder.parent / "gpt2")
    assert str(load("gpt2:l.1").hookpoint) == "resid_post.1"
    assert list(load_all("gpt2:l.1")) == ["resid_post.1"]
    with pytest.raises(FileNotFoundError, match="'l.7'; it holds l.0, l.1"):
        load("gpt2:l.7")
    with pytest.raises(LocalEntryNotFoundError, match="jbloom/.*HF_HUB_OFFLINE"):
        load("gpt2:res-jb/6")  # a short name, and nothing in the folder


def test_only_a_commit_s_snapshot_is_believed(tmp_path):
    for name in ("hello", COMMIT):
        snapshot = tmp_path / "models--victim--repo" / "snapshots" / name
        save(make("topk", hookpoint="resid_post.0", dtype=torch.float32), snapshot / "a")
        metadata = load(snapshot).metadata
        assert metadata.get("source") == ("victim/repo" if name == COMMIT else None)


def test_a_file_below_a_folder_that_may_not_be_listed_is_loaded(tmp_path, monkeypatch):
    save(make("topk", hookpoint="resid_post.0", dtype=torch.float32), tmp_path / "x")
    (tmp_path / "x" / "layer_1.safetensors").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("")  # what a family looks for is found by its name
    (tmp_path / "other.yaml").write_text("")
    listed = Path.iterdir

    def iterdir(folder):
        if folder == tmp_path:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert str(load(tmp_path / "x" / WEIGHTS).hookpoint) == "resid_post.0"
    names = open_source(tmp_path / "x" / "layer_1.safetensors")[0].names()
    assert "config.yaml" in names and "other.yaml" not in names
