"""An evaluation as one self-contained HTML page: no script, nothing fetched, fit for a phone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from saert.measure.reports import plots

TEMPLATE = "report.html.jinja"


def require() -> None:
    """Raise ImportError, naming the extra, unless a page can be made: before long work."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the report needs {missing[0]}: pip install 'saert[measure]'")


def render(evaluation: Mapping[str, Any]) -> str:
    """The page for the content of `eval.json`.

    Raises ImportError without jinja2 or matplotlib."""
    require()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent, "count": count, "sign": signed}
    source = files("saert.measure.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    saes = evaluation["saes"]
    page = environment.from_string(source).render(
        facts=evaluation["facts"],
        saes=saes,
        pictures=[_pictures(sae, f"sae{i}") for i, sae in enumerate(saes)],
        overview=_overview(saes) if len(saes) > 1 else [],
        has_compute=any(sae.get("compute_equivalent") is not None for sae in saes),
    )
    return page + "\n"


def _pictures(sae: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """(caption, svg)"""
    reconstruction, downstream = sae["reconstruction"], sae["downstream"]
    return [
        (
            "How often latents fire",
            plots.density(reconstruction["density"], sae["num_latents"], f"{name}-density"),
        ),
        ("Active latents per token", plots.l0(reconstruction["l0_counts"], f"{name}-l0")),
        (
            "FVU by position",
            plots.by_position(reconstruction["positions"], "fvu", "FVU", f"{name}-fvu"),
        ),
        (
            "Loss added by position",
            plots.by_position(downstream["positions"], "delta_ce", "ΔCE, nats", f"{name}-ce"),
        ),
    ]


def _overview(saes: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names = [sae["name"] for sae in saes]
    fvu = [sae["reconstruction"]["fvu"] for sae in saes]
    added = [sae["downstream"]["delta_ce"] for sae in saes]
    return [
        ("Variance unexplained", plots.compared(names, fvu, "FVU", "all-fvu")),
        ("Loss added by the splice", plots.compared(names, added, "ΔCE, nats", "all-ce")),
    ]


def number(value: float | None) -> str:
    """Four significant digits; a dash where there is no number."""
    return "–" if value is None else f"{value:#.4g}".rstrip(".").replace("-", "−")


def signed(value: float | None) -> str:
    """With its sign."""
    return "–" if value is None else f"{value:+#.4g}".rstrip(".").replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction, to a tenth of a percent."""
    return "–" if value is None else f"{value:.1%}".replace("-", "−")


def count(value: int) -> str:
    """With separators of thousands."""
    return f"{value:,}"
