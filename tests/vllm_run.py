"""Run in vLLM's own environment: start engines as jobs say, take their steps, answer with JSON.

A job is {"model", "saes", "options", "steps", "environment", "version"}; a step is
[what, arguments].
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any


def plain(result: Any) -> dict[str, Any]:
    """What a test compares: tokens, tokens that came from the prefix cache, codes."""
    codes = {
        name: [code.indices.tolist(), code.values.tolist()] for name, code in result.codes.items()
    }
    output = result.output
    return dict(tokens=result.token_ids, cached=output.num_cached_tokens, codes=codes)


def greedy(tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options)


def asked(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def generate(
    engine: Any, *, prompts: list[list[int]], tokens: int, bias: Any = (), **wishes: Any
) -> Any:
    """`bias`: pairs of token and `logit_bias`, the user's own."""
    params = greedy(tokens, logit_bias=dict(bias) or None)
    return [plain(one) for one in engine.generate(asked(prompts), params, **wishes)]


def raw(engine: Any, *, prompts: list[list[int]], tokens: int, saert: list[Any]) -> Any:
    """vLLM's own `generate`, with extra arguments that users wrote, a prompt each, and no salt."""
    params = [greedy(tokens, extra_args={"saert": one}) for one in saert]
    outputs = engine.llm.generate(asked(prompts), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def attach_by_hand(engine: Any, *, saes: list[Any]) -> Any:
    """What a worker answers who is asked without `Engine`."""
    return json.loads(engine.llm.collective_rpc("saert_attach", args=(saes,))[0])


def stream(engine: Any, *, requests: list[dict[str, Any]]) -> Any:
    """Requests that join at a step of the engine, and some that leave before they are done."""
    from saert.engines.directive import Directive
    from saert.engines.vllm.engine import with_directive

    core, done = engine.llm.llm_engine, {}
    for now in range(1000):
        for i, one in enumerate(requests):
            if one["joins"] == now:
                params = with_directive(greedy(one["tokens"]), Directive.parse(one["edits"]))
                prompt = asked([one["prompt"]])[0]
                one["id"] = core.add_request(f"request-{i}-{now}", prompt, params)
            if one.get("leaves") == now:
                core.abort_request([f"request-{i}-{one['joins']}"])
        for output in core.step():
            if output.finished:
                done[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
        waiting = any(one["joins"] > now for one in requests)
        if not waiting and not core.has_unfinished_requests():
            break
    return {str(i): tokens for i, tokens in done.items()}


def fails(engine: Any, *, step: list[Any]) -> Any:
    """The kind and the message of what a step raises, after which the engine must still work."""
    try:
        take(engine, step)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def attach(engine: Any, *, saes: Any) -> Any:
    engine.attach(saes)
    return sorted(engine.attached)


def detach(engine: Any, *, names: list[str]) -> Any:
    engine.detach(*names)
    return sorted(engine.attached)


def for_all(engine: Any, **wishes: Any) -> Any:
    return engine.for_all(**wishes)


STEPS = (generate, raw, stream, fails, attach, attach_by_hand, detach, for_all)


def take(engine: Any, step: list[Any]) -> Any:
    what, arguments = step
    return next(one for one in STEPS if one.__name__ == what)(engine, **arguments)


def start(job: dict[str, Any]) -> Any:
    """An engine as `Engine.start` makes it; or around an `LLM` with the extension; or an `LLM`
    alone ("bare", or with the extension "bare-extension"), whose process has only vLLM's plugin to
    thank for what it knows of saert."""
    options = dict(dtype="float32", **job["options"])
    how = options.pop("how", "start")
    if how == "start":
        from saert.engines.vllm import Engine

        return Engine.start(job["model"], job["saes"], **options)
    from vllm import LLM

    if how == "bare":
        settings = {"saert": {"saes": [[None, source] for source in job["saes"]]}}
        worker = "saert.engines.vllm.worker.Worker"
        llm = LLM(job["model"], worker_cls=worker, additional_config=settings, **options)
        return SimpleNamespace(llm=llm)
    llm = LLM(job["model"], worker_extension_cls="saert.engines.vllm.worker.Extension", **options)
    if how == "bare-extension":
        return SimpleNamespace(llm=llm)
    from saert.engines.vllm import Engine

    return Engine(llm)


def main(job: dict[str, Any]) -> dict[str, Any]:
    import vllm

    before, version = dict(os.environ), vllm.__version__
    os.environ.update(job["environment"])
    vllm.__version__ = job["version"] or version
    try:
        engine = start(job)
    except Exception as error:  # the next job finds everything as it was
        os.environ.clear()
        os.environ.update(before)
        vllm.__version__ = version
        return {"refused": [type(error).__name__, str(error)]}
    return {"steps": [take(engine, step) for step in job["steps"]]}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        answers = [main(job) for job in json.load(file)]
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answers, file)
