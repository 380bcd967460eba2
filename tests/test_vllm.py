"""vLLM against saert on transformers: same edits, same greedy tokens, same codes.

`make setup-vllm` makes an environment with vLLM for CPU; SAERT_VLLM_PYTHON names its python, and
without one these tests skip. An engine takes a minute or more to start, so each test is one engine
with many steps.
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
from vllm_cases import BUNDLED, EARLY, FOOD, MIXED, MLP, RESID, TEXTS, Reference, dense, spec

from saert.activations import JumpReLU
from saert.engines.vllm.support import RUNNER
from saert.hub import bundled
from saert.hub.format import save
from saert.sae import SAE

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

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
def run(python: str, cache: Path, installed: Path, tmp_path: Path) -> Run:
    """Start an engine in the other environment, and let it take its steps."""

    def run(
        steps: list[Any],
        *,
        model: Any = bundled.MODEL,
        saes: Any = BUNDLED,
        plugin: bool = False,
        runner: str | None = None,
        **options: Any,
    ) -> Any:
        job = dict(model=str(model), saes=saes, options=options, steps=steps)
        asked, answered = tmp_path / "job.json", tmp_path / "answer.json"
        asked.write_text(json.dumps(job))
        environment = os.environ | dict(
            PYTHONPATH=os.pathsep.join(map(str, [*([installed] if plugin else []), ROOT])),
            HF_HUB_OFFLINE="1",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_CACHE_ROOT=str(cache),
            VLLM_LOGGING_LEVEL="WARNING",
            VLLM_NO_USAGE_STATS="1",
            OMP_NUM_THREADS="1",
        )
        environment.pop(RUNNER, None)
        if runner is not None:
            environment[RUNNER] = runner
        if options.get("tensor_parallel_size", 1) > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
        done = subprocess.run(
            [PYTHON, vllm_run.__file__, asked, answered],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        answer = json.loads(answered.read_text())
        assert steps == [] or "steps" in answer, done.stdout[-6000:] + done.stderr[-3000:]
        return answer

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
    flow = [
        dict(prompt=prompts[0], edits=e, tokens=TOKENS, joins=3 * i) for i, e in enumerate(MIXED)
    ]
    flow.append(dict(prompt=prompts[3], edits=[FOOD], tokens=60, joins=1, leaves=9))
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
        ["raw", dict(prompts=prompts, tokens=TOKENS, saert=[FOOD])],
        ["raw", dict(prompts=prompts, tokens=TOKENS, saert=json.dumps([FOOD]))],
        generated(prompts),
        generated(prompts, [FOOD], splice=[RESID]),
        ["for_all", dict(edits=[FOOD])],
        generated(prompts),
        ["for_all", dict()],
        generated(prompts),
        ["stream", dict(requests=flow)],
        *(
            ["fails", dict(step=["raw", dict(prompts=prompts[:1], tokens=2, saert=one)])]
            for one in bad
        ),
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
    answers = iter(run(steps, saes=[], **NATIVE, **EAGER)["steps"])
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
    assert tokens(next(answers)) == [one[0] for one in plain]
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


def test_a_graph_compiled_without_saes(run: Run, prompts: list, reference: Reference) -> None:
    """It stays in the cache that the next engines compile into, and must not serve them."""
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    assert tokens(run([generated(prompts)], saes=[], **NATIVE)["steps"][0]) == plain


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(NATIVE, id="native"),
        pytest.param(NATIVE, id="native-from-the-compile-cache"),
        pytest.param(NATIVE | TWO, id="two"),
        pytest.param(NATIVE | EAGER | TWO, id="eager-two"),
    ],
)
def test_engines(
    run: Run, prompts: list[list[int]], reference: Reference, options: dict[str, Any]
) -> None:
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    mixed = [reference(i, e, TOKENS) for i, e in zip(prompts, MIXED, strict=True)]
    spliced = [reference(ids, [FOOD], TOKENS, splice=[RESID])[0] for ids in prompts]
    steps = [
        generated(prompts),
        generated(prompts, MIXED, codes=[RESID, EARLY, MLP]),
        generated(prompts, MIXED),
        generated(prompts),
        generated(prompts, [FOOD], splice=[RESID]),
    ]
    if "enforce_eager" not in options:
        steps.append(["fails", dict(step=["attach", dict(saes=["bundled:resid_post.3"])])])
        steps.append(["fails", dict(step=["detach", dict(names=[RESID])])])
    answers: Iterator[Any] = iter(run(steps, **options)["steps"])
    assert tokens(next(answers)) == plain
    found = next(answers)
    assert tokens(found) == [one[0] for one in mixed]
    check_codes(found, [one[1] for one in mixed])
    assert tokens(next(answers)) == [one[0] for one in mixed]
    assert tokens(next(answers)) == plain
    assert tokens(next(answers)) == spliced
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
    )["steps"]
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
    found = run(steps, saes=[], how="extension", plugin=True, **few)["steps"][1]
    assert tokens(found) == [one[0] for one in mixed]
    check_codes(found, [one[1] for one in mixed])


def test_the_plugin_alone_salts_requests(
    run: Run, prompts: list[list[int]], reference: Reference
) -> None:
    """As under `vllm serve`, whose process never imports saert by itself."""
    plain = [reference(ids, [], TOKENS)[0] for ids in prompts]
    food = [reference(ids, [FOOD], TOKENS)[0] for ids in prompts]
    ask = dict(prompts=prompts, tokens=TOKENS)
    steps = [
        ["raw", dict(ask, saert=[])],
        ["raw", dict(ask, saert=[FOOD])],
        ["raw", dict(ask, saert=json.dumps([FOOD]))],
        ["raw", dict(ask, saert=[])],
        ["fails", dict(step=["raw", dict(ask, saert=[spec("resid_post.3", 1)])])],
        ["fails", dict(step=["raw", dict(ask, saert={"codes": [RESID]})])],
        ["raw", dict(ask, saert=[FOOD])],
    ]
    answers = run(steps, how="bare", plugin=True, **NATIVE)["steps"]
    assert answers[:4] == [plain, food, food, plain]
    assert "no SAE" in answers[4][1] and "key" in answers[5][1]
    assert answers[6] == food


def test_what_cannot_start_says_why(run: Run) -> None:
    kind, message = run([], runner="1", **SMALL)["refused"]
    assert kind == "Unsupported" and RUNNER in message
    kind, message = run([], saes=["bundled:resid_post.9"], **SMALL)["refused"]
    assert kind == "FileNotFoundError" and "resid_post.9" in message
