"""A progress bar for long measurements, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def tracked(
    items: Iterable[T], what: str, progress: bool = True, total: float | None = None
) -> Iterator[T]:
    """`items`, with a bar that says `what`; `total` where they have no length."""
    bar = Console(stderr=True)
    yield from track(items, what, total=total, console=bar, disable=not progress, transient=True)
