"""The card's pictures: PNG, drawn only from what was measured, the same bytes for the same numbers.

Without matplotlib (`pip install 'saert[measure]'`) there are none.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from saert.hub.publishing.entry import Entry

MEASURED, DENSITY = "measured.png", "density.png"
EDGES = tuple(-6 + 0.5 * i for i in range(13))
"""log10 of the share of tokens at which a latent fires: the bins of a density of 12 counts."""

PANELS = (
    ("fvu", "FVU", 1.0),
    ("l0", "L0", 1.0),
    ("ce_recovered", "CE recovered, %", 100.0),
    ("dead", "dead latents, %", 100.0),
)
INK, ACCENT, QUIET = "#222222", "#c2410c", "#d4d4d4"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "text.parse_math": False,
}
MOST = 64  # SAEs that a picture can hold


def draw(entries: Mapping[str, Entry]) -> dict[str, bytes]:
    """{file name: PNG}; nothing where nothing was measured, or matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return {}
    measured = {path: one for path, one in entries.items() if one.metrics is not None}
    if len(measured) > MOST:
        return {}
    densities = {path: counts for path, one in measured.items() if (counts := _density(one))}
    found = {}
    if len(measured) > 1:
        found[MEASURED] = _compared(measured)
    if len(densities) > 1:
        found[DENSITY] = _strips(densities, measured)
    for path, counts in densities.items() if len(densities) == 1 else ():
        found[DENSITY] = _bars(counts, measured[path])
    return found


def _density(entry: Entry) -> list[int] | None:
    counts = (entry.metrics or {}).get("density")
    if not isinstance(counts, list) or len(counts) != len(EDGES) - 1:
        return None
    good = all(type(one) is int and one >= 0 for one in counts) and sum(counts) > 0
    return list(counts) if good and sum(counts) <= entry.num_latents else None


def _compared(entries: Mapping[str, Entry]) -> bytes:
    panels = [
        panel for panel in PANELS if any(e.number(panel[0]) is not None for e in entries.values())
    ]
    figure, axes = _axes(max(1, len(panels)), 0.8 + 0.24 * len(entries), share=True)
    names = list(entries)
    for one, (key, label, factor) in zip(axes, panels, strict=False):
        values = [entry.number(key) for entry in entries.values()]
        lengths = [0.0 if value is None else factor * value for value in values]
        one.barh(range(len(names)), lengths, color=ACCENT, height=0.7)
        one.set_xlabel(label)
        one.grid(axis="x", color=QUIET, lw=0.6)
        one.axvline(0, color=INK, lw=0.8)
        one.xaxis.get_major_locator().set_params(nbins=4)
        for row, value in enumerate(values):
            if value is None:
                one.text(0, row, " not measured", va="center", color=INK, fontsize=7)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    return _png(figure)


def _bars(counts: list[int], entry: Entry) -> bytes:
    """How often the latents of one SAE fire."""
    figure, (axes,) = _axes(1, 3.0)
    shares = [100 * one / entry.num_latents for one in counts]
    axes.stairs(shares, EDGES, fill=True, color=ACCENT)
    axes.set_xlim(EDGES[0], EDGES[-1])
    axes.set_ylim(0, 1.12 * max(shares))
    axes.set_xlabel("share of tokens at which a latent fires, log₁₀")
    axes.set_ylabel("% of latents")
    axes.grid(axis="y", color=QUIET, lw=0.6)
    axes.set_title(f"{_never(counts, entry):.1f}% never fire", loc="left")
    return _png(figure)


def _strips(counts: Mapping[str, list[int]], entries: Mapping[str, Entry]) -> bytes:
    """How often the latents of several SAEs fire, a row each."""
    figure, (axes,) = _axes(1, 1.0 + 0.24 * len(counts))
    shares = [
        [100 * one / entries[path].num_latents for one in row] for path, row in counts.items()
    ]
    image = axes.imshow(
        shares, aspect="auto", cmap="Oranges", vmin=0, extent=(EDGES[0], EDGES[-1], len(shares), 0)
    )
    names = [f"{path} ({_never(row, entries[path]):.0f}% never)" for path, row in counts.items()]
    axes.set_yticks([i + 0.5 for i in range(len(names))], names)
    axes.set_yticks(range(1, len(names)), minor=True)
    axes.grid(axis="y", which="minor", color="white", lw=1.5)
    axes.set_axisbelow(False)
    axes.tick_params(axis="y", which="both", length=0)
    axes.set_xlabel("share of tokens at which a latent fires, log₁₀")
    figure.colorbar(image, label="% of latents", shrink=min(1.0, 4 / len(names)))
    return _png(figure)


def _never(counts: list[int], entry: Entry) -> float:
    return 100 * (1 - sum(counts) / entry.num_latents)


def _axes(count: int, height: float, share: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(2.0 * count + 1.4 if share else 6.4, height), layout="constrained")
        found = figure.subplots(1, count, sharey=share, squeeze=False)[0]
        for one in found:
            one.set_axisbelow(True)
        return figure, list(found)


def _png(figure: Any) -> bytes:
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()
