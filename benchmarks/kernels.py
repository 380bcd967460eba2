"""How fast the kernels are, and how much memory they need: each against plain PyTorch, in one run.

    python benchmarks/kernels.py                     # every op at the default shapes
    python benchmarks/kernels.py --op encode_topk --tokens 64
    python benchmarks/kernels.py --peers --save      # beside sparsify, dictionary_learning, SAELens
    python benchmarks/kernels.py --quick             # tiny shapes: does everything run?

Every round times every contender once, in a fresh random order, so that a machine that slows down
slows all of them; a speed-up is the median over rounds of contender / saert of the same round.
Before an op is timed, its result on fresh random inputs is checked against float64 (`_checks`); if
that is red, the table says so and no speed-up is given.

Peak memory is what a warm call needs on top of its inputs (weights and Adam's state included), its
result counted. Calls are warm: on a CPU a small dictionary is in the caches by then; on a GPU the
L2 cache is flushed before each. The floor on an H200 is max(bytes / 4.3 TB/s, flop / 790 Tflop/s),
with 67 Tflop/s for float32; the bytes and flop of an op stand in `_ops`. On a CPU the floor is the
fastest product x·W_encᵀ alone of the same run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Annotated, Any

# This folder's kernels.py would hide Hugging Face's package `kernels`, which transformers imports.
sys.path[0] = str(Path(__file__).parents[1])

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import _peers, _training  # noqa: E402
from benchmarks._checks import SAMPLE, CheckRed, clear_tokens  # noqa: E402
from benchmarks._inputs import Inputs, Shape, draw  # noqa: E402
from benchmarks._ops import OPS, Contender, Role  # noqa: E402
from benchmarks._timing import NotRun, Run, graphed, peak_extra, race  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BANDWIDTH = 4.3e12  # bytes/s of an H200
ARITHMETIC = {"float32": 67e12, "bfloat16": 790e12}  # flop/s of an H200; float32 without TF32
TIMED, CHECKED = 1, 2  # seeds
OUT_OF_MEMORY = "not run: out of memory"


@dataclass(frozen=True)
class Case:
    """An op at a shape; `graph`: replayed from a CUDA graph."""

    op: str
    shape: Shape
    graph: bool = False


@dataclass
class Row:
    """One contender of one case. Ratios are to saert in the same round; raw seconds are kept."""

    op: str
    shape: Shape
    cuda_graph: bool
    contender: str
    role: Role
    status: str = ""  # why there is no time, if there is none
    check: str = ""
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    peak_extra_bytes: float | None = None
    floor_seconds: float | None = None


@dataclass(frozen=True)
class Settings:
    """What the command line asked for."""

    device: torch.device
    rounds: int
    quick: bool
    peers: bool
    spoil: list[str]


# -- one case --------------------------------------------------------------------------------------


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Check, race and weigh every contender of a case."""
    op, device = OPS[case.op], settings.device
    contenders = [*op.contenders, *(_peers.contenders(case.op) if settings.peers else [])]
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    with contextlib.nullcontext() if op.trains else torch.inference_mode():
        try:
            inputs = draw(case.shape, device, TIMED)
        except torch.OutOfMemoryError:
            first = contenders[0]
            return [Row(case.op, case.shape, case.graph, first.name, first.role, OUT_OF_MEMORY)]
        for contender in (c for c in contenders if c.applies(inputs)):
            row = Row(case.op, case.shape, case.graph, contender.name, contender.role)
            rows.append(row)
            if run := enter(contender, row, inputs, case, settings):
                runs[contender.name] = run
        seconds = race(runs, settings.rounds, device)
    summarise(rows, seconds)
    set_floors(rows, case, device)
    runs.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def enter(
    contender: Contender, row: Row, inputs: Inputs, case: Case, settings: Settings
) -> Run | None:
    """Check a contender and weigh it: the call to time, or None and the reason in its row."""
    try:
        row.check = gate(contender, case, settings)
        run = prepare(contender, inputs, case, settings)
        if not case.graph:  # a graph's memory was taken when it was recorded
            row.peak_extra_bytes = peak_extra(run, settings.device)
        return run
    except CheckRed as error:
        row.check, row.status = "red", f"CHECK RED: {error}"
    except NotRun as error:
        row.check, row.status = "", f"not run: {error}"
    except torch.OutOfMemoryError:
        row.check, row.status = "", OUT_OF_MEMORY
    return None


def gate(contender: Contender, case: Case, settings: Settings) -> str:
    """Check a contender on inputs that are not the timed ones; what the check was called."""
    if contender.role == "peer":
        return "agrees"  # `make` raises CheckRed if it does not
    if contender.check is None:
        return ""
    if OPS[case.op].trains:  # its gradients sum over all tokens, so: few, and no near tie
        few = replace(case.shape, tokens=min(case.shape.tokens, SAMPLE))
        inputs = draw(few, settings.device, CHECKED)
        inputs = replace(inputs, x=inputs.x[clear_tokens(inputs)[0]])
    else:
        inputs = draw(case.shape, settings.device, CHECKED)
    found = contender.make(inputs)()
    contender.check(inputs, spoilt(found) if case.op in settings.spoil else found)
    return "green"


def prepare(contender: Contender, inputs: Inputs, case: Case, settings: Settings) -> Run:
    """The call to time, warm."""
    if contender.compiles and settings.quick:
        raise NotRun("--quick leaves torch.compile out")
    if contender.compiles and settings.peers:
        raise NotRun("nnsight, which a peer imports, breaks torch.compile")
    run = contender.make(inputs)
    run()
    return graphed(run) if case.graph else run


def spoilt(found: Any) -> Any:
    """A result that is one per cent too large: a check has to notice."""
    if isinstance(found, Tensor):
        return found * 1.01 if found.is_floating_point() else found
    parts = [spoilt(part) for part in found]
    return type(found)(*parts) if hasattr(found, "_fields") else parts


def summarise(rows: list[Row], seconds: dict[str, list[float]]) -> None:
    """Medians, and ratios to the op's first contender, if it was timed."""
    ours = seconds.get(rows[0].contender)
    for row in rows:
        if not (took := seconds.get(row.contender)):
            continue
        row.seconds = took
        row.median, row.quartiles = statistics.median(took), quartiles(took)
        if ours:
            ratios = [theirs / own for theirs, own in zip(took, ours, strict=True)]
            row.ratio, row.ratio_quartiles = statistics.median(ratios), quartiles(ratios)


def quartiles(numbers: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, high


def set_floors(rows: list[Row], case: Case, device: torch.device) -> None:
    """The least time that the work could take, where it is known."""
    floor = None
    cost = OPS[case.op].cost
    if device.type == "cpu":
        floor = min((r.median for r in rows if r.role == "gemm" and r.median), default=None)
    elif cost and "H200" in torch.cuda.get_device_name(device):
        moved, flop = cost(case.shape)
        floor = max(moved / BANDWIDTH, flop / ARITHMETIC[case.shape.dtype])
    for row in rows:
        row.floor_seconds = None if row.role == "select" else floor


# -- which cases -----------------------------------------------------------------------------------

QUICK = [(64, 2048, 8)]
SMALL, LARGE = (768, 32_768, 32), (4096, 131_072, 64)


def cases(
    ops: list[str], tokens: list[int], dtype: str, settings: Settings, full: bool
) -> Iterator[Case]:
    """The cases of a run, in the order of the table."""
    gpu = settings.device.type == "cuda"
    for name in ops:
        if OPS[name].trains:
            for shape in _training_shapes(gpu, settings):
                for count in tokens or [shape.tokens]:
                    yield Case(name, replace(shape, tokens=count))
            continue
        for d, n, k in _dictionaries(gpu, settings, full):
            for kind in ("float32", "bfloat16") if full else (dtype,):
                for count in tokens or _tokens(gpu, settings, full):
                    shape = Shape(d, n, k, count, kind)
                    yield Case(name, shape)
                    if gpu and count == 1 and not OPS[name].waits:
                        yield Case(name, shape, graph=True)


def _training_shapes(gpu: bool, settings: Settings) -> list[Shape]:
    if settings.quick:
        return [Shape(64, 1024, 8, 64, "float32")]
    if gpu and not settings.peers:
        return [Shape(*dictionary, 8192, "float32") for dictionary in (SMALL, LARGE)]
    return [Shape(768, 16_384, 32, 2048, "float32")]


def _dictionaries(gpu: bool, settings: Settings, full: bool) -> list[tuple[int, int, int]]:
    if settings.quick:
        return QUICK
    shapes = [SMALL, LARGE] if gpu and not settings.peers else [SMALL]
    if full:
        shapes = [(d, n, k) for d, n, _ in shapes for k in (32, 64, 256)]
        shapes += [(4096, 1 << 20, 64), (8192, 1 << 20, 128)] if gpu else []
    return shapes


def _tokens(gpu: bool, settings: Settings, full: bool) -> list[int]:
    if settings.quick:
        return [1, 32]
    if settings.peers or not gpu:
        return [1, 16, 64, 512, 2048, 8192] if full else [1, 64, 2048]
    return [1, 16, 64, 512, 8192, 65_536] if full else [1, 16, 64, 512, 8192]


# -- the table and the file ------------------------------------------------------------------------


def table(rows: list[Row]) -> Table:
    """All rows, a section for each case, its shape beside the first ones."""
    out = Table()
    for column in ("op", "tokens", "contender", "median ms", "speed-up"):
        out.add_column(column, no_wrap=True)
    out.add_column("peak extra MB")
    out.add_column("of floor")
    out.add_column("check", min_width=30)
    for (op, shape, graph), group in groupby(rows, lambda r: (r.op, r.shape, r.cuda_graph)):
        heads = [op, str(shape), *(["in a CUDA graph"] if graph else [])]
        for head, tokens, row in zip_longest(heads, [f"{shape.tokens:,}"], group, fillvalue=""):
            if isinstance(row, Row):
                check = row.status or row.check
                out.add_row(head, tokens, row.contender, *_figures(row), check)
        out.add_section()
    return out


def _figures(row: Row) -> tuple[str, str, str, str]:
    peak, floor = row.peak_extra_bytes, row.floor_seconds
    return (
        _spread(row.median, row.quartiles, 1000),
        "1" if row.ratio_quartiles == (1, 1) else _spread(row.ratio, row.ratio_quartiles, 1),
        "–" if peak is None or row.median is None else f"{peak / 1e6:.1f}",
        f"{floor / row.median:.0%}" if floor and row.median else "–",
    )


def _spread(middle: float | None, ends: tuple[float, float] | None, unit: float) -> str:
    if middle is None or ends is None:
        return "–"
    shown = [f"{n * unit:,.0f}" if n * unit >= 100 else f"{n * unit:.3g}" for n in (middle, *ends)]
    return "{} ({}–{})".format(*shown)


def notes(device: torch.device, ops: list[str]) -> str:
    """What one needs to read the table."""
    text = (
        "speed-up: contender / saert of the same round, median (quartiles); below 1 it is faster "
        "than saert. peak extra: of a warm call, its result included.\n"
    )
    if device.type == "cpu":
        text += "floor: the fastest GEMM alone (x·W_encᵀ) of the same case.\n"
    else:
        text += (
            f"floor (H200): max(bytes / {BANDWIDTH:.2g} B/s, flop / {ARITHMETIC['bfloat16']:.3g} "
            f"flop/s), {ARITHMETIC['float32']:.2g} flop/s in float32.\n"
        )
    if any(OPS[name].trains for name in ops):
        fused, default = _training.adam_seconds(device)
        chosen = "fused=True" if fused < default else "default"
        text += (
            f"training: saert and torch use Adam({chosen}), which measured faster: fused "
            f"{fused * 1000:.2f} ms, default {default * 1000:.2f} ms on 4096 × 768 weights. Peers "
            "use their own library's.\n"
        )
    return text.rstrip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, cpu-{torch.get_num_threads()} threads"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("saert", "triton", *_peers.DISTRIBUTIONS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(rows: list[Row], folder: Path, kind: str, settings: Settings, note: str) -> Path:
    today = date.today().isoformat()
    device = settings.device
    short = f"cpu-{torch.get_num_threads()}"
    if device.type == "cuda":
        short = torch.cuda.get_device_name(device).split()[-1].lower()
    record = {
        "date": today,
        "device": device_name(device),
        "command": "python benchmarks/kernels.py " + " ".join(sys.argv[1:]),
        "versions": versions(),
        "rounds": settings.rounds,
        "load": list(os.getloadavg()),  # over 1, 5 and 15 minutes, at the end
        "notes": note,
        "rows": [asdict(row) for row in rows],
    }
    path = folder / f"{kind}-{today}-{short}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


# -- the command -----------------------------------------------------------------------------------


def main(
    op: Annotated[
        list[str] | None, typer.Option(help=f"Only this op; repeatable. One of {', '.join(OPS)}.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Only this many tokens; repeatable.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after a warm-up.", min=2)] = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = "",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32 (default on CPU) or bfloat16 (on CUDA).")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes: a smoke test.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="All shapes of KERNELS.md section 9, and both dtypes.")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Inference and training, beside the peers installed.")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="Write the raw figures as JSON.")] = False,
    results: Annotated[Path, typer.Option(help="The folder that --save writes to.")] = RESULTS,
    spoil: Annotated[
        list[str] | None, typer.Option(hidden=True, help="Falsify this op before its check.")
    ] = None,
) -> None:
    """Time every kernel against plain PyTorch, after checking it; one table."""
    ops = op or (["inference", "training"] if peers else list(OPS))
    if unknown := set(ops) - set(OPS):
        raise typer.BadParameter(f"no op {sorted(unknown)}; there are {', '.join(OPS)}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("bfloat16" if where.type == "cuda" and not peers else "float32")
    if dtype not in ARITHMETIC:
        raise typer.BadParameter(f"dtype is {dtype!r}, expected one of {', '.join(ARITHMETIC)}")
    settings = Settings(where, rounds, quick, peers, spoil or [])
    console = Console(width=None if sys.stdout.isatty() else 180)
    todo = list(cases(ops, tokens or [], dtype, settings, full))
    rows: list[Row] = []
    for case in track(todo, "racing", console=console, transient=True):
        rows += run_case(case, settings)
    note = notes(where, ops)
    saved = ""
    if save:  # before anything is printed, which a closed pipe would end
        flags = {"peers": peers, "quick": quick, "full": full}
        kind = "-".join(["kernels", *(name for name, on in flags.items() if on), *(op or [])])
        saved = f"\nwritten to {write(rows, results, kind, settings, note)}"
    console.print(f"{device_name(where)}, torch {torch.__version__}, {rounds} rounds")
    console.print(table(rows))
    console.print(note + saved)
    if any(row.check == "red" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
