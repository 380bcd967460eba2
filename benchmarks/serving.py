"""What serving costs: tokens per second bare, added, observed and edited, by engine and streams.

    python benchmarks/serving.py --save
    python benchmarks/serving.py --engine vllm          # with the Python of vLLM's environment
    python benchmarks/serving.py --minutes 10 --streams 64 --save      # does memory grow?

Engines: `generate` is `attach` and `model.generate`, `compiled` is `attach(…, compiled=True)` and a
static cache, `serve` the engine of `saert serve`, `vllm` saert's `Engine` on vLLM. Streams are the
rows of a batch, or clients that each have one request under way. Bare: no SAE is asked anything.
Added: one `add` (in `serve` and `vllm` each request has its own). Observed: the code of every token
is read. Edited: an add, a clamp and an ablation. All of it greedy, prompts of 16 tokens, answers of
64. Rounds are interleaved; costs are to the bare run of the same round. With --minutes a mixed load
runs that long on `serve`, a tenth of its requests cancelled midway, and the process's memory is
noted over it.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from _serving_load import AT, GENERATED, PROMPT, VARIANTS, Clients, endure, job
from rich.console import Console
from rich.progress import track
from rich.table import Table

from saert.edits import ablate, add, clamp
from saert.engines.directive import Attached
from saert.engines.server.batching import Batching
from saert.hub import bundled
from saert.runtime import attach
from saert.twin import twin

RESULTS = Path(__file__).parent / "results"
EDITS: dict[str, list[Any]] = {
    "added": [add(7, 4.0, sae=AT)],
    "observed": [],
    "edited": [
        add(7, 4.0, sae=AT),
        clamp(71, 3.0, sae=AT, phase="generated"),
        ablate(5, sae=AT),
    ],
}
Rate = Callable[[int, str], float]
"""Tokens per second of so many streams of a variant."""


def main(
    engine: Annotated[
        list[str] | None, typer.Option(help="generate, compiled, serve or vllm; may be repeated.")
    ] = None,
    streams: Annotated[list[int] | None, typer.Option(help="May be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    minutes: Annotated[float, typer.Option(help="Of the mixed load; 0: none.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    save: Annotated[bool, typer.Option("--save", help="Write results/serving-….json.")] = False,
) -> None:
    """Measure tokens per second, or with --minutes memory."""
    torch.set_num_threads(threads)
    counts = streams or [1, 8, 32]
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if minutes:
        batching = _batching(max(counts))
        try:
            report["memory"] = endure(batching, max(counts), 60 * minutes)
        finally:
            batching.close()
    else:
        names = engine or ["generate", "compiled", "serve"]
        report["rounds"] = rounds
        report["throughput"] = {name: throughput(ENGINES[name], counts, rounds) for name in names}
    show(report)
    if save:
        RESULTS.mkdir(exist_ok=True)
        name = "serving-memory" if minutes else "-".join(["serving", *(engine or [])])
        file = RESULTS / f"{name}-{report['date']}-cpu-{threads}.json"
        file.write_text(json.dumps(report, indent=1) + "\n")


def throughput(
    start: Callable[[int], tuple[Rate, Callable[[], None]]], counts: list[int], rounds: int
) -> list[dict[str, Any]]:
    """Medians over rounds, by streams and variant."""
    rate, stop = start(max(counts))
    r = random.Random(0)
    rates: dict[tuple[int, str], list[float]] = {}
    try:
        for count in counts:
            for variant in VARIANTS:
                rate(count, variant)  # compiles, and fills caches
        for _ in track(range(rounds), "rounds"):
            for count in counts:
                for variant in r.sample(VARIANTS, len(VARIANTS)):
                    rates.setdefault((count, variant), []).append(rate(count, variant))
    finally:
        stop()
    rows = []
    for count in counts:
        for variant in VARIANTS:
            pairs = zip(rates[count, "bare"], rates[count, variant], strict=True)
            costs = sorted(bare / found for bare, found in pairs)
            rows.append(
                {
                    "streams": count,
                    "variant": variant,
                    "tokens_per_second": statistics.median(rates[count, variant]),
                    "cost": statistics.median(costs),
                    "cost_low": costs[0],
                    "cost_high": costs[-1],
                }
            )
    return rows


# -- the engines: how many streams at most -> how to measure, and what to do at the end ------------


def _generate(most: int, compiled: bool = False) -> tuple[Rate, Callable[[], None]]:
    base, sae = bundled.model(), bundled.sae(AT)
    models = {variant: twin(base) for variant in VARIANTS}
    for variant, edits in EDITS.items():
        record = "last" if variant == "observed" else False
        attach(models[variant], sae, list(edits), record=record, compiled=compiled)
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": GENERATED,
        "min_new_tokens": GENERATED,
        "max_length": None,
        "pad_token_id": 0,
    }
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph for each variant and batch
        how = transformers.CompileConfig(backend="inductor", mode="default", fullgraph=True)
        how._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": how}
    prompts = torch.randint(3, 1000, (most, PROMPT), generator=torch.Generator().manual_seed(0))

    def rate(count: int, variant: str) -> float:
        ids = prompts[:count]
        begun = time.perf_counter()
        with torch.no_grad():
            models[variant].generate(ids, attention_mask=torch.ones_like(ids), **options)
        return count * GENERATED / (time.perf_counter() - begun)

    return rate, lambda: None


def _batching(streams: int) -> Batching:
    sae = bundled.sae(AT)
    attached = {AT: Attached(f"bundled:{AT}", sae.num_latents, 16)}
    return Batching(bundled.model(), {AT: sae}, attached, streams=streams)


def _serve(most: int, seconds: float = 2.0) -> tuple[Rate, Callable[[], None]]:
    engine, r = _batching(most), random.Random(0)
    latents = engine.attached[AT].num_latents

    def rate(count: int, variant: str) -> float:
        clients = Clients(engine, count, lambda: job(variant, r, latents))
        time.sleep(0.3)  # all prompts are read
        tokens, begun = clients.tokens, time.perf_counter()
        time.sleep(seconds)
        found = (clients.tokens - tokens) / (time.perf_counter() - begun)
        clients.stop()
        return found

    return rate, engine.close


def _vllm(most: int) -> tuple[Rate, Callable[[], None]]:
    from vllm import SamplingParams

    from saert.engines.vllm import Engine

    engine = Engine.start(
        str(bundled.MODEL), [f"bundled:{AT}"], dtype="float32", max_num_seqs=most, seed=0,
        enable_prefix_caching=False,
    )  # fmt: skip
    params = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    r = random.Random(0)

    def rate(count: int, variant: str) -> float:
        jobs = [job(variant, r, engine.attached[AT].num_latents) for _ in range(count)]
        prompts = [{"prompt_token_ids": list(one.prompt)} for one in jobs]
        begun = time.perf_counter()
        engine.generate(
            prompts,
            params,
            edits=[list(one.directive.edits) for one in jobs],
            codes=[AT] if variant == "observed" else [],
        )
        return count * GENERATED / (time.perf_counter() - begun)

    return rate, lambda: None


ENGINES = {
    "generate": _generate,
    "compiled": lambda most: _generate(most, compiled=True),
    "serve": _serve,
    "vllm": _vllm,
}


def show(report: dict[str, Any]) -> None:
    """As tables, or memory as a line."""
    console = Console()
    if "memory" in report:
        console.print({k: v for k, v in report["memory"].items() if k != "samples"})
        return
    for engine, rows in report["throughput"].items():
        table = Table("streams", "variant", "tokens/s", "cost", title=engine)
        for row in rows:
            spread = f"{row['cost']:.2f}x ({row['cost_low']:.2f}–{row['cost_high']:.2f})"
            rate = f"{row['tokens_per_second']:,.0f}"
            table.add_row(str(row["streams"]), row["variant"], rate, spread)
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
