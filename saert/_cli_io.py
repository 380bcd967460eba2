"""How answers and errors leave the process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from saert.hub.session import UserError


def print_json(answer: Mapping[str, Any]) -> None:
    """One object on standard output; a number that JSON does not have becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [clean(inner) for inner in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    typer.echo(json.dumps(clean(answer), indent=2, ensure_ascii=False, default=str))


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that name what was found and expected become one line and exit code 2."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (UserError, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("SAERT_DEBUG"):
            raise
        said = str(error).replace("strict=False", "--no-strict")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        typer.echo(f"error: {lines[0] if lines else type(error).__name__}", err=True)
        for line in lines[1:4]:
            typer.echo(f"       {line}", err=True)
        raise typer.Exit(2) from None
