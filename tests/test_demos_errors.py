"""Whatever a handler raises, the visitor sees a message and the app goes on."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos.errors import LONGEST, shown, warn  # noqa: E402
from saert.hub.session import UserError  # noqa: E402

CPU_FULL = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
RAISED = [
    (UserError("name an SAE"), "name an SAE"),
    (ValueError("found 3, expected 4; pass strict=False"), "saert app --no-strict"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory: ask for fewer tokens"),
    (MemoryError(), "out of memory: ask for fewer tokens"),
    (RuntimeError(CPU_FULL), "out of memory: ask for fewer tokens"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory: ask"),
    (KeyError("resid"), "something went wrong (KeyError: 'resid')"),
    (RuntimeError("shapes differ"), "something went wrong (RuntimeError: shapes differ)"),
    (AssertionError(), "something went wrong (AssertionError: )"),
]
OURS = [one for one in RAISED if one[1].startswith("something")]


def fails(error):
    def handler():
        raise error

    return shown(handler)


def streams(error):
    def handler():
        yield 1
        raise error

    return shown(handler)


@pytest.mark.parametrize(("error", "words"), RAISED, ids=lambda one: type(one).__name__)
def test_errors_become_messages(error, words):
    with pytest.raises(gr.Error) as caught:
        fails(error)()
    assert words in caught.value.message
    stream = streams(error)()
    assert next(stream) == 1  # what came before it has been seen
    with pytest.raises(gr.Error) as caught:
        next(stream)
    assert words in caught.value.message


@pytest.mark.parametrize(("error", "words"), OURS, ids=lambda one: type(one).__name__)
def test_mistakes_of_ours_are_logged_with_their_traceback(error, words, caplog):
    with pytest.raises(gr.Error):
        fails(error)()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info[1] is error


def test_refusals_leave_no_traceback(caplog):
    with pytest.raises(gr.Error):
        fails(ValueError("no such latent"))()
    assert not [record for record in caplog.records if record.exc_info]


def test_messages_of_gradio_pass(caplog):
    with pytest.raises(gr.Error, match="as it is"):
        fails(gr.Error("as it is"))()


EVIL = "no <img src=https://evil.example/x> & <b>bold</b> here"


@pytest.mark.parametrize("raised", [ValueError, KeyError, gr.Error, UserError])
def test_messages_bring_no_markup_of_visitors(raised):
    """Pages draw them as HTML, and they quote what came in a link."""
    with pytest.raises(gr.Error) as caught:
        fails(raised(EVIL))()
    assert "<" not in caught.value.message
    assert "no ‹img src=https://evil.example/x› & ‹b›bold" in caught.value.message  # readable


def test_warnings_bring_none_either(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda words, **how: said.append(words))
    warn(EVIL)
    assert said == [EVIL.replace("<", "‹").replace(">", "›")]


def test_long_messages_are_cut():
    with pytest.raises(gr.Error) as caught:
        fails(ValueError("x" * 10_000))()
    assert len(caught.value.message) <= LONGEST + 1


def test_a_call_that_ran_out_of_memory_keeps_nothing():
    kept = []

    class Tensor:
        def __init__(self):
            kept.append(self.gone)

        gone = threading.Event()

        def __del__(self):
            self.gone.set()

    def handler():
        held = Tensor()
        raise torch.OutOfMemoryError(f"CUDA out of memory with {type(held)}")

    with pytest.raises(gr.Error):
        shown(handler)()
    assert kept[0].is_set()


def test_the_app_goes_on_after_running_out_of_memory():
    """Over the wire, with another visitor at work all the while."""
    client = pytest.importorskip("gradio_client")

    def work(text: str) -> str:
        if text == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return text.upper()

    with gr.Blocks(analytics_enabled=False) as app:
        gr.api(shown(work), api_name="work")
    _, url, _ = app.queue(default_concurrency_limit=8).launch(
        prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False
    )
    try:
        one, other = (client.Client(url, verbose=False) for _ in range(2))
        with ThreadPoolExecutor(1) as pool:
            at_work = pool.submit(lambda: [other.predict("b", api_name="/work") for _ in range(5)])
            for _ in range(3):
                with pytest.raises(client.exceptions.AppError, match="out of GPU memory"):
                    one.predict("large", api_name="/work")
                assert one.predict("small", api_name="/work") == "SMALL"
        assert at_work.result() == ["B"] * 5
    finally:
        app.close()
