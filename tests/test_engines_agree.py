"""The same edits, the same greedy tokens: every engine against `attach` and `generate`.

vLLM's part is in test_vllm.py, with the same cases and expectations.
"""

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm_cases import AGREED, EARLY, MLP, RESID, TEXTS, Reference, agreed

from saert.engines.directive import Attached, Directive
from saert.engines.server.batching import Batching
from saert.engines.server.engine import End, Job, Sampling, Step
from saert.hub import bundled
from saert.measure.steering.spec import EditSpec
from saert.runtime import attach
from saert.twin import twin

TOKENS = 16
SLOTS = 8


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(bundled.model(), {name: bundled.sae(name) for name in (RESID, EARLY, MLP)})


@pytest.fixture(scope="module")
def cases(reference: Reference) -> list[Any]:
    tokenizer = bundled.tokenizer()
    return agreed([tokenizer(text).input_ids for text in TEXTS], reference, TOKENS)


def test_the_cases_are_worth_their_while(reference: Reference, cases: list[Any]) -> None:
    """Every edit shows in the tokens, and so does a token that the model must not draw."""
    for (prompt, _, expected), name in zip(cases, AGREED, strict=True):
        assert reference(prompt, [], TOKENS)[0] != expected, name
    free = [
        reference(p, w["edits"], TOKENS, w.get("splice", ()), suppress_tokens=[])
        for p, w, _ in cases
    ]
    assert [tokens for tokens, _ in free] != [expected for *_, expected in cases]


def static(model: Any, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        **options,
    )
    return list(found[0, len(prompt) :].tolist())


def test_hooks_that_stay_and_a_static_cache(reference: Reference, cases: list[Any]) -> None:
    model = twin(reference.model)
    with attach(model, list(reference.saes.values()), compiled=True) as attachment:
        for prompt, wish, expected in cases:
            attachment.edits = made(wish, reference)
            attachment.splice = wish.get("splice", False)
            assert static(model, prompt) == expected, wish


@pytest.mark.slow
def test_the_graph_of_those_hooks(
    reference: Reference, cases: list[Any], request: pytest.FixtureRequest
) -> None:
    """Compiled once, for all that the cases need; a splice would be a graph of its own."""
    from transformers import CompileConfig

    request.addfinalizer(torch.compiler.reset)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True  # on CPU too: the auto-compile of GPUs
    model, unspliced = twin(reference.model), [case for case in cases if "splice" not in case[1]]
    needed = [edit for _, wish, _ in unspliced for edit in made(wish, reference)]
    with attach(model, list(reference.saes.values()), needed, compiled=True) as attachment:
        for prompt, wish, expected in unspliced:
            attachment.edits = made(wish, reference)
            assert static(model, prompt, compile_config=config) == expected, wish


def made(wish: dict[str, Any], reference: Reference) -> list[Any]:
    specs = [EditSpec.from_dict(one) for one in wish["edits"]]
    return [one.edit(reference.saes[one.sae]) for one in specs]


@pytest.fixture
def batching(reference: Reference) -> Iterator[Batching]:
    attached = {n: Attached(n, sae.num_latents, SLOTS) for n, sae in reference.saes.items()}
    engine = Batching(twin(reference.model), reference.saes, attached, streams=len(AGREED) - 1)
    yield engine
    engine.close()


def test_requests_of_the_server_in_one_batch(batching: Batching, cases: list[Any]) -> None:
    """All of them at once, one more than there is room for."""
    heard: queue.Queue[tuple[int, Step | End]] = queue.Queue()
    for i, (prompt, wish, _) in enumerate(cases):
        directive = Directive.parse(wish).resolved(batching.attached)
        job = Job(tuple(prompt), Sampling(TOKENS, temperature=0), directive)
        batching.submit(job, lambda item, i=i: heard.put((i, item)))  # type: ignore[misc]
    found: list[list[int | None]] = [[] for _ in cases]
    ended = 0
    while ended < len(cases):
        i, item = heard.get(timeout=60)
        if isinstance(item, End):
            assert item.reason == "length"
            ended += 1
        else:
            found[i].append(item.token)
    assert found == [expected for *_, expected in cases]
