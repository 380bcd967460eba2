"""`saert find`: the SAEs known for a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saert._cli_io import print_json, user_errors
from saert._cli_options import Json
from saert.hub.find import Listing, find


def find_command(
    model: Annotated[str, typer.Argument(help="A Hub id or its last part: gpt2, gemma-2-2b.")],
    online: Annotated[
        bool, typer.Option("--online/--offline", help="Ask the Hub's search too.")
    ] = True,
    limit: Annotated[int, typer.Option(min=1, help="Most repositories of each search.")] = 50,
    as_json: Json = False,
) -> None:
    """SAEs known for a model: short names to load them by, and what the Hub's search finds."""
    with user_errors():
        unreachable = None
        try:
            found = find(model, online=online, limit=limit)
        except OSError as error:  # the registry needs no network
            found, unreachable = find(model, online=False), str(error).splitlines()[0]
    if as_json:
        print_json({
            "model": model, "found": [asdict(one) for one in found],
            "hub": unreachable or ("asked" if online else "not asked"),
        })  # fmt: skip
        return
    console = Console()
    console.print(_table(model, found) if found else f"No SAE is known for {model!r}.")
    if unreachable is not None:
        console.print(f"The Hub was not searched: {unreachable}", markup=False)


def _table(model: str, found: list[Listing]) -> Table:
    table = Table(title=f"SAEs for {model}", title_justify="left", show_lines=True)
    table.add_column("name", overflow="fold", ratio=1)  # a name that is cut short is of no use
    table.add_column("what", ratio=1)
    table.add_column("downloads", justify="right")
    for one in found:
        count = "" if one.downloads is None else f"{one.downloads:,}"
        what = f"{one.about}\n{one.choices}" if one.choices else one.about
        table.add_row(escape(one.name), escape(what), count)
    return table
