"""A job as vLLM takes it, and what vLLM says of it as the steps of an `Engine`.

vLLM draws a token in the pass that reads the one before. So when a token arrives, the codes of all
tokens before it can be fetched, and the monitors that read them may still keep it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from saert.engines.codes import Chunk, joined, unpack
from saert.engines.directive import KEY
from saert.engines.server.engine import End, Job, Step
from saert.engines.server.monitors import alarms, readings
from saert.sparse import SparseCode

NOWHERE = torch.empty(0, dtype=torch.int64)


def settings(job: Job) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` for a job: its stops alone end it early."""
    how, logprobs = job.sampling, job.sampling.logprobs
    if logprobs is None and job.directive.changes:
        logprobs = 0  # the token's own says whether the logits were finite
    return {
        "max_tokens": how.max_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "seed": None if how.seed is None else how.seed % 2**63,  # -1 is None to vLLM
        "logprobs": logprobs,
        "stop_token_ids": sorted(job.stops),
        "ignore_eos": True,
        "detokenize": False,
        "extra_args": {} if job.directive.empty else {KEY: job.directive.to_data()},
    }


class Steps:
    """One job's outputs, token by token, with what was read before each.

    Attributes:
        drawn: tokens told so far.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.drawn = job, 0
        self._told = 0  # positions below it are
        self._read: dict[str, Chunk] = {}  # by hookpoint: what has come and is not told yet

    def add(self, packed: Mapping[str, bytes]) -> None:
        """Codes that have come since the last time, by hookpoint."""
        for name, data in packed.items():
            new, old = unpack(data), self._read.get(name)
            self._read[name] = new if old is None else joined([old, new])

    def of(self, tokens: Sequence[int], logprobs: Any) -> Iterator[Step | End]:
        """Steps of tokens that have been drawn, in order; an `End` if the job is over with one.

        Args:
            logprobs: for each token what vLLM says of it and the likeliest, {token: Logprob}; None
                if `settings` asked for none.

        Raises RuntimeError: codes that a monitor should have seen are missing.
        """
        job, prompt = self.job, len(self.job.prompt)
        for i, token in enumerate(tokens):
            chunks = self._until(prompt + self.drawn)
            went_off = alarms(job.monitors, chunks, prompt)
            seen = readings(job.wanted, chunks, prompt)
            if any(alarm.monitor.action == "stop" for alarm in went_off):
                yield Step(None, None, (), went_off, seen)
                yield End("monitor")
                return
            found = None if logprobs is None else logprobs[i]
            if found is not None and not math.isfinite(found[token].logprob):
                yield End("error", "the model's output is not finite; are the edits too strong?")
                return
            self.drawn += 1
            yield Step(token, *_said(found, token, job.sampling.logprobs), went_off, seen)
            if token in job.stops:
                yield End("stop")
                return
            if self.drawn >= job.sampling.max_tokens:
                yield End("length")
                return

    def _until(self, end: int) -> dict[str, Chunk]:
        """The codes of the positions from the last one told up to `end`, which are told now."""
        found = {}
        for name in self.job.directive.codes:
            chunk = self._read.get(name)
            places = NOWHERE if chunk is None else chunk.positions
            first, last = torch.searchsorted(places, torch.tensor([self._told, end])).tolist()
            if chunk is None or last - first != end - self._told:
                raise RuntimeError(
                    f"{name}: codes of {last - first} tokens, expected {end - self._told}: the "
                    "worker keeps a limited number"
                )
            found[name], self._read[name] = _cut(chunk, first, last), _cut(chunk, last, None)
        self._told = end
        return found


def _cut(chunk: Chunk, first: int, last: int | None) -> Chunk:
    some, code = slice(first, last), chunk.code
    return Chunk(
        chunk.positions[some],
        SparseCode(code.indices[some], code.values[some], code.num_latents),
    )


def _said(
    found: Mapping[int, Any] | None, token: int, asked: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """A token's log-probability and those of the likeliest, if they were asked for."""
    if found is None or asked is None:
        return None, ()
    ranked = sorted((one.rank, other, one.logprob) for other, one in found.items())
    return found[token].logprob, tuple((other, value) for _, other, value in ranked[:asked])
