"""What went wrong, in the words of whoever found out, where a visitor sees it."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from saert.hub.session import UserError

log = logging.getLogger(__name__)

LONGEST = 1000  # characters of a message
SAID = (UserError, ValueError, TypeError, OSError, ImportError, NotImplementedError)
FULL = "out of {kind}: ask for fewer tokens or a shorter text, or wait for others to finish"
CPU_FULL = ("not enough memory", "can't allocate memory", "cannot allocate memory")


@contextmanager
def visible() -> Iterator[None]:
    """Whatever is raised becomes `gr.Error`, which shows as a message; the app goes on.

    What the library refused is said in its words. Anything else is a mistake of ours: it shows in
    short, and the log has it with its traceback.
    """
    try:
        yield
    except gr.Error as error:
        error.message = plain(error.message)
        raise
    except Exception as error:
        if kind := _full(error):
            _release(error)
            log.warning("out of %s: %s", kind, error)
            raise _said(FULL.format(kind=kind)) from None
        if isinstance(error, SAID):
            log.info("refused: %s", error)
            words = str(error) or type(error).__name__
            raise _said(words.replace("strict=False", "saert app --no-strict")) from error
        log.exception("a handler failed")
        what = f"{type(error).__name__}: {error}"[:200]
        raise _said(f"something went wrong ({what}); the app's log says where") from error


def warn(words: str, title: str = "Warning") -> None:
    """A message that ends nothing."""
    gr.Warning(plain(words), title=title)


def plain(words: str) -> str:
    """A message without markup: pages draw messages as HTML, and they quote what visitors sent.

    Other signs rather than entities, which programs would have to undo.
    """
    words = words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
    return words.replace("<", "‹").replace(">", "›")


def _said(words: str) -> gr.Error:
    return gr.Error(plain(words), print_exception=False)  # the log has had it


def _full(error: Exception) -> str | None:
    """Which memory ran out, if that is what happened. Torch's own CPU allocator raises no class."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU memory"
    words = str(error).lower()
    full = isinstance(error, RuntimeError) and any(sign in words for sign in CPU_FULL)
    return "memory" if full or isinstance(error, MemoryError) else None


def _release(error: Exception) -> None:
    """Let go of the tensors that the failed call's frames still hold."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shown(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, or a generator of updates, whose errors are visible."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with visible():
                yield from handler(*args, **kwargs)

        return stream

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        with visible():
            return handler(*args, **kwargs)

    return call
