"""vLLM against saert on transformers: same edits, same greedy tokens, same codes.

`make setup-vllm` makes an environment with vLLM for CPU; SAERT_VLLM_PYTHON names its python, and
without one these tests skip. An engine takes a minute or more to start, so each test is one engine
with many steps, and two of them run at a time.
"""

import json
import os
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_run
from tiny_models import build
from vllm_cases import (
    BUNDLED,
    EARLY,
    FOOD,
    MIXED,
    MLP,
    RESID,
    TEXTS,
    Reference,
    agreed,
    dense,
    spec,
)

from saert.activations import JumpReLU
from saert.engines.vllm.support import RUNNER
from saert.hub import bundled
from saert.hub.format import save
from saert.sae import SAE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2400)]

PYTHON = os.environ.get("SAERT_VLLM_PYTHON", ".venv-vllm/bin/python")
ROOT = Path(__file__).parents[1]
TOKENS = 16
SMALL = dict(  # prompts run in chunks, and fill blocks of the prefix cache
    max_model_len=128, max_num_seqs=4, max_num_batched_tokens=32, block_size=32
)
NATIVE = SMALL | dict(model_impl="vllm")
# vLLM 0.32's transformers backend cannot load GPT-2 (the biases of c_attn), but Llama
BACKEND = SMALL | dict(model_impl="transformers")
EAGER = dict(enforce_eager=True)
TWO = dict(tensor_parallel_size=2)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def python() -> str:
    """The python of an environment with vLLM. Without one: a visible skip."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if not Path(PYTHON).exists() or subprocess.run([PYTHON, "-c", probe]).returncode:
        pytest.skip(f"{PYTHON} has no vllm; `make setup-vllm`, or set SAERT_VLLM_PYTHON")
    return PYTHON


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache of compiled graphs: empty to begin with, and shared by the engines."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would write of our entry points, for an environment where saert is only a path."""
    folder = tmp_path_factory.mktemp("installed")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        line
        for group, points in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    info = folder / "saert-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saert\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def execute(python: str, cache: Path, installed: Path, tmp_path: Path) -> Run:
    """Let the other environment do some jobs in one process; what each of them answers."""

    def execute(jobs: list[Any], *, plugin: bool, **changes: str) -> Any:
        asked, answered = tmp_path / "jobs.json", tmp_path / "answers.json"
        asked.write_text(json.dumps(jobs))
        environment = os.environ | dict(
            PYTHONPATH=os.pathsep.join(map(str, [*([installed] if plugin else []), ROOT])),
            HF_HUB_OFFLINE="1",
            VLLM_PLUGINS="saert" if plugin else "none",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CPU_OMP_THREADS_BIND="nobind",  # others test on these cores too
            VLLM_CACHE_ROOT=str(cache),
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
            OMP_NUM_THREADS="1",
        )
        environment.pop(RUNNER, None)
        done = subprocess.run(
            [PYTHON, vllm_run.__file__, asked, answered],
            env=environment | changes,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        answers = json.loads(answered.read_text())
        for job, answer in zip(jobs, answers, strict=True):
            assert not job["steps"] or "steps" in answer, (answer, done.stderr[-6000:])
        return answers

    return execute


def job(
    steps: list[Any],
    *,
    model: Any = bundled.MODEL,
    saes: Any = BUNDLED,
    environment: Any = (),
    version: str = "",
    **options: Any,
) -> dict[str, Any]:
    facts = dict(model=str(model), saes=saes, options=options, steps=steps)
    return facts | dict(environment=dict(environment), version=version)


@pytest.fixture
def run(execute: Run) -> Run:
    """Start an engine, and let it take its steps."""

    def run(steps: list[Any], *, plugin: bool = False, **wishes: Any) -> Any:
        return execute([job(steps, **wishes)], plugin=plugin)[0]["steps"]

    return run


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = bundled.tokenizer()
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(bundled.model(), {name: bundled.sae(name) for name in (RESID, EARLY, MLP)})


def generated(prompts: list[list[int]], edits: Any = (), **wishes: Any) -> list[Any]:
    return ["generate", dict(prompts=prompts, tokens=TOKENS, edits=edits, **wishes)]


def raw(prompts: list[list[int]], saert: Any) -> list[Any]:
    """A step without `Engine`, the same wish for all."""
    return ["raw", dict(prompts=prompts, tokens=TOKENS, saert=[saert] * len(prompts))]


def all_agreed(cases: list[Any]) -> list[Any]:
    """A step that asks for all of them in one batch."""
    prompts, wishes, _ = zip(*cases, strict=True)
    return ["raw", dict(prompts=prompts, tokens=TOKENS, saert=wishes)]


def flowing(prompts: list[list[int]]) -> list[Any]:
    """A step in which requests join and one leaves while others run."""
    requests = [
        dict(prompt=prompts[0], edits=e, tokens=TOKENS, joins=3 * i) for i, e in enumerate(MIXED)
    ]
    requests.append(dict(prompt=prompts[3], edits=[FOOD], tokens=60, joins=1, leaves=9))
    return ["stream", dict(requests=requests)]


def tokens(results: list[dict[str, Any]]) -> list[list[int]]:
    return [one["tokens"] for one in results]


def test_an_eager_engine(run: Run, prompts: list[list[int]], reference: Reference) -> None:
    names = [RESID, EARLY, MLP]
    plain = [reference(ids, [], TOKENS) for ids in prompts]
    mixed = [reference(i, e, TOKENS) for i, e in zip(prompts, MIXED, strict=True)]
    food = [reference(ids, [FOOD], TOKENS) for ids in prompts]
    spliced = [reference(ids, [FOOD], TOKENS, splice=[RESID]) for ids in prompts]
    assert sum(a[0] != b[0] for a, b in zip(plain, mixed, strict=True)) >= 3  # edits that matter
    onward = [ids + one[0] + [15] for ids, one in zip(prompts, mixed, strict=True)]
    turns = [reference(i, e, TOKENS)[0] for i, e in zip(onward, MIXED, strict=True)]
    solo = [reference(prompts[0], e, TOKENS)[0] for e in MIXED]
    cases = agreed(prompts, reference, TOKENS)
    bias = [[plain[0][0][0], -100.0]]
    same_bias = [[[token], amount] for token, amount in bias]
    biased = [reference(ids, [], TOKENS, sequence_bias=same_bias) for ids in prompts]
    bad = [
        [spec("resid_post.3", 1)],
        [spec(RESID, 10**6)],
        [spec(RESID, 1, when=10**6)],
        [spec(RESID, i) for i in range(17)],
        [dict(FOOD, op="shout")],
        "not json",
    ]
    steps: list[Any] = [
        ["fails", dict(step=generated(prompts[:1], [FOOD]))],
        ["attach", dict(saes=BUNDLED)],
        generated(prompts),
        generated(prompts, MIXED, codes=names),
        generated(prompts, MIXED, codes=names),  # a warm prefix cache
        generated(prompts, MIXED),
        generated(onward, MIXED),  # what was generated, and cached so, is prompt now
        generated(prompts),
        raw(prompts, [FOOD]),
        raw(prompts, json.dumps([FOOD])),
        all_agreed(cases),
        generated(prompts),
        generated(prompts, bias=bias),
        generated(prompts, [FOOD], splice=[RESID]),
        ["for_all", dict(edits=[FOOD])],
        generated(prompts),
        ["for_all", dict()],
        generated(prompts),
        flowing(prompts),
        *(["fails", dict(step=raw(prompts[:1], one))] for one in bad),
        ["fails", dict(step=["attach", dict(saes=[f"bundled:{RESID}"])])],
        ["fails", dict(step=["attach", dict(saes={"resid_mid.1": f"bundled:{RESID}"})])],
        ["fails", dict(step=["attach", dict(saes={"mlp_act.1": f"bundled:{RESID}"})])],
        ["fails", dict(step=["attach", dict(saes=["/nowhere"])])],
        generated(prompts),
        ["detach", dict(names=[RESID])],
        ["fails", dict(step=generated(prompts[:1], [FOOD]))],
        ["attach", dict(saes={RESID: f"bundled:{RESID}"})],
        generated(prompts, [FOOD]),
    ]
    answers = iter(run(steps, saes=[], **NATIVE, **EAGER))
    kind, message = next(answers)
    assert kind == "ValueError" and "no SAE" in message and "attached: none" in message
    assert next(answers) == sorted(names)
    assert tokens(next(answers)) == [one[0] for one in plain]
    for _ in range(2):
        found = next(answers)
        assert tokens(found) == [one[0] for one in mixed]
        check_codes(found, [one[1] for one in mixed])
    again = next(answers)
    assert tokens(again) == [one[0] for one in mixed]
    assert any(one["cached"] for one in again)  # by those before, whose edits are the same
    assert tokens(next(answers)) == turns
    cached = next(answers)
    assert tokens(cached) == [one[0] for one in plain]
    assert any(one["cached"] for one in cached)
    assert next(answers) == [one[0] for one in food]  # unsalted by its user
    assert next(answers) == [one[0] for one in food]
    assert next(answers) == [expected for _, _, expected in cases]
    assert tokens(next(answers)) == [one[0] for one in plain]
    assert tokens(next(answers)) == [one[0] for one in biased] != [one[0] for one in plain]
    assert tokens(next(answers)) == [one[0] for one in spliced]
    assert next(answers) is None
    assert tokens(next(answers)) == [one[0] for one in food]
    assert next(answers) is None
    assert tokens(next(answers)) == [one[0] for one in plain]
    flowed = next(answers)
    assert [flowed[str(i)] for i in range(len(MIXED))] == solo
    expected = ("no SAE", "does not exist", "does not exist", "slots", "shout", "not JSON")
    for words in expected:
        kind, message = next(answers)
        assert kind in ("ValueError", "VLLMValidationError") and words in message
    for words in ("already", "fused norms", "width", "nowhere"):
        kind, message = next(answers)
        assert kind in ("ValueError", "FileNotFoundError") and words in message, (kind, message)
    assert tokens(next(answers)) == [one[0] for one in plain]
    assert next(answers) == sorted([EARLY, MLP])
    kind, message = next(answers)
    assert kind == "ValueError" and "no SAE" in message
    assert next(answers) == sorted(names)
    assert tokens(next(answers)) == [one[0] for one in food]


def check_codes(found: list[dict[str, Any]], expected: list[dict[str, torch.Tensor]]) -> None:
    for one, codes in zip(found, expected, strict=True):
        assert set(one["codes"]) == set(codes)
        for name, code in codes.items():
            ours = dense(one["codes"][name], code.shape[-1])
            torch.testing.assert_close(ours, code, rtol=1e-3, atol=1e-3)


def test_compiled_engines(run: Run, prompts: list[list[int]], reference: Reference) -> None:
    """One after the other, with one compile cache: a graph that knows of no SAE must not serve
    the next engine; the last finds the graph of the one before."""
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    assert tokens(run([generated(prompts)], saes=[], **NATIVE)[0]) == plain
    for _ in range(2):
        check_engine(run, prompts, reference, NATIVE)


@pytest.mark.parametrize("options", [NATIVE | TWO, NATIVE | EAGER | TWO], ids=["two", "eager-two"])
def test_two_processes(
    run: Run, prompts: list[list[int]], reference: Reference, options: dict[str, Any]
) -> None:
    check_engine(run, prompts, reference, options)


def check_engine(
    run: Run, prompts: list[list[int]], reference: Reference, options: dict[str, Any]
) -> None:
    """Batches of everything that requests may ask for, again from a warm prefix cache, requests
    that join and leave."""
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    mixed = [reference(i, e, TOKENS) for i, e in zip(prompts, MIXED, strict=True)]
    cases = agreed(prompts, reference, TOKENS)
    solo = [reference(prompts[0], e, TOKENS)[0] for e in MIXED]
    steps = [
        generated(prompts),
        generated(prompts, MIXED, codes=[RESID, EARLY, MLP]),
        generated(prompts, MIXED),
        generated(prompts, MIXED),  # a warm prefix cache
        generated(prompts),
        all_agreed(cases),
        flowing(prompts),
    ]
    if "enforce_eager" not in options:
        steps.append(["fails", dict(step=["attach", dict(saes=["bundled:resid_post.3"])])])
        steps.append(["fails", dict(step=["detach", dict(names=[RESID])])])
    answers: Iterator[Any] = iter(run(steps, **options))
    assert tokens(next(answers)) == plain
    found = next(answers)
    assert tokens(found) == [one[0] for one in mixed]
    check_codes(found, [one[1] for one in mixed])
    assert tokens(next(answers)) == [one[0] for one in mixed]
    cached = next(answers)
    assert tokens(cached) == [one[0] for one in mixed] and any(one["cached"] for one in cached)
    cached = next(answers)
    assert tokens(cached) == plain and any(one["cached"] for one in cached)
    assert next(answers) == [expected for _, _, expected in cases]
    flowed = next(answers)
    assert [flowed[str(i)] for i in range(len(MIXED))] == solo
    for kind, message in answers:
        assert kind == "Unsupported" and "compiled its model" in message


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A tiny Llama, whose native blocks return (hidden, residual), and a JumpReLU SAE for it."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=2, num_key_value_heads=2, head_dim=32, pad_token_id=0,
                 bos_token_id=1, eos_token_id=2, max_position_embeddings=128)  # fmt: skip
    model = build("Llama", **sizes)
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = (torch.randn(256, 64, generator=generator) / 8 for _ in range(2))
    sae = SAE.from_weights(
        W_enc, W_dec, torch.zeros(256), torch.zeros(64),
        activation=JumpReLU(0.5), hookpoint="resid_post.1",
    )  # fmt: skip
    save(sae, folder / "sae")
    return folder, Reference(model, {"resid_post.1": sae})


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(NATIVE | TWO, id="two"),
        pytest.param(BACKEND, id="transformers"),
        pytest.param(BACKEND | EAGER | TWO, id="transformers-eager-two"),
    ],
)
def test_llama(run: Run, llama: tuple[Path, Reference], options: dict[str, Any]) -> None:
    """Native blocks return a pair; transformers' hold one row of all tokens, [1, T, d]."""
    folder, reference = llama
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (40, 7, 19)]
    name = "resid_post.1"
    edits: list[list[dict]] = [
        [spec(name, 5, "add", 20.0)],
        [],
        [spec(name, 7, "scale", 3.0), spec(name, 9, "clamp", 15.0, phase="generated")],
    ]
    mixed = [reference(i, e, TOKENS) for i, e in zip(prompts, edits, strict=True)]
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    assert [one[0] for one in mixed] != plain
    steps = [generated(prompts), generated(prompts, edits, codes=[name]), generated(prompts, edits)]
    done = run(
        steps,
        model=folder / "model",
        saes=[str(folder / "sae")],
        skip_tokenizer_init=True,
        **options,
    )
    assert tokens(done[0]) == plain
    assert tokens(done[1]) == [one[0] for one in mixed]
    check_codes(done[1], [one[1] for one in mixed])
    assert tokens(done[2]) == [one[0] for one in mixed]


def test_a_worker_of_ones_own_with_the_extension(
    run: Run, prompts: list[list[int]], reference: Reference
) -> None:
    """With so few blocks of KV cache that requests are preempted, and begin again."""
    mixed = [reference(i, e, 40) for i, e in zip(prompts, MIXED, strict=True)]
    wishes = dict(prompts=prompts, tokens=40, edits=MIXED, codes=[RESID, EARLY, MLP])
    steps = [["attach", dict(saes=BUNDLED)], ["generate", wishes]]
    few = NATIVE | EAGER | dict(num_gpu_blocks_override=7)
    found = run(steps, saes=[], how="extension", plugin=True, **few)[1]
    assert tokens(found) == [one[0] for one in mixed]
    check_codes(found, [one[1] for one in mixed])


def test_the_plugin_alone_salts_requests(
    run: Run, prompts: list[list[int]], reference: Reference
) -> None:
    """As under `vllm serve`, whose process never imports saert by itself."""
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    food = [reference(ids, [FOOD], TOKENS)[0] for ids in prompts]
    steps = [
        raw(prompts, []),
        raw(prompts, [FOOD]),
        raw(prompts, json.dumps([FOOD])),
        raw(prompts, []),
        ["fails", dict(step=raw(prompts, [spec("resid_post.3", 1)]))],
        ["fails", dict(step=raw(prompts, {"codes": [RESID]}))],
        raw(prompts, [FOOD]),
    ]
    answers = run(steps, how="bare", plugin=True, **NATIVE, **EAGER)
    assert answers[:4] == [plain, food, food, plain]
    assert "no SAE" in answers[4][1] and "key" in answers[5][1]
    assert answers[6] == food


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (job([], environment={RUNNER: "1"}), "Unsupported", RUNNER),
    # without `Engine`, vLLM's own CPU build refuses V2; on a GPU `check_config` does
    (job([], version="0.33.0"), "Unsupported", "found 0.33.0"),
    (job([], version="0.31.9", how="bare", **SMALL), "Unsupported", "found 0.31.9"),
    (job([], saes=["bundled:resid_post.9"]), "FileNotFoundError", "resid_post.9"),
    (job([], how="bare", **SMALL), "Unsupported", "VLLM_PLUGINS"),
]


def test_what_cannot_start_says_why(execute: Run) -> None:
    """Where vLLM loaded no plugin, in one process, so that a worker's own error arrives here."""
    by_hand = ["attach_by_hand", dict(saes=[[None, BUNDLED[0]]])]
    last = job([by_hand], how="bare-extension", **SMALL, **EAGER)
    jobs = [*(one for one, _, _ in REFUSED), last]
    answers = execute(jobs, plugin=False, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert all(
        answer["refused"][0] == kind and words in answer["refused"][1]
        for answer, (_, kind, words) in zip(answers, REFUSED, strict=False)
    ), answers
    refused = answers[-1]["steps"][0]
    assert refused["kind"] == "Unsupported" and "VLLM_PLUGINS" in refused["error"]
