"""`saert serve --engine vllm` against `saert serve`: the same requests, the same answers.

Run as test_vllm.py is, but in one process: one server for all of it, in vLLM's environment; the
other, and the clients, are here.
"""

import copy
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_cases import FOOD, KEY, PROMPT, SOURCES, TEMPLATE, running

from saert.engines.vllm.support import RUNNER

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

PYTHON = os.environ.get("SAERT_VLLM_PYTHON", ".venv-vllm/bin/python")
ROOT = Path(__file__).parents[1]
AT, MLP = "resid_post.2", "mlp_in.2"
LONG = (  # read in several passes
    "Tom was sad. He wanted to go to the park, but his mom said no. Then his friend Sam came with "
    "a red ball and a big brown dog. The dog ran to Tom. It wanted to play"
)
EATING = 'Mom said, "Let us eat some'
ENGINE = dict(dtype="float32", max_model_len=256, max_num_batched_tokens=32, block_size=32)
START = 400.0  # seconds


class Server:
    """`saert serve --engine vllm` in a process of the other environment."""

    def __init__(self, folder: Path) -> None:
        template = folder / "chat.jinja"
        template.write_text(TEMPLATE)
        environment = os.environ | dict(
            PYTHONPATH=str(ROOT),
            SAERT_API_KEY=KEY,
            HF_HUB_OFFLINE="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CACHE_ROOT=str(folder / "cache"),
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
            VLLM_PLUGINS="none",  # not even saert's is needed
            OMP_NUM_THREADS="1",
        )
        environment.pop(RUNNER, None)
        options = ["--port", "0", "--streams", "16", "--chat-template", str(template)]
        options += ["--engine", "vllm", "--engine-args", json.dumps(ENGINE)]
        options += [part for source in SOURCES for part in ("-s", source)]
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [PYTHON, "-c", "from saert.cli import app; app()", "serve", *options],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START
        while not (found := re.search(r"running on (http://[\d.:]+)", self.log)):
            assert self.process.poll() is None and time.monotonic() < end, self.log[-8000:]
            time.sleep(0.5)
        self.address = found[1]

    @property
    def log(self) -> str:
        return self._log.read_text()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=240)

    def get(self, path: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.get(self.address + path, headers=headers, timeout=60)

    def count(self, name: str) -> float:
        """A number of /metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if not Path(PYTHON).exists() or subprocess.run([PYTHON, "-c", probe]).returncode:
        pytest.skip(f"{PYTHON} has no vllm; `make setup-vllm`, or set SAERT_VLLM_PYTHON")
    found = Server(tmp_path_factory.mktemp("server"))
    try:
        yield found
    finally:
        code = found.stop()
    # uvicorn passes the signal on when it is done
    assert code == -signal.SIGTERM and '"event": "stopped"' in found.log, found.log[-4000:]


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def clients(server: Server, reference: Any) -> tuple[openai.OpenAI, openai.OpenAI]:
    return server.client(), reference.client()


def complete(client: openai.OpenAI, saert: Any = None, **options: Any) -> Any:
    """An answer as plain data; of a stream, its pieces."""
    extra = {} if saert is None else {"extra_body": {"saert": saert}}
    given = dict(model="bundled", prompt=PROMPT, temperature=0, max_tokens=16) | extra | options
    answer = client.completions.create(**given)
    return [one.to_dict() for one in answer] if given.get("stream") else answer.to_dict()


def plain(answer: dict[str, Any]) -> dict[str, Any]:
    """A copy without what differs from request to request."""
    return copy.deepcopy({k: v for k, v in answer.items() if k not in ("id", "created")})


def strengths(code: dict[str, Any]) -> dict[int, float]:
    """Activations by latent, without the weakest, which rounding may swap with the next."""
    return {one["latent"]: one["activation"] for one in code["latents"][:-1]}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal but for rounding: activations and log-probabilities to 1e-3."""
    ours, theirs = plain(ours), plain(theirs)
    found, expected = ours.pop("saert", None), theirs.pop("saert", None)
    for one, other in zip(ours["choices"], theirs["choices"], strict=True):
        a, b = one.pop("logprobs"), other.pop("logprobs")
        assert (a is None) == (b is None)
        if a is not None:
            assert a["tokens"] == b["tokens"] and a["text_offset"] == b["text_offset"]
            assert a["token_logprobs"] == pytest.approx(b["token_logprobs"], abs=1e-3)
            for x, y in zip(a["top_logprobs"], b["top_logprobs"], strict=True):
                assert x == pytest.approx(y, abs=1e-3)
    assert ours == theirs
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    for x, y in zip(found["events"], expected["events"], strict=True):
        assert x.pop("activation") == pytest.approx(y.pop("activation"), abs=1e-3)
        assert x == y
    for x, y in zip(found["codes"], expected["codes"], strict=True):
        assert strengths(x) == pytest.approx(strengths(y), abs=1e-3)
        assert {k: v for k, v in x.items() if k != "latents"} == {
            k: v for k, v in y.items() if k != "latents"
        }


FOOD_EDIT = {"sae": AT, "latent": "food", "amount": 9.0}
WATCH = {"sae": AT, "latent": "food", "threshold": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "long": dict(prompt=LONG),
    "ids": dict(prompt=[5, 6, 7]),
    "label": dict(saert={"edits": [FOOD_EDIT]}),
    "clamp": dict(saert={"edits": [FOOD_EDIT | {"op": "clamp", "phase": "generated"}]}),
    "when": dict(saert={"edits": [FOOD_EDIT | {"amount": 60, "when": 124, "above": 0.5}]}),
    "two saes": dict(
        saert={"edits": [FOOD_EDIT | {"phase": "prompt"}, {"sae": MLP, "latent": 5, "amount": 6}]}
    ),
    "splice": dict(saert={"splice": True}),
    "codes": dict(saert={"return_codes": {"sae": AT, "top": 8}}),
    "codes of two, edited": dict(
        prompt=LONG,
        saert={
            "edits": [FOOD_EDIT],
            "return_codes": [{"sae": AT, "top": 9}, {"sae": MLP, "phase": "generated"}],
        },
    ),
    "flag": dict(prompt=EATING, max_tokens=24, saert={"monitors": [WATCH]}),
    "stop": dict(
        prompt=EATING,
        max_tokens=24,
        saert={"monitors": [WATCH | {"action": "stop", "phase": "generated"}]},
    ),
    "stop in the prompt": dict(
        prompt=LONG, saert={"monitors": [{"sae": AT, "latent": 124, "action": "stop"}]}
    ),
    "clamp monitor": dict(
        prompt=EATING,
        max_tokens=24,
        saert={"monitors": [WATCH | {"action": "clamp", "value": 0}], "edits": [FOOD_EDIT]},
    ),
    "logprobs": dict(logprobs=5, saert={"edits": [FOOD_EDIT | {"amount": 4}]}),
    "logprobs of the token": dict(logprobs=0, max_tokens=3),
    "stop text": dict(max_tokens=40, stop=[" park", " the"]),
    "to the end": dict(max_tokens=200, prompt="The end of the story. They were"),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_transformers(clients: Any, name: str) -> None:
    ours, theirs = (complete(client, **CASES[name]) for client in clients)
    same(ours, theirs)


def test_the_cases_do_what_they_are_there_for(clients: Any) -> None:
    answers = {name: complete(clients[1], **case) for name, case in CASES.items()}
    text = {name: answer["choices"][0]["text"] for name, answer in answers.items()}
    ends = {name: answer["choices"][0]["finish_reason"] for name, answer in answers.items()}
    for name in ("label", "clamp", "when", "two saes", "splice"):
        assert text[name] != text["plain"]
    assert answers["flag"]["saert"]["events"] and text["clamp monitor"] != text["flag"]
    assert ends["stop"] == ends["stop in the prompt"] == "content_filter"
    assert answers["stop"]["usage"]["completion_tokens"] > 0
    assert text["stop in the prompt"] == "" and ends["stop text"] == ends["to the end"] == "stop"


@pytest.mark.parametrize("name", ["plain", "codes of two, edited", "flag", "stop", "logprobs"])
def test_streams_say_the_same(clients: Any, name: str) -> None:
    whole = complete(clients[0], **CASES[name])
    chunks = complete(
        clients[0], **CASES[name], stream=True, stream_options={"include_usage": True}
    )
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(one["text"] for one in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    for kind in ("events", "codes"):
        told = [one for c in chunks for one in (c.get("saert") or {}).get(kind, ())]
        wanted = (whole.get("saert") or {}).get(kind, [])
        assert [one["position"] for one in told] == [one["position"] for one in wanted]


def test_chat(clients: Any) -> None:
    messages = [{"role": "user", "content": "Once upon a time a dog"}]
    ours, theirs = (
        client.chat.completions.create(
            model="bundled", messages=messages, temperature=0, max_tokens=8, logprobs=True,
            top_logprobs=2,
        )
        for client in clients
    )  # fmt: skip
    assert ours.choices[0].message.content == theirs.choices[0].message.content
    for one, other in zip(
        ours.choices[0].logprobs.content, theirs.choices[0].logprobs.content, strict=True
    ):
        assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [t.token for t in one.top_logprobs] == [t.token for t in other.top_logprobs]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])  # the second is read in parts
def test_seeds(clients: Any, prompt: str) -> None:
    options = dict(temperature=1.0, top_p=0.9, max_tokens=20, prompt=prompt)
    drawn = [complete(clients[0], seed=s, **options)["choices"][0] for s in (1, 1, 2, -1, -1)]
    assert drawn[0] == drawn[1] and drawn[3] == drawn[4]
    assert len({one["text"] for one in drawn}) == 3


def test_sixteen_at_once_are_what_each_is_alone(clients: Any) -> None:
    ours, theirs = clients
    asked = []
    for i in range(16):
        saert: dict[str, Any] = {
            "edits": [
                {"sae": (AT, MLP)[i % 2], "latent": (71, 146, 12, 5)[i % 4], "amount": 2.0 * i}
            ]
        }
        if i % 3 == 0:
            saert["return_codes"] = {"sae": AT, "top": 4}
        if i % 5 == 0:
            saert["monitors"] = [WATCH | {"threshold": 0.5}]
        if i == 7:
            saert["monitors"] = [WATCH | {"threshold": 0.5, "action": "stop"}]
        sampled = dict(temperature=0.8, seed=i) if i % 4 == 3 else {}
        asked.append(
            dict(prompt=(PROMPT, LONG, EATING)[i % 3], saert=saert, logprobs=1, max_tokens=24)
            | sampled
        )
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda case: complete(ours, **case), asked))
    for answer, case in zip(together, asked, strict=True):
        same(answer, complete(ours, **case))
        if "seed" not in case:  # draws are each engine's own
            same(answer, complete(theirs, **case))
    assert len({answer["choices"][0]["text"] for answer in together}) > 10


def test_a_client_who_leaves_is_let_go_of(server: Server, clients: Any) -> None:
    before = server.count('saert_requests_total{outcome="cancelled",path="/v1/completions"}')
    stream = clients[0].completions.create(
        model="bundled", prompt=PROMPT, temperature=1.0, seed=3, max_tokens=200, stream=True,
        extra_body={"saert": {"return_codes": {"sae": AT}}},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 10
    while server.count("saert_requests_running"):
        assert time.monotonic() < end
        time.sleep(0.05)
    after = server.count('saert_requests_total{outcome="cancelled",path="/v1/completions"}')
    assert after == before + 1


def test_edits_too_strong_fail_alone(clients: Any) -> None:
    before = complete(clients[0])["choices"]
    for options in (dict(), dict(temperature=1.0, seed=1, top_p=0.9)):
        for sign in (1, -1):  # several: a compiled norm makes something finite of a large number
            edits = [FOOD_EDIT | {"amount": sign * 3e38}] * 16
            with pytest.raises(openai.InternalServerError, match="not finite"):
                complete(clients[0], {"edits": edits}, **options)
    assert complete(clients[0])["choices"] == before


def test_refusals(clients: Any) -> None:
    for options, says in (
        (dict(saert={"edits": [{"sae": AT, "latent": "fod"}]}), "nearest: food"),
        (dict(saert={"edits": [{"sae": AT, "latent": 1} for _ in range(17)]}), "16 slots"),
        (dict(max_tokens=255), "holds 256"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            complete(clients[0], **options)


def test_sources_and_features(server: Server, reference: Any) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    for path in ("sources", f"features/{AT}/{FOOD}", f"features/{MLP}/3"):
        theirs = httpx.get(f"{reference.address}/v1/saert/{path}", headers=headers).json()
        near(server.get(f"/v1/saert/{path}").json(), theirs)
    assert server.get(f"/v1/saert/features/{AT}/food").json()["promoted"]


def near(one: Any, other: Any) -> None:
    """Equal, numbers to 1e-4."""
    if isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-4)
    elif isinstance(other, dict | list):
        assert len(one) == len(other)
        for key in other if isinstance(other, dict) else range(len(other)):
            near(one[key], other[key])
    else:
        assert one == other


def test_a_dead_engine_says_so(server: Server, clients: Any) -> None:
    """The last test: kills vLLM under the server."""
    assert server.get("/health").status_code == 200
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    everyone = {int(pid) for task in children.parents[1].iterdir()
                for pid in (task / "children").read_text().split()}  # fmt: skip
    core = [p for p in everyone if "EngineCore" in Path(f"/proc/{p}/comm").read_text()
            or "EngineCore" in Path(f"/proc/{p}/cmdline").read_text()]  # fmt: skip
    stream = clients[0].completions.create(
        model="bundled", prompt=PROMPT, temperature=1.0, max_tokens=200, stream=True,
        extra_body={"saert": {"return_codes": {"sae": AT}}},
    )  # fmt: skip
    next(iter(stream))
    for pid in core:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="failed|ended"):
        list(stream)
    end = time.monotonic() + 20
    while (health := server.get("/health")).status_code != 503:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert health.json() == {"status": "unavailable"}
    with pytest.raises(openai.InternalServerError, match="has died"):
        complete(clients[0])
