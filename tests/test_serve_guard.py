"""Keys, limits, clients who leave, time limits, logs, metrics, and a stop that is not abrupt."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from serve_cases import KEY, PROMPT, running

from saert.engines.server.limits import Limits
from saert.engines.server.logs import Lines
from saert.engines.server.security import Keys, host_allowed, is_loopback
from saert.engines.server.text import Text

HEADERS = {"authorization": f"Bearer {KEY}"}
ASK = {"model": "bundled", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(Limits(streams=2, waiting=1, body=20_000, body_seconds=1.0, grace=1.0)) as found:
        yield found


def post(server, **options):
    options = {"headers": HEADERS, "json": ASK, "timeout": 60} | options
    return httpx.post(f"{server.address}/v1/completions", **options)


def test_keys(server):
    assert post(server).status_code == 200
    for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": KEY}):
        for path in ("/v1/models", "/v1/saert/sources", "/metrics", "/openapi.json", "/nowhere"):
            answer = httpx.get(server.address + path, headers=wrong)
            assert answer.status_code == 401, path
    assert answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(server.address + "/health").json() == {"status": "ok"}
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="nope").models.list()


def test_keys_compare():
    keys = Keys(["one", "two ü"])
    assert keys.allow("Bearer one") and keys.allow("bearer two ü")
    assert not any(map(keys.allow, (None, "", "Bearer", "Bearer on", "Basic one", "Bearer onee")))
    assert Keys([]).allow(None) and not Keys([]) and keys


def test_hosts(server):
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "10.0.0.1", "example.org", "")))
    assert host_allowed("localhost:8000", "127.0.0.1") and host_allowed("[::1]:80", "::1")
    assert not host_allowed("evil.example:8000", "127.0.0.1")
    assert host_allowed("evil.example:8000", "0.0.0.0")
    answer = httpx.get(server.address + "/v1/models", headers=HEADERS | {"host": "evil.example"})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "content, status",
    [
        (b"{", 400),
        (b"", 400),
        (b"[" * 9000, 400),
        (b'{"model": "bundled", "prompt": "a", "temperature": NaN}', 400),
        (b'"\xff\xfe"', 400),
        (b" " * 20_001, 413),
    ],
)
def test_bad_bodies(server, content, status):
    headers = HEADERS | {"content-type": "application/json"}
    answer = post(server, content=content, json=None, headers=headers)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_without_a_length_is_counted(server):
    def endless():
        for _ in range(100):
            yield b" " * 1000

    headers = HEADERS | {"content-type": "application/json"}
    assert post(server, content=endless(), json=None, headers=headers).status_code == 413


def test_a_slow_body_is_given_up(server):
    port = int(server.address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        s.sendall(
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {KEY}\r\n"
            "content-type: application/json\r\ncontent-length: 100\r\n\r\n{".encode()
        )
        assert b" 408 " in s.recv(4096).split(b"\r\n")[0]


def test_other_media_types_are_refused(server):
    """A web page may post text/plain across origins without asking the browser."""
    headers = HEADERS | {"content-type": "text/plain"}
    answer = post(server, content=json.dumps(ASK), json=None, headers=headers)
    assert answer.status_code == 415


def slowed(server, monkeypatch, seconds=0.02):
    real = server.service.engine._passes.token

    def slow(*args):
        time.sleep(seconds)
        return real(*args)

    monkeypatch.setattr(server.service.engine._passes, "token", slow)


def test_a_client_who_leaves_frees_the_slot(server, monkeypatch):
    slowed(server, monkeypatch)
    engine, long = server.service.engine, ASK | {"max_tokens": 200}
    with server.client().completions.create(**long, stream=True) as stream:
        next(iter(stream))
        assert engine.load().running == 1
    server.wait_idle(5)
    with pytest.raises(httpx.ReadTimeout):  # and one who waits for a whole answer
        post(server, json=long, timeout=0.5)
    server.wait_idle(5)
    passes = engine._passes.count
    time.sleep(0.2)
    assert engine._passes.count == passes  # nothing runs on


def test_too_many(server, monkeypatch):
    slowed(server, monkeypatch)
    client, long = server.client(), ASK | {"max_tokens": 100}
    streams = [client.completions.create(**long, stream=True) for _ in range(3)]
    end = time.monotonic() + 10
    while (load := server.service.engine.load()).waiting < 1 or load.running < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refusal:
        client.completions.create(**ASK)
    assert refusal.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    server.wait_idle(5)
    assert client.completions.create(**ASK).choices[0].text


def test_time_limit(server, monkeypatch):
    slowed(server, monkeypatch)
    monkeypatch.setattr(
        server.service, "limits", Limits(streams=2, waiting=1, seconds=0.3, grace=1.0)
    )
    long = ASK | {"max_tokens": 200}
    with pytest.raises(openai.InternalServerError) as refusal:
        server.client().completions.create(**long)
    assert refusal.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than this server allows"):
        list(server.client().completions.create(**long, stream=True))
    server.wait_idle(5)


def test_logs_hold_facts_and_no_text(server, caplog):
    caplog.set_level(logging.INFO, "saert.serve")
    saert = {"edits": [{"sae": "resid_post.2", "latent": 71, "amount": 5}]}
    answer = post(server, json=ASK | {"saert": saert}).json()
    post(server, json=ASK | {"prompt": []})
    end = time.monotonic() + 5
    while len(caplog.records) < 2 and time.monotonic() < end:  # the answer leaves before its line
        time.sleep(0.01)
    lines = [json.loads(Lines().format(record)) for record in caplog.records]
    done, refused = (line for line in lines if line["event"] == "request")
    assert done["status"] == 200 and done["edits"] == 1 and done["id"] == answer["id"]
    assert done["completion_tokens"] == 4 and done["outcome"] == "ok"
    assert refused["status"] == 400
    text = json.dumps(lines)
    assert "Lily" not in text and answer["choices"][0]["text"].strip() not in text


def test_log_prompts(server, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "saert.serve")
    monkeypatch.setattr(server.service, "log_text", True)
    text = post(server).json()["choices"][0]["text"]
    end = time.monotonic() + 5
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.01)
    facts = caplog.records[0].facts
    assert PROMPT in facts["prompt"] and facts["text"] == text


def test_errors_in_logs_do_not_quote(caplog):
    try:
        raise ValueError("Once upon a time")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "it failed", (), sys.exc_info())
    line = json.loads(Lines().format(record))
    assert line["error"] == "ValueError" and "Once" not in json.dumps(line)


def test_metrics(server):
    post(server)
    text = httpx.get(server.address + "/metrics", headers=HEADERS).text
    assert 'saert_requests_total{outcome="ok",path="/v1/completions"}' in text
    assert 'saert_tokens_total{kind="generated"}' in text
    assert "saert_requests_running 0.0" in text
    assert httpx.get(f"{server.address}/{'x' * 50}", headers=HEADERS).status_code == 404
    assert "xxxx" not in httpx.get(server.address + "/metrics", headers=HEADERS).text


def test_stopping_lets_answers_end():
    with running(Limits(grace=20.0)) as server:
        client, parts = server.client(), []

        def read():
            stream = client.completions.create(**ASK | {"max_tokens": 150}, stream=True)
            parts.extend(chunk.choices[0] for chunk in stream)

        thread = threading.Thread(target=read)
        thread.start()
        while not parts:
            time.sleep(0.005)
    thread.join(20)
    assert parts[-1].finish_reason in ("length", "stop")


class Words:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def test_text_holds_back_half_characters_and_stops():
    text = Text(Words(), b"prompt")
    parts = [text.add(byte) for byte in "aé🙂".encode()]
    assert parts == ["a", "", "é", "", "", "", "🙂"] and text.end() == ""
    broken = Text(Words(), b"")
    assert [broken.add(0xF0), broken.end()] == ["", "\ufffd"]
    for stops, given, expected in (
        (["END"], "abEENDcd", "abE"),
        (["END"], "abEN", "abEN"),
        (["xx", "b"], "aabxx", "aa"),
        ([], "END", "END"),
    ):
        text = Text(Words(), b"p", stops)
        out = "".join(text.add(byte) for byte in given.encode()) + text.end()
        assert out == expected and text.stopped == (expected != given)


@pytest.mark.slow
def test_nothing_of_it_is_imported_with_saert():
    names = ("fastapi", "uvicorn", "starlette", "prometheus_client", "pydantic")
    code = f"import saert, saert.cli, sys; print([m for m in {names} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
