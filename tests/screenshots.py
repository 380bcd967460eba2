"""The pictures of the app in docs/ and README: `make screenshots`, never by hand.

    python tests/screenshots.py [NAME]...

Each is a short journey on the bundled model, greedy and from a fixed seed, so that only what the
app says about milliseconds differs from one run to the next.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser import QUIET, SIZE, executable, serve
from PIL import Image
from playwright.sync_api import expect, sync_playwright

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PHONE = {"width": 390, "height": 844}
TALLEST = 1900
COLOURS = 128  # of the palette; text stays sharp, and a picture is a quarter as large


def steer(page: Any) -> None:
    page.locator("#steer-preset-0").click()
    page.locator("#steer-0-title").wait_for()
    page.locator("#steer-run").click()
    written(page, "#steer-default", "#steer-steered")


def explore(page: Any) -> None:
    page.get_by_role("tab", name="Explore").click()
    page.locator("#explore-look").click()
    page.locator("#explore-firing [data-index]").first.wait_for(timeout=120_000)
    page.get_by_role("tab", name="Search").click()
    page.locator("#explore-query textarea, #explore-query input").first.fill("park")
    page.locator("#explore-search").click()
    page.locator("#explore-results [data-index]").first.click()
    expect(page.locator("#explore-effect")).not_to_be_empty()


def ablate(page: Any) -> None:
    page.get_by_role("tab", name="Ablate").click()
    page.locator("#ablate-look").click()
    page.locator("#ablate-latents [data-index='1']").click()
    page.locator("#ablate-latents [data-index='1'].on").wait_for()
    page.locator("#ablate-run").click()
    written(page, "#ablate-default", "#ablate-ablated")


def refine(page: Any) -> None:
    page.get_by_role("tab", name="Refine").click()
    page.locator("#refine-run").click()
    expect(page.locator("#refine-tokens [data-index]").first).to_be_visible()
    page.locator("#refine-tokens [data-index]").nth(10).click()
    page.wait_for_timeout(2000)


def written(page: Any, *texts: str) -> None:
    """Wait until texts are there and no longer grow."""
    for text in texts:
        page.locator(f"{text} [data-index]").first.wait_for()
    last, same = "", 0
    while same < 3:
        page.wait_for_timeout(400)
        now = "".join(page.locator(text).inner_text() for text in texts)
        last, same = now, same + 1 if now == last else 0


@dataclass(frozen=True)
class Picture:
    """A journey, how large and dark the page is meanwhile, and where on a phone to look then."""

    play: Callable[[Any], None]
    size: dict[str, int]
    dark: bool = False
    at: str = ""


PICTURES = {
    "steer": Picture(steer, SIZE),
    "steer-dark": Picture(steer, SIZE, dark=True),
    "steer-phone": Picture(steer, PHONE, at="#steer-run"),
    "explore": Picture(explore, SIZE),
    "ablate": Picture(ablate, SIZE),
    "refine": Picture(refine, SIZE),
}


def take(browser: Any, url: str, picture: Picture) -> bytes:
    """A png of the page at the end of the journey: from its top, or a phone's screen."""
    context = browser.new_context(viewport=picture.size, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto(f"{url}?__theme={'dark' if picture.dark else 'light'}")
    picture.play(page)
    page.mouse.move(0, 0)
    page.evaluate(
        """at => {
          document.activeElement?.blur();
          window.scrollTo(0, 0);
          if (at) window.scrollTo(0, document.querySelector(at).getBoundingClientRect().top - 8);
        }""",
        picture.at,
    )
    page.wait_for_timeout(500)
    whole = {} if picture.at else {"full_page": True, "clip": top(page, picture.size["width"])}
    shot: bytes = page.screenshot(animations="disabled", **whole)
    context.close()
    return shot


def top(page: Any, width: int) -> dict[str, float]:
    tall = page.evaluate("document.documentElement.scrollHeight")
    return {"x": 0, "y": 0, "width": width, "height": min(tall, TALLEST)}


def main(names: list[str]) -> None:
    """Take those named, or all."""
    if unknown := [name for name in names if name not in PICTURES]:
        sys.exit(f"no picture {unknown[0]}; there are {', '.join(PICTURES)}")
    if (chromium := executable()) is None:
        sys.exit("no chromium here: `make browser`, or SAERT_CHROMIUM=/path/to/one")
    FOLDER.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        url, server = serve(Path(folder) / "app.log")
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
            for name in names or PICTURES:
                image = Image.open(io.BytesIO(take(browser, url, PICTURES[name]))).convert("RGB")
                path = FOLDER / f"app-{name}.png"
                image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
                print(
                    f"{path.name}: {image.width} x {image.height}, {path.stat().st_size // 1024} kB"
                )
            browser.close()
        finally:
            server.terminate()
            server.wait(20)


if __name__ == "__main__":
    main(sys.argv[1:])
