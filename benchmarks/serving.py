"""What serving costs: tokens per second of the engine bare, observed and edited, by streams.

    python benchmarks/serving.py --save
    python benchmarks/serving.py --streams 64 --minutes 10        # does memory grow?

Each variant keeps so many jobs under way at `Batching`, the engine of `saert serve`: as one ends,
the next begins, with other edits. Bare: no SAE is asked anything. Added: one `add` each. Observed:
every token's code is read. Edited: an add, a clamp and an ablation each, their latents and amounts
all different. Rounds are interleaved; ratios are to the bare run of the same round. With --minutes
the mixed load runs that long, a tenth of its jobs cancelled midway, and the process's memory is
noted before and after.
"""

from __future__ import annotations

import gc
import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from saert.engines.directive import Attached, Directive
from saert.engines.server.batching import Batching
from saert.engines.server.engine import End, Job, Sampling, Step
from saert.hub import bundled
from saert.measure.steering.spec import EditSpec

RESULTS = Path(__file__).parent / "results"
AT, PROMPT, GENERATED = bundled.DEMO.hookpoint, 16, 64
VARIANTS = ("bare", "added", "observed", "edited")


def main(
    streams: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each variant in each round.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    minutes: Annotated[float, typer.Option(help="Of the mixed load; 0: none.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    save: Annotated[bool, typer.Option("--save", help="Write results/serving-….json.")] = False,
) -> None:
    """Measure tokens per second, or with --minutes memory."""
    torch.set_num_threads(threads)
    counts = streams or [1, 8, 32, 64]
    sae = bundled.sae(AT)
    attached = {AT: Attached(f"bundled:{AT}", sae.num_latents, 16)}
    engine = Batching(bundled.model(), {AT: sae}, attached, streams=max(counts))
    try:
        if minutes:
            report: dict[str, Any] = {"memory": endure(engine, max(counts), 60 * minutes)}
        else:
            report = {"throughput": throughput(engine, counts, seconds, rounds)}
    finally:
        engine.close()
    report |= {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    show(report)
    if save:
        RESULTS.mkdir(exist_ok=True)
        name = "serving-memory" if minutes else "serving"
        file = RESULTS / f"{name}-{report['date']}-cpu-{threads}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")


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
    codes = (AT,) if variant == "observed" else ()
    prompt = tuple(r.randrange(3, 1000) for _ in range(PROMPT))
    directive = Directive(edits, codes=codes, key=f"{r.random()}")
    return Job(prompt, Sampling(GENERATED, 0.0), directive)


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


def throughput(
    engine: Batching, counts: list[int], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds, by streams and variant."""
    r = random.Random(0)
    rates: dict[tuple[int, str], list[float]] = {}
    latents = engine.attached[AT].num_latents
    for _ in range(rounds):
        for count in counts:
            for variant in r.sample(VARIANTS, len(VARIANTS)):
                clients = Clients(engine, count, lambda v=variant: job(v, r, latents))
                time.sleep(min(1.0, seconds / 4))  # all prompts are read
                tokens, begun = clients.tokens, time.perf_counter()
                time.sleep(seconds)
                rate = (clients.tokens - tokens) / (time.perf_counter() - begun)
                clients.stop()
                rates.setdefault((count, variant), []).append(rate)
    return [
        {
            "streams": count,
            "variant": variant,
            "tokens_per_second": statistics.median(found),
            "cost": statistics.median(
                bare / rate for bare, rate in zip(rates[count, "bare"], found, strict=True)
            ),
        }
        for (count, variant), found in sorted(
            rates.items(), key=lambda x: (x[0][0], VARIANTS.index(x[0][1]))
        )
    ]


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


def show(report: dict[str, Any]) -> None:
    """As a table, or memory as a line."""
    console = Console()
    if "memory" in report:
        console.print({k: v for k, v in report["memory"].items() if k != "samples"})
        return
    table = Table("streams", "variant", "tokens/s", "cost")
    for row in report["throughput"]:
        table.add_row(
            str(row["streams"]),
            row["variant"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['cost']:.2f}x",
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
