"""publish on a Hub on the loopback, with huggingface_hub's own client."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Fault, HubServer
from publish_cases import KINDS, METRICS, MODEL, a_folder

from saert.hub import bundled

# huggingface_hub reads its environment at import: a process of its own, which runs what it is told.
WORKER = """
import io, json, sys, traceback
from contextlib import redirect_stdout
from pathlib import Path
import huggingface_hub, huggingface_hub.utils._http as http
import torch
from publish_cases import an_sae
from typer.testing import CliRunner
from saert.cli import app
from saert import load, load_all, publish
from saert.hub.format import read
from saert.hub.identity import fingerprint

http.time.sleep = lambda seconds: None  # between the client's own retries
out, names = sys.stdout, dict(globals())
for line in sys.stdin:
    printed, answer = io.StringIO(), {}
    try:
        with redirect_stdout(printed):
            *first, last = json.loads(line)
            for one in first:
                exec(one, names)
            answer["value"] = eval(last, names)
    except Exception as error:
        answer["error"], answer["text"] = type(error).__name__, str(error)
    answer["printed"] = printed.getvalue()
    out.write(json.dumps(answer, default=vars) + "\\n")
    out.flush()
"""


class Client:
    """Another process; `run` gives what the last expression was there."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.log = home / "stderr"
        home.mkdir()
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        environment = server.environment(home, TOKEN) | {"PYTHONPATH": ":".join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=environment, cwd=home, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
        )  # fmt: skip

    def ask(self, *code: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        assert TOKEN not in line + self.log.read_text()  # nowhere, whatever happens
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, *code: str) -> Any:
        found = self.ask(*code)
        assert "error" not in found, found
        return found["value"]


@pytest.fixture(scope="module")
def server():
    with HubServer() as found:
        yield found


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    found = Client(server, tmp_path_factory.mktemp("hub") / "home")
    yield found
    found.process.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return a_folder(tmp_path_factory.mktemp("saes") / "in")


def files(server, repo, revision="main"):
    return set(server.repos[repo][revision])


def test_published_saes_load_back_bit_for_bit(server, client, source):
    found = client.run(f"p = publish({str(source)!r}, 'someone/all', license='mit')", "p")
    assert found["commit"] == server.commit("someone/all")
    assert found["url"] == f"{server.url}/someone/all/tree/{found['commit']}"
    assert {*found["files"]} == files(server, "someone/all") - {".gitattributes"}
    assert len(server.requests("POST /api/models/someone/all/commit")) == 1  # never half a repo
    same = client.run(
        f"here = {{path: read(Path({str(source)!r}) / path) for path in p.saes}}",
        "there = {path: load('someone/all', path) for path in p.saes}",
        "[[fingerprint(here[path]) == fingerprint(there[path]), there[path].metadata['revision']]"
        " for path in p.saes]",
    )
    assert same == [[True, found["commit"]]] * 5
    assert set(client.run("list(load_all('someone/all'))")) == {"mlp_in.0", *KINDS}


def test_the_card_on_the_hub_holds_the_measured_numbers(server, client, source):
    client.run(f"publish({str(source)!r}, 'someone/card')")
    results = client.run(
        "card = huggingface_hub.ModelCard.load('someone/card')",
        "[[r.metric_args['sae'], r.metric_type, r.metric_value] for r in card.data.eval_results]",
    )
    keys = ("fvu", "l0", "dead", "ce_recovered")
    wanted = [[path, key, METRICS[key]] for path in ("mlp_in.0", *KINDS) for key in keys]
    assert results == wanted
    assert client.run("[card.data.library_name, card.data.base_model]") == ["saert", MODEL]


def test_the_same_again_commits_nothing(server, client, source):
    first = client.run(f"publish({str(source)!r}, 'someone/twice')")
    before = len(server.log)
    again = client.run(f"publish({str(source)!r}, 'someone/twice', tags=['v1'])")
    assert (again["commit"], again["files"]) == (first["commit"], [])
    assert server.requests("preupload|/commit/|lfs", before) == []
    loaded = "{path: load('someone/twice', path) for path in p.saes}"
    assert client.run(f"publish({loaded}, 'someone/twice')")["files"] == []


def test_only_what_changed_is_sent(server, client):
    client.run("publish({'a': an_sae(), 'b': an_sae('relu')}, 'someone/part')")
    before = len(server.log)
    found = client.run("publish({'a': an_sae(), 'b': an_sae('relu', mark=1.0)}, 'someone/part')")
    assert found["files"] == ["b/sae_weights.safetensors", "saes.json"]  # which has its hash
    assert len(server.requests("PUT /_lfs", before)) == 1


def test_a_connection_that_breaks_is_taken_up_again(server, client, source):
    """One upload breaks, whatever the client tries: nothing is visible, the others stay stored."""

    def hang_up():
        raise ConnectionResetError

    sums = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source.glob("*/sae_weights.safetensors")
    }
    server.lfs.clear()
    server.faults = [Fault(f"PUT /_lfs/{sums['resid_post.1']}", times=10, then=hang_up)]
    before = len(server.log)
    broken = client.ask(f"publish({str(source)!r}, 'someone/broken')")
    assert broken["error"] == "ConnectionError"
    assert "what has arrived is not sent again" in broken["text"]
    assert files(server, "someone/broken") == {".gitattributes"}
    assert server.requests("POST .*/commit/", before) == []
    server.faults.clear()
    stored = set(server.lfs)
    assert stored and sums["resid_post.1"] not in stored
    before = len(server.log)
    assert client.run(f"publish({str(source)!r}, 'someone/broken')")["commit"]
    sent = {line.rpartition("/")[2] for line in server.requests("PUT /_lfs", before)}
    assert sent == set(sums.values()) - stored  # and not what had arrived
    assert "resid_post.1/sae_weights.safetensors" in files(server, "someone/broken")


def test_a_busy_hub_is_asked_again_and_a_refusal_is_passed_on(server, client):
    server.faults = [Fault("GET /api/models/someone/busy", status=429)]
    assert client.run("publish(an_sae(), 'someone/busy')")["commit"]
    server.faults = [Fault("POST .*/commit/", status=403, text="no right to write here")]
    refused = client.ask("publish(an_sae(mark=1.0), 'someone/busy')")
    assert refused["error"] == "HfHubHTTPError" and "no right to write" in refused["text"]
    server.faults.clear()


def test_saes_added_later_keep_those_before_and_the_owners_words(server, client):
    first = client.run("publish({'resid_post.10': an_sae(at='resid_post.10')}, 'someone/more')")
    kept = dict(server.repos["someone/more"]["main"])
    text = kept["README.md"].decode().replace("library_name", "language: en\nlibrary_name")
    text = text.replace("# more\n", "# My SAEs\n\nThey are mine.\n") + "\n## Thanks\n\nTo all.\n"
    server.push("someone/more", kept | {"README.md": text.encode(), "notes.txt": b"keep"})
    client.run("publish(an_sae('relu', 'resid_post.9'), 'someone/more', license='mit')")
    now = server.repos["someone/more"]["main"]
    card = now["README.md"].decode()
    assert card.index("| `resid_post.9` |") < card.index("| `resid_post.10` |")
    assert card.count("saert: begin") == card.count("saert: end") == 1
    for part in ("# My SAEs\n\nThey are mine.", "## Thanks\n\nTo all.", "language: en"):
        assert part in card
    assert "license: mit" in card and now["notes.txt"] == b"keep"
    results = client.run("huggingface_hub.ModelCard.load('someone/more').data.eval_results")
    assert {one["metric_args"]["sae"] for one in results} == {"resid_post.9", "resid_post.10"}
    assert first["commit"] != server.commit("someone/more")
    # an SAE that was deleted on the Hub leaves the card
    gone = {n: c for n, c in now.items() if not n.startswith("resid_post.10/")}
    server.push("someone/more", gone)
    client.run("publish(an_sae('relu', 'resid_post.9'), 'someone/more')")
    assert "resid_post.10" not in server.repos["someone/more"]["main"]["README.md"].decode()


def test_a_repo_that_others_commit_to_meanwhile_is_merged(server, client):
    client.run("publish(an_sae(), 'someone/race')")
    client.run("publish({'theirs': an_sae(at='resid_post.7'), 'x': an_sae()}, 'someone/race-b')")
    theirs = server.repos["someone/race-b"]["main"]

    def commit():
        server.push("someone/race", server.repos["someone/race"]["main"] | theirs)

    server.faults = [Fault("POST /api/models/someone/race/commit", then=commit)]
    client.run("publish(an_sae(at='resid_post.1'), 'someone/race')")
    card = server.repos["someone/race"]["main"]["README.md"].decode()
    for path in ("theirs", "x", "resid_post.1"):
        assert f"{path}/cfg.json" in files(server, "someone/race") and f"| `{path}` |" in card


def test_one_repo_is_for_one_model(server, client):
    client.run("publish(an_sae(), 'someone/model-a')")
    refused = client.ask(
        "publish(an_sae(at='resid_post.1'), 'someone/model-a', base_model='someone/else')"
    )
    assert refused["error"] == "ValueError" and "several models" in refused["text"]


def test_a_broken_index_is_not_overwritten(server, client):
    client.run("publish(an_sae(), 'someone/index')")
    now = server.repos["someone/index"]["main"]
    for wrong in (b"{", b'{"saes": {"a": {}}}', b'{"saes": []}'):
        commit = server.push("someone/index", now | {"saes.json": wrong})
        refused = client.ask("publish(an_sae(mark=1.0), 'someone/index')")
        assert refused["error"] == "ValueError" and "saes.json" in refused["text"]
        assert server.commit("someone/index") == commit


def test_tags_name_the_commit_and_never_move(server, client):
    first = client.run("publish(an_sae(), 'someone/tags', tags=['v1', 'best'])")
    assert server.commit("someone/tags", "v1") == first["commit"]
    again = client.run("publish(an_sae(), 'someone/tags', tags=['v1', 'v1.1'])")
    assert again["commit"] == first["commit"] == server.commit("someone/tags", "v1.1")
    before = len(server.log)
    refused = client.ask("publish(an_sae(mark=1.0), 'someone/tags', tags=['v1'])")
    assert refused["error"] == "ValueError" and "nothing was published" in refused["text"]
    assert server.requests("PUT|preupload|/commit/", before) == []
    changed = client.run("publish(an_sae(mark=1.0), 'someone/tags', tags=['v2'])")
    assert client.run("load('someone/tags', revision='v1').metadata['revision']") == first["commit"]
    assert (
        client.run("load('someone/tags', revision='v2').metadata['revision']")
        == (changed["commit"])
    )


def test_a_private_repo_is_private_from_its_first_moment(server, client):
    client.run("publish(an_sae(), 'someone/secret', private=True)")
    assert "someone/secret" in server.private
    assert client.run("publish(an_sae(), 'someone/secret')")["files"] == []  # and stays so
    assert "someone/secret" in server.private
    client.run("publish(an_sae(), 'someone/open')")
    before = len(server.log)
    refused = client.ask("publish(an_sae(mark=1.0), 'someone/open', private=True)")
    assert refused["error"] == "ValueError" and "is public" in refused["text"]
    assert server.requests("POST|PUT", before) == []


def test_a_revision_is_a_branch_that_is_made(server, client):
    main = client.run("publish(an_sae(), 'someone/branch', tags=['v1'])")
    dev = client.run("publish(an_sae(mark=1.0), 'someone/branch', revision='dev')")
    assert server.commit("someone/branch") == main["commit"] != dev["commit"]
    assert server.commit("someone/branch", "dev") == dev["commit"]
    again = client.run("publish(an_sae(mark=1.0), 'someone/branch', revision='dev')")
    assert (again["commit"], again["files"]) == (dev["commit"], [])
    assert 'revision="dev"' in dev["card"] and "revision=" not in main["card"]
    refused = client.ask("publish(an_sae(), 'someone/branch', revision='v1')")
    assert refused["error"] == "ValueError" and "is a tag" in refused["text"]


def test_a_pull_request_leaves_the_branch_alone(server, client):
    main = client.run("publish(an_sae(), 'someone/pr')")
    found = client.run("publish(an_sae(mark=1.0), 'someone/pr', create_pr=True)")
    assert server.commit("someone/pr") == main["commit"] != found["commit"]
    assert found["url"].endswith("/someone/pr/discussions/1")


def test_sparsify_s_layout_is_published_under_module_paths(server, client):
    made = (
        "sae = an_sae(at='resid_post.2')",
        "sae.metadata['base_model_config'] = {'model_type': 'gpt2'}",
    )
    found = client.run(
        *made,
        "publish(sae, 'someone/sparsify', format='sparsify')",
    )
    assert found["saes"] == ["h.2"]
    assert {"h.2/cfg.json", "h.2/sae.safetensors"} <= files(server, "someone/sparsify")
    same = client.run(
        "back = load('someone/sparsify', 'h.2')",
        "[torch.equal(sae.W_enc, back.W_enc), torch.equal(sae.W_dec, back.W_dec),"
        " back.activation.k == sae.activation.k, str(back.hookpoint)]",
    )
    assert same[:3] == [True, True, True] and same[3] in ("h.2", "resid_post.2")
    assert 'SparseCoder.load_from_hub("someone/sparsify", "h.2")' in found["card"]
    refused = client.ask("publish(an_sae(), 'someone/sparsify', format='sparsify')")
    assert "--model-type" in refused["text"]


def test_another_layout_in_the_same_place_replaces_the_first(server, client):
    client.run("publish({'h.2': an_sae(at='resid_post.2')}, 'someone/swap')")
    client.run("publish({'h.2': an_sae(at='resid_post.2')}, 'someone/swap', format='sparsify')")
    assert {n for n in files(server, "someone/swap") if n.startswith("h.2/")} == {
        "h.2/cfg.json", "h.2/sae.safetensors", "h.2/metrics.json"
    }  # fmt: skip


def test_the_card_s_example_runs(server, client):
    where = bundled.SAES / "resid_post.2"
    found = client.run(f"publish({str(where)!r}, 'someone/bundled')")
    (block,) = [b.partition("```")[0] for b in found["card"].split("```python\n")[1:]]
    assert 'load("someone/bundled", "resid_post.2")' in block
    assert client.ask(block, "None")["printed"].startswith("SparseCode(")


def test_the_command_publishes_and_prints_the_commit(server, client, source):
    command = f"CliRunner().invoke(app, ['publish', {str(source)!r}, 'someone/cli', *more]).output"
    said = client.run("more = ['--tag', 'v1', '--private']", command)
    commit = server.commit("someone/cli", "v1")
    assert "5 SAEs, " in said and f"{server.url}/someone/cli/tree/{commit}" in said
    assert "holds all of it already" in client.run("more = []", command)
    assert json.loads(client.run("more = ['--json']", command))["commit"] == commit
    said = client.run("more = ['--revision', 'v1']", command)
    assert said.startswith("error: revision 'v1' is a tag")
