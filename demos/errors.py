"""What went wrong, in the words of whoever found out, where a visitor sees it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from saert.hub.session import UserError

log = logging.getLogger(__name__)


@contextmanager
def visible() -> Iterator[None]:
    """Errors of the library and of memory become `gr.Error`, which shows as a message."""
    try:
        yield
    except gr.Error:
        raise
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise gr.Error("out of GPU memory: ask for fewer tokens, or wait for others") from error
    except MemoryError as error:
        raise gr.Error("out of memory: ask for fewer tokens, or wait for others") from error
    except (UserError, ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        log.info("refused: %s", error)
        raise gr.Error(str(error)) from error


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
