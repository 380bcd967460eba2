"""SAEs in vLLM: edits of their own for every request, codes back to its caller.

    engine = Engine.start("google/gemma-2-2b", ["gemma-scope-2b-pt-res:…"])
    engine.generate(prompts, SamplingParams(max_tokens=50), edits=[[add(…, sae=…)], []])

Tested with vLLM 0.32 (`saert.engines.vllm.support`). Nothing here is imported unless it is asked
for: workers name `saert.engines.vllm.worker`, vLLM's plugins `saert.engines.vllm.plugin`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saert.engines.vllm.engine import Engine, Result

__all__ = ["Engine", "Result"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from saert.engines.vllm import engine

    return getattr(engine, name)
