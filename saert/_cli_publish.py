"""`saert publish`: a folder of SAEs in, a repo of the Hub out."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from saert._cli_io import print_json, user_errors
from saert._cli_options import Json
from saert.hub.publish import Published
from saert.hub.publish import publish as send

Option = typer.Option


class Format(StrEnum):
    SAELENS = "saelens"
    SPARSIFY = "sparsify"


def publish(
    folder: Annotated[
        Path, typer.Argument(help="A training run, or any folder of SAEs that saert reads.")
    ],
    repo: Annotated[str, typer.Argument(help="USER/NAME; made if missing.")],
    private: Annotated[
        bool, Option("--private", help="Make a new repo private; refuse one that is public.")
    ] = False,
    revision: Annotated[
        str | None, Option("--revision", help="A branch; made if missing.", metavar="BRANCH")
    ] = None,
    tag: Annotated[
        list[str] | None, Option("--tag", help="A name for the commit. May be repeated.")
    ] = None,
    format: Annotated[Format, Option("--format", help="The layout to write.")] = Format.SAELENS,
    into: Annotated[
        str,
        Option("--into", help="A folder of the repo to publish below.", metavar="PATH"),
    ] = "",
    license: Annotated[
        str | None, Option("--license", help="For the card, as the Hub spells it: apache-2.0.")
    ] = None,
    base_model: Annotated[
        str | None, Option("--base-model", help="The model's Hub id, if the SAEs do not say it.")
    ] = None,
    model_type: Annotated[
        str | None,
        Option("--model-type", help="The model's type, for sparsify, if the SAEs do not say it."),
    ] = None,
    message: Annotated[
        str | None, Option("--message", help="Of the commit.", metavar="TEXT")
    ] = None,
    create_pr: Annotated[
        bool, Option("--pr", help="Open a pull request instead of committing.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, show the card as for a new repo.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Upload SAEs with their measurements and a model card, in one commit.

    The token is the one of `hf auth login`, or HF_TOKEN. What is there already is not sent again.
    """
    with user_errors():
        done = send(
            folder,
            repo,
            format=format.value,
            into=into,
            private=private,
            revision=revision,
            tags=tag or (),
            message=message,
            base_model=base_model,
            model_type=model_type,
            license=license,
            create_pr=create_pr,
            dry_run=dry_run,
        )
    if as_json:
        print_json(asdict(done) | {"dry_run": dry_run})
        return
    for line in _lines(done, dry_run):
        typer.echo(line)


def _lines(done: Published, dry_run: bool) -> list[str]:
    count = f"{len(done.saes)} SAE{'s' if len(done.saes) > 1 else ''}"
    lines = []
    if dry_run:
        lines += [
            done.card,
            f"{count} for {done.repo_id}; nothing was sent. Files, as for a new repo:",
        ]
        lines += [f"  {name}" for name in done.files]
    elif done.files or done.removed:
        lines += [f"{count}, {len(done.files)} files written: {done.url}", f"commit {done.commit}"]
    else:
        lines += [f"{done.url} holds all of it already", f"commit {done.commit}"]
    if done.removed:
        lines.append(f"removed, as they belonged to what was replaced: {', '.join(done.removed)}")
    if done.stale:
        lines.append(
            f"others replaced the weights of {', '.join(done.stale)}; their numbers left the card"
        )
    if done.unmeasured:
        lines.append(
            f"without measurements: {', '.join(done.unmeasured)}; `saert eval` into the folder "
            "makes them"
        )
    return lines
