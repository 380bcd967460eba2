"""How long a call takes and how much memory it needs at its peak, on a CPU and on a CUDA device."""

from __future__ import annotations

import ctypes
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]
SHORT = 2e-3
"""Seconds that one CPU sample lasts at least: shorter calls are repeated within it."""


class NotRun(Exception):
    """Why a contender does not take part."""


def race(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contender in every round, each round in a fresh random order."""
    repeats = {name: _repeats(run, device) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs)
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(_sample(runs[name], repeats[name], device))
    return seconds


def _repeats(run: Run, device: torch.device) -> int:
    """Warms up, then: how many calls make a sample long enough for the CPU's clock."""
    run()
    if device.type == "cuda":
        return 1
    begun = time.perf_counter()
    run()
    return max(1, min(50, int(SHORT / (time.perf_counter() - begun))))


def _sample(run: Run, repeats: int, device: torch.device) -> float:
    if device.type == "cuda":  # CUDA events around each call, the L2 cache flushed before it
        from triton.testing import do_bench

        return float(do_bench(run, warmup=5, rep=20, return_mode="median")) / 1000
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begun) / repeats


def graphed(run: Run) -> Run:
    """The same work as the replay of a CUDA graph: what it costs without launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise NotRun(f"no CUDA graph: {first_line(error)}") from error
    return graph.replay


def peak_extra(run: Run, device: torch.device) -> float | None:
    """Bytes a warm call needs on top of what exists before it, its result included.

    CUDA: the allocator's peak. CPU: the peak of resident memory, which Linux resets on request
    (`/proc/self/clear_refs`), after the heap's free pages went back; None elsewhere.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - held)
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)
    reset.write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0.0, _resident("VmHWM") - before)


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * float(found[1]) if found else 0.0


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:100]}" if text else type(error).__name__
