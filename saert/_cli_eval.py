"""`saert eval`: SAEs in, their numbers and a page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from saert._cli_eval_run import PAGE, Evaluation
from saert._cli_io import print_json, user_errors
from saert._cli_options import At, Batch, Context, Data, Device, Json, Model, Progress, Rows, Strict
from saert._cli_text import read_text
from saert.hub import bundled
from saert.hub.session import BUNDLED, load_model, open_session
from saert.measure.reports.html import require

Option = typer.Option


def evaluate(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="SAEs to measure. None: what is bundled."),
    ] = None,
    model: Model = None,
    data: Data = None,
    rows: Rows = 64,
    context: Context = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "-o",
            help="Gets eval.json and eval.html; what it holds already is not measured again. "
            "Default: named after model and text.",
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        Option(help="A fine-tuned version of the model: measure there too.", metavar="MODEL"),
    ] = None,
    scaling: Annotated[
        Path | None,
        Option(
            help="JSON with a law of loss against compute, {a, b, c}, or {compute: […], "
            "loss: […]} to fit one: express the spliced loss as compute.",
            metavar="FILE",
        ),
    ] = None,
    batch: Batch = 16,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """How well SAEs reconstruct, and what the model loses with them spliced in.

    Writes FOLDER/eval.json and FOLDER/eval.html, a page that needs nothing else.
    """
    with user_errors():
        require()
        chosen = [one for source in sources or [BUNDLED] for one in _spelt_out(source)]
        session = open_session(model, chosen, hookpoint=hookpoint, device=device, strict=strict)
        text = read_text(session, data, rows, context)
        second = None if tuned is None else (tuned, load_model(tuned, device)[0])
        work = Evaluation(session, text, second, batch)
        folder = work.folder() if out is None else out
        found = work.run(folder, scaling, progress)
    if as_json:
        print_json(found | {"folder": str(folder)})
        return
    console = Console()
    console.print(_table(found))
    facts, losses = found["facts"]["text"], found["saes"][0]["downstream"]
    console.print(f"{facts['tokens']:,} tokens: {facts['source']}")
    console.print(f"the model's own cross-entropy there: {losses['ce']:.4f} nats per token")
    console.print(f"{folder / PAGE}")


def _spelt_out(source: str) -> list[str]:
    """`bundled` alone means all of them."""
    return [f"{BUNDLED}:{at}" for at in bundled.HOOKPOINTS] if source == BUNDLED else [source]


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("SAE", overflow="fold", min_width=12)
    names = ("L0", "FVU", "dead", "CE added", "recovered", "KL", "top-1")
    compute = found["facts"]["scaling"] is not None
    for name in (*names, *(["compute"] if compute else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for sae in found["saes"]:
        r, d = sae["reconstruction"], sae["downstream"]
        cells = [
            _show(r["l0"], ".1f"),
            _show(r["fvu"], ".4f"),
            _show(r["dead"], ".1%"),
            _show(d["delta_ce"], "+.4f"),
            _show(d["ce_recovered"], ".1%"),
            _show(d["kl_spliced"], ".4f"),
            _show(d["agreement"], ".1%"),
        ]
        if compute:
            cells.append(_show(sae["compute_equivalent"]["fraction"], ".2%"))
        table.add_row(sae["name"], *cells)
    return table


def _show(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
