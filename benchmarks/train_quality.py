"""How well TopK SAEs reconstruct that saert and its peers trained, on the same activations.

    python benchmarks/train_quality.py --save
    python benchmarks/train_quality.py --model bundled --tokens 300000 --expansion 4 --no-tune

Everybody gets the same batches in the same order, and the same n, k and number of tokens. `default`
is a library's own trainer with its own initialisation, optimiser, learning rate, schedule and care
for dead latents; the output says what that is (`_train_peers.LIBRARIES`, and SAERT here). `tuned`
is the same with the learning rate that is best on validation activations for the first seed: from
the rate of a common grid, 10⁻³ · 2^j, that is nearest to the default, up or down the grid for as
long as it helps.

FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖² in float64 over held-out activations (Gao et al. 2024), L0 the latents
above 0 per token, dead the latents that never exceed 10⁻³ on them. The text is cut by document into
training text and text that is held out, half of it for validation.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

# This folder's kernels.py would hide Hugging Face's package `kernels`, which transformers imports.
sys.path[0] = str(Path(__file__).parents[1])

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks._timing import NotRun  # noqa: E402
from benchmarks._train_peers import LIBRARIES, Library, Task, Trained  # noqa: E402
from benchmarks.kernels import device_name, versions  # noqa: E402
from saert.capture import capture  # noqa: E402
from saert.hookpoint import Hookpoint  # noqa: E402
from saert.measure.reports.reconstruction import Unexplained  # noqa: E402
from saert.train.config import (  # noqa: E402
    EvaluationConfig,
    ModelConfig,
    SAEConfig,
    TrainConfig,
)
from saert.train.mesh import Mesh  # noqa: E402
from saert.train.objectives.base import ALIVE  # noqa: E402
from saert.train.objectives.topk import TopKObjective  # noqa: E402
from saert.train.run import Job, Plan, Run  # noqa: E402
from saert.train.session import Session  # noqa: E402
from saert.train.stream import Served, StreamConfig  # noqa: E402
from saert.train.text import DataConfig  # noqa: E402
from saert.train.training import DEAD_TOKENS, OptimiserConfig, default_rate  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXT = SHARED / "text" / "tinystories_windows_a" / "windows.jsonl"
STORIES = SHARED / "models" / "stories260K"
MARGIN = 1.02  # saert's FVU may be this much of the best peer's


@dataclass
class Row:
    """One library on one model, all seeds. `ratio`: mean FVU / saert's of the same variant."""

    model: str
    library: str
    variant: str  # default, tuned
    rate: float
    status: str = ""  # why there are no figures, if there are none
    fvu: list[float] = field(default_factory=list)
    l0: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    validation: dict[str, float] = field(default_factory=dict)  # rate -> FVU, while tuning

    @property
    def mean(self) -> float:
        return statistics.mean(self.fvu)


@dataclass(frozen=True)
class Subject:
    """Activations of one model: to train on, to tune on, to report."""

    name: str
    hookpoint: Hookpoint
    task: Task
    validation: Tensor
    test: Tensor


# -- saert -----------------------------------------------------------------------------------------


class Replay:
    """Recorded activations as the stream of a `Run`."""

    def __init__(self, task: Task, site: Hookpoint) -> None:
        self.task, self.site, self.batches = task, site, task.batches()

    def next(self) -> Served:
        return Served({self.site: next(self.batches)})

    def sample(self, tokens: int) -> dict[Hookpoint, Tensor]:
        return {self.site: self.task.x[:tokens]}

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


def train_saert(
    task: Task, seed: int, rate: float, objective: TopKObjective | None = None, **more: Any
) -> Trained:
    """A `Run`, as `saert.train.session` makes it. `more`: other settings of the optimiser."""
    site = Hookpoint.parse("resid_post.0")
    more |= {"dead_tokens": task.dead_tokens or min(DEAD_TOKENS, task.steps * task.batch // 20)}
    optimiser = OptimiserConfig(lr=rate / math.sqrt(2**14 / task.num_latents), **more)
    job = Job("it", site, None, task.num_latents, objective or TopKObjective(task.k), seed=seed)
    run = Run([job], Replay(task, site), Plan(task.steps, optimiser), None, Mesh())
    run.train()
    run.calibrate()
    sae = run.members[0].sae()

    def trained(x: Tensor) -> tuple[Tensor, Tensor]:
        code = sae.encode(x)
        return sae.decode(code, x), code.to_dense()

    return trained


SAERT = Library(
    "saert",
    lambda task: default_rate(TopKObjective.lr, task.num_latents, task.x.shape[1], task.steps),
    train_saert,
    "train.run.Run with TopKObjective and OptimiserConfig as they are: Adam, eps "
    f"{OptimiserConfig.eps:g}, lr by default_rate, warm-up {OptimiserConfig.warmup} "
    f"and decay {OptimiserConfig.decay} of the run, FVU, AuxK {TopKObjective.aux:g} after "
    "a twentieth of the run in silence, unit-norm decoder, b_dec at the geometric "
    "median and the encoder scaled on 32,768 tokens.",
)


# -- activations -----------------------------------------------------------------------------------


def subject(
    name: str, text: Path, tokens: int, batch: int, expansion: int, k: int,
    heldout: int, dead_tokens: int | None,
) -> Subject:  # fmt: skip
    """Run a model over the text; a layer three fifths up."""
    model = ModelConfig(name)
    probe = Session(TrainConfig(model, DataConfig((str(text),)), SAEConfig(("resid_post.0",))))
    site = f"resid_post.{int(0.6 * probe.facts.num_hidden_layers)}"
    context = min(256, probe.facts.max_position_embeddings)
    rows = -(-2 * heldout // context)
    config = TrainConfig(
        model,
        DataConfig((str(text),), context=context, holdout=0.03),
        SAEConfig((site,), expansion=float(expansion)),
        TopKObjective(k),
        stream=StreamConfig(batch_tokens=batch, buffer_tokens=max(131_072, 2 * batch)),
        evaluation=EvaluationConfig(rows=rows),
        tokens=tokens,
    )
    session = Session(config)
    [job] = session.jobs()
    stream = session.stream([job])
    x = torch.cat([stream.next().x[job.hookpoint] for _ in range(config.steps)])
    unseen = session.heldout
    assert unseen is not None
    used = ~session.special(unseen).flatten()
    held = capture(session.model, unseen, [job.hookpoint])[job.hookpoint][used]
    validation, test = held.chunk(2)
    task = Task(x, batch, job.num_latents, k, dead_tokens)
    return Subject(Path(name).name, job.hookpoint, task, validation, test)


# -- training and measuring ------------------------------------------------------------------------


@torch.no_grad()
def measure(trained: Trained, x: Tensor) -> tuple[float, float, float]:
    """FVU, L0 and the fraction of dead latents on x."""
    unexplained, active, fired = Unexplained(), 0, torch.zeros(0, dtype=torch.bool)
    for part in x.split(1024):
        reconstruction, f = trained(part)
        unexplained.add(part, reconstruction)
        active += int((f > 0).sum())
        alive = (f > ALIVE).any(0)
        fired = alive if not len(fired) else fired | alive
    return unexplained.fvu, active / len(x), 1 - fired.double().mean().item()


def run_library(
    library: Library, about: Subject, seeds: int, tune: bool, say: Callable[[str], None]
) -> Iterator[Row]:
    """The library's rows: default, and tuned if asked."""
    task = about.task
    rate = library.rate(task)

    @functools.cache
    def once(seed: int, rate: float) -> tuple[Trained, float]:
        say(f"{about.name}: {library.name}, lr {rate:.2g}, seed {seed}")
        begun = time.perf_counter()
        return library.train(task, seed, rate), time.perf_counter() - begun

    row = Row(about.name, library.name, "default", rate)
    try:
        report(row, once, about.test, seeds)
    except NotRun as error:
        row.status = f"not run: {error}"
        yield row
        return
    yield row
    if tune:
        row = Row(about.name, library.name, "tuned", rate)

        def score(rate: float) -> float:
            found = measure(once(0, rate)[0], about.validation)[0]
            row.validation[f"{rate:g}"] = found
            return found

        row.rate = climb(score, rate)
        report(row, once, about.test, seeds)
        yield row


def report(
    row: Row, once: Callable[[int, float], tuple[Trained, float]], test: Tensor, seeds: int
) -> None:
    for seed in range(seeds):
        trained, seconds = once(seed, row.rate)
        figures = *measure(trained, test), seconds
        for values, figure in zip((row.fvu, row.l0, row.dead, row.seconds), figures, strict=True):
            values.append(figure)


def climb(score: Callable[[float], float], start: float) -> float:
    """The rate 10⁻³ · 2^j of least score, one grid point from which both neighbours are worse."""
    at = round(math.log2(start / 1e-3))
    known = functools.cache(lambda j: _finite(score(1e-3 * 2.0**j)))
    step = 1 if known(at + 1) < known(at) else -1
    while known(at + step) < known(at):
        at += step
    return float(1e-3 * 2.0**at)


def _finite(number: float) -> float:
    return number if math.isfinite(number) else math.inf


# -- the table and the file ------------------------------------------------------------------------


def set_ratios(rows: list[Row]) -> None:
    ours = {(r.model, r.variant): r.mean for r in rows if r.library == SAERT.name and r.fvu}
    for row in rows:
        if row.fvu and (row.model, row.variant) in ours:
            row.ratio = row.mean / ours[row.model, row.variant]


def verdicts(rows: list[Row]) -> list[str]:
    """saert's FVU against the best peer's, for every model and variant."""
    found = []
    for model, variant in dict.fromkeys((r.model, r.variant) for r in rows):
        here = [r for r in rows if (r.model, r.variant) == (model, variant) and r.ratio is not None]
        if peers := [r for r in here if r.library != SAERT.name]:
            best = min(peers, key=lambda r: r.mean)
            assert best.ratio is not None
            kept = "within" if 1 / best.ratio <= MARGIN else "NOT within"
            found.append(
                f"{model}, {variant}: saert's FVU is {1 / best.ratio:.3f} of the best peer's "
                f"({best.library}), {kept} {MARGIN - 1:.0%}"
            )
    return found


def table(rows: list[Row]) -> Table:
    out = Table()
    for column in ("model", "library", "variant", "lr", "FVU", "of each seed", "/ saert"):
        out.add_column(column, no_wrap=True)
    for column in ("L0", "dead", "s a run"):
        out.add_column(column, justify="right")
    previous = ""
    for row in rows:
        if row.model != previous and previous:
            out.add_section()
        previous = row.model
        if row.status:
            out.add_row(row.model, row.library, row.variant, "", row.status)
            continue
        out.add_row(
            row.model, row.library, row.variant, f"{row.rate:.2g}", f"{row.mean:.4f}",
            " ".join(f"{n:.4f}" for n in row.fvu),
            "–" if row.ratio is None else f"{row.ratio:.3f}",
            f"{statistics.mean(row.l0):.1f}", f"{statistics.mean(row.dead):.1%}",
            f"{statistics.mean(row.seconds):.0f}",
        )  # fmt: skip
    return out


def write(folder: Path, kind: str, rows: list[Any], **more: Any) -> Path:
    """A record as `kernels.py` writes it: what, when, where and by which command."""
    today, device = date.today().isoformat(), torch.device("cpu")
    record = {
        "date": today,
        "device": device_name(device),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": versions(),
        "load": list(os.getloadavg()),  # over 1, 5 and 15 minutes, at the end
        **more,
        "rows": [asdict(row) for row in rows],
    }
    path = folder / f"{kind}-{today}-cpu-{torch.get_num_threads()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


# -- the command -----------------------------------------------------------------------------------


def main(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="bundled, or a transformers model's folder; repeatable. Default: the bundled "
            "one, and stories260K where the shared folder is."
        ),
    ] = None,
    text: Annotated[Path, typer.Option(help=".txt or .jsonl with a field `text`.")] = TEXT,
    tokens: Annotated[int, typer.Option(help="To train on.", min=1)] = 2_000_000,
    batch: Annotated[int, typer.Option(help="Tokens in a batch.", min=8)] = 2048,
    expansion: Annotated[int, typer.Option(help="Latents for each dimension.", min=1)] = 8,
    k: Annotated[int, typer.Option(min=1)] = 16,
    heldout: Annotated[
        int, typer.Option(help="Tokens to report on, and as many to tune on, if there are.", min=64)
    ] = 32_768,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="Libraries whose name contains this.")] = "",
    tune: Annotated[bool, typer.Option(help="Also with the best learning rate.")] = True,
    dead_tokens: Annotated[
        int, typer.Option(help="Dead after so many silent tokens, everywhere. 0: each its own.")
    ] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write the raw figures as JSON.")] = False,
    results: Annotated[Path, typer.Option(help="The folder that --save writes to.")] = RESULTS,
) -> None:
    """Train with saert and every peer installed, on the same activations; one table."""
    if not text.is_file():
        raise typer.BadParameter(f"no text at {text}; give some with --text")
    names = model or ["bundled", *([str(STORIES)] if STORIES.is_dir() else [])]
    console = Console(width=None if sys.stdout.isatty() else 160)
    log = Console(stderr=True)
    libraries = [lib for lib in (SAERT, *LIBRARIES) if only in lib.name]
    rows: list[Row] = []
    about = []
    for name in names:
        log.print(f"{name}: activations")
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
            it = subject(name, text, tokens, batch, expansion, k, heldout, dead_tokens or None)
        task = it.task
        about.append(
            f"{it.name}, {it.hookpoint}: d {task.x.shape[1]}, n {task.num_latents}, k {k}, "
            f"{task.steps:,} batches of {batch:,} tokens, {len(it.validation):,} to tune on, "
            f"{len(it.test):,} to report"
        )
        for library in libraries:
            rows += run_library(library, it, seeds, tune, log.print)
    set_ratios(rows)
    notes = [*about, *(f"{lib.name}: {lib.settings}" for lib in libraries)]
    found = verdicts(rows)
    if save:
        kind = "-".join(filter(None, ["train_quality", "auxk" if dead_tokens else "", only]))
        path = write(results, kind, rows, notes=notes, verdicts=found)
    console.print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {seeds} seeds")
    console.print(table(rows))
    console.print("\n".join([*notes, "", *found]), highlight=False)
    if save:
        console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
