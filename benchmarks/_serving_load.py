"""Load for an engine of `saert serve`: clients that ask anew as soon as they have their answer."""

from __future__ import annotations

import gc
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saert.engines.directive import Directive
from saert.engines.server.batching import Batching
from saert.engines.server.engine import End, Job, Sampling, Step
from saert.engines.server.monitors import Wanted
from saert.hub import bundled
from saert.measure.steering.spec import EditSpec

AT, PROMPT, GENERATED = bundled.DEMO.hookpoint, 16, 64
VARIANTS = ("bare", "added", "observed", "edited")


def job(variant: str, r: random.Random, latents: int) -> Job:
    """A job of a variant, with a prompt and edits of its own."""
    edits: tuple[EditSpec, ...] = ()
    if variant in ("added", "edited"):
        edits = (EditSpec(AT, r.randrange(latents), "add", r.uniform(1, 8)),)
    if variant == "edited":
        edits += (
            EditSpec(AT, r.randrange(latents), "clamp", r.uniform(0, 8), "generated"),
            EditSpec(AT, r.randrange(latents), "ablate"),
        )
    wanted = (Wanted(AT, 4),) if variant == "observed" else ()
    prompt = tuple(r.randrange(3, 1000) for _ in range(PROMPT))
    directive = Directive(edits, codes=tuple(w.sae for w in wanted), key=f"{r.random()}")
    return Job(prompt, Sampling(GENERATED, 0.0), directive, wanted=wanted)


class Clients:
    """So many clients of an engine, each asking anew as soon as it has its answer.

    `give_up` is the part of the answers that their clients leave midway.
    """

    def __init__(
        self, engine: Batching, streams: int, make: Callable[[], Job], give_up: float = 0.0
    ) -> None:
        self._engine, self._make, self._give_up = engine, make, give_up
        self._r, self._lock, self._stopped = random.Random(0), threading.Lock(), False
        self.tokens = self.answers = self.left = 0
        self._open, self._idle = streams, threading.Event()
        for _ in range(streams):
            self._ask()

    def _ask(self) -> None:
        made = self._make()
        leaves = self._r.random() < self._give_up
        at = self._r.randrange(2, GENERATED) if leaves else 0
        heard = 0

        def sink(item: Step | End) -> None:
            nonlocal heard
            if isinstance(item, Step):
                heard += 1
                self.tokens += 1
                if heard == at:
                    self.left += 1
                    self._engine.cancel(made.directive.key)
                return
            self.answers += 1
            if not self._stopped:
                self._ask()
                return
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._idle.set()

        self._engine.submit(made, sink)

    def stop(self) -> None:
        """Ask no more, and wait for the last answer."""
        self._stopped = True
        self._idle.wait()


def endure(engine: Batching, streams: int, seconds: float) -> dict[str, Any]:
    """Mixed load for some time: resident memory over it, in MB."""
    r = random.Random(0)
    latents = engine.attached[AT].num_latents
    clients = Clients(engine, streams, lambda: job(r.choice(VARIANTS), r, latents), give_up=0.1)
    begun, samples = time.perf_counter(), list[tuple[float, float]]()
    while (now := time.perf_counter() - begun) < seconds:
        samples.append((round(now, 1), resident()))
        time.sleep(seconds / 60)
    clients.stop()
    while any(vars(engine.load()).values()):
        time.sleep(0.01)
    gc.collect()
    warm = [memory for at, memory in samples if at >= seconds / 4]
    half = len(warm) // 2
    return {
        "seconds": seconds,
        "streams": streams,
        "tokens": clients.tokens,
        "answers": clients.answers,
        "left_midway": clients.left,
        "after": vars(engine.load()),
        "median_2nd_quarter_mb": statistics.median(warm[:half]),
        "median_last_mb": statistics.median(warm[half:]),
        "largest_mb": max(memory for _, memory in samples),
        "samples": samples,
    }


def resident() -> float:
    """This process's resident memory, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS: --minutes needs Linux")
