"""`saert probe`: what the latents of an SAE know about labelled text."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saert._cli_io import print_json, user_errors
from saert._cli_options import At, Batch, Device, Json, Model, Progress, Sae, Strict
from saert.hub.session import Loaded, UserError, open_session
from saert.measure.identity import sae_identity
from saert.measure.probes.probing import SELECT, Select
from saert.measure.probes.results import Probes
from saert.measure.probes.suites import probe_suite, read_suite
from saert.runtime import attach

SelectName = StrEnum("SelectName", {name: name for name in SELECT})  # type: ignore[misc]
Option = typer.Option


def probe(
    suite: Annotated[Path, typer.Argument(help="A TOML file of tasks (docs/probes.md).")],
    data: Annotated[
        Path | None, Option(help="Where its files lie. Default: beside it.", metavar="FOLDER")
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "-o",
            help="Gets a file for every finished task, and is read by the next run.",
            metavar="FOLDER",
        ),
    ] = None,
    k: Annotated[
        str, Option("-k", "--k", help="Latents of the k-sparse probes; none: ''.", metavar="K,K,…")
    ] = "5,20",
    select: Annotated[SelectName, Option(help="How those are chosen.")] = SelectName.loss,  # type: ignore[attr-defined]
    dense: Annotated[
        bool, Option("--dense/--no-dense", help="A probe on the hidden state beside them.")
    ] = True,
    ridge: Annotated[float, Option(help="Of the single probes.")] = 1e-6,
    model: Model = None,
    sae: Sae = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    batch: Batch = 16,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Find, for every task, the latent that predicts the label best, and how well it does.

    The score is the probe loss of Gao et al.: the lowest cross-entropy of a logistic probe on one
    latent, chosen on the train split. Accuracy, F1 and AUC are those of the test split.
    """
    with user_errors():
        ks = _numbers(k)
        tasks = read_suite(suite, data)
        session = open_session(model, sae or [], hookpoint=hookpoint, device=device, strict=strict)
        found: list[Probes] = []
        folders = [None] * len(session.saes) if out is None else _folders(out, session.saes)
        for one, folder in zip(session.saes, folders, strict=True):
            with attach(session.model, one.sae, strict=strict):
                pass  # refuses, in its own words, an SAE that does not fit the model
            probes = probe_suite(
                session.model, session.tokenizer, one.sae.to(session.model.device), tasks,
                ks=ks, select=cast(Select, select.value), dense=dense, ridge=ridge, batch=batch,
                folder=folder, progress=progress and not as_json,
            )  # fmt: skip
            found.append(probes)
    if as_json:
        saes = [
            {
                "source": one.source,
                "hookpoint": one.name,
                "mean_score": probes.mean_score,
                "probes": [each.as_dict() for each in probes],
                "left_out": list(probes.left_out),
            }
            for one, probes in zip(session.saes, found, strict=True)
        ]
        print_json({"model": session.name, "suite": tasks.name, "saes": saes})
        return
    console = Console()
    for one, probes in zip(session.saes, found, strict=True):
        console.print(_table(one.source, probes))
        if probes.left_out:
            console.print(Text(probes.said_of_left_out()))


def _folders(out: Path, saes: list[Loaded]) -> list[Path]:
    """Where each SAE's files go: by hookpoint, with a fingerprint where several are at one."""
    if len(saes) == 1:
        return [out]
    times = Counter(one.name for one in saes)
    return [
        out / (one.name if times[one.name] == 1 else f"{one.name}-{_short(one)}") for one in saes
    ]


def _short(one: Loaded) -> str:
    return sae_identity(one.sae)["fingerprint"][:8]


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--k {text}: expected numbers with commas between them") from None
    if any(one < 1 for one in found):
        raise UserError(f"--k {text}: expected 1 or more")
    return found


def _table(source: str, probes: Probes) -> Table:
    head, *rows = probes.cells()
    # Text, not str: names of tasks and classes may look like rich's markup.
    title = Text(f"{source}: mean score {probes.mean_score:.4f} nats", style="table.title")
    table = Table(*head[:2], box=box.SIMPLE, title=title)
    for name in head[2:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
