"""Engines' parts in one process: directives, rows, codes, taps on flat tokens, hooks for SGLang."""

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from engine_fakes import LATENTS, D, Model, Runner, jump, sae
from tiny_models import tiny
from torch import nn

from saert.architecture import HookpointError
from saert.edits import Edit, ablate, active, add, add_vector, clamp, scale
from saert.engines.codes import Chunk, CodeStore, joined, pack, unpack
from saert.engines.directive import Attached, Directive, find, specs
from saert.engines.places import place
from saert.engines.rows import Rows, batch_of
from saert.engines.sglang import make
from saert.engines.taps import StreamHook
from saert.engines.vllm.engine import Engine
from saert.engines.vllm.plugin import admit, check_registered, register
from saert.engines.vllm.station import Station
from saert.engines.vllm.support import (
    EXTENSION,
    RUNNER,
    WORKER,
    Unsupported,
    check_config,
    check_version,
)
from saert.hookpoint import Hookpoint
from saert.hub.format import save
from saert.measure.steering.spec import EditSpec
from saert.plan import compile_plan, edit
from saert.runtime import attach
from saert.sparse import SparseCode

AT = "layers.0"
CATALOGUE = {AT: Attached("org/repo:a", LATENTS, 4), "resid_post.1": Attached("b", LATENTS, 4)}


def spec(latent: int, op: str = "add", amount: float = 2.0, **rest: object) -> dict:
    return EditSpec(AT, latent, op, amount, **rest).to_dict()  # type: ignore[arg-type]


WHEN = spec(9, amount=5.0, when=11, above=0.1)

# --------------------------------------------------------------------------- directives


def test_a_directive_survives_json():
    asked = Directive.parse(
        {"edits": [spec(3, when=2, above=0.5)], "splice": AT, "codes": [AT], "key": "k"}
    )
    assert Directive.parse(json.dumps(asked.to_data())) == asked
    assert asked.splice == asked.codes == (AT,) and asked.names == {AT}
    assert Directive.parse([]).empty and not asked.empty
    assert Directive.parse(json.dumps([spec(3)])).edits == (EditSpec(AT, 3, "add", 2.0),)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "found int"),
        ("[", "not JSON"),
        ({"edit": []}, "unknown key 'edit'"),
        ({"splice": [3]}, "splice"),
        ({"key": 3}, "key"),
        ({"edits": 3}, "expected a list of edits"),
        ([3], "found int"),
        ([dict(spec(3), op="shout")], "shout"),
        ([{"sae": AT}], "'latent' is missing"),
        ([dict(spec(3), amount=float("nan"))], "finite"),
    ],
)
def test_bad_directives_are_refused(given, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Directive.parse(given)


def test_edits_of_latents_are_plain_data():
    given: list[Edit] = [
        ablate([3, 4], sae=AT),
        scale(5, 2.0, sae="blocks.1.hook_resid_post", phase="prompt", when=active(2, 0.5)),
        clamp(6, 1.5, sae=sae()),
    ]
    assert specs(given) == (
        EditSpec(AT, 3, "clamp"),
        EditSpec(AT, 4, "clamp"),
        EditSpec("resid_post.1", 5, "scale", 2.0, "prompt", 2, 0.5),
        EditSpec(AT, 6, "clamp", 1.5),
    )
    for bad, words in (
        (add(3, 1.0), "which SAE"),
        (add(3, 1.0, sae=AT, rows=0), "rows or positions"),
        (add(3, 1.0, sae=AT, positions=-1), "rows or positions"),
    ):
        with pytest.raises(ValueError, match=words):
            specs(bad)
    with pytest.raises(TypeError, match="edit of latents"):
        specs([add_vector(torch.ones(D), sae=AT)])


def test_names_are_resolved_and_checked():
    assert find("b", CATALOGUE) == find("blocks.1.hook_resid_post", CATALOGUE) == "resid_post.1"
    resolved = Directive.parse({"edits": [dict(spec(3), sae="b")], "codes": ["org/repo:a"]})
    resolved = resolved.resolved(CATALOGUE)
    assert resolved.edits[0].sae == "resid_post.1" and resolved.codes == (AT,)
    for bad, words in (
        ([dict(spec(3), sae="c")], r"no SAE 'c'.*layers.0 \(org/repo:a\)"),
        ([spec(LATENTS)], "does not exist"),
        ([spec(1, when=LATENTS)], "does not exist"),
        ([spec(1)] * 5, "5 edits.*4 slots"),
        ({"splice": ["c"]}, "no SAE"),
    ):
        with pytest.raises(ValueError, match=words):
            Directive.parse(bad).resolved(CATALOGUE)


def test_salts_tell_apart_what_keys_depend_on():
    def salt(given=None, length=9, catalogue=CATALOGUE, asked=()):
        return Directive.parse(asked).salt(given, length, catalogue)

    assert salt() is None and salt("mine") == "mine"  # nothing changes, nothing to hide
    assert salt(asked={"codes": [AT]}) is None
    everywhere, phased = [spec(3)], [spec(3, phase="generated")]
    assert salt(asked=everywhere) == salt(asked=everywhere, length=10)
    assert salt(asked=phased) != salt(asked=phased, length=10)
    other = CATALOGUE | {AT: Attached("org/repo:a", LATENTS, 4, tag="later")}
    salts = [
        salt(asked=everywhere),
        salt("mine", asked=everywhere),
        salt(asked=phased),
        salt(asked=[spec(4)]),
        salt(asked=[spec(3, amount=2.5)]),
        salt(asked={"splice": [AT]}),
        salt(asked={"edits": everywhere, "splice": [AT]}),
        salt(asked=everywhere, catalogue=other),
        salt(asked=[spec(3), spec(3, "scale")]),
        salt(asked=[spec(3, "scale"), spec(3)]),
    ]
    assert None not in salts and len(set(salts)) == len(salts)


# --------------------------------------------------------------------------- rows and codes


def test_rows_are_lent_and_taken_back():
    rows = Rows(2)
    assert rows.lend("a") == 1 == rows.lend("a") and rows.lend("b") == 2 and rows.of("c") == 0
    with pytest.raises(RuntimeError, match="all 2 rows"):
        rows.lend("c")
    rows.keep(["b"])
    assert rows.of("a") == 0 and rows.lend("c") == 1 and rows.of("b") == 2


def test_a_batch_is_the_tokens_of_those_who_ask():
    asked = [None, Directive.parse([spec(3)]), Directive.parse({"codes": [AT], "key": "k"})]
    positions = torch.tensor([0, 1, 5, 7, 8, 9])
    batch = batch_of(AT, asked, [0, 1, 2], [0, 2, 3, 6], positions)
    assert batch is not None and batch.tokens.tolist() == [2, 3, 4, 5]
    assert batch.rows.tolist() == [1, 2, 2, 2] and batch.positions.tolist() == [5, 7, 8, 9]
    assert batch.edited and not batch.spliced and batch.kept == (("k", 1, 4),)
    assert batch_of("resid_post.1", asked, [0, 1, 2], [0, 2, 3, 6], positions) is None


def code(*latents: int) -> SparseCode:
    return SparseCode(torch.tensor([[x] for x in latents]), torch.ones(len(latents), 1), LATENTS)


def test_codes_wait_for_their_caller():
    store = CodeStore(limit=5)
    store.add("a", AT, Chunk(torch.tensor([2, 3]), code(2, 3)))
    store.add("a", AT, Chunk(torch.tensor([0, 2]), code(0, 9)))  # position 2 ran again
    store.add("b", AT, Chunk(torch.tensor([0]), code(5)))
    found = unpack(store.take("a")[AT])
    assert found.positions.tolist() == [0, 2, 3]
    assert found.code.indices[:, 0].tolist() == [0, 9, 3] and found.code.num_latents == LATENTS
    assert store.take("a") == {} and store.tokens == 1
    for key in "cdefg":
        store.add(key, AT, Chunk(torch.tensor([0]), code(5)))
    assert store.tokens == 5 and store.take("b") == {}  # the oldest was forgotten
    both = joined([unpack(pack(Chunk(torch.tensor([1]), code(4))))])
    assert both.code.indices.tolist() == [[4]]


# --------------------------------------------------------------------------- taps


@pytest.mark.parametrize("kind", ["pair", "flat", "batch"])
@pytest.mark.parametrize("make_sae", [sae, jump])
def test_requests_in_one_batch_are_what_they_are_alone(kind, make_sae):
    """Requests of different edits, that join and leave, against `attach` on each alone."""
    model, one = Model(kind), make_sae()
    runner = Runner(model)
    station = Station(runner, shards=1, rows=3, slots=4, keeps=True)
    station.attach(AT, one)
    wishes: dict[str, tuple[list[Edit], dict]] = {
        "a": ([add(3, 2.0), scale(3, 3.0)], dict(edits=[spec(3), spec(3, "scale", 3.0)])),
        "b": ([], {}),
        "c": (
            [clamp(5, 4.0, phase="generated")],
            dict(edits=[spec(5, "clamp", 4.0, phase="generated")], codes=[AT], key="c"),
        ),
        "d": ([ablate(7, phase="prompt")], dict(edits=[spec(7, "ablate", 0.0, phase="prompt")])),
        "e": ([add(9, 5.0, when=active(11, 0.1))], dict(edits=[WHEN], splice=[AT])),
    }  # fmt: skip
    x = {name: torch.randn(8, D) for name in wishes}
    for name, (_, saert) in wishes.items():
        runner.add(name, 5, saert or None)
    got: dict[str, list[torch.Tensor]] = {name: [] for name in wishes}
    passes = [
        dict(a=(0, 4), b=(0, 8)), dict(c=(0, 3), a=(4, 5)), dict(a=(5, 8), d=(0, 6), c=(3, 8)),
        dict(d=(6, 7), e=(0, 8)), dict(e=(0, 0), d=(7, 8)),
    ]  # fmt: skip
    for scheduled in passes:
        out = runner.step(**{n: (x[n][i:j], i) for n, (i, j) in scheduled.items()})
        for name, part in out.items():
            got[name].append(part)
    for name, (edits, saert) in wishes.items():
        plain = Model(kind)
        plain.load_state_dict(model.state_dict())
        expected = alone(plain, make_sae(), x[name], edits, bool(saert.get("splice")))
        torch.testing.assert_close(torch.cat(got[name]), expected, rtol=1e-5, atol=1e-5)
    untouched = Model(kind)
    untouched.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(torch.cat(got["b"]), untouched(x["b"]))
    with torch.no_grad():
        stream = untouched(x["c"])
    found = unpack(station.store.take("c")[AT])
    torch.testing.assert_close(found.code.to_dense(), make_sae().encode(stream).to_dense())


def alone(model, one, x, edits, splice):
    """The block's stream with `saert.plan`'s own edits; the first five tokens are the prompt."""
    with torch.no_grad():
        stream = model(x)
        plan = compile_plan(edits, [], one)
        past = torch.arange(len(x)) >= 5
        gates = {"all": torch.ones_like(past), "prompt": ~past, "generated": past}
        columns = [gates[e.select.phase] for e in edits for _ in e.latents]
        plan = plan.gated(torch.stack(columns, -1) if columns else None, None)
        return edit(stream, one, plan, splice=splice)


@pytest.mark.parametrize("huge", [torch.inf, torch.nan, 1e30])
def test_a_token_that_overflows_stays_its_own_problem(huge):
    model = Model("pair")
    runner = Runner(model)
    station = Station(runner, shards=1, rows=3, slots=4, keeps=True)
    station.attach(AT, sae())
    x = torch.randn(3, D)
    bad = x.clone()
    bad[1] = huge
    wish = {"edits": [spec(3, "scale"), spec(4)], "splice": [AT], "codes": [AT]}
    for name in "ab":
        runner.add(name, 3, wish | {"key": name})
    runner.add("plain", 3)
    out = runner.step(a=(bad, 0), b=(x, 0), plain=(bad, 0))
    assert out["b"].isfinite().all() and torch.equal(out["a"][[0, 2]], out["b"][[0, 2]])
    assert out["a"][1].allclose(out["plain"][1], rtol=0, atol=0, equal_nan=True)
    kept = unpack(station.store.take("a")[AT]).code
    assert kept.values[1].isnan().all()  # nobody takes it for a token where nothing fires
    assert kept.values[0].isfinite().all() and kept.values[0].ne(0).any()


def test_a_row_forgets_whose_it_was():
    runner = Runner(Model())
    station = Station(runner, shards=1, rows=2, slots=4, keeps=True)
    station.attach(AT, sae())
    x = torch.randn(2, D)
    runner.add("first", 2, {"edits": [spec(3)], "splice": [AT]})
    runner.step(first=(x, 0))
    runner.add("watched", 2, {"codes": [AT], "key": "k"})
    runner.add("edited", 2, {"edits": [spec(4)], "splice": [AT]})
    runner.add("plain", 2)
    runner.step(watched=(x, 0))  # where the first one was
    out = runner.step(watched=(x, 0), edited=(x, 0), plain=(x, 0))
    assert torch.equal(out["watched"], out["plain"])
    assert not torch.equal(out["edited"], out["plain"])
    with torch.inference_mode():  # a rehearsal of the engine's, which no request is in
        torch.testing.assert_close(runner.model(x), out["plain"])


class FusedNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x


def test_a_fused_norm_is_no_block():
    """It returns (normed, stream), a block (what it adds, stream): only the latter are summed."""
    x, seen = torch.randn(2, D), []
    for module in (FusedNorm(), Model().layers[0]):
        StreamHook(lambda hidden, residual: seen.append(residual))(module, (), module(x))
    assert seen[0] is None and torch.equal(seen[1], x)


def test_a_station_refuses_and_stays_as_it_was():
    runner = Runner(Model())
    with pytest.raises(Unsupported, match="_model_forward"):
        Station(SimpleNamespace(), shards=1, rows=3, slots=4, keeps=True)
    station = Station(runner, shards=1, rows=3, slots=4, keeps=False)
    station.attach(AT, sae())
    with pytest.raises(ValueError, match="already"):
        station.attach(AT, sae())
    runner.add("a", 3, [spec(3)])
    with pytest.raises(ValueError, match="1 requests that run now"):
        station.detach(AT)
    edited = runner.step(a=(torch.ones(3, D), 0))["a"]
    del runner.requests["a"]
    station.detach(AT)
    with pytest.raises(ValueError, match="no SAE"):
        station.detach(AT)
    runner.add("a", 3, [spec(3)])
    plain = runner.step(a=(torch.ones(3, D), 0))["a"]
    assert not runner.model.layers[0]._forward_hooks and not torch.equal(edited, plain)


def test_a_width_that_does_not_fit_is_named():
    runner = Runner(nn.Sequential(nn.Linear(D, 5)))
    Station(runner, shards=1, rows=3, slots=4, keeps=False).attach("0", sae())
    runner.add("a", 3)
    with pytest.raises(ValueError, match=r"\[6, 5\].*reads width 12"):
        runner.step(a=(torch.ones(3, D), 0))


def test_a_request_id_may_come_again():
    runner = Runner(Model())
    station = Station(runner, shards=1, rows=1, slots=4, keeps=False)
    station.attach(AT, sae())
    x, seen = torch.ones(2, D), []
    for wish in ([spec(3)], [spec(4)], None, [spec(3)]):
        runner.add("a", 2, wish)
        seen.append(runner.step(a=(x, 0))["a"])
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


# --------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("at", "shards", "words"),
    [
        ("resid_pre.0", 1, "resid_post.0"),
        ("resid_mid.1", 1, "fused norms"),
        ("attn_z.1", 2, "splits this tensor"),
        ("mlp_act.1", 2, "splits this tensor"),
        ("model.layers.1:in", 1, "several tensors"),
        ("resid_post.9", 1, "layers 0 to 2"),
    ],
)
def test_places_an_engine_does_not_have(at, shards, words):
    with pytest.raises(HookpointError, match=words):
        place(tiny("llama"), Hookpoint.parse(at), shards=shards)


def test_places():
    model = tiny("llama")
    before = place(model, Hookpoint.parse("resid_pre.2"))
    assert before == place(model, Hookpoint.parse("resid_post.1"), shards=2)
    assert (before.path, before.side) == ("model.layers.1", "out")
    assert place(model, Hookpoint.parse("mlp_act.1")).path.endswith("down_proj")


# --------------------------------------------------------------------------- vLLM's front door


def config(model=(), **changes):
    model = dict(model)
    parallel = dict(
        worker_cls=WORKER, worker_extension_cls="", pipeline_parallel_size=1, use_ubatching=False
    )
    facts = dict(
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(**parallel | changes.pop("parallel", {})),
        compilation_config=SimpleNamespace(mode=0, pass_config=SimpleNamespace(enable_sp=False)),
        speculative_config=None,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(
            uses_mrope=False,
            is_encoder_decoder=False,
            runner_type="generate",
            **dict(generation_config="auto", override_generation_config={}) | model,
            get_vocab_size=lambda: 100,
        ),
        additional_config={"saert": {"catalogue": {AT: vars(CATALOGUE[AT])}}},
    )
    return SimpleNamespace(**facts | changes)


def request(saert=None, **changes):
    params = SimpleNamespace(
        extra_args=None if saert is None else {"saert": saert, "other": 1},
        n=1,
        skip_reading_prefix_cache=None,
        logit_bias=None,
    )
    facts = dict(sampling_params=params, cache_salt=None, resumable=False, prompt_embeds=None)
    return SimpleNamespace(**facts | dict(prompt_token_ids=[1, 2, 3]) | changes)


@pytest.fixture
def vllm(monkeypatch):
    module = SimpleNamespace(__version__="0.32.0", __spec__=None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def door(vllm, monkeypatch):
    """vLLM's `InputProcessor`, as far as the plugin looks at it."""

    class InputProcessor:
        def __init__(self, config, **generation):
            self.vllm_config, self.generation_config_fields = config, generation

        def process_inputs(self, request):
            return request

    module = SimpleNamespace(InputProcessor=InputProcessor)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.input_processor", module)
    monkeypatch.setenv(RUNNER, "")
    monkeypatch.delenv(RUNNER)
    return InputProcessor


def test_a_worker_misses_the_plugin(door):
    with pytest.raises(Unsupported, match="did not load saert's plugin.*VLLM_PLUGINS"):
        check_registered()
    register()
    check_registered()
    once = door.process_inputs
    register()
    assert door.process_inputs is once and os.environ[RUNNER] == "0"


def test_a_vllm_that_we_do_not_know_is_left_alone(door, vllm):
    vllm.__version__ = "0.99.1"
    before = door.process_inputs
    register()
    assert door.process_inputs is before and RUNNER not in os.environ
    with pytest.raises(Unsupported, match="found 0.99.1"):
        Engine(None)
    with pytest.raises(Unsupported, match="found 0.99.1"):
        Engine.start("model")


def test_tokens_that_a_model_never_draws(door):
    """`suppress_tokens`: those there are, unless the request itself says something of them."""
    register()
    says = {"suppress_tokens": [1, 5, -1, 100]}

    def bias(own=None, says=says, saert=None, **changes):
        one = request(saert)
        one.sampling_params.logit_bias = own
        door(config(**changes), **says).process_inputs(one)
        return one.sampling_params.logit_bias

    own = {5: 2.0, 7: 1.0}
    assert bias() == bias(saert=[spec(3)]) == {1: -math.inf, 5: -math.inf}
    assert bias(own) == {1: -math.inf, 5: 2.0, 7: 1.0} and own == {5: 2.0, 7: 1.0}
    assert bias(says={}) is bias(says={"suppress_tokens": None}) is None
    assert bias(own, says={}) is own
    assert bias(model=dict(generation_config="vllm")) is None
    assert bias(model=dict(override_generation_config={"suppress_tokens": [2]})) == {2: -math.inf}
    extension = dict(worker_cls="auto", worker_extension_cls=EXTENSION)
    assert bias(parallel=extension) == bias()
    assert bias(parallel=dict(worker_cls="auto")) is None  # an engine that is none of ours
    pooling = request(sampling_params=None)
    assert door(config(), **says).process_inputs(pooling) is pooling


def test_without_params_an_engine_takes_the_models_defaults(door):
    class Params(SimpleNamespace):
        def clone(self):
            return Params(**vars(self))

    asked = []
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=config()),
        get_default_sampling_params=lambda: Params(temperature=0.5, extra_args=None),
        generate=lambda prompts, params, use_tqdm: asked.extend(params) or [None] * len(prompts),
    )
    engine = Engine(llm)
    engine.generate(["a", "b"], edits=[[spec(3)], []])
    engine.generate("a", Params(temperature=0.0, extra_args=None))
    assert [one.temperature for one in asked] == [0.5, 0.5, 0.0]
    assert [one.extra_args is None for one in asked] == [False, True, True]
    with pytest.raises(ValueError, match="0 params for 1 prompts"):
        engine.generate("a", [])


def test_requests_are_salted_whether_or_not_their_user_thought_of_it(vllm):
    plain, edited, phased = request(), request([spec(3)]), request(json.dumps([spec(3)]))
    for one in (plain, edited, phased):
        admit(config(), one)
    assert plain.cache_salt is None and plain.sampling_params.extra_args is None
    assert edited.cache_salt == phased.cache_salt and "saert:" in edited.cache_salt
    assert edited.sampling_params.extra_args["other"] == 1
    assert Directive.parse(edited.sampling_params.extra_args["saert"]).at(AT)
    own = request([spec(3)], cache_salt="mine")
    admit(config(), own)
    assert own.cache_salt.startswith("mine|saert:")
    watched = request({"codes": [AT], "key": "k"})
    admit(config(), watched)
    assert watched.cache_salt is None and watched.sampling_params.skip_reading_prefix_cache


def test_edits_of_every_request_come_first(vllm):
    settings = config()
    settings.additional_config["saert"]["default"] = {"edits": [spec(4)]}
    plain, own = request(), request([spec(3)])
    admit(settings, plain)
    admit(settings, own)
    first = Directive.parse(plain.sampling_params.extra_args["saert"])
    both = Directive.parse(own.sampling_params.extra_args["saert"])
    assert [e.latent for e in first.edits] == [4] and [e.latent for e in both.edits] == [4, 3]
    assert plain.cache_salt and plain.cache_salt != own.cache_salt
    admit(settings, request(sampling_params=None))  # pooling has no continuation to edit


def test_what_cannot_be_done_is_refused_at_the_door(vllm):
    for bad, words in (
        ([spec(LATENTS)], "does not exist"),
        ([dict(spec(1), sae="x")], "no SAE"),
        ({"codes": [AT]}, "key"),
        ("[", "not JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            admit(config(), request(bad))
    twice = request({"codes": [AT], "key": "k"})
    twice.sampling_params.n = 2
    with pytest.raises(ValueError, match="n=1"):
        admit(config(), twice)
    with pytest.raises(ValueError, match="streamed"):
        admit(config(), request([spec(1)], resumable=True))
    with pytest.raises(Unsupported, match="know nothing of it"):
        admit(config(parallel=dict(worker_cls="auto")), request([spec(1)]))
    vllm.__version__ = "0.99.1"
    with pytest.raises(Unsupported, match="found 0.99.1"):
        admit(config(), request([spec(1)]))
    admit(config(), request())  # and nobody else notices


def test_versions_and_settings():
    for version in ("0.32", "0.32.0", "0.32.5+cpu", "0.32.1rc1.post2"):
        check_version(version)
    for version in ("0.31.9", "0.33.0", "1.0", "dev"):
        with pytest.raises(Unsupported, match="pip install"):
            check_version(version)
    check_config(config())
    for changes, words in (
        (dict(use_v2_model_runner=True), "V2"),
        (dict(parallel=dict(pipeline_parallel_size=2)), "pipeline_parallel_size is 2"),
        (dict(parallel=dict(data_parallel_size=2)), "data_parallel_size is 2, expected 1"),
        (dict(parallel=dict(prefill_context_parallel_size=4)), "prefill_context.* is 4"),
        (dict(parallel=dict(use_ubatching=True)), "micro-batches"),
        (dict(speculative_config=object()), "speculatively"),
        (dict(cache_config=SimpleNamespace(kv_sharing_fast_prefill=True)), "fast_prefill"),
    ):
        with pytest.raises(Unsupported, match=words):
            check_config(config(**changes))


# --------------------------------------------------------------------------- SGLang


@pytest.mark.parametrize("kind", ["pair", "flat", "batch"])
def test_the_hook_that_sglang_registers(tmp_path, kind):
    save(sae(), tmp_path / "sae")
    source = str(tmp_path / "sae")
    model, x = Model(kind), torch.randn(6, D)
    with torch.no_grad():
        plain = model(x)
    for settings, edits in (
        (dict(edits=[dict(latent=3, amount=2.0), dict(latent=5, op="scale", amount=3.0)]),
         [add(3, 2.0), scale(5, 3.0)]),
        (dict(edits=[dict(sae=source, latent=7, op="ablate")], splice=True), [ablate(7)]),
        (dict(splice=True), []),
    ):  # fmt: skip
        handle = model.layers[0].register_forward_hook(make(dict(sae=source) | settings))
        with torch.inference_mode():
            found = model(x)
        handle.remove()
        plan = compile_plan(edits, [], sae())
        expected = edit(plain, sae(), plan, splice=bool(settings.get("splice")))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(found, plain)
    handle = model.layers[0].register_forward_hook(make(dict(sae=source)))
    with torch.inference_mode():
        assert torch.equal(model(x), plain)
        assert model(x[:0]).shape == (0, D)
    handle.remove()


def test_the_hook_agrees_with_attach(tmp_path):
    save(sae(), tmp_path / "sae")
    model, x = Model("flat"), torch.randn(6, D)
    with attach(model, sae(), add(3, 2.0)), torch.no_grad():
        expected = model(x)
    hook = make(dict(sae=str(tmp_path / "sae"), edits=[dict(latent=3, amount=2.0)]))
    model.layers[0].register_forward_hook(hook)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "expected a source"),
        (dict(sae=3), "expected a source"),
        (dict(sae="x", phase="all"), "unknown setting 'phase'"),
        (dict(sae="x", edits=[dict(latent=1, phase="prompt")]), "where a prompt ends"),
        (dict(sae="x", edits=[dict(latent=1, sae="y")]), "this hook has x"),
        (dict(sae="x", splice="yes"), "true or false"),
        (dict(sae="bundled:resid_post.2", edits=[dict(latent=10**6)]), "does not exist"),
        (dict(sae="bundled:mlp_in.2"), "transcoder"),
    ],
)
def test_settings_sglang_users_get_wrong(settings, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make(settings)
