"""Which objectives shrink activations, and what refining them gains (Gao et al. 2024, section 5.1).

    python benchmarks/refinement.py --data stories.jsonl                   # the bundled model
    python benchmarks/refinement.py --data stories.jsonl --seeds 2 --save  # docs/refine.md
    python benchmarks/refinement.py --data stories.jsonl --quick           # does everything run?

Dictionaries of ReLU with several L1 penalties, Gated, JumpReLU, BatchTopK and TopK train on the
same batches of one model. On held-out rows every exported SAE is then measured as it is and with
refined activations: shrinkage, FVU, and the model's loss with the reconstruction spliced in.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from saert.measure.reports.refinement import refinement_report  # noqa: E402
from saert.train.config import from_table  # noqa: E402
from saert.train.objectives import OBJECTIVES  # noqa: E402
from saert.train.objectives.base import Objective  # noqa: E402
from saert.train.run import Job, Run  # noqa: E402
from saert.train.session import Session  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "refine.md"
BEGIN, END = "<!-- table: python benchmarks/refinement.py -->", "<!-- end of table -->"


def contenders(k: int) -> dict[str, Objective]:
    """Objectives with a penalty on activations, and without one."""
    kind = OBJECTIVES
    found: dict[str, Objective] = {
        f"ReLU, L1 λ {l1:g}": kind["relu_l1"](l1=l1) for l1 in (0.05, 0.1, 0.2)
    }
    found["ReLU, L1 at the same L0"] = kind["relu_l1"](target_l0=float(k))
    found["Gated"] = kind["gated"](target_l0=float(k))
    found["JumpReLU"] = kind["jumprelu"](target_l0=float(k))
    found["BatchTopK"] = kind["batch_topk"](k=k)
    found |= {f"TopK, k {n}": kind["topk"](k=n) for n in (k // 2, k, 2 * k)}
    return found


def main(
    data: Annotated[list[str], typer.Option(help="Text, as for saert train.")],
    model: str = "bundled",
    hookpoint: str = "resid_post.2",
    num_latents: int = 512,
    k: int = 16,
    tokens: float = 6e5,
    context: int = 128,
    lr: Annotated[float, typer.Option(help="At 16,384 latents, for all alike.")] = 1e-3,
    rows: Annotated[int, typer.Option(help="Held-out rows to measure on.")] = 64,
    seeds: int = 1,
    threads: int = 0,
    quick: bool = False,
    save: Annotated[bool, typer.Option("--save", help="Also docs/refine.md.")] = False,
) -> None:
    """Train, refine and measure."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        num_latents, k, tokens, rows = 64, 4, 2048 * 8, 4
    config = from_table(
        {
            "model": {"name": model},
            "data": {"source": data, "context": context},
            "sae": {"hookpoints": [hookpoint], "num_latents": num_latents},
            "stream": {"batch_tokens": 2048, "buffer_tokens": 8192 if quick else 32_768},
            "optimiser": {"lr": lr, "dead_tokens": int(tokens / 8)},
            "evaluation": {"rows": rows},
            "tokens": int(tokens),
        }
    )
    results = [one for seed in range(seeds) for one in _seed(replace(config, seed=seed), k)]
    console = Console(width=140)
    table = Table(*HEAD)
    for cells in _cells(results):
        table.add_row(*cells)
    console.print(table)
    if save:
        console.print(f"written to {_save(results, config, seeds)}")


def _seed(config: Any, k: int) -> Iterator[dict[str, Any]]:
    session = Session(config)
    read, write = config.sae.pairs()[0]
    jobs = [
        Job(name, read, write, config.sae.num_latents, objective, config.seed, start=None)
        for name, objective in contenders(k).items()
    ]
    run = Run(jobs, session.stream(jobs), session.plan(), None, session.mesh)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"seed {config.seed}", total=config.steps)
        run.train(lambda step, logs: bar.update(task, completed=step))
    run.calibrate()
    assert session.heldout is not None
    for member in run.members:
        found = refinement_report(
            session.model, member.sae(), session.heldout, special=session.special, progress=False
        )
        yield {"objective": member.job.name, "seed": config.seed} | found.to_dict()


HEAD = ("objective", "L0", "shrinkage", "FVU", "refined", "CE added", "refined", "KL", "refined")


def _cells(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: means over seeds."""
    for name in dict.fromkeys(r["objective"] for r in results):
        seeds = [r for r in results if r["objective"] == name]
        m = {key: statistics.mean(r[key] for r in seeds) for key in seeds[0] if key != "objective"}
        yield (
            name, f"{m['l0']:.1f}", f"{m['shrinkage']:+.1%}",
            f"{m['fvu']:.4f}", f"{m['fvu_refined']:.4f}",
            f"{m['ce_spliced'] - m['ce']:.4f}", f"{m['ce_refined'] - m['ce']:.4f}",
            f"{m['kl_spliced']:.4f}", f"{m['kl_refined']:.4f}",
        )  # fmt: skip


def _save(results: list[dict[str, Any]], config: Any, seeds: int) -> Path:
    about = {
        "date": date.today().isoformat(),
        "command": "python benchmarks/refinement.py " + " ".join(
            Path(a).name if "/" in a else a for a in sys.argv[1:]
        ),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "results": results,
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"refinement-{about['date']}.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(results)]
    note = (
        f"{about['date']}: {config.sae.hookpoints[0]} of the {config.model.name} model, "
        f"{config.sae.num_latents:,} latents, {config.tokens / 1e6:g} M tokens, "
        f"{results[0]['tokens']:,} held out, mean of {seeds} seed{'s' if seeds > 1 else ''}; "
        f"{about['device']}. Raw figures: [{path.name}](../benchmarks/results/{path.name})."
    )
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + note + "\n" + after)
    return path


if __name__ == "__main__":
    typer.run(main)
