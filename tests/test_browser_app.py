"""The app as a whole, in a real browser: it opens, its tabs answer, it fits a phone."""

import pytest

pytestmark = pytest.mark.browser
TABS = ("Steer", "Explore", "Ablate", "Refine")


def test_every_tab_opens(page):
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        chosen = page.get_by_role("tab", name=name, selected=True)
        chosen.wait_for()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(new_page, width):
    page = new_page(size={"width": width, "height": 844})
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
