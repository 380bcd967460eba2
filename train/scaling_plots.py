"""Pictures of scaling laws (`saert.train.scaling`): PNG for the eye, SVG for print."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from saert.train.scaling import Fit, JointLaw, Point, PowerLaw, frontier

INK, ACCENT, QUIET = "#222222", "#c2410c", "#8a8a8a"


def plot_compute(
    points: Sequence[Point], fit: Fit[PowerLaw], path: Path, title: str = "Loss and compute"
) -> tuple[Path, Path]:
    """All training curves, their frontier and L(C). Writes `path`.png and .svg, returns both.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _axes(title, "Training compute C" + _unit(fit.law), [p.loss for p in points])
    runs = sorted(points, key=lambda p: (p.num_latents, p.k, p.flops))
    colours = _colours(sorted({p.num_latents for p in runs}))
    named: set[int] = set()
    for (n, _), run in groupby(runs, key=lambda p: (p.num_latents, p.k)):
        curve = list(run)
        x = [p.flops / fit.law.unit for p in curve]
        label = None if n in named else f"n = {n:,}"
        named.add(n)
        axes.plot(x, [p.loss for p in curve], color=colours[n], lw=1, marker=".", ms=4, label=label)
    best = frontier(points)
    axes.plot(
        [p.flops / fit.law.unit for p in best],
        [p.loss for p in best],
        ls="none",
        marker="o",
        ms=7,
        mfc="none",
        mec=INK,
        label="frontier",
    )
    _power(axes, fit, "C", np.array([p.flops for p in points]))
    return _save(figure, axes, path)


def plot_latents(
    points: Sequence[Point], fit: Fit[PowerLaw], path: Path, title: str = "Loss and latents"
) -> tuple[Path, Path]:
    """Converged runs of one k and L(N). Writes and returns as `plot_compute`."""
    k = points[0].k
    figure, axes = _axes(title, f"Latents N, at k = {k}", [p.loss for p in points])
    x = np.array([p.num_latents for p in points])
    axes.plot(x, [p.loss for p in points], ls="none", marker="o", ms=7, color=INK, label="runs")
    _power(axes, fit, "N", x)
    return _save(figure, axes, path)


def plot_joint(
    points: Sequence[Point], fit: Fit[JointLaw], path: Path, title: str = "Loss, latents and k"
) -> tuple[Path, Path]:
    """Converged runs, L(n, k) and its floor for each k. Writes and returns as `plot_compute`."""
    figure, axes = _axes(title, "Latents n", [p.loss for p in points])
    ks = sorted({p.k for p in points})
    colours = _colours(ks)
    x = _along(np.array([p.num_latents for p in points]))
    floors = all(fit.coefficients[name].identified for name in ("zeta", "eta"))
    for k in ks:
        of_k = [p for p in points if p.k == k]
        axes.plot(
            [p.num_latents for p in of_k],
            [p.loss for p in of_k],
            ls="none",
            marker="o",
            ms=6,
            color=colours[k],
        )
        axes.plot(x, fit.predict(x, k), lw=1.8, color=colours[k], label=f"k = {k}")
        if floors:
            axes.axhline(float(fit.law.irreducible(k)), lw=1, ls="--", color=colours[k])
    if floors:
        axes.plot([], [], lw=1, ls="--", color=QUIET, label="irreducible, by k")
    symbols = ("α", "$\\beta_k$", "$\\beta_n$", "γ", "ζ", "η")
    for symbol, name in zip(symbols, fit.coefficients, strict=True):
        axes.plot([], [], ls="none", label=_value(fit, name, symbol))
    return _save(figure, axes, path)


def _power(axes: Any, fit: Fit[PowerLaw], symbol: str, x: Any) -> None:
    """The fitted curve over the range of x and, if it is known, the floor."""
    along = _along(x)
    values = [_value(fit, "A", "A"), _value(fit, "alpha", "α")]
    label = "\n".join([f"$E + A\\,{symbol}^{{-\\alpha}}$", *values])
    axes.plot(along / fit.law.unit, fit.predict(along), lw=2.2, color=ACCENT, label=label)
    known = fit.coefficients["E"].identified
    if known:
        axes.axhline(fit.law.E, lw=1.4, ls="--", color=QUIET)
    axes.plot(
        [], [], lw=1.4, ls="--" if known else "none", color=QUIET, label=_value(fit, "E", "E")
    )


def _value(fit: Fit[Any], name: str, symbol: str) -> str:
    c = fit.coefficients[name]
    if not c.identified:
        return f"{symbol} not identified"
    return f"{symbol} = {c.value:.3g} [{c.low:.3g}, {c.high:.3g}]".replace("-", "−")


def _along(x: Any) -> Any:
    """200 places over the range of x and a little further, evenly in logarithms."""
    return np.geomspace(x.min() / 1.15, x.max() * 1.15, 200)


def _unit(law: PowerLaw) -> str:
    return "" if law.unit == 1 else f", in units of {law.unit:g}".replace("e+", "e")


def _colours(values: Sequence[int]) -> dict[int, Any]:
    """From dark to light in the order of values; the palest end, unreadable on white, unused."""
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(values)))
    return dict(zip(values, map(tuple, shades), strict=True))


def _axes(title: str, xlabel: str, losses: Sequence[float]) -> tuple[Any, Any]:
    """A figure 1500 pixels wide at 150 dpi, and its logarithmic axes. Uses no global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError(
            "plotting scaling laws needs matplotlib, which is not installed: "
            "pip install 'saert[train]'"
        ) from error
    figure = Figure(figsize=(10, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="Normalised MSE (FVU), held out")
    axes.set_title(title, loc="left", color=INK)
    # Losses seldom span a decade: powers of ten alone would leave the axis without a label.
    wide = max(losses) > 8 * min(losses)
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if wide else tuple(float(i) for i in range(1, 10)))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#e4e4e4", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> tuple[Path, Path]:
    # Beside the axes it hides no point, however many curves there are.
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9,
        title="[95% intervals]",
        title_fontsize=9,
    )
    legend.set_alignment("left")
    stem = path.name.removesuffix(".png").removesuffix(".svg")
    png, svg = path.with_name(f"{stem}.png"), path.with_name(f"{stem}.svg")
    figure.savefig(png)
    figure.savefig(svg, metadata={"Date": None})
    return png, svg
