"""Publishing into a repo that has something already: what is whose, and what still holds."""

import json

import pytest
from hub_server import Fault, HubServer
from publish_cases import an_sae
from test_publish import Client, files

from saert.hub.format import save


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
def trained(tmp_path_factory):
    at = tmp_path_factory.mktemp("run") / "in"
    save(an_sae(), at / "resid_post.0")
    record = {"config": {"objective": "topk", "seed": 1}, "data": {"dataset": "a/b"}}
    (at / "resid_post.0" / "training.json").write_text(json.dumps(record))
    (at / "resid_post.0" / "labels.json").write_text('{"0": "cats"}')
    return at


def add(server, repo, **more):
    more = {name.replace("__", "/").replace("_json", ".json"): one for name, one in more.items()}
    return server.push(repo, server.repos[repo]["main"] | more)


def text(server, repo, name="README.md"):
    return server.repos[repo]["main"][name].decode()


def test_pictures_that_are_not_ours_stay(server, client):
    client.run("huggingface_hub.HfApi().create_repo('someone/png')", "1")
    theirs = {"density.png": b"theirs", "measured.png": b"too"}
    server.push("someone/png", server.repos["someone/png"]["main"] | theirs)
    for code in ("publish(an_sae(), 'someone/png')", "publish(an_sae('relu'), 'someone/png')"):
        found = client.run(code)
        now = server.repos["someone/png"]["main"]
        assert {name: now[name] for name in theirs} == theirs and found["removed"] == []
        assert "](density.png)" not in found["card"]


def test_files_beside_an_sae_stay_while_its_weights_do(server, client):
    client.run("publish(an_sae(), 'someone/lab')")
    commit = add(server, "someone/lab", **{"resid_post.0__labels_json": b'{"0": "cats"}'})
    again = client.run("publish(an_sae(), 'someone/lab')")
    assert (again["files"], again["removed"], again["commit"]) == ([], [], commit)
    changed = client.run("publish(an_sae(mark=1.0), 'someone/lab')")
    assert changed["removed"] == ["resid_post.0/labels.json"]
    assert "resid_post.0/labels.json" not in files(server, "someone/lab")
    add(server, "someone/lab", **{"resid_post.0__labels_json": b"{}"})
    said = client.run(
        "b = an_sae(mark=2.0); import tempfile; d = tempfile.mkdtemp()",
        "from saert.hub.format import save; save(b, d)",
        "CliRunner().invoke(app, ['publish', d, 'someone/lab']).output",
    )
    assert "removed, as they belonged to what was replaced: resid_post.0/labels.json" in said


def test_a_published_sae_published_again_keeps_what_was_known(server, client, trained):
    client.run(f"publish({str(trained)!r}, 'someone/tr')")
    before = dict(server.repos["someone/tr"]["main"])
    assert '"seed": 1' in text(server, "someone/tr")
    again = client.run("publish(load('someone/tr'), 'someone/tr')")
    assert server.repos["someone/tr"]["main"] == before
    assert again["files"] == [] and again["unmeasured"] == []
    bare = client.run(
        "a = load('someone/tr'); a.metadata.pop('metrics')", "publish(a, 'someone/tr')"
    )
    assert bare["removed"] == [] and bare["unmeasured"] == []
    for name in ("metrics", "training", "labels"):
        path = f"resid_post.0/{name}.json"
        assert server.repos["someone/tr"]["main"][path] == before[path]
    assert text(server, "someone/tr") == before["README.md"].decode()
    other = client.run("a.W_dec.data[0] += 1", "publish(a, 'someone/tr')")
    assert other["unmeasured"] == ["resid_post.0"] and len(other["removed"]) >= 3
    assert "fvu" not in other["card"] and '"seed": 1' not in other["card"]


def test_numbers_of_weights_that_somebody_replaced_are_dropped(server, client):
    client.run("publish(an_sae(), 'someone/st')", "1")
    client.run("publish(an_sae('relu', mark=3.0), 'someone/other')", "1")
    path = "resid_post.0/sae_weights.safetensors"
    weights = server.repos["someone/other"]["main"][path]
    server.push("someone/st", server.repos["someone/st"]["main"] | {path: weights})
    found = client.run("publish(an_sae(at='resid_post.1'), 'someone/st')")
    assert found["stale"] == ["resid_post.0"]
    rows = [row for row in found["card"].splitlines() if row.startswith("| `resid_post.0` | `")]
    assert len(rows) == 1 and "0.25" not in rows[0]
    assert client.run("publish(an_sae(at='resid_post.1'), 'someone/st')")["stale"] == []


def test_what_an_earlier_publication_said_wrongly_leaves_the_card(server, client):
    client.run("a = an_sae(); a.metadata |= {'base_model': 'wrong/model', 'dataset': 'bad/data'}",
               "publish(a, 'someone/base')")  # fmt: skip
    client.run("publish(an_sae(), 'someone/base')")
    card = text(server, "someone/base")
    assert "wrong/model" not in card and "bad/data" not in card and "someone/model" in card


def test_marks_that_are_broken_are_refused(server, client):
    client.run("publish(an_sae(), 'someone/end')")
    good = text(server, "someone/end")
    end = "<!-- saert: end -->"
    for broken in (good.replace(end, ""), good + end, good + good.partition("---\n\n")[2]):
        commit = add(server, "someone/end", **{"README.md": (broken + "\nprecious\n").encode()})
        refused = client.ask("publish(an_sae(at='resid_post.1'), 'someone/end')")
        assert refused["error"] == "ValueError" and "put them back" in refused["text"]
        assert server.commit("someone/end") == commit


def test_a_new_repo_is_as_visible_as_its_owner_wants(server, client, monkeypatch):
    import hub_routes

    sent, create = [], hub_routes.Handler.create_or_delete

    def spied(self, new):
        sent.append(json.loads(self.content))
        return create(self, new)

    monkeypatch.setattr(hub_routes.Handler, "create_or_delete", spied)
    client.run("publish(an_sae(), 'someone/asis')", "publish(an_sae(), 'someone/hid', private=1)")
    assert not {"private", "visibility"} & set(sent[0])
    assert sent[1].get("private") or sent[1].get("visibility") == "private"


def test_many_publish_at_the_same_time(server, client):
    client.run("publish(an_sae(), 'someone/race')")
    moves = iter(range(100))

    def commit():
        theirs = {f"notes{next(moves)}": b""}
        server.push("someone/race", server.repos["someone/race"]["main"] | theirs)

    server.faults = [Fault("POST /api/models/someone/race/commit", times=8, then=commit)]
    assert client.run("publish(an_sae(mark=1.0), 'someone/race')")["files"]
    server.faults = [Fault("POST /api/models/someone/race/commit", times=99, then=commit)]
    refused = client.ask("publish(an_sae(mark=2.0), 'someone/race')")
    assert refused["error"] == "ConnectionError" and "publish again" in refused["text"]
    server.faults.clear()


def test_no_message_has_the_signature_of_an_address(server, client, monkeypatch):
    import hub_routes

    batch = hub_routes.Handler.batch

    def signed(self):
        status, body, headers = batch(self)
        return status, body.replace(b'", "header"', b'?X-Amz-Signature=S3CRET", "header"'), headers

    monkeypatch.setattr(hub_routes.Handler, "batch", signed)
    server.faults = [Fault("PUT /_lfs", times=99, status=403)]
    refused = client.ask("publish(an_sae(mark=9.0), 'someone/signed')")
    assert refused["error"] == "OSError" and "403" in refused["text"]
    assert "S3CRET" not in refused["text"] and "sent again" not in refused["text"]
    server.faults = [Fault("PUT /_lfs", times=99, status=503)]
    busy = client.ask("publish(an_sae(mark=9.0), 'someone/signed')")
    assert busy["error"] == "ConnectionError" and "S3CRET" not in busy["text"]
    server.faults = [Fault("GET /api/models/someone/signed", times=99, status=503)]
    busy = client.ask("publish(an_sae(mark=9.0), 'someone/signed')")
    assert busy["error"] == "ConnectionError" and "sent again" not in busy["text"]
    server.faults.clear()


def test_sparsify_s_config_names_the_model_and_keeps_what_is_there(server, client):
    made = "a = an_sae(at='resid_post.2')"
    send = "publish({'h.2': a}, 'someone/sp', format='sparsify')"
    client.run(made, send)
    assert json.loads(text(server, "someone/sp", "config.json"))["model"] == "someone/model"
    back = "load('someone/sp', 'h.2').metadata['base_model']"
    assert client.run(back) == "someone/model"
    theirs = {"sae": {"k": 5}, "model": "someone/model", "ctx_len": 64}
    add(server, "someone/sp", config_json=json.dumps(theirs).encode())
    assert client.run("a.W_dec.data[0] += 1", send)["files"]
    assert json.loads(text(server, "someone/sp", "config.json")) == theirs
    add(server, "someone/sp", config_json=json.dumps(theirs | {"model": "x/y"}).encode())
    refused = client.ask(send)
    assert refused["error"] == "ValueError" and "config.json says" in refused["text"]
    add(server, "someone/sp", config_json=b'{"model_type": "gpt2"}')  # a model's own
    client.run(send)
    assert text(server, "someone/sp", "config.json") == '{"model_type": "gpt2"}'


def test_a_tag_is_no_branch(server, client):
    client.run("publish(an_sae(), 'someone/br')", "publish(an_sae(), 'someone/br', revision='dev')")
    commit = server.commit("someone/br")
    refused = client.ask("publish(an_sae(mark=1.0), 'someone/br', tags=['dev'])")
    assert "is a branch" in refused["text"] and server.commit("someone/br") == commit


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("latin", "# Caf\xe9\n".encode("latin-1")),
        ("bom", b"\xef\xbb\xbf---\nlicense: mit\n---\n# Caf\xc3\xa9\n"),
    ],
)
def test_cards_in_other_encodings_are_read(server, client, name, card):
    client.run(f"huggingface_hub.HfApi().create_repo('someone/{name}')", "1")
    add(server, f"someone/{name}", **{"README.md": card})
    found = client.run(f"publish(an_sae(), 'someone/{name}')")["card"]
    assert "# Café" in found and found.startswith("---\n") and found.count("\n---\n") == 1
    assert ("license: mit" in found) == (name == "bom")
