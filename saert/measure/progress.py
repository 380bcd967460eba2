"""A progress bar for long measurements, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track

T = TypeVar("T")


def tracked(
    items: Iterable[T], what: str, progress: bool = True, total: float | None = None
) -> Iterator[T]:
    """`items`, with a bar that says `what`; `total` where they have no length."""
    bar = Console(stderr=True)
    yield from track(items, what, total=total, console=bar, disable=not progress, transient=True)


@contextmanager
def bar(what: str, progress: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar to be set by hand: the function inside takes what is done, and of how much."""
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
