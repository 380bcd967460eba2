"""Which vLLM, and which of its settings, saert has been tested with: all else is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from saert.engines.directive import KEY

TESTED = ((0, 32), (0, 33))  # from the first, below the second
WORKER = "saert.engines.vllm.worker.Worker"
EXTENSION = "saert.engines.vllm.worker.Extension"


RUNNER = "VLLM_USE_V2_MODEL_RUNNER"  # the environment variable that chooses between the two

# The first two split a pass between processes; of several engines, collective_rpc tells the codes
# of the first.
ONE = ("pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")


class Unsupported(RuntimeError):
    """This vLLM, or a setting of it, is not one that saert can work with."""


def check_version(version: str) -> None:
    """Raise Unsupported for a vLLM that was not tested."""
    (low, high) = TESTED
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not low <= found < high:
        raise Unsupported(
            f"saert was tested with vLLM {low[0]}.{low[1]}, and what it relies on changes between "
            f"versions; found {version}: pip install 'saert[vllm]'"
        )


def prefer_v1() -> None:
    """Ask for model runner V1 unless the environment says another; Unsupported if it does."""
    if os.environ.setdefault(RUNNER, "0").strip().lower() in ("1", "true"):
        raise Unsupported(
            f"saert works with vLLM's model runner V1, but {RUNNER}={os.environ[RUNNER]} asks for "
            f"V2; unset it, or set it to 0"
        )


def check_config(config: Any) -> None:
    """Raise Unsupported for settings of a VllmConfig under which edits could go wrong unseen."""
    if wrong := list(_objections(config)):
        raise Unsupported("saert cannot work with this engine: " + "; ".join(wrong))


def _objections(config: Any) -> Iterator[str]:
    parallel, compilation = config.parallel_config, config.compilation_config
    if config.use_v2_model_runner:
        yield f"it uses model runner V2; set {RUNNER}=0 before it starts"
    for name in ONE:
        if (found := getattr(parallel, name, 1)) > 1:
            yield f"{name} is {found}, expected 1"
    if getattr(parallel, "use_ubatching", False):
        yield "it splits batches in micro-batches (enable_dbo)"
    if config.speculative_config is not None:
        yield "it decodes speculatively"
    if getattr(compilation.pass_config, "enable_sp", False):
        yield "sequence parallelism (pass_config.enable_sp) splits the hidden states"
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        yield "kv_sharing_fast_prefill lets some layers see some tokens only"
    if config.model_config.uses_mrope:
        yield "the model counts positions in three dimensions (M-RoPE)"
    if config.model_config.is_encoder_decoder:
        yield "it is an encoder-decoder model"
    if config.model_config.runner_type != "generate":
        yield f"it is a {config.model_config.runner_type} engine, which generates nothing"


def ours(config: Any) -> bool:
    """Whether the engine's workers know of saert."""
    parallel = config.parallel_config
    return bool(parallel.worker_cls == WORKER or parallel.worker_extension_cls == EXTENSION)


def check_worker(config: Any) -> None:
    """Raise Unsupported if the engine's workers are not ours: edits would be ignored."""
    if not ours(config):
        raise Unsupported(
            f"a request asks for {KEY!r}, but the engine's workers know nothing of it: start with "
            f"worker_cls={WORKER!r}, or eager with worker_extension_cls={EXTENSION!r}"
        )


def compiles(config: Any) -> bool:
    """Whether the engine compiles its model, so that hooks must be there when it is loaded."""
    return int(config.compilation_config.mode or 0) != 0


def settings_of(config: Any) -> dict[str, Any]:
    """What `additional_config["saert"]` says, changes to which stay; {} of its own if nothing."""
    if not isinstance(config.additional_config, dict):
        raise Unsupported("additional_config is not a mapping, so it cannot say what to attach")
    settings = config.additional_config.setdefault(KEY, {})
    if not isinstance(settings, dict):
        raise ValueError(f"additional_config[{KEY!r}]: found {settings!r}, expected a mapping")
    return settings
