"""What a step of training costs: saert's whole step beside its peers', and where saert's time goes.

    python benchmarks/train_step.py --save
    python benchmarks/train_step.py --half           # in bfloat16 arithmetic
    python benchmarks/train_step.py --dead 0.125     # AuxK at work, on an eighth of the latents
    python benchmarks/train_step.py --end-to-end     # with the language model, the bundled one

A step is all that a trainer does for a batch of activations: loss, AuxK's machinery, backward, the
gradient's projection or clipping, the optimiser, the decoder's norms, the count of silent latents,
and the numbers for the log (`_train_peers`). `kernels.py --peers` times the bare step without most
of these. All start from the same weights, and each peer's reconstruction is checked against saert's
before it is timed. Every round times everybody once, in a fresh order; a ratio is the median over
rounds of the peer's time / saert's of the same round.

The parts of saert's step are timed apart, by wrapping its functions; their sum is the step but for
what a call costs. `end to end` is saert training the bundled model's SAE, buffer by buffer, beside
the model alone on the same rows: no logits, no hooks, no SAE.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

# This folder's kernels.py would hide Hugging Face's package `kernels`, which transformers imports.
sys.path[0] = str(Path(__file__).parents[1])

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import _train_peers as peers  # noqa: E402
from benchmarks._checks import CheckRed  # noqa: E402
from benchmarks._inputs import Inputs, Shape, draw  # noqa: E402
from benchmarks._timing import NotRun, race  # noqa: E402
from benchmarks._timing import Run as Call  # noqa: E402
from benchmarks._training import computes_in_half  # noqa: E402
from benchmarks.kernels import device_name, quartiles  # noqa: E402
from benchmarks.train_quality import RESULTS, TEXT, write  # noqa: E402
from saert.train import training  # noqa: E402
from saert.train.config import ModelConfig, SAEConfig, TrainConfig  # noqa: E402
from saert.train.dictionary import Dictionary  # noqa: E402
from saert.train.mesh import Mesh  # noqa: E402
from saert.train.objectives import topk  # noqa: E402
from saert.train.objectives.base import Batch  # noqa: E402
from saert.train.objectives.topk import TopKObjective  # noqa: E402
from saert.train.run import Run  # noqa: E402
from saert.train.session import Session  # noqa: E402
from saert.train.stream import ActivationStream, StreamConfig  # noqa: E402
from saert.train.text import DataConfig  # noqa: E402
from saert.train.training import OptimiserConfig, Training  # noqa: E402

PHASES = {  # by what is wrapped; what a later version does not have is left out
    (Batch, "of"): "the batch's variance",
    (Dictionary, "topk"): "encode",
    (Dictionary, "decode"): "decode",
    (topk, "unexplained"): "loss",
    (topk, "aux_loss"): "AuxK",
    (topk, "summarise"): "statistics",
    (Tensor, "backward"): "backward",
    (training, "remove_parallel_gradient"): "projection",
    (training, "clip_gradient"): "gradient's norm",
    (torch.optim.Adam, "step"): "Adam",
    (training, "normalise_decoder"): "normalise",
    (Training, "_move_average"): "moving average",
    (Training, "_log"): "statistics",
}


@dataclass
class Row:
    """One contender, or one part of saert's step. `ratio`: its time / saert's whole step."""

    what: str
    status: str = ""  # why there is no time, if there is none
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None


# -- steps -----------------------------------------------------------------------------------------


def saert_step(i: Inputs, half: bool, dead: float) -> Call:
    """What `train.run` does with a batch, the numbers for the log included."""
    if half and not computes_in_half(i.x.device):
        raise NotRun("this CPU has no bfloat16 instructions")
    weights = [t.clone() for t in (i.W_enc, i.W_dec, i.b_enc, i.b_dec)]
    dictionary = Dictionary(*weights, compute=torch.bfloat16 if half else None)
    mesh, objective = Mesh(), TopKObjective(i.shape.k)
    it = Training(dictionary, objective, OptimiserConfig(), steps=10_000)

    def step() -> dict[str, float]:
        peers.keep_dead(it.since, dead)
        found = it.step(Batch.of(i.x, i.x, mesh), number=1000)  # past the warm-up
        return {name: value.item() for name, value in found.items()}

    return step


def contenders(half: bool, dead: float, beside: bool) -> dict[str, Callable[[Inputs], Call]]:
    ours = {"saert": lambda i: saert_step(i, half, dead)}
    return {**ours, **(peers.steps(half, dead) if beside else {})}


def time_steps(
    made: dict[str, Callable[[Inputs], Call]], inputs: Inputs, rounds: int
) -> tuple[list[Row], dict[str, Call]]:
    rows, runs = [], {}
    for name, make in made.items():
        row = Row(name)
        rows.append(row)
        try:
            with peers.quietly():
                runs[name] = make(inputs)
        except (NotRun, CheckRed) as error:
            kind = "not run" if isinstance(error, NotRun) else "CHECK RED"
            row.status = f"{kind}: {error}"
    seconds = race(runs, rounds, inputs.x.device)
    for row in rows:
        summarise(row, seconds.get(row.what, []), seconds.get("saert", []))
    return rows, runs


def summarise(row: Row, took: list[float], ours: list[float]) -> None:
    if not took:
        return
    row.seconds, row.median, row.quartiles = took, statistics.median(took), quartiles(took)
    if ours:
        ratios = [a / b for a, b in zip(took, ours, strict=True)]
        row.ratio, row.ratio_quartiles = statistics.median(ratios), quartiles(ratios)


# -- where saert's time goes -----------------------------------------------------------------------


def parts(step: Call, rounds: int, device: torch.device) -> list[Row]:
    """Seconds of each part of a step, in its order, and of the rest."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        spent: dict[str, float] = defaultdict(float)
        with contextlib.ExitStack() as stack:
            wrap(stack, spent, device)
            begun = now(device)
            step()
            whole = now(device) - begun
        for name, seconds in {**spent, "the rest": whole - sum(spent.values())}.items():
            found[name].append(seconds)
        found["the whole step"].append(whole)
    whole_step = found.pop("the whole step")
    rows = []
    for name, seconds in {**found, "the whole step": whole_step}.items():
        row = Row(name)
        summarise(row, seconds, whole_step)
        rows.append(row)
    return rows


def wrap(stack: contextlib.ExitStack, spent: dict[str, float], device: torch.device) -> None:
    """Let the functions of a step report their time; one called by another counts there."""
    inside = [False]

    def timed(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if inside[0]:
                return act(*args, **options)
            inside[0], begun = True, now(device)
            try:
                return act(*args, **options)
            finally:
                spent[name] += now(device) - begun
                inside[0] = False

        return run

    for (owner, name), phase in PHASES.items():
        if hasattr(owner, name):
            act: Any = timed(phase, getattr(owner, name))
            if (owner, name) == (Batch, "of"):
                act = staticmethod(act)  # it is a class method, already bound
            stack.enter_context(patch.object(owner, name, act))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -- end to end ------------------------------------------------------------------------------------


class Kept:
    """Rows of a source, the last ones kept."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.last = rows, torch.empty(0)

    def take(self, n: int) -> Tensor:
        self.last = self.rows.take(n)
        return self.last

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self.rows.state_dict()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


def end_to_end(text: Path, rounds: int, num_latents: int, k: int, buffer: int) -> list[Row]:
    """Seconds of training on a buffer of the bundled model's activations, and of its forward."""
    config = TrainConfig(
        ModelConfig("bundled"),
        DataConfig((str(text),), context=256),
        SAEConfig(("resid_post.2",), num_latents=num_latents),
        TopKObjective(k),
        stream=StreamConfig(batch_tokens=2048, buffer_tokens=buffer),
        tokens=10**9,
    )
    session = Session(config)
    jobs = session.jobs()
    stream = session.stream(jobs)
    assert isinstance(stream, ActivationStream)
    stream.rows = rows = Kept(stream.rows)
    run = Run(jobs, stream, session.plan(), None, Mesh())  # fills the first buffer

    def train() -> int:
        before = run.step
        while True:
            run.train(until=run.step + 1)
            if stream.buffer is None:  # the next step fills one
                return run.step - before

    @torch.no_grad()
    def forward() -> None:
        for part in rows.last.split(config.stream.forward_rows):
            session.model.base_model(part, use_cache=False)

    train()
    forward()
    took: dict[str, list[float]] = defaultdict(list)
    for turn in track(range(rounds), "end to end", console=Console(stderr=True), transient=True):
        order = [("train", train), ("forward", forward)]
        if turn % 2:
            order.reverse()
        for name, act in order:
            begun = time.perf_counter()
            found = act()
            took[name].append(time.perf_counter() - begun)
            if found is not None:
                trained = found * config.stream.batch_tokens
    out = []
    for name, what in (("train", "saert, training"), ("forward", "the model alone")):
        seconds = took[name]
        tokens = rows.last.numel()
        speed = tokens / statistics.median(seconds)
        row = Row(f"{what}: {speed:,.0f} tokens/s, {tokens:,} in a buffer")
        if name == "train":
            row.what += f", {trained:,} trained on"
        summarise(row, seconds, took["train"])
        out.append(row)
    return out


# -- the table -------------------------------------------------------------------------------------


def table(rows: list[Row], ratio: str) -> Table:
    out = Table()
    for column in ("", "median ms (quartiles)", ratio):
        out.add_column(column)
    for row in rows:
        if row.median is None or row.quartiles is None:
            out.add_row(row.what, row.status)
            continue
        low, high = row.quartiles
        times = f"{1e3 * row.median:,.1f} ({1e3 * low:,.1f}–{1e3 * high:,.1f})"
        share = "–"
        if row.ratio is not None and row.ratio_quartiles is not None:
            share = f"{row.ratio:.3f} ({row.ratio_quartiles[0]:.3f}–{row.ratio_quartiles[1]:.3f})"
        out.add_row(row.what, times, share)
    return out


def sections(
    settings: dict[str, Any], rounds: int, beside: bool, whole: bool, text: Path
) -> Iterator[tuple[str, str, list[Row]]]:
    """(title, what a ratio is, rows) of each table."""
    if whole:
        n, k = settings["latents"], settings["k"]
        rows = end_to_end(text, rounds, n, k, settings["buffer"])
        yield f"end to end, bundled resid_post.2, n {n}, k {k}", "/ saert's training", rows
        return
    shape = Shape(settings["d"], settings["latents"], settings["k"], settings["tokens"], "float32")
    inputs = draw(shape, torch.device(settings["device"]), seed=1)
    half, dead = settings["half"], settings["dead"]
    rows, runs = time_steps(contenders(half, dead, beside), inputs, rounds)
    arithmetic = "bfloat16 arithmetic" if half else "float32"
    yield (
        f"{shape.d} × {shape.n}, k {shape.k}, {shape.tokens:,} tokens, {arithmetic}, "
        f"{dead:.0%} of the latents dead",
        "/ saert's",
        rows,
    )
    if "saert" in runs:
        shares = parts(runs["saert"], rounds, inputs.x.device)
        yield "the parts of saert's step", "of the step", shares


# -- the command -----------------------------------------------------------------------------------


def main(
    d: Annotated[int, typer.Option(help="d_in.", min=1)] = 768,
    latents: Annotated[int, typer.Option(help="Default: 16,384; end to end 1,024.", min=0)] = 0,
    k: Annotated[int, typer.Option(help="Default: 32; end to end 16.", min=0)] = 0,
    tokens: Annotated[int, typer.Option(help="In a batch.", min=1)] = 2048,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after a warm-up.", min=2)] = 9,
    dead: Annotated[
        float, typer.Option(help="The part of latents that stays dead, for AuxK.", min=0, max=1)
    ] = 0.0,
    half: Annotated[bool, typer.Option("--half", help="In bfloat16 arithmetic.")] = False,
    peer: Annotated[bool, typer.Option(help="Beside the peers that are installed.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    whole: Annotated[
        bool, typer.Option("--end-to-end", help="Training beside the model's own forward.")
    ] = False,
    text: Annotated[Path, typer.Option(help="For --end-to-end.")] = TEXT,
    buffer: Annotated[int, typer.Option(help="For --end-to-end: tokens in a buffer.")] = 65_536,
    save: Annotated[bool, typer.Option("--save", help="Write the raw figures as JSON.")] = False,
    results: Annotated[Path, typer.Option(help="The folder that --save writes to.")] = RESULTS,
) -> None:
    """Time one training step of saert and of every peer installed; one table each."""
    if whole and not text.is_file():
        raise typer.BadParameter(f"no text at {text}; give some with --text")
    settings = {
        "d": d, "latents": latents or (1024 if whole else 16_384), "k": k or (16 if whole else 32),
        "tokens": tokens, "dead": dead, "half": half, "device": device, "buffer": buffer,
    }  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bars
        found = list(sections(settings, rounds, peer, whole, text))
    saved = ""
    if save:
        flags = {"end-to-end": whole, "half": half, "auxk": dead > 0}
        kind = "-".join(["train_step", *(name for name, on in flags.items() if on)])
        rows = [row for _, _, rows in found for row in rows]
        path = write(results, kind, rows, rounds=rounds, settings=settings)
        saved = f"written to {path}"
    where = device_name(torch.device(device))
    console.print(f"{where}, torch {torch.__version__}, {rounds} rounds")
    for title, ratio, rows in found:
        console.print(title, highlight=False)
        console.print(table(rows, ratio))
    if saved:
        console.print(saved)
    if any(row.status.startswith("CHECK RED") for _, _, rows in found for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
