"""`saert serve --engine vllm`: the session without its model, and the vLLM that has it.

The server's own process needs little of the model: its tokenizer, its configuration, and for logit
lenses the final norm and the unembedding. It loads those, and the SAEs, on the CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from saert.compat import check_model
from saert.engines.directive import KEY
from saert.engines.server.engine import Job
from saert.engines.server.limits import Limits
from saert.engines.server.shelf import Shelf
from saert.engines.server.vllm_engine import VllmEngine
from saert.engines.server.vllm_steps import settings
from saert.engines.vllm.plugin import register
from saert.engines.vllm.support import (
    WORKER,
    Unsupported,
    check_config,
    check_version,
    prefer_v1,
)
from saert.hub import bundled
from saert.hub.session import Session, UserError, load_model, open_session

OURS = (  # what we rely on, and what would have no effect
    "model", "worker_cls", "worker_extension_cls", "additional_config", "max_num_seqs",
    "generation_config", "skip_tokenizer_init", "max_logprobs", "logprobs_mode",
    "disable_log_stats", "enable_log_requests", "override_generation_config", "revision",
    "tokenizer", "tokenizer_revision", "hf_overrides", "served_model_name",
)  # fmt: skip
log = logging.getLogger("saert.serve")


class Headless(nn.Module):
    """A model of which only the configuration is known: no logit lenses."""

    def __init__(self, config: Any, generation_config: Any) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config

    def get_output_embeddings(self) -> None:
        """There are none."""


def session_of(
    model: str | None, saes: Sequence[str], *, hookpoint: str | None = None, strict: bool = True
) -> Session:
    """As `open_session`, with the ends of the model only.

    Raises what that raises, and ValueError: an SAE that was made for another model.
    """
    session = open_session(model, saes, hookpoint=hookpoint, strict=strict, load=load_ends)
    for one in session.saes:
        assert one.sae.hookpoint is not None
        check_model(session.model, one.sae, one.sae.hookpoint, strict)
    return session


def load_ends(name: str, device: str) -> tuple[Any, Any]:
    """A model's first block and what is before and behind the blocks, and its tokenizer."""
    if name == bundled.NAME:
        return load_model(name, "cpu")  # it has hardly more
    try:
        return load_model(name, "cpu", blocks=1)
    except (OSError, UserError):  # it is not there
        raise
    except Exception as error:  # a quantized one, say, that transformers lacks a library for
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        log.warning("no logit lenses: transformers cannot load %s: %s", name, error)
        config = AutoConfig.from_pretrained(name)
        try:
            generation = GenerationConfig.from_pretrained(name)
        except OSError:  # no such file
            generation = GenerationConfig.from_model_config(config)
        return Headless(config, generation), AutoTokenizer.from_pretrained(name)


def engine_of(
    session: Session, shelf: Shelf, limits: Limits, options: Mapping[str, Any] | None = None
) -> VllmEngine:
    """Start vLLM with a session's model and SAEs; it takes a minute and more.

    Args:
        options: for `AsyncEngineArgs`: tensor_parallel_size, enforce_eager, dtype, …

    Raises UserError: vLLM does not start with these options; ImportError: it is not installed.
    """
    given = dict(options or {})
    if taken := [key for key in given if key in OURS]:
        raise UserError(f"--engine-args: {taken[0]} is not yours to set here")
    args = {
        "model": str(bundled.MODEL if session.name == bundled.NAME else session.name),
        "worker_cls": WORKER,
        "worker_extension_cls": "saert.engines.server.vllm_worker.Serving",
        "additional_config": {KEY: _what_workers_load(session, shelf)},
        "max_num_seqs": limits.streams,
        "generation_config": "vllm",  # stops and draws are each job's own
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "max_logprobs": 20,  # as many as a request may ask for
        **given,
    }
    never = getattr(session.model.generation_config, "suppress_tokens", None) or []

    async def start() -> Any:
        llm = _start(args)
        try:
            size = llm.model_config.get_vocab_size()
            there = [token for token in never if 0 <= token < size]
            await llm.collective_rpc("saert_serve", args=(there,))
        except BaseException:
            llm.shutdown()
            raise
        return llm

    try:
        return VllmEngine(
            start, _params, shelf.attached, streams=limits.streams, waiting=limits.waiting
        )
    except (Unsupported, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"vLLM does not start: {error}") from error


def _what_workers_load(session: Session, shelf: Shelf) -> dict[str, Any]:
    return {
        "saes": [[one.name, one.source] for one in session.saes],
        "slots": next(one.slots for one in shelf.attached.values()),
        "catalogue": {name: vars(one) for name, one in shelf.attached.items()},
        "engine": True,  # `register` is called here, whether or not vLLM finds the plugin
    }


def _start(args: dict[str, Any]) -> Any:
    prefer_v1()  # before vLLM decides on a model runner
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    import vllm

    check_version(vllm.__version__)
    register()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AsyncEngineArgs(**args).create_engine_config()
    check_config(config)
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def _params(job: Job) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(**settings(job), output_kind=RequestOutputKind.DELTA)
