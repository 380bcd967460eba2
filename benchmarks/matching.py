"""Matching latents one to one: scipy on the whole matrix beside saert's candidates and bound.

    python benchmarks/matching.py --save                     # benchmarks/results/matching-….json
    python benchmarks/matching.py --sizes 131072 --d 64      # what a whole matrix has no room for

Directions: 60% of the second dictionary's are the first's with noise of random size, the rest are
new. "first answer" is the best matching among the nearest 32 of either side; "gap" is how far its
bound lies above it, and `match` goes on until that is below 1e-6. Where the whole matrix fits
(--dense), scipy's linear_sum_assignment says what the optimum is.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import scipy  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from saert.measure.matching.assignment import match  # noqa: E402

HERE = Path(__file__).parent


def main(
    sizes: Annotated[str, typer.Option(help="Latents of each dictionary.")] = "1024,2048,4096,8192",
    d: int = 128,
    candidates: int = 32,
    dense: Annotated[int, typer.Option(help="scipy's turn up to this size.")] = 8192,
    save: bool = False,
) -> None:
    """Time both, and compare their answers."""
    rows = []
    for n in (int(part) for part in sizes.split(",")):
        rows.append(_one(n, d, candidates, n <= dense))
        print(json.dumps(rows[-1]), flush=True)
    if save:
        about = {
            "date": date.today().isoformat(),
            "command": "python benchmarks/matching.py " + " ".join(sys.argv[1:]),
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "scipy": scipy.__version__},
            "rows": rows,
        }
        (HERE / "results").mkdir(exist_ok=True)
        name = f"matching-d{d}-{sizes.replace(',', '-')}-{about['date']}.json"
        (HERE / "results" / name).write_text(json.dumps(about, indent=1) + "\n")


def _one(n: int, d: int, candidates: int, dense: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(n)
    a, b = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    kin = int(0.6 * n)
    noise = torch.randn(kin, d, generator=g) * torch.rand(kin, 1, generator=g) * 1.4
    b[:kin] = a[:kin] + noise
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b[torch.randperm(n, generator=g)]))
    begun, cpu = time.perf_counter(), time.process_time()
    found = match(a, b, candidates=candidates, progress=n > 50_000)
    row: dict[str, Any] = {"n": n, "d": d, "seconds": time.perf_counter() - begun,
                           "cpu_seconds": time.process_time() - cpu, "mean": found.mean,
                           "gap": found.bound - found.mean, "rounds": found.rounds}  # fmt: skip
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if n <= 50_000:
        first = match(a, b, candidates=candidates, max_rounds=0)
        row |= {"first_answer": first.mean, "first_gap": first.bound - first.mean}
    if dense:
        begun = time.perf_counter()
        cosines = (a @ b.T).double().numpy()
        _, partner = linear_sum_assignment(cosines, maximize=True)
        row["scipy_seconds"] = time.perf_counter() - begun
        row["scipy_mean"] = float(cosines[range(n), partner].mean())
        row["same_partner"] = float((torch.from_numpy(partner) == found.partner).double().mean())
    return row


if __name__ == "__main__":
    typer.run(main)
