"""`saert ablate`: what each active latent does to the model's predictions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import saert._cli_view as view
from saert._cli_edits import read_positions
from saert._cli_io import print_json, user_errors
from saert._cli_options import (
    At,
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
from saert.hub.session import Session, UserError, open_session
from saert.measure.ablation.ablate import ablation_effects, direction_effects
from saert.measure.ablation.run import NothingToAblate
from saert.measure.ablation.table import AblationEffects
from saert.measure.identity import differences, model_identity, sae_identity
from saert.measure.passes import sites
from saert.measure.progress import tracked

Option = typer.Option
KEPT = 10  # promoted and suppressed tokens of each ablation
SORTS = ("kl", "sparsity", "loss_change", "values", "positions")


def ablate(
    source: Source = None,
    prompt: Annotated[
        str | None, Option("--prompt", "-p", help="One text, instead of --data.")
    ] = None,
    latents: Annotated[
        str,
        Option(
            "--latents",
            "-l",
            metavar="WHICH",
            help="active; attributed:100, the largest in each row by attribution; or 17,18.",
        ),
    ] = "active",
    positions: Annotated[
        str | None,
        Option(metavar="POSITIONS", help="Ablate only there: 3, 0,4 or 2:10; -1 is the last."),
    ] = None,
    horizon: Annotated[int, Option(min=1, help="Tokens looked at, the ablated one first.")] = 16,
    keep_error: Annotated[
        bool,
        Option("--keep-error/--drop-error", help="Drop: the reconstruction is spliced in."),
    ] = True,
    channels: Annotated[
        int, Option(min=0, help="Also so many channels of the hidden state, for comparison.")
    ] = 0,
    random: Annotated[
        int, Option(min=0, help="Also so many random directions, for comparison.")
    ] = 0,
    sort: Annotated[str, Option(help=f"By {', '.join(SORTS)}.")] = "kl",
    top: Annotated[int, Option(min=1, help="Ablations to show.")] = 20,
    data: Data = None,
    rows: Rows = 8,
    context: Context = None,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="Keep every row's effects here; run again to go on."),
    ] = None,
    batch: Annotated[
        int | None, Option(min=1, help="Ablations of one pass. Default: as many as fit 512 MiB.")
    ] = None,
    model: Model = None,
    hookpoint: At = None,
    device: Device = "auto",
    strict: Strict = True,
    progress: Progress = True,
    as_json: Json = False,
) -> None:
    """Ablate latents one at a time: how sparsely and how much the predictions change.

    Sparsity is the share of the logits of the next tokens that an ablation reaches (Gao et al.
    2024); KL and loss change are means over these tokens, in nats.
    """
    with user_errors():
        if sort not in SORTS:
            raise UserError(f"--sort {sort}: expected one of {', '.join(SORTS)}")
        if prompt is not None and data:
            raise UserError("--prompt and --data: give one of them")
        sources = [source] if source else []
        session = open_session(model, sources, hookpoint=hookpoint, device=device, strict=strict)
        one = session.saes[0]
        if prompt is None:
            text = read_text(session, data, rows, context)
            ids, about, special = text.rows, text.source, text.special
        else:
            ids, about, special = session.encode(prompt)["input_ids"], prompt, None
        options: dict[str, Any] = {
            "positions": read_positions(positions),
            "horizon": horizon,
            "special": special,
        }
        chosen = _latents(latents)
        sae = one.sae.to(session.model.device)
        site = sites(sae)[1]

        def of_latents(row: Tensor, shown: bool) -> AblationEffects:
            return ablation_effects(
                session.model, sae, row, latents=chosen, keep_error=keep_error, strict=strict,
                progress=shown, **options,
            )  # fmt: skip

        def of_directions(which: str) -> Any:
            return lambda row, shown: direction_effects(
                session.model,
                site,
                row,
                which,
                top=KEPT,
                batch_size=batch,
                progress=shown,
                **options,
            )

        wanted = {"latents": of_latents}
        if channels:
            wanted["channels"] = of_directions(f"channels:{channels}")
        if random:
            wanted["random directions"] = of_directions(f"random:{random}")
        settings = {
            "model": model_identity(session.model, sae) | {"source": session.name},
            "sae": sae_identity(sae) | {"source": one.source},
            "latents": latents,
            "positions": positions,
            "horizon": horizon,
            "keep_error": keep_error,
            "channels": channels,
            "random": random,
            "ids": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        }
        shown = progress and not as_json
        found = {
            name: _by_rows(run, ids, _kept(out, settings, name), horizon, name, shown)
            for name, run in wanted.items()
        }
        if out is not None:
            for name, table in found.items():
                table.save(out / f"{name.replace(' ', '_')}.safetensors")
    if as_json:
        effects = _listed(found["latents"].sort(sort)[:top], session, ids)
        print_json(
            settings
            | {"source": about, "summary": {n: t.summary() for n, t in found.items()}}
            | {"method": found["latents"].method, "effects": effects}
        )
        return
    _show(found, session, ids, sort, top, about)


def _latents(text: str) -> str | list[int]:
    numbers = text.split(",")
    return [int(n) for n in numbers] if all(n.strip().isdigit() for n in numbers) else text


def _kept(out: Path | None, settings: dict[str, Any], name: str) -> Path | None:
    """The folder for one table's rows; UserError if `out` holds other ablations."""
    if out is None:
        return None
    record = out / "settings.json"
    if record.exists():
        before = json.loads(record.read_text("utf-8"))
        other = differences(before, settings)
        if other:
            raise UserError("\n".join([f"--out {out}: holds other ablations", *other]))
    folder = out / "rows" / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=1), "utf-8")
    return folder


def _by_rows(
    run: Any, ids: Tensor, folder: Path | None, horizon: int, name: str, shown: bool
) -> AblationEffects:
    """All rows; with a folder one at a time, each kept there, those already there read."""
    if folder is None:
        table: AblationEffects = run(ids, shown)
        return table
    tables = []
    for i in tracked(range(len(ids)), f"ablating {name}", shown):
        path = folder / f"{i:06}.safetensors"
        if not path.exists():
            half = path.with_suffix(".part")
            try:
                found = run(ids[i : i + 1], False)
            except NothingToAblate:  # an answer too
                found = AblationEffects.empty(horizon, KEPT)
            found.save(half)
            half.replace(path)
        table = AblationEffects.load(path)
        tables.append(AblationEffects(**vars(table) | {"rows": table.rows + i}))
    whole = AblationEffects.cat(tables)
    if not len(whole):
        raise NothingToAblate(f"{name}: none is active at the chosen positions of any row")
    return whole


def _listed(table: AblationEffects, session: Session, ids: Tensor) -> list[dict[str, Any]]:
    one = session.saes[0]
    return [
        {
            "row": int(table.rows[i]),
            "position": int(table.positions[i]),
            "token": session.text([int(ids[table.rows[i], table.positions[i]])])[0],
            "latent": int(table.latents[i]),
            "label": one.label(int(table.latents[i])),
            "value": table.values[i].item(),
            "sparsity": table.sparsity[i].item(),
            "kl": table.kl[i].item(),
            "loss_change": table.loss_change[i].item(),
            "promotes": session.text(table.top_promoted[i].tolist()),
            "suppresses": session.text(table.top_suppressed[i].tolist()),
        }
        for i in range(len(table))
    ]


def _show(
    found: dict[str, AblationEffects],
    session: Session,
    ids: Tensor,
    sort: str,
    top: int,
    about: str,
) -> None:
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    several = len(ids) > 1
    for name in (*(["row"] if several else []), "token", "latent"):
        table.add_column(name)
    for name in ("value", "sparsity", "KL", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("promotes", "suppresses"):
        table.add_column(name)
    for one in _listed(found["latents"].sort(sort)[:top], session, ids):
        token = f"{one['position']} {view.show_token(one['token'])}"
        table.add_row(
            *([str(one["row"])] if several else []),
            token,
            f"#{one['latent']} {one['label'] or ''}".strip(),
            f"{one['value']:.2f}",
            f"{one['sparsity']:.1%}",
            f"{one['kl']:.2g}",
            "–" if math.isnan(one["loss_change"]) else f"{one['loss_change']:+.2g}",
            _tokens(one["promotes"]),
            _tokens(one["suppresses"]),
        )
    console.print(table)
    console.print(f"text: {about}", highlight=False)
    for name, effects in found.items():
        facts = effects.summary()
        console.print(
            f"{len(effects):,} {name} by {effects.method}: mean sparsity {facts['sparsity']:.1%}, "
            f"KL {facts['kl']:.3g}, loss change {facts['loss_change']:+.3g} nats per token",
            highlight=False,
        )


def _tokens(tokens: Sequence[str], most: int = 4) -> str:
    return " ".join(view.show_token(token).strip() or "␣" for token in tokens[:most])
