"""`saert verify`: does an SAE do on its model what it declares, and if not, why?"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saert._cli_io import print_json, user_errors
from saert._cli_options import At, Context, Data, Device, Json, Model, Source
from saert._cli_text import read_text
from saert.hub.session import BUNDLED, UserError, open_session
from saert.hub.verify import verify as measure
from saert.hub.verifying.declared import FACTS
from saert.hub.verifying.verification import Verification, VerificationError, shown

FITS = 5  # other readings to show


class Action(StrEnum):
    REFUSE = "refuse"
    WARN = "warn"


def verify(
    source: Source = None,
    model: Model = None,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many to measure on.")] = 4096,
    context: Context = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACT=VALUE",
            help=f"What to compare with: {', '.join(FACTS)}. May be repeated.",
        ),
    ] = None,
    on_mismatch: Annotated[
        Action, typer.Option(help="refuse: exit code 1; warn: exit code 0.")
    ] = Action.REFUSE,
    hookpoint: At = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure an SAE on its model, compare with what it declares, and name the cause of a mismatch.

    Looks for a wrong activation, k or threshold, hookpoint, normalisation, use of b_dec,
    orientation or model. Exit code 1 on a mismatch.
    """
    about: dict[str, Any] = {"sae": source or BUNDLED, "model": model, "text": None}
    with user_errors():
        facts = _facts(expect or [])
        try:
            session = open_session(model, [source or BUNDLED], hookpoint=hookpoint, device=device)
        except VerificationError as refusal:  # by its weights alone
            found = refusal.verification
        else:
            (loaded,) = session.saes
            width = context or 128
            text = read_text(session, data, -(-tokens // (width - 1)), context)
            about |= {"sae": loaded.source, "model": session.name, "text": text.source}
            found = measure(
                loaded.sae.to(session.model.device),
                session.model,
                text.rows,
                tokenizer=session.tokenizer,
                expect=facts,
                on_mismatch="report",
                tokens=tokens,
            )
    if as_json:
        print_json(about | found.to_dict())
    else:
        _print(found, about)
    if not found.ok and on_mismatch is Action.REFUSE:
        raise typer.Exit(1)


def _facts(given: list[str]) -> dict[str, float]:
    found = {}
    for one in given:
        fact, _, value = one.partition("=")
        try:
            found[fact.strip()] = float(value)
        except ValueError:
            raise UserError(f"--expect {one}: expected FACT=NUMBER, for example l0=82") from None
    return found


def _print(found: Verification, about: dict[str, Any]) -> None:
    console = Console()
    where = f", {found.tokens:,} tokens: {about['text']}" if found.tokens else ""
    console.print(escape(f"{found.name}{where}"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("", "fact", "measured", "declared", "expected"):
        table.add_column(column, no_wrap=column in ("", "fact"), overflow="fold")
    for check in found.checks:
        mark = "" if check.ok else "[red]✗[/red]" if check.serious else "[yellow]![/yellow]"
        said = "" if check.declared is None else shown(check.declared)
        cells = (check.fact, shown(check.measured), said, check.expected)
        table.add_row(mark, *(escape(cell) for cell in cells))
    console.print(table)
    for check in found.checks:
        if not check.ok and check.hint:
            console.print(escape(f"{check.fact}: {check.hint}"))
    best = [f"{what}: {fvu:.3g}" for what, (fvu, _) in list(found.fits.items())[:FITS]]
    if best:
        console.print(escape(f"FVU if it were read otherwise, best first: {'; '.join(best)}"))
    if found.cause is not None:
        console.print(f"[bold]probable cause:[/bold] {escape(found.cause)}")
    verdict = "mismatch" if not found.ok else "no mismatch"
    unsure = f", {len(found.warnings)} implausible" if found.warnings else ""
    console.print(verdict + unsure)
