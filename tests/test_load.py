"""load and load_all: from folders and from a Hub on the loopback, with the real client."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from sae_cases import make
from safetensors.torch import save_file

from saert.hub.format import FormatError, save
from saert.hub.formats.saelens import CONFIG, WEIGHTS
from saert.hub.load import load, load_all

# -- folders -------------------------------------------------------------------------------------


@pytest.fixture
def saes(tmp_path) -> Path:
    """A folder laid out as a repository with three SAEs."""
    for path, at in [("a/resid_post.0", 0), ("a/resid_post.1", 1), ("b", 2)]:
        sae = make("topk", hookpoint=f"resid_post.{at}", dtype=torch.float32)
        sae.b_enc.data += at
        save(sae, tmp_path / path)
    (tmp_path / "README.md").write_text("three")
    return tmp_path


@pytest.mark.parametrize("as_text", [False, True])
def test_a_folder_inside_a_source_is_loaded(saes, as_text):
    source = str(saes) if as_text else saes
    assert str(load(source, "a/resid_post.1").hookpoint) == "resid_post.1"
    assert str(load(source, "./b/").hookpoint) == "resid_post.2"
    assert str(load(saes / "a", "resid_post.0").hookpoint) == "resid_post.0"


def test_the_path_may_be_left_out_where_there_is_only_one(saes):
    assert str(load(saes / "b").hookpoint) == "resid_post.2"
    for at in ("a/resid_post.0", "a/resid_post.1"):
        for file in (saes / at).iterdir():
            file.unlink()
    assert str(load(saes).hookpoint) == "resid_post.2"


def test_several_saes_and_no_path_lists_them(saes):
    with pytest.raises(FileNotFoundError, match="which SAE.*a/resid_post.0, a/resid_post.1, b"):
        load(saes)


def test_a_wrong_path_lists_what_there_is(saes):
    with pytest.raises(
        FileNotFoundError, match="'a/resid_post.9'.*a/resid_post.0, a/resid_post.1, b"
    ):
        load(saes, "a/resid_post.9")


def test_a_folder_without_an_sae_names_what_it_holds(saes):
    (saes / "b" / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=rf"b: no SAE found in a layout .* holds \['{CONFIG}'\]"):
        load(saes / "b")
    with pytest.raises(FileNotFoundError, match="no SAE at 'b'; it holds a/resid_post.0, a/resid"):
        load(saes, "b")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc", "a/..", "", " "])
def test_paths_that_leave_the_source_are_refused(saes, path):
    with pytest.raises(FormatError, match="expected a file or folder inside the source"):
        load(saes / "a", path)


@pytest.mark.parametrize("source", ["/no/such", "./no", "a/b/c", Path("no")], ids=str)
def test_a_missing_folder_is_no_repo(source):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(source)


def test_a_revision_of_a_folder_is_refused(saes):
    with pytest.raises(ValueError, match="revision='main' is for Hub repos"):
        load(saes, "b", revision="main")


@pytest.mark.parametrize(
    ("pattern", "layers"), [("*", [0, 1, 2]), ("a/*", [0, 1]), ("*.1", [1]), ("b", [2])]
)
def test_load_all_is_keyed_by_hookpoint(saes, pattern, layers):
    found = load_all(saes, pattern, dtype=torch.float64)
    assert sorted(found) == [f"resid_post.{layer}" for layer in layers]
    for key, sae in found.items():
        assert str(sae.hookpoint) == key
        assert sae.dtype == torch.float64


def test_load_all_of_nothing_lists_what_there_is(saes):
    with pytest.raises(FileNotFoundError, match=r"no SAE matches 'c\*'.*a/resid_post.0"):
        load_all(saes, "c*")


def test_load_all_refuses_two_saes_at_one_hookpoint(saes):
    save(make("topk", hookpoint="resid_post.1", dtype=torch.float32), saes / "c")
    with pytest.raises(ValueError, match="two SAEs read resid_post.1"):
        load_all(saes)


# -- the Hub -------------------------------------------------------------------------------------

# Runs in a process of its own, because huggingface_hub reads its environment at import. Each step
# reports what it got, and marks its place in the server's log.
CLIENT = """
import json, sys, urllib.request
import huggingface_hub, torch
from saert.hub.load import load, load_all

steps = {
    "load": lambda: load("someone/saes", "resid_post.0"),
    "again": lambda: load("someone/saes", "resid_post.0"),
    "tag": lambda: load("someone/saes", "resid_post.0", revision="v1"),
    "sha": lambda: load("someone/saes", "resid_post.0", revision=sys.argv[2]),
    "wrong path": lambda: load("someone/saes", "resid_post.7"),
    "traversal": lambda: load("someone/saes", "../x"),
    "wrong revision": lambda: load("someone/saes", "resid_post.0", revision="v9"),
    "no repo": lambda: load("someone/nothing", "resid_post.0"),
    "no path": lambda: load("someone/saes"),
    "only one": lambda: load("someone/one"),
    "all": lambda: load_all("someone/saes", "*.1")["resid_post.1"],
    "offline": lambda: load("someone/saes", "resid_post.0"),
}
report = {}
for name, step in steps.items():
    try:
        urllib.request.urlopen(sys.argv[1] + "/mark/" + urllib.parse.quote(name))
    except urllib.error.HTTPError:
        pass
    huggingface_hub.constants.HF_HUB_OFFLINE = name == "offline"
    try:
        sae = step()
        report[name] = dict(
            metadata={k: v for k, v in sae.metadata.items() if k in ("source", "revision")},
            hookpoint=str(sae.hookpoint), mark=sae.b_dec[0].item(),
        )
    except Exception as error:
        kinds = [k.__name__ for k in type(error).__mro__]
        report[name] = dict(error=kinds, module=type(error).__module__, text=str(error))
print(json.dumps(report))
"""


def repository(folder: Path, mark: float, layers: list[int]) -> dict[str, bytes]:
    for layer in layers:
        sae = make("topk", hookpoint=f"resid_post.{layer}", dtype=torch.float32)
        sae.b_dec.data[0] = mark
        save(sae, folder / f"resid_post.{layer}")
    (folder / "README.md").write_text("someone's SAEs")
    (folder / "resid_post.0" / "examples.safetensors").write_bytes(b"large")
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[HubServer, dict[str, Any], dict[str, list[tuple[str, str]]]]:
    """A Hub, what a client got from it, and what it asked for, step by step."""
    tmp = tmp_path_factory.mktemp("hub")
    versions = {
        "main": repository(tmp / "main", 2.0, [0, 1]),
        "v1": repository(tmp / "v1", 1.0, [0, 1]),
    }
    repos = {"someone/saes": versions, "someone/one": {"main": repository(tmp / "one", 3.0, [0])}}
    with HubServer(repos) as server:
        run = subprocess.run(
            [sys.executable, "-c", CLIENT, server.url, server.commit("someone/saes", "v1")],
            env=server.environment(tmp / "home"),
            cwd=tmp,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
    requests: dict[str, list[tuple[str, str]]] = {}
    for method, path in server.log:
        if path.startswith("/mark/"):
            requests[path.removeprefix("/mark/")] = []
        else:
            requests[list(requests)[-1]].append((method, path))
    return server, json.loads(run.stdout.splitlines()[-1]), requests


@pytest.mark.parametrize(
    ("step", "revision", "mark"),
    [("load", "main", 2.0), ("again", "main", 2.0), ("tag", "v1", 1.0), ("sha", "v1", 1.0)],
)
def test_a_hub_sae_remembers_the_commit_it_came_from(hub, step, revision, mark):
    server, report, _ = hub
    commit = server.commit("someone/saes", revision)
    assert report[step].get("mark") == mark, report[step]
    assert report[step]["metadata"] == {"source": "someone/saes", "revision": commit}
    assert report[step]["hookpoint"] == "resid_post.0"


def test_only_the_files_of_one_sae_are_fetched_and_only_once(hub):
    _, _, requests = hub

    def fetched(step: str) -> list[str]:
        resolve = re.compile("/someone/saes/resolve/[^/]+/(.*)")  # HEAD of each, then GET
        found = [resolve.fullmatch(path) for _, path in requests[step]]
        return sorted({m[1] for m in found if m is not None})

    assert fetched("load") == [f"resid_post.0/{CONFIG}", f"resid_post.0/{WEIGHTS}"]
    assert len([path for method, path in requests["load"] if path.startswith("/_lfs/")]) == 1
    assert requests["again"] == [
        ("GET", "/api/models/someone/saes/revision/main")
    ]  # may have moved


def test_a_commit_that_was_loaded_before_asks_the_hub_nothing(hub):
    _, report, requests = hub
    assert report["sha"]["mark"] == 1.0
    assert requests["sha"] == []


def test_a_path_that_a_repo_does_not_hold_lists_those_it_does(hub):
    _, report, _ = hub
    assert report["wrong path"]["error"][0] == "FileNotFoundError"
    text = report["wrong path"]["text"]
    assert "someone/saes: no SAE at 'resid_post.7'; it holds resid_post.0, resid_post.1" in text
    assert report["no path"]["error"][0] == "FileNotFoundError"
    assert "it holds resid_post.0, resid_post.1" in report["no path"]["text"]


def test_a_path_out_of_a_repo_asks_the_hub_nothing(hub):
    _, report, requests = hub
    assert report["traversal"]["error"][0] == "FormatError"
    assert requests["traversal"] == []


@pytest.mark.parametrize(
    ("step", "error"),
    [("no repo", "RepositoryNotFoundError"), ("wrong revision", "RevisionNotFoundError")],
)
def test_the_hub_s_own_errors_come_through(hub, step, error):
    _, report, _ = hub
    assert report[step]["error"][0] == error
    assert report[step]["module"] == "huggingface_hub.errors"


def test_load_all_reads_what_matches_from_a_repo(hub):
    _, report, requests = hub
    assert report["all"].get("hookpoint") == "resid_post.1", report["all"]
    files = [path for _, path in requests["all"] if "/resolve/" in path]
    assert files
    assert all("/resid_post.1/" in path for path in files)


def test_the_path_may_be_left_out_where_a_repo_holds_only_one(hub):
    _, report, _ = hub
    assert report["only one"].get("mark") == 3.0, report["only one"]


def test_what_is_cached_loads_offline(hub):
    server, report, _ = hub
    assert report["offline"].get("mark") == 2.0, report["offline"]
    assert report["offline"]["metadata"]["revision"] == server.commit("someone/saes")


# -- what else lies about ------------------------------------------------------------------------


def test_a_model_and_stray_files_beside_saes_are_no_saes(saes):
    (saes / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"wte.weight": torch.zeros(3, 2)}, saes / "model.safetensors")
    torch.save({"step": torch.zeros(1)}, saes / "a" / "run.pt")
    with pytest.raises(FileNotFoundError, match=r"which SAE\? it holds a/resid_post.0, a/resid_"):
        load(saes)
    assert len(load_all(saes)) == 3
    with pytest.raises(FormatError, match="model.safetensors holds tensors .* none of: OpenSAE"):
        load(saes, "model.safetensors")


def test_strays_alone_are_named(tmp_path):
    torch.save({"step": torch.zeros(1)}, tmp_path / "run.pt")
    with pytest.raises(FormatError, match="run.pt holds tensors .'step'.*none of: OpenAI"):
        load_all(tmp_path)


def test_a_config_file_names_its_sae(saes):
    assert str(load(saes, f"a/resid_post.1/{CONFIG}").hookpoint) == "resid_post.1"


def test_two_layouts_in_one_folder_are_told_apart_by_their_weights(saes):
    save(make("topk", hookpoint="resid_post.1", dtype=torch.float32), saes / "c")
    save(make("topk", hookpoint="resid_post.1", dtype=torch.float32), saes / "d", format="sparsify")
    for file in (saes / "d").iterdir():
        if file.suffix == ".safetensors":
            file.rename(saes / "c" / file.name)
    with pytest.raises(FileNotFoundError, match="which SAE.*c/sae.safetensors, c/sae_weights.saf"):
        load(saes, "c")
