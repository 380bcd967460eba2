"""The pictures of an evaluation as inline SVG: without ids that clash, with alternative text.

Every function takes plain numbers (the content of `eval.json`) and returns `<svg>…</svg>`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from saert.measure.reports.reconstruction import DENSITY_EDGES

INK, ACCENT, QUIET = "#222222", "#c2410c", "#d4d4d4"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
}
BARS = 24  # of a histogram, at most


def density(counts: Sequence[int], num_latents: int, name: str) -> str:
    """How many latents fire how often."""
    figure, axes = _axes("share of tokens, log₁₀", "latents")
    width = DENSITY_EDGES[1] - DENSITY_EDGES[0]
    axes.bar(DENSITY_EDGES[:-1], counts, width=width * 0.92, align="edge", color=ACCENT)
    axes.set_xlim(DENSITY_EDGES[0], 0)
    axes.set_ylim(0, max(1, *counts) * 1.08)
    bins = [
        f"{n} between 10^{low:g} and 10^{low + width:g}"
        for low, n in zip(DENSITY_EDGES, counts, strict=False)
        if n
    ]
    never = num_latents - sum(counts)
    return _svg(figure, name, f"Latents by how often they fire: {', '.join(bins)}; {never} never.")


def l0(counts: Sequence[int], name: str) -> str:
    """How many tokens have how many active latents."""
    figure, axes = _axes("active latents", "share of tokens")
    seen = [i for i, n in enumerate(counts) if n]
    low, high, total = min(seen), max(seen), sum(counts)
    step = -(-(high - low + 1) // BARS)
    starts = range(low, high + 1, step)
    shares = [sum(counts[i : i + step]) / total for i in starts]
    centres = [i + (step - 1) / 2 for i in starts]
    axes.bar(centres, shares, width=step * 0.92, color=ACCENT)
    axes.set_xlim(low - max(step, 2), high + max(step, 2))
    axes.xaxis.get_major_locator().set_params(integer=True)
    alone = f"every token has {low}" if low == high else f"from {low} to {high}"
    likely = max(zip(shares, centres, strict=True))
    more = "" if low == high else f"; most often about {likely[1]:g} ({likely[0]:.0%})"
    return _svg(figure, name, f"Active latents per token: {alone}{more}.")


def by_position(parts: Sequence[dict[str, Any]], field: str, label: str, name: str) -> str:
    """One number of the reports, by bucket of positions."""
    spans = [f"{p['start']}–{p['stop'] - 1}" for p in parts]
    figure, axes = _axes("position in the row", label)
    values = [p[field] for p in parts]
    axes.bar(range(len(spans)), [v or 0 for v in values], width=0.7, color=ACCENT)
    crowded = len(spans) > 5
    axes.set_xticks(
        range(len(spans)), spans, rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.axhline(0, color=INK, lw=0.8)
    found = ", ".join(f"{_short(v)} at {span}" for v, span in zip(values, spans, strict=True))
    return _svg(figure, name, f"{label} by position: {found}.")


def compared(names: Sequence[str], values: Sequence[float | None], label: str, name: str) -> str:
    """One number of several SAEs, one bar each."""
    figure, axes = _axes(label, "", height=0.7 + 0.34 * len(names))
    axes.barh(range(len(names)), [v or 0 for v in values], color=ACCENT, height=0.7)
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a $ in a path is a $
    axes.invert_yaxis()
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.axvline(0, color=INK, lw=0.8)
    found = ", ".join(f"{n} {_short(v)}" for n, v in zip(names, values, strict=True))
    return _svg(figure, name, f"{label}: {found}.")


def _short(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _axes(x: str, y: str, height: float = 2.7) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.7, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="x" if not y else "y", color=QUIET, lw=0.6)
        axes.set_axisbelow(True)
        return figure, axes


def _svg(figure: Any, name: str, says: str) -> str:
    """The figure, with `says` for those who do not see it. `name` sets its ids apart."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", svg)
    # as wide as its place, whatever its own points
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = f'<svg role="img" aria-label="{escape(says)}"'
    return svg.replace("<svg", label, 1)
