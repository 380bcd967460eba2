"""`saert compare`: do several SAEs have the same latents?"""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saert._cli_io import print_json, user_errors
from saert._cli_options import Json, Progress
from saert.hub.session import Loaded, UserError, load_sae
from saert.measure.matching.consistency import Consistency, Pair, consistency, feature_splitting

BAR = 40
"""Characters of the longest bar of a histogram."""


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Two SAEs or more: Hub ids, folders, bundled:PATH.", metavar="SOURCE…"),
    ],
    threshold: Annotated[
        float, typer.Option(min=-1.0, max=1.0, help="The cosine from which latents are shared.")
    ] = 0.7,
    candidates: Annotated[
        int, typer.Option(min=1, help="Nearest latents that the matching starts with.")
    ] = 32,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Match the latents of SAEs one to one: PW-MCC, shared latents, feature splitting.

    SAEs of one size are matched, pair by pair. Of different sizes, every smaller one is looked up
    in every larger one: which of its latents are found, split, and what is new.
    """
    with user_errors():
        if len(sources) < 2:
            raise UserError(f"{len(sources)} SAE: name two or more to compare")
        loaded = [load_sae(source) for source in sources]
        sizes = sorted({one.sae.num_latents for one in loaded})
        shown = progress and not as_json
        matched: list[Consistency] = []
        for size in sizes:
            alike = [one for one in loaded if one.sae.num_latents == size]
            if len(alike) > 1:
                matched.append(
                    consistency(
                        *(one.sae for one in alike),
                        names=[one.source for one in alike],
                        threshold=threshold,
                        candidates=candidates,
                        progress=shown,
                    )
                )
        split = [
            {"small_source": a.source, "large_source": b.source}
            | feature_splitting(
                a.sae, b.sae, threshold, names=(a.source, b.source), progress=shown
            ).as_dict()
            for a, b in _ordered(loaded)
        ]
    if as_json:
        found = [one.as_dict() | {"histograms": _histograms(one)} for one in matched]
        print_json({"saes": [_about(one) for one in loaded], "matched": found, "splitting": split})
        return
    console = Console()
    for one in matched:
        console.print(_table(one))
        for pair in one.pairs:
            console.print(_bars(pair))
    if split:
        console.print(_splitting(split))


def _ordered(loaded: list[Loaded]) -> list[tuple[Loaded, Loaded]]:
    """Pairs of different size, the smaller one first."""
    ranked = sorted(loaded, key=lambda one: one.sae.num_latents)
    return [p for p in combinations(ranked, 2) if p[0].sae.num_latents < p[1].sae.num_latents]


def _about(one: Loaded) -> dict[str, Any]:
    return {
        "source": one.source,
        "hookpoint": None if one.sae.hookpoint is None else one.name,
        "num_latents": one.sae.num_latents,
    }


def _histograms(found: Consistency) -> list[list[int]]:
    return [pair.histogram() for pair in found.pairs]


def _table(found: Consistency) -> Table:
    std = f" ± {found.pw_mcc_std:.4f}" if len(found.pairs) > 1 else ""
    head = ("PW-MCC", "at most", "mean max", "same partner", "shared", "looser")
    title = f"PW-MCC {found.pw_mcc:.4f}{std}; shared: cosine of {found.threshold:g} or more"
    table = Table(box=box.SIMPLE, title=title)
    table.add_column("SAEs", overflow="fold")
    for name in head:
        table.add_column(name, justify="right")
    for pair in found.pairs:
        table.add_row(
            Text(f"{pair.a}\n{pair.b}"),  # no markup: a source is a path, with any characters
            f"{pair.pw_mcc:.4f}",
            f"{pair.decoder.bound:.4f}",
            f"{float(pair.decoder.nearest.mean()):.4f}",
            *(
                "-" if share is None else f"{share:.1%}"
                for share in (pair.same_counterpart, pair.shared, pair.shared_notebook)
            ),
        )
    return table


def _bars(pair: Pair) -> Text:
    counts = pair.histogram()
    most = max(counts)
    lines = [f"matched cosines, {pair.a} | {pair.b}"]
    for at, count in enumerate(counts):
        bar = "█" * round(BAR * count / most)
        lines.append(f"  {at / 10:.1f}-{(at + 1) / 10:.1f}  {count:>7,}  {bar}")
    return Text("\n".join(lines))


def _splitting(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, title="feature splitting")
    for name in ("small", "large", "found", "split", "new", "children"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            Text(f"{row['small_source']}\n{row['small']:,} latents"),
            Text(f"{row['large_source']}\n{row['large']:,} latents"),
            f"{row['found']:.1%}",
            f"{row['split']:.1%}",
            f"{row['new']:.1%}",
            f"{row['mean_children']:.1f}, at most {row['max_children']}",
        )
    return table
