"""What attaching costs: the bare model against observe, add, clamp and splice, in one run.

    python benchmarks/attach_overhead.py --save

Every round times every variant once, in a fresh order, so that a machine that slows down slows all
of them; the ratio is the median over rounds of variant / bare of the same round. `generate` is
greedy, with a KV cache. Without `--model` two models run: the bundled one with its own SAE, and one
of GPT-2-small's shape (d 768, 12 layers, random weights) with 32,768 random latents.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from saert import SAE, JumpReLU, TopK, add, attach, clamp
from saert.hub import bundled

RESULTS = Path(__file__).parent / "results"
GENERATED, PROMPT = 64, 16


@dataclass(frozen=True)
class Subject:
    """A model, an SAE for it, and how long its prefill is."""

    name: str
    model: transformers.PreTrainedModel
    sae: SAE
    prefill: int


@dataclass(frozen=True)
class Row:
    """One variant of one subject; seconds are medians, ratios are to the bare run of the round."""

    subject: str
    work: str
    variant: str
    seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bundled_subject() -> Subject:
    model = bundled.model()
    context = model.config.n_positions
    sae = bundled.sae(bundled.DEMO.hookpoint)
    return Subject("bundled", model, sae, min(512, context - GENERATED))


def gpt2_subject(activation: str) -> Subject:
    """GPT-2 small's shape. Random weights cost what trained ones do."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    num_latents, d_in = 32_768, 768
    W = torch.nn.functional.normalize(torch.randn(num_latents, d_in), dim=-1)
    kind = TopK(32)
    if activation == "jumprelu":  # about 32 active latents on this stream, as for TopK
        kind = JumpReLU(_threshold_for(model, W, 32))
    sae = SAE.from_weights(W, W, activation=kind, hookpoint="resid_post.8")
    return Subject(f"gpt2-small shape, {activation}", model, sae, 512)


def _threshold_for(model: transformers.PreTrainedModel, W: torch.Tensor, l0: int) -> float:
    ids = torch.randint(model.config.vocab_size, (1, 256))
    seen: list[torch.Tensor] = []
    block = model.transformer.h[8]
    hook = block.register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids)
    hook.remove()
    scores = seen[0].flatten(0, -2) @ W.T
    return float(scores.flatten().kthvalue(scores.numel() - l0 * scores.shape[0]).values)


def variants(subject: Subject) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    model, sae = subject.model, subject.sae
    return {
        "bare": nullcontext,
        "observe": lambda: attach(model, sae),
        "add": lambda: attach(model, sae, add(7, 1.0), record=False),
        "clamp": lambda: attach(model, sae, clamp(7, 1.0), record=False),
        "splice": lambda: attach(model, sae, splice=True, record=False),
        "observe + splice": lambda: attach(model, sae, splice=True),
    }


def works(subject: Subject) -> dict[str, Callable[[], object]]:
    model, vocabulary = subject.model, subject.model.config.vocab_size
    long = torch.randint(vocabulary, (1, subject.prefill))
    short = torch.randint(vocabulary, (1, PROMPT))
    mask = torch.ones_like(short)

    def generate() -> object:
        return model.generate(
            short, attention_mask=mask, max_new_tokens=GENERATED, min_new_tokens=GENERATED,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return {f"prefill {subject.prefill}": lambda: model(long), f"generate {GENERATED}": generate}


def measure(subject: Subject, rounds: int, console: Console) -> Iterator[Row]:
    for work, run in works(subject).items():
        seconds: dict[str, list[float]] = {name: [] for name in variants(subject)}
        for turn in track(range(rounds + 1), f"{subject.name}, {work}", console=console):
            order = list(variants(subject).items())
            random.Random(turn).shuffle(order)
            for name, attached in order:
                with attached(), torch.inference_mode():
                    begun = time.perf_counter()
                    run()
                    took = time.perf_counter() - begun
                if turn:  # the first round warms up
                    seconds[name].append(took)
        for name, took in seconds.items():
            ratios = [a / b for a, b in zip(took, seconds["bare"], strict=True)]
            low, high = (statistics.quantiles(ratios, n=4)[i] for i in (0, 2))
            yield Row(
                subject.name, work, name, statistics.median(took), statistics.median(ratios),
                low, high,
            )  # fmt: skip


def main(
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 15,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 leaves the default.")] = 0,
    only: Annotated[str, typer.Option(help="Subjects whose name contains this.")] = "",
    save: Annotated[bool, typer.Option(help="Write benchmarks/results/attach_overhead-*.json.")] = (
        False
    ),
) -> None:
    """Time bare, observed, edited and spliced runs side by side; medians and ratios."""
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    makers: dict[str, Callable[[], Subject]] = {
        "bundled": bundled_subject,
        "gpt2-small shape, topk": lambda: gpt2_subject("topk"),
        "gpt2-small shape, jumprelu": lambda: gpt2_subject("jumprelu"),
    }
    rows = []
    for name, make in makers.items():
        if only in name:
            rows += list(measure(make(), rounds, console))
    table = Table("model", "work", "variant", "median ms", "ratio to bare", "quartiles")
    for row in rows:
        table.add_row(
            row.subject, row.work, row.variant, f"{row.seconds * 1000:.1f}", f"{row.ratio:.3f}",
            f"{row.ratio_low:.3f}–{row.ratio_high:.3f}",
        )  # fmt: skip
    console.print(table)
    if save:
        device = f"cpu-{torch.get_num_threads()}"
        chosen = f" --only {only}" if only else ""
        record = {
            "date": date.today().isoformat(),
            "device": f"{platform.processor() or platform.machine()}, {device} threads",
            "command": f"python benchmarks/attach_overhead.py --rounds {rounds}{chosen} --save",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": [asdict(row) for row in rows],
        }
        part = f"-{only}" if only else ""  # a part of the run does not replace the whole
        path = RESULTS / f"attach_overhead{part}-{record['date']}-{device}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {path.relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    typer.run(main)
