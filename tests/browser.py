"""A real browser on a real app: the fixtures of the journeys in tests/test_browser_*.py.

`app_url` is the app on the bundled model in a process of its own, one for all xdist workers;
`page` is a fresh visitor, `new_page` makes more. A page that writes an error to its console,
raises one, or asks another host for anything fails its test.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

HERE = Path(__file__).parent
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QUIET = (  # no requests of the browser's own
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
STARTED, PATIENCE = 120, 20_000  # seconds for the app, milliseconds for a page
SIZE = {"width": 1280, "height": 900}


def executable() -> str | None:
    """The browser to drive: $SAERT_CHROMIUM, or the first of `NAMES` that is installed."""
    asked = os.environ.get("SAERT_CHROMIUM")
    found = [shutil.which(name) for name in ([asked] if asked else NAMES)]
    shell = Path("/usr/lib/chromium/chromium-headless-shell")
    return next((name for name in found if name), str(shell) if shell.exists() else None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}config", timeout=5) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False


def serve(log: Path, *options: str, watched: int | None = None) -> tuple[str, subprocess.Popen]:
    """Start `saert app` on a free port and wait for it: its address, and its process."""
    port = free_port()
    command = [sys.executable, str(HERE / "app_server.py"), str(watched or os.getpid())]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options], stdout=out, stderr=out
        )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}/", time.monotonic() + STARTED
    while not answers(url):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"saert app did not start:\n{log.read_text()[-3000:]}", pytrace=False)
        time.sleep(0.1)
    return url, process


@pytest.fixture(scope="session")
def app_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app on the bundled model and its SAEs; its log is `app.log` beside."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        url, process = serve(tmp_path_factory.getbasetemp() / "app.log")
        yield url
        process.terminate()
        process.wait(20)
        return
    # The first worker to come starts it; it ends with the controller, which is their parent.
    folder = tmp_path_factory.getbasetemp().parent
    with (folder / "app.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = folder / "app.url"
        if not known.exists() or not answers(known.read_text()):
            known.write_text(serve(folder / "app.log", watched=os.getppid())[0])
    yield known.read_text()


@pytest.fixture(scope="module")  # its event loop would be in the way of other modules' asyncio.run
def browser() -> Iterator[Any]:
    """Chromium under playwright's synchronous API."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = executable()
    if path is None:
        pytest.skip("no chromium here: `make browser`, or SAERT_CHROMIUM=/path/to/one")
    with api.sync_playwright() as playwright:
        api.expect.set_options(timeout=PATIENCE)
        started = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield started
        started.close()


@pytest.fixture
def new_page(browser: Any, app_url: str) -> Iterator[Callable[..., Any]]:
    """Another visitor: `new_page(size={"width": 390, "height": 844}, dark=True, query="s=…")`."""
    contexts, wrong = [], []
    host = urlsplit(app_url).netloc

    def looked_at(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob", "about") and address.netloc != host:
            wrong.append(f"request to another host: {request.url}")

    def said(message: Any) -> None:
        if message.type == "error":
            wrong.append(f"console: {message.text} ({message.location.get('url')})")

    def open_page(
        size: dict[str, int] | None = None, dark: bool = False, query: str = "", url: str = app_url
    ) -> Any:
        context = browser.new_context(
            viewport=size or SIZE, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        context.on("request", looked_at)
        context.on("console", said)
        context.on("weberror", lambda error: wrong.append(f"page error: {error.error}"))
        page = context.new_page()
        # gradio goes by the address, not by what the browser prefers
        asked = [f"__theme={'dark' if dark else 'light'}", *([query] if query else [])]
        page.goto(f"{url}?{'&'.join(asked)}", wait_until="load")
        page.locator("#source").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, "\n".join(wrong)


def settled(page: Any) -> None:
    """Wait until nothing is under way, half faded in or about to be aborted by a reload."""
    busy = ".progress-text, .generating, [aria-busy=true]"
    for _ in range(2):  # one event may be followed by another
        page.wait_for_timeout(300)
        page.wait_for_function(f"!document.querySelector('{busy}')")


@pytest.fixture
def page(new_page: Callable[..., Any]) -> Any:
    """A fresh visitor with the app open, 1280 by 900."""
    return new_page()
