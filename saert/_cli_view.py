"""How results look in a terminal. Every function takes plain data and a console; no logic here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from saert._cli_run import Active, Continuation, Features, Overhead, TokenFeatures
from saert.record import SAEReport

FULL_HEAT = 4.0  # nats at which a colour is saturated
WRITTEN = 0.3  # nats from which a change is written beside its token, for terminals without colour


def show_token(text: str) -> str:
    """A token on one line, with its white space visible only where it is all there is."""
    plain = text.replace("\n", "⏎").replace("\t", "⇥")
    return plain if plain.strip() else plain.replace(" ", "␣")


def heat(change: float) -> Style:
    """Green: the edits made this token likelier. Red: less likely. White: no difference."""
    strength = min(abs(change) / FULL_HEAT, 1.0)
    if strength < 0.02:
        return Style()
    fade = round(235 - 145 * strength)
    red, green, blue = (fade, 225, fade) if change > 0 else (240, fade, fade)
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")


def warmth(value: float, largest: float) -> Style:
    """Orange by activation."""
    if value <= 0 or largest <= 0:
        return Style()
    fade = round(235 - 165 * min(value / largest, 1.0))
    return Style(color="black", bgcolor=f"rgb(255,{(fade + 255) // 2},{fade})")


def latent_line(latents: Sequence[Active]) -> Text:
    """`#17 dogs 3.2   #5 1.1`."""
    line = Text()
    for one in latents:
        if line:
            line.append("  ")
        line.append(f"#{one.latent}", style="cyan")
        if one.label:
            line.append(f" {one.label}")
        line.append(f" {one.activation:.2f}", style="dim")
    return line or Text("-", style="dim")


def features_table(features: Features) -> Table:
    """A row per token: how many latents fire, and the strongest."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Active latents at {features.hookpoint}  ({features.source})",
        title_justify="left",
    )
    table.add_column("", justify="right", style="dim")
    table.add_column("token", no_wrap=True)
    table.add_column("L0", justify="right")
    table.add_column("strongest latents", overflow="fold")
    for token in features.tokens:
        table.add_row(*_token_row(token))
    return table


def _token_row(token: TokenFeatures) -> list[RenderableType]:
    return [
        str(token.position),
        Text(show_token(token.text), style="bold"),
        str(token.l0),
        latent_line(token.latents),
    ]


def traced_text(features: Features, latent: int, label: str | None) -> Group:
    """The prompt, coloured by the activation of one latent."""
    values = features.traced[latent]
    largest = max(values)
    head = Text(f"#{latent}", style="cyan")
    head.append(f" {label or ''}  largest activation {largest:.2f}")
    line = Text()
    for token, value in zip(features.tokens, values, strict=True):
        line.append(show_token(token.text), style=warmth(value, largest))
        if value > 0:
            line.append(f"({value:.2f})", style="dim")
    return Group(head, line, Text())


def continuation_panel(title: str, run: Continuation, edited: bool) -> Panel:
    """A continuation, its tokens coloured by what the edits changed."""
    body = Text()
    for token in run.tokens:
        body.append(token.text, style=heat(token.change) if edited else Style())
        if edited and abs(token.change) >= WRITTEN:
            body.append(f" {token.change:+.1f}", style="dim")
    if edited and run.tokens:
        mean = sum(token.change for token in run.tokens) / len(run.tokens)
        most = max(run.tokens, key=lambda token: abs(token.change))
        body.append(f"\n\nΔ log p {mean:+.2f} a token; most ", style="dim")
        body.append(show_token(most.text), style=heat(most.change))
        body.append(f" {most.change:+.2f}", style="dim")
    return Panel(body, title=Text(title), padding=(0, 1))


def side_by_side(console: Console, runs: Mapping[str, Continuation]) -> None:
    """Panels in a row, or in a column where the terminal is narrow. The first is the baseline."""
    panels = [
        continuation_panel(title, run, edited=i > 0) for i, (title, run) in enumerate(runs.items())
    ]
    if console.width < 34 * len(panels):
        for panel in panels:
            console.print(panel)
    else:
        grid = Table.grid(expand=True)
        for _ in panels:
            grid.add_column(ratio=1)
        grid.add_row(*panels)
        console.print(grid)
    key = Text(
        f"Δ log p of a token, edited minus bare, in nats; written from {WRITTEN} on: ", style="dim"
    )
    for value in (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0):
        key.append(f" {value:+.0f} ", style=heat(value))
    console.print(key)


def change_table(runs: Mapping[str, Continuation]) -> Table:
    """Token by token: the baseline, and each edited run with what changed."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", justify="right", style="dim")
    for i, title in enumerate(runs):
        table.add_column(title, no_wrap=True)
        if i:
            table.add_column("Δ log p", justify="right")
    longest = max(len(run.tokens) for run in runs.values())
    for t in range(longest):
        row: list[RenderableType] = [str(t)]
        for i, run in enumerate(runs.values()):
            token = run.tokens[t] if t < len(run.tokens) else None
            row.append("" if token is None else Text(show_token(token.text)))
            if i:
                row.append(
                    "" if token is None else Text(f"{token.change:+.2f}", style=heat(token.change))
                )
        table.add_row(*row)
    return table


def report_lines(report: Mapping[str, SAEReport]) -> Text:
    """`resid_post.2: 50 tokens, L0 32.0, FVU 0.100, 3.2 ms`."""
    return Text("\n".join(f"{where}: {one}" for where, one in report.items()))


def overhead_line(overhead: Overhead) -> Text:
    """What attaching costs, and that it changes nothing."""
    line = Text(
        f"observing costs {overhead.ratio:.2f}x: {overhead.bare_ms:.0f} ms bare, "
        f"{overhead.observed_ms:.0f} ms attached; without edits the logits are "
    )
    same = overhead.identical
    line.append("bit-identical" if same else "DIFFERENT", style="green" if same else "bold red")
    return line


def info_table(info: Mapping[str, Any]) -> Table:
    """Facts by name."""
    table = Table(
        box=box.SIMPLE, show_header=False, title=str(info["source"]), title_justify="left"
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in info.items():
        if name == "source" or value is None:
            continue
        if isinstance(value, Mapping):
            for inner, fact in value.items():
                table.add_row(f"{name}.{inner}", Text(_plain(fact)))
        else:
            table.add_row(name, Text(_plain(value)))
    return table


OVERVIEW = {"l0": "L0", "fvu": "FVU", "ce_recovered": "CE rec", "dead": "dead"}


def overview_table(infos: Sequence[Mapping[str, Any]]) -> Table:
    """A row per SAE: what it is, and the metrics measured when it was trained."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("source", "latents", "kind", *OVERVIEW.values()):
        left = name in ("source", "kind")
        table.add_column(name, no_wrap=True, justify="left" if left else "right")
    for info in infos:
        arrow = f"→{info['target_hookpoint']}" if info["target_hookpoint"] else ""
        metrics = info["metrics"]
        table.add_row(
            info["source"] + arrow,
            f"{info['num_latents']:,}",
            " ".join(_plain(fact) for fact in info["activation"].values()),
            *(_rounded(metrics.get(name)) for name in OVERVIEW),
        )
    return table


def _rounded(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(fact)}" for name, fact in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(one) for one in value)
    return str(value)
