"""Loading from the Hub and from the web: the real client over real HTTP, then without a server."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_client import finish, run_client, start_client
from hub_server import TOKEN, Fault, HubServer
from sae_cases import make

from saert.hub.format import save
from saert.hub.formats.saelens import CONFIG, WEIGHTS

ONLINE = {
    "create": "huggingface_hub.create_repo('someone/new', private=True).repo_id",
    "upload": "huggingface_hub.upload_folder(repo_id='someone/new', folder_path='one').oid",
    "again": "huggingface_hub.upload_folder(repo_id='someone/new', folder_path='one').oid",
    "list": "huggingface_hub.list_repo_files('someone/new')",
    "tag": "huggingface_hub.create_tag('someone/new', tag='v1')",
    "second": "huggingface_hub.upload_folder(repo_id='someone/new', folder_path='two').oid",
    "old": "load('someone/new@v1')",
    "new": "load('someone/new')",
    "address": "load(url + '/someone/new/tree/v1')",
    "address of the file": "load(url + '/someone/new/resolve/v1/resid_post.0/" + WEIGHTS + "')",
    "hf": "load('hf://someone/new@v1/resid_post.0')",
    "both": "load_all('someone/saes')",
    "moves meanwhile": "load('someone/moving', 'resid_post.0')",
    "snapshot": "load(snapshot_download('someone/saes', allow_patterns=['*.1/*']), 'resid_post.1')",
    "snapshot's folder": "load(snapshot_download('someone/saes') + '/resid_post.1')",
    "web": "load(web + '/files/a/" + WEIGHTS + "?sig=TheQuery')",
    "web again": "load(web + '/files/a/" + WEIGHTS + "?sig=TheQuery')",
    "web cut": "load(web + '/files/b', '" + WEIGHTS + "')",
    "web moved away": "load(web + '/files/c/" + WEIGHTS + "')",
    "web http redirect": "load(web + '/files/c/" + WEIGHTS + "')",
    "web page": "load(web + '/files/d/" + WEIGHTS + "')",
    "web missing": "load(web + '/files/none/" + WEIGHTS + "?sig=TheQuery')",
    "web busy": "load(web + '/files/d/" + WEIGHTS + "?sig=TheQuery')",
    "web full": "full_disk() and load(web + '/files/d/" + WEIGHTS + "')",
    "web huge config": "load(web + '/files/huge/" + WEIGHTS + "')",
    "web renewed": "load(web + '/files/b', '" + WEIGHTS + "')",
    "web revision": "load(web + '/files/d/" + WEIGHTS + "', revision='sha256:' + '0' * 64)",
    "only downloaded": "fresh() and snapshot_download('someone/saes', revision='main')",
}
OFFLINE = {
    "branch": "load('someone/new')",
    "tag": "load('someone/new', revision='v1')",
    "commit": "load('someone/new', revision=sys.argv[1])",
    "not cached": "load('someone/moving', 'resid_post.1')",
    "no such revision": "load('someone/new', revision='v9')",
    "never seen": "load('someone/nothing')",
    "web": "load(web + '/files/a/" + WEIGHTS + "?sig=TheQuery')",
    "web never seen": "load(web + '/files/z/" + WEIGHTS + "?sig=TheQuery')",
    "set": "offline(True) and load('someone/saes', 'resid_post.1')",
    "set, not cached": "load('someone/moving', 'resid_post.1')",
    "set, web": "load(web + '/files/a/" + WEIGHTS + "?sig=TheQuery')",
    "set, web never seen": "load(web + '/files/z/" + WEIGHTS + "?sig=TheQuery')",
    "only downloaded": "fresh() and load('someone/saes', 'resid_post.0')",
}


def repository(folder: Path, mark: float, layers: tuple[int, ...] = (0, 1)) -> dict[str, bytes]:
    for layer in layers:
        sae = make("topk", hookpoint=f"resid_post.{layer}", dtype=torch.float32)
        sae.b_dec.data[0] = mark
        save(sae, folder / f"resid_post.{layer}")
    (folder / "resid_post.0" / "examples.safetensors").write_bytes(b"large")
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def web(repo: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"/files/{folder}/{name}": repo[f"resid_post.0/{name}"] for name in (CONFIG, WEIGHTS)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """What a client with a token got while the Hub was there, and another after it was gone."""
    tmp = tmp_path_factory.mktemp("hub")
    one = repository(tmp / "one", 1.0, (0,))
    two = repository(tmp / "two", 2.0, (0,))
    saes, moved = repository(tmp / "saes", 3.0), repository(tmp / "moved", 4.0)
    with HubServer({"someone/saes": {"main": saes}, "someone/moving": {"main": saes}}) as hub:
        for name, repo in (("a", one), ("b", two), ("d", one), ("huge", one)):
            hub.web |= web(repo, name)
        hub.web[f"/files/huge/{CONFIG}"] = b" " * (5 << 20)

        def plant(*faults: Fault):
            return lambda: hub.faults.extend(faults)

        def redirect(target: str):
            return plant(Fault("/files/c/", status=302, headers={"Location": target}))

        page = {"Content-Type": "text/html"}
        hub.steps = {
            "moves meanwhile": plant(
                Fault("^HEAD /someone/moving", then=lambda: hub.push("someone/moving", moved))
            ),
            "web cut": plant(Fault(f"/files/b/{WEIGHTS}", cut=1500)),
            "web moved away": redirect("file:///etc/passwd"),
            "web http redirect": redirect("http://example.org/x.pt"),
            "web page": plant(Fault(f"/files/d/{WEIGHTS}", status=200, headers=page)),
            "web busy": plant(Fault("/files/d/", times=3, status=503)),
            "web renewed": lambda: hub.web.update(web(one, "b")),
        }  # fmt: skip
        online = run_client(hub, tmp / "home", ONLINE, TOKEN)
        commit = hub.commit("someone/new", "v1")
    steps = {name: code.replace("sys.argv[1]", repr(commit)) for name, code in OFFLINE.items()}
    gone = run_client(hub, tmp / "home", steps)
    return SimpleNamespace(hub=hub, online=online, offline=gone, home=tmp / "home", commit=commit)


def test_what_is_uploaded_is_listed_tagged_pinned_and_loaded(run):
    hub, online = run.hub, run.online
    assert online["create"]["value"] == "someone/new"
    assert online["upload"]["value"] == online["again"]["value"] == run.commit
    assert f"resid_post.0/{WEIGHTS}" in online["list"]["value"]
    for step in ("old", "address", "address of the file", "hf"):
        sae = online[step]["sae"]
        assert sae["mark"] == 1.0
        where = {key: sae["metadata"][key] for key in ("source", "path", "revision")}
        assert where == {"source": "someone/new", "path": "resid_post.0", "revision": run.commit}
    assert online["new"]["sae"]["mark"] == 2.0
    assert online["new"]["sae"]["metadata"]["revision"] == hub.commit("someone/new")


def test_only_what_is_needed_comes_and_only_once(run):
    fetched = [line for line in run.hub.during("old") if "/resolve/" in line]
    assert {line.rpartition("/")[2] for line in fetched} == {CONFIG, WEIGHTS}
    for step in ("address", "address of the file", "hf"):  # the tag may have moved; nothing more
        assert run.hub.during(step) == ["GET /api/models/someone/new/revision/v1"]
    assert not [line for line in run.hub.requests("examples.safetensors") if "GET /some" in line][
        1:
    ]


def test_load_all_of_a_repo(run):
    saes = run.online["both"]["saes"]
    assert {key: one["mark"] for key, one in saes.items()} == {"resid_post.0": 3, "resid_post.1": 3}


def test_a_branch_that_moves_between_list_and_download_changes_nothing(run):
    sae = run.online["moves meanwhile"]["sae"]
    assert sae["mark"] == 3.0 and run.hub.commit("someone/moving") != sae["metadata"]["revision"]
    asked = [line for line in run.hub.during("moves meanwhile") if "/resolve/" in line]
    assert asked and all(f"/resolve/{sae['metadata']['revision']}/" in line for line in asked)


def test_a_folder_of_the_hub_s_cache_knows_where_it_came_from(run):
    for step in ("snapshot", "snapshot's folder"):
        sae = run.online[step]["sae"]
        assert sae["hookpoint"] == "resid_post.1"
        assert sae["metadata"]["source"] == "someone/saes"
        assert sae["metadata"]["path"] == "resid_post.1"
        assert sae["metadata"]["revision"] == run.hub.commit("someone/saes")


def test_a_file_on_the_web_is_downloaded_once_and_remembers_its_content(run):
    first, again = run.online["web"]["sae"], run.online["web again"]["sae"]
    assert first["mark"] == 1.0 and first == again
    host = run.hub.url.replace("127.0.0.1", "localhost")
    assert first["metadata"]["source"] == f"{host}/files/a/{WEIGHTS}"
    assert first["metadata"]["revision"].startswith("sha256:")
    assert f"GET /files/a/{CONFIG}" in run.hub.during("web")
    assert run.hub.during("web again") == [f"GET /files/a/{WEIGHTS}"]  # its ETag: 304
    assert run.online["web renewed"]["sae"]["mark"] == 1.0  # was 2.0


def test_a_download_that_breaks_is_taken_up_where_it_broke(run):
    assert run.online["web cut"]["sae"]["mark"] == 2.0
    sent = [
        headers.get("range")
        for (_, path), headers in zip(run.hub.log, run.hub.headers, strict=True)
        if path == f"/files/b/{WEIGHTS}"
    ]
    assert sent[:2] == [None, "bytes=1500-"]


@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        ("web moved away", "OSError", "redirected to file:///etc/passwd, which is not followed"),
        ("web http redirect", "OSError", "redirected to http://example.org"),
        ("web page", "FileNotFoundError", "answers a web page, expected a file"),
        ("web missing", "FileNotFoundError", "the server answers 404"),
        ("web busy", "LocalEntryNotFoundError", "is not cached, and the server answers 503"),
        ("web full", "OSError", "at most 999 are expected or fit onto the disk"),
        ("web huge config", "OSError", "5242880 bytes or more, but at most 4194304"),
        ("web revision", "ValueError", "sha256:0+ is not what is there now"),
    ],
)
def test_what_goes_wrong_on_the_web_is_said(run, step, error, text):
    found = run.online[step]
    assert error in found.get("error", ()), found
    assert re.search(text, found["text"]), found["text"]


@pytest.mark.parametrize(
    ("step", "mark"),
    [("branch", 2), ("tag", 1), ("commit", 1), ("web", 1), ("set", 3), ("set, web", 1),
     ("only downloaded", 3)],
)  # fmt: skip
def test_what_is_cached_loads_without_the_server(run, step, mark):
    assert run.offline[step].get("sae", run.offline[step])["mark"] == mark
    online = {"branch": "new", "tag": "old", "commit": "old", "web": "web"}.get(step)
    if online is not None:
        assert run.offline[step]["sae"] == run.online[online]["sae"]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("not cached", "someone/moving: resid_post.1/cfg.json is not cached, and the connection"),
        ("no such revision", "someone/new: revision 'v9' is not cached, and the connection failed"),
        ("never seen", "someone/nothing: revision 'main' is not cached, and the connection failed"),
        ("web never seen", f"z/{WEIGHTS} is not cached, and the connection failed (ConnectError"),
        ("set, not cached", "resid_post.1/cfg.json is not cached, and HF_HUB_OFFLINE is set"),
        ("set, web never seen", f"z/{WEIGHTS} is not cached, and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_is_not_cached_says_what_is_missing_and_why(run, step, text):
    assert text in run.offline[step]["text"], run.offline[step]
    assert "LocalEntryNotFoundError" in run.offline[step]["error"]


def test_no_token_and_no_query_is_printed_logged_or_stored(run):
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for headers in run.hub.headers)
    elsewhere = [one for one in run.hub.headers if one["host"].startswith("localhost")]
    assert elsewhere and not any("authorization" in one for one in elsewhere)
    direct = [
        headers
        for (_, path), headers in zip(run.hub.log, run.hub.headers, strict=True)
        if path.startswith("/files/")
    ]
    assert direct and not any("authorization" in one for one in direct)
    for report in (run.online, run.offline):
        assert TOKEN not in json.dumps(report)
        ours = [{key: one[key] for key in one if key != "log"} for one in report.values()]
        assert "TheQuery" not in json.dumps(ours)
    for file in run.home.parent.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert TOKEN.encode() not in content and b"TheQuery" not in content, file


def test_no_half_file_is_left(run):
    for report in (run.online, run.offline):
        assert not any(one["left"] for one in report.values())


def test_two_processes_fill_one_empty_cache(tmp_path):
    files = repository(tmp_path / "one", 1.0)
    steps = {"load": "load_all('someone/saes')"}
    with HubServer({"someone/saes": {"main": files}}) as hub:
        hub.faults = [Fault("^GET /_lfs/", times=4, delay=0.3)]
        clients = [start_client(hub, tmp_path / "home") for _ in range(2)]
        reports = [finish(one, hub, steps)["load"] for one in clients]
    for report in reports:
        assert {key: one["mark"] for key, one in report["saes"].items()} == {
            "resid_post.0": 1.0,
            "resid_post.1": 1.0,
        }
        assert report["left"] == []
