"""`saert explain`: which patterns of tokens latents answer to, and how far that explains them."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from saert._cli_edits import latent_of
from saert._cli_io import print_json, user_errors
from saert._cli_options import (
    At,
    Batch,
    Context,
    Data,
    Device,
    Json,
    Model,
    Progress,
    Source,
    Strict,
)
from saert._cli_text import read_text
from saert.hub.session import Session, UserError, open_session
from saert.measure.n2g.explain import explain as n2g
from saert.measure.n2g.explain import neutral_token
from saert.measure.n2g.explanations import Explanation, Explanations
from saert.measure.n2g.splice import ExplanationLoss, explanation_loss

Option = typer.Option


class Others(StrEnum):
    DROP = "drop"
    KEEP = "keep"


def explain(
    source: Source = None,
    latent: Annotated[
        list[str] | None,
        Option(metavar="LATENT", help="Explain this latent. May be repeated."),
    ] = None,
    latents: Annotated[
        str, Option(metavar="N|all", help="Or so many at random of those that fire.")
    ] = "64",
    data: Data = None,
    rows: Annotated[int, Option(min=2, help="Rows of text to find activations in.")] = 128,
    context: Context = None,
    train: Annotated[int, Option(min=1, help="Activations that a graph is built from.")] = 16,
    heldout: Annotated[int, Option(min=1, help="Others that measure its recall.")] = 16,
    seed: Annotated[int, Option(help="Of the random choices.")] = 0,
    pad_token: Annotated[
        str | None,
        Option(metavar="ID|TEXT", help="Stands in for a token to see if it matters. Default: _"),
    ] = None,
    bos: Annotated[
        bool, Option("--bos/--no-bos", help="Keep the token that begins every row.")
    ] = True,
    reconstruction: Annotated[
        bool,
        Option(
            help="Splice the predictions in, on a quarter as many other rows; measure the loss."
        ),
    ] = False,
    others: Annotated[
        Others, Option(help="With it: latents that are not explained.")
    ] = Others.DROP,
    patterns: Annotated[int, Option(min=1, help="Patterns to print for each latent.")] = 3,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="Keep explanations in this file, and go on from it (.jsonl)."),
    ] = None,
    model: Model = None,
    hookpoint: At = None,
    batch: Batch = 16,
    device: Device = "auto",
    strict: Strict = True,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Explain latents by the patterns of tokens they fire on (N2G), with precision and recall.

    With --out the same command goes on where it was stopped, or adds further latents.
    """
    with user_errors():
        session = open_session(
            model, [source] if source else [], hookpoint=hookpoint, device=device, strict=strict
        )
        with session.attach(record=False):
            pass  # refuses an SAE that does not fit, in the usual words
        loaded, shown = session.saes[0], progress and not as_json
        sae = loaded.sae.to(session.model.device)
        chosen = [latent_of(session, spec, "--latent")[1] for spec in latent or []]
        # a quarter more, which the graphs do not see; of a short text the same share
        asked = rows + max(1, rows // 4)
        text = read_text(session, data, asked, context)
        seen = max(1, len(text.rows) * rows // asked)
        if reconstruction and seen == len(text.rows):
            raise UserError(f"--reconstruction: {text.source} has one row; it needs another")
        found = n2g(
            session.model, sae, text.rows[:seen], chosen or None,
            sample=None if chosen else _number(latents),
            pad_token=_pad(session, pad_token), special=text.special, train=train, heldout=heldout,
            seed=seed, bos="auto" if bos else None, batch=batch, out=out, progress=shown,
        )  # fmt: skip
        if not found:
            raise UserError(f"no latent of {loaded.name} fires in {text.source}")
        loss = None
        if reconstruction:
            loss = explanation_loss(
                session.model, sae, found, text.rows[seen:], others=others.value,
                special=text.special, batch=batch, progress=shown,
            )  # fmt: skip
    if as_json:
        print_json(
            {
                "model": session.name,
                "sae": loaded.source,
                "hookpoint": loaded.name,
                "text": text.source,
                "rows": seen,
                "file": None if out is None else str(out),
                "settings": found.settings,
                "summary": found.summary(),
                "explanations": [
                    one.to_dict()
                    | {"label": loaded.label(one.latent), "lines": one.lines(session.tokenizer)}
                    for one in found
                ],
                "reconstruction": None if loss is None else loss.to_dict(),
            }
        )
        return
    console = Console()
    for one in found:
        console.print(_card(one, session.tokenizer, loaded.label(one.latent), patterns))
    console.print(_summary(found))
    if loss is not None:
        console.print(_loss(loss))
    console.print(f"{found[0].tokens:,} tokens: {text.source}", highlight=False)
    if out is not None:
        console.print(str(out), highlight=False)


def _number(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or not int(text):
        raise UserError(f"--latents {text}: expected a number of at least 1, or all")
    return int(text)


def _pad(session: Session, spec: str | None) -> int:
    tokenizer = session.tokenizer
    if spec is None:
        return neutral_token(tokenizer)
    if spec.isdigit():
        vocabulary = session.model.config.get_text_config().vocab_size
        if int(spec) >= vocabulary:
            raise UserError(f"--pad-token {spec}: {session.name} has {vocabulary} tokens")
        return int(spec)
    ids = tokenizer(spec, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"--pad-token {spec!r}: that is {len(ids)} tokens, expected one")
    return int(ids[0])


def _card(one: Explanation, tokenizer: Any, label: str | None, limit: int) -> Line:
    """The figures of a latent on a line, its strongest patterns below."""
    card = Line()
    card.append(f"#{one.latent}" + (f" {label}" if label else ""), style="bold")
    figures = ("density", "recall", "precision", "correlation")
    card.append("".join(f"  {name} {_show(getattr(one, name))}" for name in figures))
    lines = one.lines(tokenizer)
    for line in lines[:limit]:
        card.append(f"\n  {line}")
    if len(lines) > limit:
        card.append(f"\n  and {len(lines) - limit} more", style="dim")
    return card


def _summary(found: Explanations) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("recall", "precision", "correlation", "patterns")
    table.add_column("density")
    for name in ("latents", *names, "wild"):
        table.add_column(name, justify="right")
    summary = found.summary()
    for density, mean in [*summary["by_density"].items(), ("all", summary)]:
        figures = (_show(mean[name]) for name in names)
        table.add_row(density, str(mean["latents"]), *figures, str(mean["wild"]))
    return table


def _loss(loss: ExplanationLoss) -> Table:
    silent = "silent" if loss.others == "drop" else "as they are"
    table = Table(
        title=f"{loss.latents} latents explained, the others {silent}; {loss.tokens:,} predictions",
        title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("spliced in")
    for name in ("CE", "KL", "FVU"):
        table.add_column(name, justify="right")
    table.add_row("nothing: the model as it is", f"{loss.ce:.4f}", "0", "–")
    for name, one in (
        ("the SAE's reconstruction", loss.spliced),
        ("true activations of those explained", loss.true),
        ("predicted activations", loss.explained),
        ("no activations of those explained", loss.empty),
    ):
        table.add_row(name, f"{one.ce:.4f}", f"{one.kl:.4f}", f"{one.fvu:.4f}")
    table.add_row("recovered", _show(loss.recovered), "", "")
    return table


def _show(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2g}" if 0 < value < 0.01 else f"{value:.2f}"
