"""How the app bears several visitors: tokens per second and latency, and what starting it costs.

    python benchmarks/app_load.py                     # 1, 2, 4 and 8 visitors, bundled model
    python benchmarks/app_load.py --save              # benchmarks/results/app-load-*.json

`saert app` runs in a process of its own. Each visitor, a thread with `gradio_client`, asks for
pairs of texts (default and steered, `--tokens` each) in a row, with its own prompt, edits and seed.
Latency is of a whole request; the first token is timed apart. Resident memory of the app is read
after each round.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).parents[1])  # this folder's kernels.py would hide another package

import typer  # noqa: E402
from gradio_client import Client  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from saert.measure.steering import EditSpec, Sampling, Setup  # noqa: E402

HERE = Path(__file__).parent
SOURCE = "bundled:resid_post.2"
PROMPTS = ("Once upon a time, there was a little girl", "The dog", "Tom and Sue went", "One day")


@dataclass(frozen=True)
class Round:
    """What so many visitors at once saw.

    Attributes:
        tokens_per_second: of all visitors together, default and steered text counted.
        p50, p95: seconds of a request.
        first: median seconds until a request's first token.
        resident: MiB of the app afterwards.
    """

    visitors: int
    requests: int
    tokens_per_second: float
    p50: float
    p95: float
    first: float
    resident: float | None


def setup(visitor: int, tokens: int) -> Setup:
    """Another text for every visitor."""
    edit = EditSpec(SOURCE, (71, 546, 349, 748)[visitor % 4], "add", 4.0 + visitor)
    drawn = Sampling(tokens, temperature=0.8, seed=visitor)
    return Setup("bundled", PROMPTS[visitor % 4], edits=(edit,), sampling=drawn)


def ask(client: Client, asked: Setup) -> tuple[int, float, float]:
    """Tokens written, seconds until the first, seconds in all."""
    begun, first, last = time.perf_counter(), 0.0, {}
    for value in client.submit(asked.to_json(), api_name="/steer"):
        first, last = first or time.perf_counter() - begun, value
    return (
        len(last["default_tokens"]) + len(last["steered_tokens"]),
        first,
        time.perf_counter() - begun,
    )


def measure(url: str, pid: int, visitors: int, requests: int, tokens: int) -> Round:
    """So many visitors, each with so many requests in a row."""
    clients = [Client(url, verbose=False) for _ in range(visitors)]
    ready = threading.Barrier(visitors)

    def visit(i: int) -> list[tuple[int, float, float]]:
        ready.wait()
        return [ask(clients[i], setup(i, tokens)) for _ in range(requests)]

    begun = time.perf_counter()
    with ThreadPoolExecutor(visitors) as pool:
        answers = [one for many in pool.map(visit, range(visitors)) for one in many]
    lasted = time.perf_counter() - begun
    seconds = sorted(one[2] for one in answers)
    return Round(
        visitors=visitors,
        requests=len(answers),
        tokens_per_second=sum(one[0] for one in answers) / lasted,
        p50=statistics.median(seconds),
        p95=seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
        first=statistics.median(one[1] for one in answers),
        resident=resident(pid),
    )


def resident(pid: int) -> float | None:
    """MiB in use, on Linux."""
    pages = Path(f"/proc/{pid}/statm")
    size = os.sysconf("SC_PAGE_SIZE")
    return int(pages.read_text().split()[1]) * size / 2**20 if pages.exists() else None


def start() -> tuple[subprocess.Popen[str], str, float]:
    """`saert app` on a free port, its address, and the seconds until it said so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.perf_counter()
    command = [sys.executable, "-c", "from saert.cli import app; app()", "app", "--port", str(port)]
    app = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert app.stdout is not None
    if "http://" not in app.stdout.readline():
        raise SystemExit("saert app did not start")
    return app, f"http://127.0.0.1:{port}/", time.perf_counter() - begun


def stop(app: subprocess.Popen[str]) -> None:
    """As ctrl-C does."""
    app.send_signal(signal.SIGINT)
    app.wait(30)


def main(
    visitors: Annotated[str, typer.Option(help="At once, separated by commas.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(help="Of each visitor.")] = 4,
    tokens: Annotated[int, typer.Option(help="New ones in each of both texts.")] = 40,
    starts: Annotated[int, typer.Option(help="How often starting the app is timed.")] = 5,
    save: bool = False,
    results: Path = HERE / "results",
) -> None:
    """Start the app a few times, then let visitors in."""
    times = []
    for _ in range(starts):
        app, url, seconds = start()
        times.append(seconds)
        if len(times) < starts:
            stop(app)
    try:
        measure(url, app.pid, 1, 1, tokens)  # warm
        rounds = [
            measure(url, app.pid, int(count), requests, tokens) for count in visitors.split(",")
        ]
    finally:
        stop(app)
    console, table = Console(), Table("visitors", "tokens/s", "p50, s", "p95, s", "first, s", "MiB")
    for one in rounds:
        cells = (one.tokens_per_second, one.p50, one.p95, one.first, one.resident or 0)
        table.add_row(
            str(one.visitors), *(f"{cell:.3g}" for cell in cells[:-1]), f"{cells[-1]:.0f}"
        )
    console.print(f"start, s: {', '.join(f'{one:.1f}' for one in times)}")
    console.print(table)
    if save:
        record: dict[str, Any] = {
            "date": date.today().isoformat(),
            "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
            "command": "python benchmarks/app_load.py",
            "requests": requests,
            "tokens": tokens,
            "versions": {one: version(one) for one in ("torch", "transformers", "gradio")},
            "load": os.getloadavg(),
            "starts": times,
            "rounds": [asdict(one) for one in rounds],
        }
        results.mkdir(exist_ok=True)
        path = results / f"app-load-{record['date']}-cpu-{os.cpu_count()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
