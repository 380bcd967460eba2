"""`saert serve --engine vllm` without vLLM: an `AsyncLLM` that writes by rule stands in for it."""

import asyncio
import math
import random
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from serve_cases import running
from tiny_models import HIDDEN, tiny
from typer.testing import CliRunner

from saert.activations import TopK
from saert.cli import app
from saert.engines.codes import Chunk, CodeStore
from saert.engines.directive import KEY, Attached, Directive
from saert.engines.server import vllm_engine
from saert.engines.server.engine import Busy, Closing, End, Job, Load, Sampling, Step
from saert.engines.server.limits import Limits
from saert.engines.server.monitors import Monitor, Wanted
from saert.engines.server.shelf import Shelf
from saert.engines.server.vllm_engine import VllmEngine
from saert.engines.server.vllm_start import Headless, engine_of, load_ends, session_of
from saert.engines.server.vllm_steps import settings
from saert.engines.server.vllm_worker import Serving
from saert.hub import bundled
from saert.hub.session import UserError
from saert.measure.features.direction import direction
from saert.measure.steering.spec import EditSpec
from saert.sae import SAE
from saert.sparse import SparseCode

VOCAB, CONTEXT, AT = 50, 64, "resid_post.0"


def written(prompt, tokens):
    """The prompt and what the stand-in writes after it."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append((7 * ids[-1] + len(ids)) % VOCAB)
    return ids


def code_of(ids):
    """Two latents at each token: ids % 8, ids / 10 strong, and latent 9, 0.5 strong."""
    ids = torch.tensor(ids)
    indices = torch.stack([ids % 8, torch.full_like(ids, 9)], -1)
    return SparseCode(indices, torch.stack([ids / 10, torch.full(ids.shape, 0.5)], -1), 10)


class FakeLLM:
    """What `VllmEngine` uses of an `AsyncLLM`.

    Args:
        batch: tokens in an output; ahead: passes that the model is ahead of what it has said.
        again: whether requests are preempted now and then, and begin again.
        hold: what a request awaits before each output.

    Attributes:
        leaving, aborted: requests of which the client has gone, before and after vLLM knows.
        stuck: whether those wait in between.
    """

    def __init__(self, batch=1, ahead=0, again=False, hold=None, logprob=-0.5):
        self.model_config = SimpleNamespace(max_model_len=CONTEXT, get_vocab_size=lambda: VOCAB)
        self.batch, self.ahead, self.again, self.logprob = batch, ahead, again, logprob
        self.hold = hold or (lambda: asyncio.sleep(0))
        self.errored, self.mute, self.down = False, False, False
        self.store, self.rpcs, self.aborted, self.params = CodeStore(), 0, [], {}
        self.error, self.leaving, self.stuck = None, [], False

    async def generate(self, prompt, params, name):
        assert prompt["type"] == "token"
        self.params[name] = params
        key = (params["extra_args"].get(KEY) or {}).get("key")
        length, most = len(prompt["prompt_token_ids"]), params["max_tokens"]
        ids = written(prompt["prompt_token_ids"], most + self.ahead)
        read, done = 0, 0
        try:
            while done < most:
                await self.hold()
                if self.error:
                    raise self.error
                new = ids[length + done :][: min(self.batch, most - done)]
                done += len(new)
                if key:
                    end = length + done - 1 + self.ahead
                    read = 0 if self.again and done % 3 == 0 else read
                    chunk = Chunk(torch.arange(read, end), code_of(ids[read:end]))
                    self.store.add(key, AT, chunk)
                    read = end
                yield SimpleNamespace(outputs=[self._output(new, params["logprobs"])])
        except (asyncio.CancelledError, GeneratorExit):
            self.leaving.append(name)
            await asyncio.sleep(0)
            while self.stuck:
                await asyncio.sleep(0.001)
            self.aborted.append(name)
            if key:  # the pass under way
                self.store.add(key, AT, Chunk(torch.arange(read, read + 1), code_of([1])))
            raise

    def _output(self, new, asked):
        told = None
        if asked is not None:
            told = [
                {t: SimpleNamespace(logprob=self.logprob, rank=2)}
                | {n: SimpleNamespace(logprob=-n / 10, rank=n) for n in range(1, asked + 1)}
                for t in new
            ]
        return SimpleNamespace(token_ids=new, logprobs=told, finish_reason=None)

    async def collective_rpc(self, method, args):
        assert method == "saert_codes"
        self.rpcs += 1
        while self.mute:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.001)
        return [{key: self.store.take(key) for key in args[0]}, {}]  # the second of two processes

    def shutdown(self):
        self.down = True


def engine(llm, **options):
    async def start():
        return llm

    return VllmEngine(start, settings, {AT: Attached("x", 10, 4)}, **options)


class Heard:
    """What an engine says of a job."""

    def __init__(self, made, job):
        self.items, self._over = [], threading.Event()
        self.name = made.submit(job, self._sink)

    def _sink(self, item):
        self.items.append(item)
        if isinstance(item, End):
            self._over.set()

    def wait(self):
        assert self._over.wait(20), self.items
        return self

    @property
    def steps(self):
        return [item for item in self.items if isinstance(item, Step)]

    @property
    def end(self):
        assert [isinstance(item, End) for item in self.items].count(True) == 1
        return self.items[-1]


def a_job(key, monitors=(), wanted=(), tokens=12, prompt=(3, 4, 5), edits=(), **rest):
    codes = (AT,) if monitors or wanted else ()
    how = Sampling(tokens, 0.0, **{n: rest.pop(n) for n in ("logprobs", "seed") if n in rest})
    return Job(prompt, how, Directive(edits, (), codes, key), monitors, wanted, **rest)


@pytest.fixture
def made(request):
    """An engine, closed at the end."""
    llm = FakeLLM(**getattr(request, "param", {}))
    found = engine(llm, streams=32)
    found.llm = llm
    yield found
    found.close()
    assert llm.down and not found.alive() and found.load() == Load(0, 0, 0)


def readings(ids, first, last):
    """Positions, and activations by latent that are not zero."""
    strengths = [{ids[p] % 8: ids[p] / 10, 9: 0.5} for p in range(first, last)]
    return [(p, {n: v for n, v in one.items() if v}) for p, one in enumerate(strengths, first)]


ENGINES = [
    pytest.param(dict(), id="in step"),
    pytest.param(dict(batch=4), id="several tokens an output"),
    pytest.param(dict(ahead=2), id="ahead"),
    pytest.param(dict(batch=3, ahead=1, again=True), id="ahead and preempted"),
]


@pytest.mark.parametrize("made", ENGINES, indirect=True)
def test_every_token_comes_with_what_was_read_before_it(made):
    r = random.Random(0)
    jobs = [
        a_job(f"{i}", (Monitor(AT, 3, 1.0),), (Wanted(AT, 2),), r.randrange(1, 20),
              tuple(r.randrange(1, VOCAB) for _ in range(r.randrange(1, 9))))
        for i in range(20)
    ]  # fmt: skip
    for job, heard in [(job, Heard(made, job)) for job in jobs]:
        assert heard.wait().end == End("length")
        length, most = len(job.prompt), job.sampling.max_tokens
        ids = written(job.prompt, most)
        assert [step.token for step in heard.steps] == ids[length:]
        told = 0
        for i, step in enumerate(heard.steps):
            expected = readings(ids, told, length + i)
            assert [one.position for one in step.readings] == [p for p, _ in expected]
            for one, (_, strengths) in zip(step.readings, expected, strict=True):
                assert dict(one.latents) == pytest.approx(strengths)
            went_off = [p for p in range(told, length + i) if ids[p] % 8 == 3 and ids[p] > 10]
            assert [alarm.position for alarm in step.alarms] == went_off
            told = length + i


@pytest.mark.parametrize("made", ENGINES, indirect=True)
@pytest.mark.parametrize("phase", ["all", "generated"])
def test_a_monitor_keeps_the_next_token_back(made, phase):
    prompt = (11, 4)  # 11 sets it off: 11 % 8 == 3
    ids = written(prompt, 30)
    first = next(p for p in range(0 if phase == "all" else 2, 30) if ids[p] in (11, 19, 27, 35, 43))
    monitor = Monitor(AT, 3, 1.0, "stop", 0.0, phase)
    heard = Heard(made, a_job("k", (monitor,), tokens=30, prompt=prompt)).wait()
    assert heard.end == End("monitor")
    *drawn, last = heard.steps
    read = max(first + 1, 2)  # the whole prompt is read in one pass
    assert [step.token for step in drawn] == ids[2:read]
    assert last.token is None and [alarm.position for alarm in last.alarms] == [first]
    assert made.llm.aborted == ["k"]


def test_stops_and_log_probabilities(made):
    ids = written((3, 4, 5), 12)
    job = a_job("a", logprobs=3, stops=frozenset({ids[6]}))
    heard = Heard(made, job).wait()
    assert heard.end == End("stop")
    assert [step.token for step in heard.steps] == ids[3:7]
    assert all(step.logprob == -0.5 for step in heard.steps)
    assert [len(step.top) for step in heard.steps] == [3] * 4
    assert heard.steps[0].top[0] == (1, -0.1)
    silent = Heard(made, a_job("b", edits=(EditSpec(AT, 1, "add", 1.0),))).wait()
    assert silent.steps[0].logprob is None and silent.steps[0].top == ()


def test_sampling_parameters():
    edits = (EditSpec(AT, 1, "add", 1.0),)
    plain = settings(a_job("", stops=frozenset({7, 2})))
    assert plain["logprobs"] is None and plain["extra_args"] == {} and plain["ignore_eos"]
    assert plain["stop_token_ids"] == [2, 7] and plain["temperature"] == 0.0
    edited = settings(a_job("", edits=edits))
    assert edited["logprobs"] == 0  # to see whether the logits are finite
    assert Directive.parse(edited["extra_args"][KEY]).edits == edits
    seeds = [settings(a_job("", seed=seed))["seed"] for seed in (None, 5, -1, -(2**63))]
    assert seeds[:2] == [None, 5] and all(0 <= seed < 2**63 for seed in seeds[2:])
    assert len(set(seeds)) == 4


def test_codes_are_fetched_together_and_only_where_asked_for(made):
    plain = [Heard(made, a_job(f"p{i}")) for i in range(8)]
    for heard in plain:
        heard.wait()
    assert made.llm.rpcs == 0
    coded = [Heard(made, a_job(f"c{i}", wanted=(Wanted(AT, 1),), tokens=40)) for i in range(16)]
    for heard in coded:
        assert heard.wait().end == End("length")
    assert made.llm.rpcs < 16 * 40 / 4


def test_nothing_stays_in_the_workers(made):
    for i in range(3):
        assert Heard(made, a_job(f"{i}", wanted=(Wanted(AT, 1),))).wait().end == End("length")
    end = time.monotonic() + 5
    while made.llm.store.tokens:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("lost", [0, 3])
def test_codes_that_are_missing_end_the_job(made, lost):
    """A monitor that cannot see must not be silent."""
    keep = made.llm.store.add

    def add(key, name, chunk):
        if lost not in chunk.positions:
            keep(key, name, chunk)

    made.llm.store.add = add
    heard = Heard(made, a_job("k", (Monitor(AT, 3, 1e9, "stop"),))).wait()
    assert heard.end == End("error", "the model failed: RuntimeError")
    assert len(heard.steps) == (1 if lost else 0)


@pytest.mark.parametrize("made", [dict(logprob=math.nan)], indirect=True)
def test_what_is_not_finite_ends_the_job(made):
    heard = Heard(made, a_job("k", edits=(EditSpec(AT, 1, "add", 1e38),))).wait()
    assert heard.end.reason == "error" and "not finite" in heard.end.message
    assert heard.steps == []
    assert Heard(made, a_job("plain")).wait().end == End("length")


def forever():
    return asyncio.sleep(1000)


@pytest.mark.parametrize("made", [dict(hold=forever)], indirect=True)
def test_cancellation(made):
    jobs = [a_job(f"{i}", edits=(EditSpec(AT, 1, "add", 1.0),)) for i in range(3)]
    heard = [Heard(made, job) for job in jobs]
    made.cancel("0")  # perhaps before it began
    assert heard[0].wait().end == End("cancelled")
    while made.llm.params.keys() < {"1", "2"}:
        time.sleep(0.01)
    assert made.load() == Load(2, 0, 2)
    made.cancel("1"), made.cancel("1"), made.cancel("nobody")
    assert heard[1].wait().end == End("cancelled")
    assert "1" in made.llm.aborted and "2" not in made.llm.aborted
    assert made.load() == Load(1, 0, 1)
    made.close()
    assert heard[2].wait().end == End("cancelled", "the server is shutting down")
    made.cancel("2")
    assert [one.end.reason for one in heard] == ["cancelled"] * 3


@pytest.mark.parametrize("made", [dict(hold=forever)], indirect=True)
@pytest.mark.parametrize("again", ["cancel", "close"])
def test_who_leaves_twice_is_aborted_all_the_same(made, again):
    made.llm.stuck = True
    heard = Heard(made, a_job("k"))
    while not made.llm.params:
        time.sleep(0.01)
    made.cancel("k")
    while not made.llm.leaving:
        time.sleep(0.01)
    threading.Timer(0.2, setattr, (made.llm, "stuck", False)).start()
    made.cancel("k") if again == "cancel" else made.close()
    assert heard.wait().end.reason == "cancelled" and made.llm.aborted == ["k"]


def test_what_does_not_fit(made):
    for job, says in (
        (a_job("", prompt=()), "no tokens"),
        (a_job("", tokens=CONTEXT), f"holds {CONTEXT}"),
        (a_job("", prompt=(VOCAB,)), f"token {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=says):
            made.submit(job, lambda item: None)


def test_busy_and_closing():
    made = engine(FakeLLM(hold=forever), streams=2, waiting=1)
    for i in range(3):
        Heard(made, a_job(f"{i}"))
    assert made.load() == Load(2, 1, 0)
    with pytest.raises(Busy):
        made.submit(a_job("4"), lambda item: None)
    made.close()
    with pytest.raises(Closing):
        made.submit(a_job("4"), lambda item: None)
    made.close()


def test_close_waits_for_its_grace():
    made = engine(FakeLLM(hold=lambda: asyncio.sleep(0.02)))
    heard = Heard(made, a_job("k"))
    made.close(grace=20)
    assert heard.end == End("length")


@pytest.mark.parametrize("made", [dict(hold=lambda: asyncio.sleep(0.01))], indirect=True)
def test_a_request_that_fails_fails_alone(made):
    first = Heard(made, a_job("a"))
    made.llm.error = OverflowError("what the prompt was")
    assert first.wait().end == End("error", "the model failed: OverflowError")
    made.llm.error = None
    assert Heard(made, a_job("b")).wait().end == End("length") and made.alive()


def test_an_engine_that_dies(monkeypatch):
    """Also while codes are on their way, which then never come."""
    monkeypatch.setattr(vllm_engine, "PATIENCE", 0.05)
    llm = FakeLLM()
    made = engine(llm)
    llm.mute = True
    heard = Heard(made, a_job("k", wanted=(Wanted(AT, 1),)))
    while not llm.rpcs:
        time.sleep(0.01)
    assert made.alive()
    llm.errored = True
    assert heard.wait().end == End("error", "the model failed: RuntimeError")
    assert not made.alive()
    with pytest.raises(Closing):
        made.submit(a_job("next"), lambda item: None)
    made.close()


def test_an_engine_that_does_not_start():
    async def start():
        raise RuntimeError("no GPU")

    with pytest.raises(RuntimeError, match="no GPU"):
        VllmEngine(start, settings, {})


def test_http_over_it():
    """A server over the stand-in: text, codes, a monitor, a client who leaves."""
    at = "resid_post.2"
    llm = FakeLLM()
    llm.model_config.get_vocab_size = lambda: 2048

    def start(session, shelf, limits):
        async def begin():
            return llm

        return VllmEngine(begin, settings, shelf.attached, streams=limits.streams)

    real = llm.store.add
    llm.store.add = lambda key, name, chunk: real(key, at, chunk)
    with running(start=start) as server:
        client = server.client()
        monitor = {"sae": at, "latent": 9, "threshold": 0.4, "action": "stop", "phase": "generated"}
        extra = {"saert": {"return_codes": {"sae": at, "top": 1}, "monitors": [monitor]}}
        answer = client.completions.create(
            model="bundled", prompt=[3, 4], max_tokens=9, temperature=0, extra_body=extra
        )
        assert answer.choices[0].finish_reason == "content_filter"
        assert answer.usage.completion_tokens == 1
        assert [one["position"] for one in answer.saert["codes"]] == [0, 1, 2]
        llm.hold = forever
        stream = client.completions.create(
            model="bundled", prompt=[3, 4], max_tokens=9, temperature=0, stream=True, timeout=0.5
        )
        with pytest.raises(Exception, match="timed out"):
            next(iter(stream))
        stream.close()
        server.wait_idle()
        assert len(llm.aborted) == 2
        llm.errored = True
        health = httpx.get(server.address + "/health")
        assert (health.status_code, health.json()) == (503, {"status": "unavailable"})


# -- around the engine ---------------------------------------------------------------------------


def a_worker(**parts):
    runner = SimpleNamespace(**parts)
    return type("Worker", (Serving,), {"model_runner": runner})(), runner


def test_tokens_that_nobody_draws():
    model = SimpleNamespace(compute_logits=lambda x: x)
    worker, _ = a_worker(get_model=lambda: model, device="cpu", sample_tokens=None)
    worker.saert_serve([1, 3])
    logits = torch.zeros(2, 5)
    assert model.compute_logits(logits).tolist() == [[0.0, -math.inf, 0.0, -math.inf, 0.0]] * 2
    assert not logits.isinf().any()
    model.compute_logits = lambda x: None  # the other processes of tensor parallelism
    worker.saert_serve([1])
    assert model.compute_logits(logits) is None


def test_a_prompt_that_is_read_in_parts_leaves_its_seed_alone():
    seen = []
    worker, runner = a_worker(
        device="cpu",
        input_batch=SimpleNamespace(num_reqs=3, generators={0: "a", 1: "b"}),
        discard_request_mask=SimpleNamespace(np=np.array([0, 1, 1, 1], dtype=bool)),
        sample_tokens=lambda *args: seen.append((args, dict(runner.input_batch.generators))),
    )
    worker.saert_serve([])
    runner.sample_tokens("grammar")
    assert seen == [(("grammar",), {0: "a"})]
    assert runner.input_batch.generators == {0: "a", 1: "b"}


def test_the_ends_of_a_model_are_enough_for_lenses(tmp_path):
    whole = tiny("gemma2")
    whole.save_pretrained(tmp_path)
    bundled.tokenizer().save_pretrained(tmp_path)
    ends, tokenizer = load_ends(str(tmp_path), "cpu")
    assert len(ends.model.layers) == 1 < len(whole.model.layers)
    assert ends.config.num_hidden_layers == whole.config.num_hidden_layers
    W_enc, W_dec = torch.randn(2, 20, HIDDEN)
    sae = SAE.from_weights(
        W_enc, W_dec, torch.zeros(20), torch.zeros(HIDDEN),
        activation=TopK(4), hookpoint="resid_post.1",
    )  # fmt: skip
    for latent in (0, 7):
        ours, theirs = (direction(model, tokenizer, sae, latent) for model in (ends, whole))
        assert ours == theirs and ours.promoted and not ours.undefined
    no = direction(Headless(whole.config, whole.generation_config), tokenizer, sae, 7)
    assert (
        no.neighbours == theirs.neighbours and not no.promoted and "no unembedding" in no.undefined
    )


def test_a_model_that_is_not_there_is_not_loaded_without_its_head(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_ends(str(tmp_path / "nothing"), "cpu")


def ask(*options):
    return CliRunner().invoke(app, ["serve", *options], env={"SAERT_API_KEY": ""})


@pytest.mark.parametrize(
    "options, says",
    [
        (["--eager"], "--engine vllm"),
        (["--tensor-parallel", "2"], "--engine vllm"),
        (["--engine", "vllm"], "pip install 'saert[serve,vllm]'"),
    ],
)
def test_refused_options(options, says, monkeypatch):
    monkeypatch.setattr("saert._cli_serve.find_spec", lambda name: None)
    refused = ask(*options)
    assert refused.exit_code == 2 and says in " ".join(refused.output.split())


@pytest.mark.parametrize(
    "options, says",
    [
        (["--engine-args", "[1]"], "found list"),
        (["--engine-args", "{"], "not JSON"),
        (["--device", "cuda"], "--device cuda"),
        (["--engine-args", '{"model": "gpt2"}'], "model: use --model"),
        (["--engine-args", '{"max_num_seqs": 3}'], "use --streams"),
        (["--engine-args", '{"tensor_parallel_size": 2}'], "use --tensor-parallel"),
        (["--engine-args", '{"dtype": "half", "enforce_eager": true}'], "use --eager"),
        (["--engine-args", '{"logprobs_mode": "raw_logits"}'], "logprobs_mode is not yours"),
    ],
)
def test_refused_options_of_vllm(options, says, monkeypatch):
    monkeypatch.setattr("saert._cli_serve.find_spec", lambda name: name)
    refused = ask("--engine", "vllm", "-s", "bundled:resid_post.2", *options)
    assert refused.exit_code == 2 and says in " ".join(refused.output.split())


def started(options=None):
    """`engine_of` on the bundled model."""
    session = session_of(bundled.NAME, ["bundled:resid_post.2"])
    shelf = Shelf(session.saes, session.model, session.tokenizer, {}, 16)
    return engine_of(session, shelf, Limits(), options)


def test_engine_arguments_that_are_ours():
    for key in (
        "worker_cls", "max_logprobs", "logprobs_mode", "disable_log_stats", "enable_log_requests",
        "override_generation_config",
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--engine-args: {key} is not yours"):
            started({"dtype": "float32", key: 1})


def test_vllm_goes_down_with_a_server_that_cannot_start(monkeypatch):
    llm = FakeLLM()

    async def rpc(method, args):
        raise RuntimeError("no such method")

    llm.collective_rpc = rpc
    monkeypatch.setattr("saert.engines.server.vllm_start._start", lambda args: llm)
    with pytest.raises(UserError, match="vLLM does not start: no such method"):
        started()
    assert llm.down


def test_options_reach_vllm(monkeypatch):
    """All but vLLM itself."""
    calls, services = [], []

    def start(args):
        calls.append(args)
        llm = FakeLLM()
        llm.model_config.get_vocab_size = lambda: 2048
        llm.never = []

        async def rpc(method, args):
            llm.never.append((method, args))

        llm.collective_rpc = rpc
        calls.append(llm)
        return llm

    monkeypatch.setattr("saert._cli_serve.find_spec", lambda name: name)
    monkeypatch.setattr("saert.engines.server.vllm_start._start", start)
    monkeypatch.setattr("saert.engines.server.run.serve", lambda *args: services.append(args[0]))
    found = ask(
        "--engine", "vllm", "--tensor-parallel", "2", "--eager", "--slots", "3", "--streams", "5",
        "--engine-args", '{"dtype": "float32"}', "-s", "bundled:resid_post.2",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    args, llm = calls
    assert args["tensor_parallel_size"] == 2 and args["enforce_eager"] and args["max_num_seqs"] == 5
    assert args["max_logprobs"] == 20  # the most that `Chat` lets through
    assert args["dtype"] == "float32" and args["model"] == str(bundled.MODEL)
    loads = args["additional_config"][KEY]
    assert loads["saes"] == [["resid_post.2", "bundled:resid_post.2"]] and loads["slots"] == 3
    assert llm.never == [("saert_serve", ([1],))]  # suppress_tokens of the bundled model
    (service,) = services
    service.engine.close()
    assert service.shelf.feature("food")["promoted"]
