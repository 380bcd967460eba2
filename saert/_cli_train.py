"""`saert train` and `saert scale`: options in, a run out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from saert._cli_io import print_json, user_errors
from saert.hub.session import UserError
from saert.train.objectives import OBJECTIVES

ObjectiveName = StrEnum("ObjectiveName", {name: name for name in OBJECTIVES})  # type: ignore[misc]
Option = typer.Option
Run, Shape, Text, Output = "Run", "Dictionary", "Text", "Output"


def train(
    model: Annotated[
        str | None, typer.Argument(help="A Hub id, a local folder, or 'bundled'.")
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="The run's folder. Default: named after the run."),
    ] = None,
    recipe: Annotated[
        str | None,
        Option(help="Published settings by name (--recipes lists them), or a TOML file."),
    ] = None,
    recipes: Annotated[bool, Option("--recipes", help="List the recipes and stop.")] = False,
    data: Annotated[
        list[str] | None,
        Option(
            help="A Hub dataset, or .txt, .jsonl, .parquet or .npy files, globs, folders.",
            metavar="SOURCE",
            rich_help_panel=Text,
        ),
    ] = None,
    field: Annotated[
        str | None, Option(help="The column with the text.", rich_help_panel=Text)
    ] = None,
    context: Annotated[int | None, Option(help="Tokens in a row.", rich_help_panel=Text)] = None,
    hookpoints: Annotated[
        list[str] | None,
        Option(
            "--hookpoints",
            "--hookpoint",
            help="Where to read; several train at once. 'mlp_in.6->mlp_out.6' is a transcoder.",
            metavar="NAME[,NAME]",
            rich_help_panel=Shape,
        ),
    ] = None,
    objective: Annotated[
        ObjectiveName | None, Option(help="What to train for.", rich_help_panel=Shape)
    ] = None,
    num_latents: Annotated[
        int | None, Option(help="Default: 16 times the width.", rich_help_panel=Shape)
    ] = None,
    k: Annotated[
        int | None, Option("-k", "--k", help="Latents a token.", rich_help_panel=Shape)
    ] = None,
    normalise: Annotated[
        str | None,
        Option(help="none, layer_norm, unit, sqrt_d; auto: as published.", rich_help_panel=Shape),
    ] = None,
    precision: Annotated[
        str | None, Option(help="fp32, tf32, bf16 or fp64.", rich_help_panel=Shape)
    ] = None,
    tokens: Annotated[
        float | None, Option(help="How many to train on, such as 5e8.", rich_help_panel=Run)
    ] = None,
    batch_tokens: Annotated[
        int | None, Option(help="Tokens in a step.", rich_help_panel=Run)
    ] = None,
    lr: Annotated[
        float | None,
        Option(help="At 16,384 latents; scaled by 1/√num_latents.", rich_help_panel=Run),
    ] = None,
    seed: Annotated[int | None, Option(rich_help_panel=Run)] = None,
    shards: Annotated[
        int | None,
        Option(help="Under torchrun: processes that share the latents.", rich_help_panel=Run),
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Any other setting: optimiser.ema=0.999, objective.k_aux=512, … May be repeated.",
            metavar="KEY=VALUE",
            rich_help_panel=Run,
        ),
    ] = None,
    device: Annotated[str, Option(help="cpu, cuda, or auto.", rich_help_panel=Run)] = "auto",
    cache: Annotated[
        Path | None,
        Option(help="Keep activations here, and read them back.", rich_help_panel=Output),
    ] = None,
    cache_gb: Annotated[
        float, Option(help="The most the cache may hold, in 10⁹ bytes.", rich_help_panel=Output)
    ] = 10.0,
    evaluate_every: Annotated[
        int | None,
        Option(help="Steps between evaluations. Default: the end only.", rich_help_panel=Output),
    ] = None,
    wandb: Annotated[
        str | None, Option(help="Log to this Weights & Biases project too.", rich_help_panel=Output)
    ] = None,
    tensorboard: Annotated[
        bool, Option("--tensorboard/--no-tensorboard", rich_help_panel=Output)
    ] = True,
    progress: Annotated[bool, Option("--progress/--no-progress", rich_help_panel=Output)] = True,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Print the whole configuration and stop.", rich_help_panel=Output),
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print one JSON object.", rich_help_panel=Output)
    ] = False,
) -> None:
    """Train sparse autoencoders or transcoders on a model's activations.

    Settings come from the recipe, then the options, then --set. The same command goes on with a
    stopped run. Under torchrun the processes share the latents (--shards) and the tokens.
    """
    with user_errors():
        from saert.train import config as configs

        if recipes:
            _list_recipes(configs)
            return
        options = {
            "objective.name": None if objective is None else objective.value,  # before what it has
            "model.name": model,
            "data.source": data,
            "data.field": field,
            "data.context": context,
            "sae.hookpoints": None if not hookpoints else _split(hookpoints),
            "sae.num_latents": num_latents,
            "sae.normalise": normalise,
            "sae.precision": precision,
            "tokens": None if tokens is None else int(tokens),
            "stream.batch_tokens": batch_tokens,
            "optimiser.lr": lr,
            "seed": seed,
            "shards": shards,
            "evaluation.every": evaluate_every,
            "objective.k": k,
        }
        config = configs.from_table(
            configs.override(_with(_recipe(recipe), options), settings or [])
        )
        if dry_run:
            print_json(config.to_dict())
            return
        parts = (Path(config.model.name).name, config.objective.name, *config.sae.hookpoints)
        folder = out or Path("runs") / "-".join(parts).replace("->", "-").replace("/", "-")
        metrics = _run(config, folder, device, cache=cache, cache_gb=cache_gb, wandb=wandb,
                       tensorboard=tensorboard, progress=progress and not as_json)  # fmt: skip
    if metrics is None:
        return
    if as_json:
        print_json({"folder": str(folder), "saes": metrics})
        return
    Console().print(_table(metrics))
    typer.echo(f"{folder}: saes/ can be loaded, attached and published")


def _run(config: Any, folder: Path, device: str, **options: Any) -> dict[str, Any] | None:
    """The metrics of every dictionary, or None on a process that is not the first."""
    from saert.train.checkpoint import CheckpointError
    from saert.train.run import Interrupted, TrainingError
    from saert.train.session import train as run

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    under_torchrun = dist.is_torchelastic_launched()
    if under_torchrun:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if device == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
    first = not under_torchrun or dist.get_rank() == 0
    try:
        found = run(config, folder, device=device, say=_say if first else _silent, **options)
    except Interrupted as stopped:
        _say(str(stopped))
        raise typer.Exit(130) from None
    except (TrainingError, CheckpointError) as error:
        raise UserError(str(error)) from error
    finally:
        if under_torchrun:
            dist.destroy_process_group()
    return found if first else None


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _silent(text: str) -> None:
    pass


def _recipe(name: str | None) -> dict[str, Any]:
    from saert.train import config as configs

    if name is None:
        return {}
    path = configs.RECIPES / f"{name}.toml"
    if name in configs.recipe_names():
        return configs.load_table(path)
    if Path(name).is_file():
        return configs.load_table(Path(name))
    raise UserError(
        f"recipe {name!r}: no such file, and none of {', '.join(configs.recipe_names())}"
    )


def _with(table: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The tables with the options that were given."""
    for path, value in options.items():
        if value is None or value == []:
            continue
        *tables, key = path.split(".")
        here = table
        for name in tables:
            if isinstance(here.get(name), str):  # objective = "topk" is short for its name
                here[name] = {"name": here[name]}
            here = here.setdefault(name, {})
        if path == "objective.name" and here and here.get("name", "topk") != value:
            # the recipe's settings, and its optimiser's, are those of another objective
            here.clear()
            table.pop("optimiser", None)
            table.get("sae", {}).pop("normalise", None)
        here[key] = value
    return table


def _split(names: list[str]) -> list[str]:
    return [part.strip() for name in names for part in name.split(",") if part.strip()]


def _list_recipes(configs: Any) -> None:
    table = Table("recipe", "model", "hookpoints", "objective", "tokens")
    for name in configs.recipe_names():
        recipe = configs.load_table(configs.RECIPES / f"{name}.toml")
        objective = recipe.get("objective", {})
        table.add_row(
            name,
            recipe["model"]["name"],
            ", ".join(recipe["sae"]["hookpoints"]),
            str(objective.get("name", "topk")),
            f"{recipe.get('tokens', 0):,}",
        )
    Console().print(table)


def _table(metrics: dict[str, Any]) -> Table:
    table = Table("dictionary", "FVU", "L0", "dead", "CE recovered", "KL recovered")
    for name, m in metrics.items():
        if m is None:
            table.add_row(name, *["not measured"] * 5)
            continue
        table.add_row(
            name,
            f"{m['fvu']:.4f}",
            f"{m['l0']:.1f}",
            f"{m['dead']:.1%}",
            f"{m['ce_recovered']:.2%}",
            f"{m['kl_recovered']:.2%}",
        )
    return table


def scale(
    model: Annotated[
        str | None, typer.Argument(help="A Hub id, a local folder, or 'bundled'.")
    ] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Default: runs/MODEL-scale.")] = None,
    recipe: Annotated[str | None, Option(help="As for `saert train`.")] = None,
    data: Annotated[
        list[str] | None, Option(help="As for `saert train`.", metavar="SOURCE")
    ] = None,
    context: Annotated[int | None, Option(help="Tokens in a row.")] = None,
    hookpoint: Annotated[str | None, Option(help="Where to read.", metavar="NAME")] = None,
    num_latents: Annotated[
        str, Option(help="Sizes to train.", metavar="N,N,…")
    ] = "512,1024,2048,4096",
    k: Annotated[str, Option("-k", "--k", help="Latents a token.", metavar="K,K,…")] = "8,16,32",
    tokens: Annotated[float | None, Option(help="How many each is trained on.")] = None,
    batch_tokens: Annotated[int | None, Option(help="Tokens in a step.")] = None,
    settings: Annotated[
        list[str] | None, Option("--set", help="Any other setting.", metavar="KEY=VALUE")
    ] = None,
    device: Annotated[str, Option(help="cpu, cuda, or auto.")] = "auto",
    at_once: Annotated[int, Option(min=1, help="Dictionaries that train together.")] = 6,
    cache_gb: Annotated[float, Option(help="The most the activation cache may hold.")] = 10.0,
    keep_cache: Annotated[bool, Option("--keep-cache", help="Leave the cache there.")] = False,
    progress: Annotated[bool, Option("--progress/--no-progress")] = True,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sweep sizes and k, and fit how the loss falls with compute, latents and k.

    All dictionaries see the same batches. The laws are those of Gao et al. 2024, section 3.
    """
    with user_errors():
        from saert.train import config as configs
        from saert.train.run import Interrupted
        from saert.train.sweep import sweep

        options = {
            "model.name": model,
            "data.source": data,
            "data.context": context,
            "sae.hookpoints": None if hookpoint is None else [hookpoint],
            "tokens": None if tokens is None else int(tokens),
            "stream.batch_tokens": batch_tokens,
        }
        table = configs.override(_with(_recipe(recipe), options), settings or [])
        config = configs.from_table(table)
        folder = out or Path("runs") / f"{Path(config.model.name).name}-scale"
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            found = sweep(
                config, folder, _numbers(num_latents), _numbers(k), device=device,
                cache_gb=cache_gb, keep_cache=keep_cache, at_once=at_once,
                progress=progress and not as_json, say=_say,
            )  # fmt: skip
        except Interrupted as stopped:
            _say(str(stopped))
            raise typer.Exit(130) from None
    if as_json:
        print_json({"folder": str(folder), "fits": {n: f.to_dict() for n, f in found.fits.items()}})
        return
    console = Console()
    for name, law in found.fits.items():
        header, *rows = law.table()
        table_of = Table(*header, title=f"{name}: {len(law.points)} points, R² {law.r_squared:.4f}")
        for row in rows:
            table_of.add_row(*row)
        console.print(table_of)
        for note in law.notes:
            console.print(f"  {note}", highlight=False)
    typer.echo(f"{folder}: points.json, fits.json and the plots")


def _numbers(text: str) -> list[int]:
    try:
        return [int(float(part)) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{text!r}: expected numbers with commas between them") from None
