"""How fast a checkpoint loads and how much memory it needs, beside reading its file and the peers.

    python benchmarks/loading.py --save
    python benchmarks/loading.py --peers PYTHON --save   # a Python with sae-lens and eai-sparsify

Every contender is a process of its own (`_load_worker.py`), and every round asks each of them for
one load, in a fresh order; the page cache is warm. `read` is `Path.read_bytes` of the weights file.
The ratio is the median over rounds of contender / read of the same round; `peak` is the resident
memory that a load needs, as a multiple of the file. saert's load includes its checks: finite
weights, and what they contradict. SAELens maps the file and reads nothing until the weights are
used; "copied" and "bfloat16" are what compares with saert, whose weights are its own.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

HERE = Path(__file__).parent
OURS = {"SAELens": ("saert", "saert, bfloat16")}
THEIRS = {
    "SAELens": ("SAELens", "SAELens, copied", "SAELens, bfloat16"),
    "sparsify": ("sparsify",),
}


def _shown(arguments: list[str]) -> list[str]:
    """The command line without where this machine keeps its Pythons."""
    return ["PYTHON" if "python" in one else one for one in arguments]


@dataclass(frozen=True)
class Row:
    """One contender on one layout. `ratio`: its time / reading the file, median and quartiles."""

    layout: str
    contender: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    peak: float


def write(folder: Path, layout: str, d: int, n: int) -> Path:
    """A checkpoint of random float32 weights, as the library of that name lays it out."""
    g = torch.Generator().manual_seed(0)
    W, V = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    b, c = torch.zeros(n), torch.zeros(d)
    config: dict[str, Any] = {}
    if layout == "SAELens":
        metadata = dict(sae_lens_version="6.54.12", hook_name="blocks.6.hook_resid_post")
        config["cfg.json"] = dict(
            architecture="topk", d_in=d, d_sae=n, k=32, dtype="float32", device="cpu",
            apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none",
            rescale_acts_by_decoder_norm=False, metadata=metadata,
        )  # fmt: skip
        folder.mkdir(parents=True)
        tensors = {"W_enc": W.T.contiguous(), "W_dec": V, "b_enc": b, "b_dec": c}
        save_file(tensors, folder / "sae_weights.safetensors")
    elif layout == "sparsify":
        folder = folder / "layers.6"
        config["cfg.json"] = dict(
            activation="topk", expansion_factor=n // d, num_latents=n, k=32, d_in=d,
            normalize_decoder=True, multi_topk=False, skip_connection=False, transcode=False,
        )  # fmt: skip
        folder.mkdir(parents=True)
        tensors = {"encoder.weight": W, "encoder.bias": b, "W_dec": V, "b_dec": c}
        save_file(tensors, folder / "sae.safetensors")
    elif layout == "Gemma Scope":
        inner = folder / "gemma-scope-2b-pt-res" / "layer_6" / "width_32k" / "average_l0_82"
        inner.mkdir(parents=True)
        threshold = np.full(n, 0.5, np.float32)
        tensors = {"W_enc": W.T.contiguous(), "W_dec": V, "b_enc": b, "b_dec": c}
        arrays = {name: one.numpy() for name, one in tensors.items()}
        np.savez(inner / "params.npz", threshold=threshold, **arrays)
        folder = folder / "gemma-scope-2b-pt-res"
    else:
        folder.mkdir(parents=True)
        tensors = {"encoder.weight": W, "encoder.bias": b, "decoder.weight": V.T, "b_dec": c}
        scalars = {"k": torch.tensor(32), "threshold": torch.tensor(0.5)}
        torch.save(tensors | scalars, folder / "ae.pt")
        trainer = dict(dict_class="BatchTopKSAE", activation_dim=d, dict_size=n, k=32, layer=6)
        config["config.json"] = {"trainer": trainer}
    for name, content in config.items():
        (folder / name).write_text(json.dumps(content))
    return folder


LAYOUTS = ("SAELens", "sparsify", "Gemma Scope", "dictionary_learning")


class Worker:
    """A process that loads a folder when it is asked to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.peak = self._answer("peak")

    def _answer(self, key: str) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise typer.BadParameter("a worker ended early: is the library there? (see above)")
        return float(json.loads(line)[key])

    def load(self) -> float:
        """Seconds that one load takes."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer("seconds")


@contextmanager
def worker(python: str, kind: str, folder: Path, tiny: Path, threads: int) -> Iterator[Worker]:
    quiet = {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    command = [python, str(HERE / "_load_worker.py"), kind, str(folder), str(tiny)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet
    ) as process:
        try:
            yield Worker(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def measure(
    layout: str, place: Path, size: tuple[int, int], rounds: int, threads: int, peers: Path | None
) -> list[Row]:
    folder = write(place / "large", layout, *size)
    tiny = write(place / "tiny", layout, 64, 256)
    pythons = dict.fromkeys(("read", *OURS.get(layout, ("saert",))), sys.executable)
    if peers is not None:
        pythons |= dict.fromkeys(THEIRS.get(layout, ()), str(peers))
    file_size = max(one.stat().st_size for one in folder.rglob("*"))
    with ExitStack() as stack:
        workers = {
            kind: stack.enter_context(worker(python, kind, folder, tiny, threads))
            for kind, python in pythons.items()
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in workers}
        for turn in range(rounds):
            for kind in random.Random(turn).sample(list(workers), len(workers)):
                seconds[kind].append(workers[kind].load())
    rows = []
    for kind, took in seconds.items():
        ratios = [a / b for a, b in zip(took, seconds["read"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        median, ratio = statistics.median(took), statistics.median(ratios)
        peak = workers[kind].peak / file_size
        rows.append(Row(layout, kind, median, ratio, (low, high), peak))
    return rows


def main(
    d: int = 768,
    n: int = 32_768,
    rounds: int = 9,
    threads: Annotated[int, typer.Option(help="Of every process.")] = 2,
    peers: Annotated[
        Path | None, typer.Option(help="A Python with sae-lens and eai-sparsify.")
    ] = None,
    save: bool = False,
    results: Path = HERE / "results",
) -> None:
    """Time loads side by side; medians, ratios to reading the file, and peaks."""
    rows = []
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as place:
            rows += measure(layout, Path(place), (d, n), rounds, threads, peers)
    table = Table("layout", "contender", "median, ms", "time / read", "quartiles", "peak / file")
    for row in rows:
        low, high = row.quartiles
        table.add_row(
            row.layout, row.contender, f"{1000 * row.seconds:.0f}", f"{row.ratio:.2f}",
            f"{low:.2f}–{high:.2f}", f"{row.peak:.2f}",
        )  # fmt: skip
    Console().print(table)
    if save:
        record = {
            "date": date.today().isoformat(),
            "device": f"{platform.machine()} CPU, {threads} threads",
            "command": "python benchmarks/loading.py " + " ".join(_shown(sys.argv[1:])),
            "versions": {one: version(one) for one in ("torch", "numpy", "safetensors")},
            "load": os.getloadavg(),
            "rows": [asdict(row) for row in rows],
        }
        results.mkdir(exist_ok=True)
        path = results / f"loading-{record['date']}-cpu-{threads}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
