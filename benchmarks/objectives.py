"""Every objective on the same batches of one model, in one table.

    python benchmarks/objectives.py --data stories.jsonl                    # the bundled model
    python benchmarks/objectives.py --data stories.jsonl --seeds 2 --save   # docs/objectives.md
    python benchmarks/objectives.py --data stories.jsonl --quick            # does everything run?

All dictionaries of a seed train at once on one stream; end-to-end, which needs whole rows, goes on
from the trained TopK on rows of the same text, for a tenth of the tokens. Sparsity penalties steer
to the same L0 as the others' k, where the objective can. Metrics are of the exported SAEs on text
that is held out. "bias" is the relative reconstruction bias γ = Σ‖x̂ − b‖² / Σ⟨x̂ − b, x − b⟩ with
b = b_dec, the factor by which reconstructions are too long (below 1: shrinkage). Steps are timed
one after the other in rounds when training is over; tokens/s is a median, without the language
model.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from saert.capture import capture  # noqa: E402
from saert.measure.reports.evaluate import evaluate  # noqa: E402
from saert.sae import SAE  # noqa: E402
from saert.train.config import from_table  # noqa: E402
from saert.train.objectives import OBJECTIVES  # noqa: E402
from saert.train.objectives.base import Objective  # noqa: E402
from saert.train.run import Job, Run  # noqa: E402
from saert.train.session import Session  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "objectives.md"
BEGIN, END = "<!-- table: python benchmarks/objectives.py -->", "<!-- end of table -->"
COLUMNS = ("fvu", "l0", "ce_recovered", "kl_spliced", "dead", "bias", "tokens_per_second")


def contenders(k: int) -> dict[str, Objective]:
    """Every objective at the same L0, and the variants that the table compares."""
    kind = OBJECTIVES
    found: dict[str, Objective] = {
        "TopK": kind["topk"](k=k),
        "TopK without AuxK": kind["topk"](k=k, aux=0.0),
        "TopK, Multi-TopK": kind["topk"](k=k, multi=1 / 8),
        "BatchTopK": kind["batch_topk"](k=k),
        "Matryoshka BatchTopK": kind["matryoshka"](k=k),
        "Mutual Choice": kind["mutual_choice"](k=k),
        "Feature Choice": kind["feature_choice"](k=k),
        "ReLU, L1": kind["relu_l1"](target_l0=float(k)),
        "Gated": kind["gated"](target_l0=float(k)),
        "JumpReLU": kind["jumprelu"](target_l0=float(k)),
        "ATM": kind["atm"](),
        "Llama Scope (JumpReLU)": kind["llama_scope"](k=k),
        "Gradient SAE": kind["gradient"](k=k),
    }
    return found


def main(
    data: Annotated[list[str], typer.Option(help="Text, as for saert train.")],
    model: str = "bundled",
    hookpoint: str = "resid_post.2",
    num_latents: int = 1024,
    k: int = 16,
    tokens: float = 2e6,
    context: int = 128,
    lr: Annotated[float, typer.Option(help="At 16,384 latents, for all alike.")] = 5e-4,
    seeds: int = 1,
    only: Annotated[str | None, typer.Option(help="Contenders whose name contains this.")] = None,
    threads: int = 0,
    quick: bool = False,
    save: Annotated[bool, typer.Option("--save", help="Also docs/objectives.md.")] = False,
) -> None:
    """Train, export, measure and time every objective."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        num_latents, k, tokens = 128, 4, 2048 * 8
    config = from_table(
        {
            "model": {"name": model},
            "data": {"source": data, "context": context},
            "sae": {"hookpoints": [hookpoint], "num_latents": num_latents},
            "stream": {"batch_tokens": 2048, "buffer_tokens": 16_384 if quick else 65_536},
            "optimiser": {"lr": lr, "dead_tokens": int(tokens / 8)},
            "evaluation": {"rows": 16 if quick else 256},
            "tokens": int(tokens),
        }
    )
    results = []
    for seed in range(seeds):
        results += list(_seed(replace(config, seed=seed), k, only))
    console = Console(width=140)
    console.print(_table(results))
    if save:
        _save(results, config, k)


def _seed(config: Any, k: int, only: str | None) -> Iterator[dict[str, Any]]:
    chosen = {n: o for n, o in contenders(k).items() if only is None or only in n}
    session = Session(config)
    read, write = config.sae.pairs()[0]

    def job(name: str, objective: Objective, start: SAE | None = None) -> Job:
        return Job(name, read, write, config.sae.num_latents, objective, config.seed, start=start)

    jobs = [job(name, objective) for name, objective in chosen.items()]
    run = Run(jobs, session.stream(jobs), session.plan(), None, session.mesh)
    with Progress() as bar:
        task = bar.add_task(f"seed {config.seed}", total=config.steps)
        run.train(lambda step, logs: bar.update(task, completed=step))
    speed = _speeds(run)
    run.calibrate()
    saes = {member.job.name: member.sae() for member in run.members}
    if "TopK" in saes:
        name = "End-to-end (from TopK)"
        jobs = [job(name, OBJECTIVES["end_to_end"](k=k), saes["TopK"])]
        tuned = replace(config.optimiser, lr=config.optimiser.lr / 5)
        plan = replace(session.plan(), steps=max(2, config.steps // 10), optimiser=tuned)
        end = Run(jobs, session.stream(jobs), plan, None, session.mesh)
        end.train()
        speed |= _speeds(end)
        saes[name] = end.members[0].sae()
    assert session.heldout is not None
    for name, sae in saes.items():
        metrics = asdict(evaluate(session.model, sae, session.heldout, special=session.special))
        bias = reconstruction_bias(session, sae)
        yield {"objective": name, "seed": config.seed, **metrics, "bias": bias} | {
            "tokens_per_second": speed[name]
        }


def _speeds(run: Run, rounds: int = 7) -> dict[str, float]:
    """Tokens per second of a training step: all members in turn, a few rounds."""
    seconds: dict[str, list[float]] = {member.job.name: [] for member in run.members}
    for _ in range(rounds):
        served = run.stream.next()
        for member in run.members:
            batch = member.batch(served, run.mesh, run.plan.dtype)
            begun = time.perf_counter()
            member.training.step(batch, run.plan.steps - 1)
            seconds[member.job.name].append(time.perf_counter() - begun)
    return {name: batch.tokens / statistics.median(s[1:]) for name, s in seconds.items()}


@torch.no_grad()
def reconstruction_bias(session: Session, sae: SAE) -> float:
    """γ of the module's docstring, on held-out tokens."""
    assert session.heldout is not None and sae.hookpoint is not None
    x = capture(session.model, session.heldout, [sae.hookpoint])[sae.hookpoint]
    x = x[~session.special(session.heldout).flatten()]
    b = sae.b_dec if sae.b_dec is not None else x.new_zeros(())
    x, estimate = (x - b).double(), (sae(x) - b).double()
    return (estimate.square().sum() / (estimate * x).sum()).item()


def _mean(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    names = list(dict.fromkeys(r["objective"] for r in results))
    return {
        name: {c: statistics.mean(r[c] for r in results if r["objective"] == name) for c in COLUMNS}
        for name in names
    }


def _cells(m: dict[str, float]) -> list[str]:
    return [
        f"{m['fvu']:.4f}", f"{m['l0']:.1f}", f"{m['ce_recovered']:.2%}", f"{m['kl_spliced']:.4f}",
        f"{m['dead']:.1%}", f"{m['bias']:.3f}", f"{m['tokens_per_second']:,.0f}",
    ]  # fmt: skip


HEAD = ("objective", "FVU", "L0", "CE recovered", "KL spliced", "dead", "bias γ", "tokens/s")


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(*HEAD)
    for name, m in _mean(results).items():
        table.add_row(name, *_cells(m))
    return table


def _save(results: list[dict[str, Any]], config: Any, k: int) -> None:
    seeds = len({r["seed"] for r in results})
    about = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/objectives.py " + " ".join(
            Path(a).name if "/" in a else a for a in sys.argv[1:]
        ),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "results": results,
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"objectives-{about['date']}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    rows = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    rows += [f"| {name} | " + " | ".join(_cells(m)) + " |" for name, m in _mean(results).items()]
    note = (
        f"{about['date']}: {config.sae.hookpoints[0]} of the {config.model.name} model, "
        f"{config.sae.num_latents:,} latents, k or target L0 {k}, {config.tokens / 1e6:g} M "
        "tokens, "
        f"mean of {seeds} seed{'s' if seeds > 1 else ''}; {about['device']}. "
        f"Raw figures: [{path.name}](../benchmarks/results/{path.name})."
    )
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(rows) + "\n\n" + note + "\n" + after)


if __name__ == "__main__":
    typer.run(main)
