"""`saert index` and `saert card`: what every latent fires on, gathered once, then looked at."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

import saert._cli_view as view
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
from saert.hub.session import UserError, open_session
from saert.measure.features import (
    Card,
    Example,
    FeatureIndex,
    Found,
    Logit,
    Selection,
    feature_index,
    to_neuronpedia,
    to_openai_viewer,
    to_sae_dashboard,
)

Option = typer.Option
Argument = typer.Argument


class Export(StrEnum):
    SAEDASHBOARD = "saedashboard"
    NEURONPEDIA = "neuronpedia"
    OPENAI = "openai"


EXPORTS = {
    Export.SAEDASHBOARD: to_sae_dashboard,
    Export.NEURONPEDIA: to_neuronpedia,
    Export.OPENAI: to_openai_viewer,
}
BARS = " ▁▂▃▄▅▆▇█"


def index(
    source: Source = None,
    out: Annotated[
        Path, Option("--out", "-o", help="The index's folder; hookpoints may share one.")
    ] = Path("features"),
    data: Data = None,
    rows: Annotated[int, Option(min=1, help="Rows of text; more of them later are added.")] = 512,
    context: Context = None,
    export: Annotated[
        list[Export] | None, Option(help="Also write this format. May be repeated.")
    ] = None,
    model: Model = None,
    hookpoint: At = None,
    batch: Batch = 16,
    device: Device = "auto",
    strict: Strict = True,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Gather where every latent of an SAE fires in a text, for `saert card` and other viewers.

    Run it again to go on where it was stopped, or with more --rows to add them.
    """
    with user_errors():
        session = open_session(
            model, [source] if source else [], hookpoint=hookpoint, device=device, strict=strict
        )
        loaded = session.saes[0]
        with session.attach(record=False):
            pass  # refuses an SAE that does not fit, in the usual words
        text = read_text(session, data, rows, context)
        shown = progress and not as_json
        found = feature_index(
            session.model, loaded.sae.to(session.model.device), text.rows, out,
            tokenizer=session.tokenizer, labels=loaded.labels or None, special=text.special,
            batch=batch, dataset=text.source if data else "", progress=shown,
        )  # fmt: skip
        written = {
            one.value: len(EXPORTS[one](found, found.place / "export" / one.value, progress=shown))
            for one in export or []
        }
    answer = {
        "model": session.name,
        "sae": loaded.source,
        "hookpoint": loaded.name,
        "text": text.source,
        "folder": str(found.place),
        "rows": len(text.rows),
        "tokens": found.tokens_seen,
        "activations": int(found.counts.sum()),
        "latents": len(found),
        "dead": len(found.dead),
        "exports": {
            name: {"folder": str(found.place / "export" / name), "files": files}
            for name, files in written.items()
        },
    }
    if as_json:
        print_json(answer)
        return
    Console().print(view.info_table({"source": str(found.place)} | answer))
    typer.echo(f"look at a latent: saert card {out} {_liveliest(found)} --hookpoint {loaded.name}")


def card(
    folder: Annotated[Path, Argument(help="A folder that `saert index` made.")],
    latent: Annotated[list[int] | None, Argument(metavar="[LATENT]...")] = None,
    text: Annotated[
        str | None, Option("--text", "-t", help="The latents that fire where the text says this.")
    ] = None,
    top: Annotated[int, Option(min=1, help="Examples, or latents found, to show.")] = 8,
    per_band: Annotated[int, Option(min=0, help="Examples from each band of activation.")] = 2,
    hookpoint: At = None,
    as_json: Json = False,
) -> None:
    """Latents of an index: what they fire on, what they promote, what they resemble."""
    with user_errors():
        found = FeatureIndex.open(folder, hookpoint)
        if bool(latent) == (text is not None):
            raise UserError(f"give latents, 0 to {len(found) - 1}, or --text, and not both")
        hits = [] if text is None else found.search(text, top)
        selection = Selection(top=top, per_quantile=per_band)
        cards = [found.card(number, selection) for number in latent or []]
    if as_json:
        answer: dict[str, Any] = {"folder": str(found.place), "tokens": found.tokens_seen}
        if text is not None:
            answer |= {"text": text, "found": [vars(one) for one in hits]}
        print_json(answer | {"cards": [one.as_dict() for one in cards]})
        return
    console = Console()
    if text is not None:
        console.print(_hits_table(hits, text))
    for one in cards:
        console.print(_card_view(one))


def _liveliest(index: FeatureIndex) -> int:
    """A latent worth a first look: a labelled one, else the one that fires highest."""
    alive = [latent for latent in index.labels if index.counts[latent] > 0]
    return alive[0] if alive else int(index.largest.argmax())


def _hits_table(hits: list[Found], text: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"Latents that fire on {text!r}", title_justify="left")
    for name in ("latent", "label", "of the tokens", "of its activation", "largest"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for hit in hits:
        table.add_row(
            str(hit.latent), hit.label or "", f"{hit.coverage:.1%}", f"{hit.share:.1%}",
            f"{hit.activation:.2f}",
        )  # fmt: skip
    return table


def _card_view(card: Card) -> Group:
    head = Text(f"#{card.latent}", style="bold cyan")
    head.append(f" {card.label or ''}", style="bold")
    if not card.count:
        return Group(head, Text("  dead: it fires nowhere in the index"), *_facts(card), Text())
    head.append(f"  fires at {card.density:.3%} of tokens ({card.count:,})", style="dim")
    head.append(f", mean {card.mean:.2f}, largest {card.largest:.2f}", style="dim")
    parts = [head, _histogram(card), *_facts(card), Text("top", style="bold")]
    parts += [_heat(one, card.largest) for one in card.top]
    for band in card.bands:
        if band.examples:
            share = band.count / card.count
            parts.append(Text(f"{band.low:.2f} to {band.high:.2f}: {share:.1%}", style="bold"))
            parts += [_heat(one, card.largest) for one in band.examples]
    return Group(*parts, Text())


def _facts(card: Card) -> list[Text]:
    lines = []
    for name, logits in (("promotes", card.promoted), ("suppresses", card.suppressed)):
        if logits:
            lines.append(Text(f"  {name:<11}", style="dim") + _logits(logits[:8]))
    near = "  ".join(f"#{latent} {cosine:.2f}" for latent, cosine in card.neighbours[:6])
    return [*lines, Text(f"  {'near':<11}", style="dim") + Text(near)]


def _logits(logits: tuple[Logit, ...]) -> Text:
    line = Text()
    for one in logits:
        line.append(view.show_token(one.string) or f"<{one.token}>", style="reverse")
        line.append(f" {one.value:+.2f}  ", style="dim")
    return line


def _histogram(card: Card) -> Text:
    """A bar a bin on one line; heights on a square-root scale, as most activations are small."""
    most = max(1, int(card.heights.max()))
    steps = (math.ceil(8 * math.sqrt(height / most)) for height in card.heights.tolist())
    return Text(
        "  0 " + "".join(BARS[step] for step in steps) + f" {card.largest:.2f}", style="dim"
    )


def _heat(one: Example, largest: float) -> Text:
    """An example, its tokens coloured by activation; the peak's is written beside it."""
    line = Text(f"  {one.activations[one.peak]:>7.2f}  ", style="dim")
    strings = one.strings or tuple(f" {i}" for i in one.tokens)
    for i, (string, value) in enumerate(zip(strings, one.activations, strict=True)):
        style = view.warmth(value, largest)
        line.append(view.show_token(string), style=style + Style(bold=i == one.peak))
    return line
