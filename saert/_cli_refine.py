"""`saert refine`: how far an SAE's activations are from the best for its own choice of latents."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

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
    Rows,
    Source,
    Strict,
)
from saert._cli_text import read_text
from saert.compat import check_model
from saert.hub.session import BUNDLED, open_session
from saert.measure.reports.refinement import RefinementReport, refinement_report
from saert.refine import MAX_STEPS, TOL


def refine(
    source: Source = None,
    data: Data = None,
    rows: Rows = 64,
    context: Context = None,
    batch: Batch = 16,
    max_steps: Annotated[int, typer.Option(min=1, help="Per token, at most.")] = MAX_STEPS,
    tol: Annotated[
        float, typer.Option(min=0.0, help="Distance from the optimum at which a token is done.")
    ] = TOL,
    model: Model = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Refit activations on the latents that the encoder chose: shrinkage, and what refitting gains.

    Refined activations are the best for the reconstruction without another latent or decoder (Gao
    et al. 2024, section 5.1). Losses are with either reconstruction spliced into the model.
    """
    with user_errors():
        session = open_session(
            model, [source or BUNDLED], hookpoint=hookpoint, device=device, strict=strict
        )
        (loaded,) = session.saes
        sae = loaded.sae
        assert sae.hookpoint is not None  # open_session insists
        check_model(session.model, sae, sae.hookpoint, strict)
        text = read_text(session, data, rows, context)
        sae.to(session.model.device)
        found = refinement_report(
            session.model,
            sae,
            text.rows,
            batch=batch,
            special=text.special,
            max_steps=max_steps,
            tol=tol,
            progress=progress,
        )
    if as_json:
        about = {"model": session.name, "sae": loaded.source, "hookpoint": loaded.name}
        print_json(about | {"text": text.source, "rows": len(text.rows)} | found.to_dict())
        return
    console = Console()
    console.print(f"{loaded.name} of {loaded.source}, {found.tokens:,} tokens: {text.source}")
    console.print(_table(found))
    console.print(_verdict(found))
    if found.unfinished:
        console.print(
            f"{found.unfinished:,} tokens are not at their optimum (off by up to "
            f"{found.residual:.1e}): raise --max-steps"
        )


def _table(found: RefinementReport) -> Table:
    table = Table("", "FVU", "L0", "cross-entropy", "KL", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("model", "", "", f"{found.ce:.4f}", "")
    bare = found.ce
    for name, fvu, l0, ce, kl in (
        ("spliced", found.fvu, found.l0, found.ce_spliced, found.kl_spliced),
        ("refined", found.fvu_refined, found.l0_refined, found.ce_refined, found.kl_refined),
    ):
        table.add_row(name, f"{fvu:.4f}", f"{l0:.1f}", f"{ce:.4f} ({ce - bare:+.4f})", f"{kl:.4f}")
    return table


def _verdict(found: RefinementReport) -> str:
    if math.isnan(found.shrinkage):
        return "no latent is active, so nothing was refined"
    change = "raises" if found.shrinkage > 0 else "lowers"
    return f"refining {change} the active values by {abs(found.shrinkage):.1%} (shrinkage)"
