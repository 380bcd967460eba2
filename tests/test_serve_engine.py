"""The engine: in company every job gets what it gets alone, and nothing of it stays behind."""

import math
import random
import threading

import pytest
import torch
from engine_fakes import D
from tiny_models import HIDDEN, VOCAB, tiny

from saert.activations import JumpReLU, TopK
from saert.edits import clamp
from saert.engines.directive import Attached, Directive
from saert.engines.server.batching import Batching
from saert.engines.server.engine import Busy, Closing, End, Job, Load, Sampling, Step
from saert.engines.server.monitors import Monitor, Wanted
from saert.engines.server.padded import Padded
from saert.engines.server.passes import Passes
from saert.engines.server.sampling import draw, generator
from saert.measure.steering.spec import EditSpec
from saert.runtime import attach
from saert.sae import SAE
from saert.twin import twin

LATENTS = 64
PHASES = ["all", "prompt", "generated"]
NAMES = ("resid_post.0", "resid_post.1")


def make_sae(at, activation):
    generator = torch.Generator().manual_seed(len(at))
    W_enc, W_dec = (torch.randn(LATENTS, HIDDEN, generator=generator) / 4 for _ in range(2))
    b_enc = torch.randn(LATENTS, generator=generator) / 9
    return SAE.from_weights(
        W_enc, W_dec, b_enc, torch.zeros(HIDDEN), hookpoint=at, activation=activation
    )


@pytest.fixture(scope="module")
def saes():
    return {NAMES[0]: make_sae(NAMES[0], TopK(6)), NAMES[1]: make_sae(NAMES[1], JumpReLU(0.3))}


def engine(model, saes, **options):
    attached = {name: Attached(name, sae.num_latents, 8) for name, sae in saes.items()}
    return Batching(twin(model), saes, attached, **({"streams": 8} | options))


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2")


@pytest.fixture(scope="module")
def batching(model, saes):
    found = engine(model, saes, streams=64)
    yield found
    found.close()


class Heard:
    """What an engine says of some jobs, and when all of them are over."""

    def __init__(self, jobs, batching):
        self.items = [[] for _ in jobs]
        self._left = threading.Semaphore(0)
        self.names = [batching.submit(job, self._sink(i)) for i, job in enumerate(jobs)]

    def _sink(self, i):
        def sink(item):
            self.items[i].append(item)
            if isinstance(item, End):
                self._left.release()

        return sink

    def wait(self):
        for _ in self.items:
            assert self._left.acquire(timeout=60)
        assert all([isinstance(x, End) for x in items].count(True) == 1 for items in self.items)
        return self

    def tokens(self, i):
        return [item.token for item in self.items[i] if isinstance(item, Step)]


def run(jobs, batching):
    return Heard(jobs, batching).wait()


def a_job(r, i):
    """A random job: prompt, edits, splices, monitors and draws of its own."""
    edits = [
        EditSpec(
            r.choice(NAMES),
            r.randrange(LATENTS),
            r.choice(["add", "clamp", "scale", "ablate"]),
            r.uniform(-6, 6),
            r.choice(PHASES),
            r.choice([None, r.randrange(LATENTS)]),
            0.1,
        )
        for _ in range(r.randrange(4))
    ]
    watched = Monitor(NAMES[i % 2], r.randrange(LATENTS), 0.2, "clamp", r.uniform(0, 5))
    monitors = (watched,) if r.random() < 0.3 else ()
    wanted = (Wanted(NAMES[0], 4),) if r.random() < 0.3 else ()
    directive = Directive(
        edits=(*edits, *(one.edit() for one in monitors)),
        splice=(r.choice(NAMES),) if r.random() < 0.2 else (),
        codes=tuple({one.sae for one in (*monitors, *wanted)}),
        key=f"job {i} {r.random()}",
    )
    prompt = tuple(r.randrange(3, VOCAB) for _ in range(r.randrange(1, 20)))
    sampling = Sampling(r.randrange(1, 25), r.choice([0.0, 1.0]), r.choice([1.0, 0.8]), i, 0)
    return Job(prompt, sampling, directive, monitors, wanted)


def same(a, b):
    """Two lists of steps: tokens equal, numbers to within rounding."""
    assert [type(x) for x in a] == [type(x) for x in b]
    for one, other in zip(a, b, strict=True):
        if isinstance(one, End):
            assert one == other
            continue
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [(x.monitor, x.position) for x in one.alarms] == [
            (x.monitor, x.position) for x in other.alarms
        ]
        assert [x.position for x in one.readings] == [x.position for x in other.readings]
        for x, y in zip(one.readings, other.readings, strict=True):
            assert dict(x.latents) == pytest.approx(dict(y.latents), abs=1e-4)


def test_64_jobs_with_their_own_edits_equal_their_solo_runs(batching):
    r = random.Random(0)
    jobs = [a_job(r, i) for i in range(64)]
    together = run(jobs, batching)
    assert batching.load() == Load(0, 0, 0)
    order = r.sample(range(64), 64)  # once more in other company, on rows that others had before
    again = run([jobs[i] for i in order], batching)
    for i, job in enumerate(jobs):
        alone = run([job], batching).items[0]
        same(together.items[i], alone)
        same(again.items[order.index(i)], alone)
    assert len({tuple(together.tokens(i)) for i in range(64)}) > 50  # they differ from each other


def test_solo_runs_are_what_attach_and_generate_write(batching, model, saes):
    r = random.Random(1)
    for i in range(12):
        name = NAMES[i % 2]
        edits = [
            EditSpec(name, r.randrange(LATENTS), op, r.uniform(-6, 6), phase)
            for op, phase in zip(("add", "clamp"), r.sample(PHASES, 2), strict=True)
        ]
        ids = [r.randrange(3, VOCAB) for _ in range(6)]
        directive = Directive(tuple(edits), (name,) if i % 3 == 0 else ())
        found = run([Job(tuple(ids), Sampling(10, 0.0), directive)], batching).tokens(0)
        with attach(model, saes[name], [e.edit(saes[name]) for e in edits], splice=i % 3 == 0):
            given = torch.tensor([ids])
            out = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=10, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert found == out[0, len(ids) :].tolist()


def test_an_edit_reaches_no_other_job(batching):
    """Every other job is what it is beside the same jobs with edits that do next to nothing."""
    r = random.Random(2)
    prompts = [tuple(r.randrange(3, VOCAB) for _ in range(8)) for _ in range(16)]

    def jobs(amount):
        for i, prompt in enumerate(prompts):
            edits = (EditSpec(NAMES[0], i, "add", amount if i % 2 else 2.0),)
            yield Job(prompt, Sampling(12, 0.0, logprobs=3), Directive(edits, key=f"{i} {amount}"))

    quiet, loud = (run(list(jobs(amount)), batching) for amount in (1e-30, 40.0))
    for i in range(16):
        ours, theirs = (
            [x.logprob for x in heard.items[i] if isinstance(x, Step)] for heard in (quiet, loud)
        )
        if i % 2:
            assert ours[0] != pytest.approx(theirs[0], abs=1e-2)
        else:
            assert quiet.tokens(i) == loud.tokens(i)
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom", "opt", "qwen3_moe"])
def test_architectures(name, saes):
    """Sliding windows of 4 and ALiBi included: rows of different lengths equal solo runs."""
    made = engine(tiny(name), saes)
    try:
        r = random.Random(3)
        jobs = [a_job(r, i) for i in range(10)]
        together = run(jobs, made)
        for i, job in enumerate(jobs):
            same(together.items[i], run([job], made).items[0])
    finally:
        made.close()


def test_a_model_with_a_state_is_refused():
    with pytest.raises(ValueError, match="cannot share a batch"):
        Passes(tiny("mamba"), {}, {}, 3)


def test_a_misfit_is_refused_and_leaves_no_hooks():
    from engine_fakes import sae

    model = tiny("gpt2")
    with pytest.raises(ValueError, match=f"width {D}"):
        Passes(model, {NAMES[0]: sae()}, {NAMES[0]: Attached("x", 40, 4)}, 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_resid_mid_is_refused():
    with pytest.raises(ValueError, match="keeps a copy"):
        Passes(
            tiny("gpt2"),
            {"resid_mid.1": make_sae("resid_mid.1", TopK(4))},
            {"resid_mid.1": Attached("x", LATENTS, 4)},
            3,
        )


def test_cancellation_frees_the_row_at_once(model, saes):
    made = engine(model, saes, streams=2, waiting=3)
    try:
        edit = Directive((EditSpec(NAMES[0], 3, "add", 5.0),))
        jobs = [Job((5, 6, 7), Sampling(100, 0.0), edit)] * 5
        heard = Heard(jobs[:2], made)
        while made.load().running < 2:
            pass
        heard2 = Heard(jobs[2:5], made)
        with pytest.raises(Busy):
            made.submit(jobs[0], lambda item: None)
        for name in (*heard.names, *heard2.names):
            made.cancel(name)
        heard.wait(), heard2.wait()
        ends = [items[-1].reason for items in (*heard.items, *heard2.items)]
        assert set(ends) == {"cancelled"}
        made.cancel("nobody")
        assert made.load() == Load(0, 0, 0)
        after = run([Job((5, 6, 7), Sampling(6, 0.0))], made).tokens(0)
        plain = model.generate(
            torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long),
            max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert after == plain[0, 3:].tolist()  # whose row had edits before
    finally:
        made.close()
    with pytest.raises(Closing):
        made.submit(jobs[0], lambda item: None)


def test_close_waits_for_its_grace(model, saes):
    made = engine(model, saes)
    heard = Heard([Job((5, 6), Sampling(20, 0.0))], made)
    made.close(grace=30)
    assert heard.wait().items[0][-1] == End("length")
    made = engine(model, saes)
    heard = Heard([Job((5, 6), Sampling(120, 0.0))] * 3, made)
    made.close()
    assert {items[-1].reason for items in heard.wait().items} == {"cancelled"}


def test_a_pass_that_fails_ends_its_jobs_only(model, saes, monkeypatch):
    made = engine(model, saes)
    try:
        real, calls = made._passes.token, []

        def broken(*args):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return real(*args)

        monkeypatch.setattr(made._passes, "token", broken)
        job = Job((5, 6), Sampling(8, 0.0))
        assert run([job], made).items[0][-1] == End("error", "the model failed: RuntimeError")
        assert run([job], made).items[0][-1] == End("length")
        assert made.load() == Load(0, 0, 0)
    finally:
        made.close()


def test_padded_rows_keep_their_columns():
    def cache(n, value):
        from transformers import DynamicCache

        made = DynamicCache()
        made.update(torch.full((1, 2, n, 3), value), torch.full((1, 2, n, 3), -value), 0)
        return made, n

    padded = Padded()
    padded.join([cache(2, 1.0), cache(4, 2.0)])
    padded.join([cache(3, 3.0)])
    assert padded.lengths == [2, 4, 3]
    mask, positions = padded.next(torch.device("cpu"))
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]]
    assert positions.tolist() == [2, 4, 3]
    padded.keep([2, 0])
    keys = padded.cache.layers[0].keys
    assert keys.shape == (2, 2, 3, 3)
    assert keys[:, 0, :, 0].tolist() == [[3.0, 3.0, 3.0], [0.0, 1.0, 1.0]]
    padded.keep([])
    assert len(padded) == 0 and padded.width == 0


def test_draws_follow_the_distribution():
    """Frequencies against the definition, to within five standard errors."""
    logits, n = torch.randn(1, 9), 20_000
    source = generator(5, torch.device("cpu"))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.5, 0.4)):
        how = [Sampling(1, temperature, top_p)] * n
        drawn = torch.tensor(draw(logits.expand(n, -1), how, [source] * n))
        p = (logits[0].double() / temperature).softmax(-1)
        kept, total = [], 0.0
        for token in p.argsort(descending=True).tolist():
            kept.append(token)
            total += float(p[token])
            if total >= top_p:
                break
        nucleus = torch.zeros(9, dtype=torch.float64)
        nucleus[kept] = p[kept] / p[kept].sum()
        off = (torch.bincount(drawn, minlength=9).double() / n - nucleus).abs()
        assert (off <= 5 * (nucleus * (1 - nucleus) / n).sqrt()).all()
    assert draw(logits, [Sampling(1, 0.0)], [source]) == [int(logits.argmax())]


def test_draws_hardly_notice_rounding():
    """3,000 draws from 5,000 tokens, and again with logits that are 1e-5 off."""
    how = [Sampling(1)] * 100
    flipped = 0
    for i in range(30):
        logits = 3 * torch.randn(1, 5000).expand(100, -1)
        near = logits + 1e-5 * torch.randn(logits.shape)
        ours, theirs = (
            draw(x, how, [generator(100 * i + j, x.device) for j in range(100)])
            for x in (logits, near)
        )
        flipped += sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert flipped <= 1  # with the inverse distribution function it is some 5


def test_clamp_of_a_monitor_is_the_conditional_edit(saes):
    edit = Monitor(NAMES[0], 3, 0.5, "clamp", 2.0, "generated").edit().edit(saes[NAMES[0]])
    assert (edit.latents, edit.amount, edit.op) == ((3,), 2.0, clamp(3, 2.0).op)
    assert (edit.select.when.latent, edit.select.when.above) == (3, 0.5)
    assert Monitor(NAMES[0], 3, 0.5).edit() is None


def test_a_monitor_is_not_silent_at_a_token_that_it_cannot_read(batching):
    """The norm behind it makes a huge hidden state finite again: nothing else would notice."""
    first, second = NAMES
    huge = EditSpec(sae=first, latent=3, op="add", amount=1e19, phase="generated")
    for action in ("flag", "stop"):
        watch = Monitor(second, 5, 1e6, action)
        directive = Directive((huge,), codes=(second,), key=f"huge {action}")
        job = Job((5, 6, 7), Sampling(4, 0.0), directive, (watch,), (Wanted(second, 3),))
        heard = Heard([job], batching)
        heard.wait()
        *steps, end = heard.items[0]
        assert [alarm.position for step in steps for alarm in step.alarms][0] == 3
        assert not any(step.alarms for step in steps[:1])  # the prompt can be read
        assert all(math.isnan(alarm.activation) for step in steps for alarm in step.alarms)
        assert end.reason == ("monitor" if action == "stop" else "length")
        assert all(reading.latents == () for reading in steps[1].readings)


def test_tokens_that_the_model_does_not_know_are_refused(batching):
    with pytest.raises(ValueError, match=f"token {VOCAB}; the model has {VOCAB}"):
        batching.submit(Job((5, VOCAB), Sampling(4, 0.0)), lambda item: None)
