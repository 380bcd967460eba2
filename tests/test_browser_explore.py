"""The Explore tab in a real browser."""

import re

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def explore(page):
    """The tab, once the text that stands there is looked at."""
    page.get_by_role("tab", name="Explore").click()
    page.locator("#explore-tokens [data-index]").first.wait_for()
    page.locator("#explore-firing [data-index]").first.wait_for(timeout=90_000)  # the first index
    return page


def choose(page, listed, text):
    page.locator(f"{listed} [data-index]", has_text=text).first.click()


def test_from_a_text_to_a_card_and_on_to_steering(explore):
    from playwright.sync_api import expect

    page = explore
    page.locator("#explore-text textarea").fill("Tom and his dog went to the park. <b>Fun</b>")
    page.locator("#explore-look").click()
    token = page.locator("#explore-tokens [data-index]", has_text="park")
    expect(token).to_have_count(1)
    expect(page.locator("#explore-tokens")).to_contain_text("<b>")  # text, not markup
    token.click()
    choose(page, "#explore-at-token", "#546")
    title = page.locator("#explore-title h3")
    expect(title).to_have_text("#546 to the park")
    expect(page.locator("#explore-examples .saert-line").first).to_contain_text("park")
    expect(page.locator("#explore-histogram svg rect")).to_have_count(40)
    expect(page.locator("#explore-logits li")).to_have_count(20)
    expect(page.locator("#explore-figures")).to_contain_text("density")
    expect(page.locator("#explore-effect")).to_contain_text("Taken away at “ park”")
    # its heat over the text is at the token it fires on
    hot = token.evaluate("node => +node.style.getPropertyValue('--heat')")
    assert hot > 0.5
    page.locator("#explore-explain").click()
    expect(page.locator("#explore-explanation li").first).to_be_visible()

    page.locator("#explore-neighbours [data-index]").first.click()
    expect(title).not_to_have_text("#546 to the park")
    expect(page.locator("#explore-explanation h4")).to_have_count(0)
    neighbour = re.match(r"#(\d+)", title.inner_text()).group(1)
    expect(page.locator("#explore-examples .saert-line").first).to_be_visible()
    page.locator("#explore-steer").click()
    rows = page.locator(".steer-title")  # what the page began with gives way
    expect(rows).to_have_count(1)
    expect(page.get_by_role("tab", name="Steer", selected=True)).to_be_visible()
    expect(page.get_by_role("tabpanel").filter(visible=True)).to_contain_text(neighbour)


def test_searching_and_what_is_not_there(explore):
    from playwright.sync_api import expect

    page = explore
    page.locator("#explore-lists").get_by_role("tab", name="Search").click()
    query = page.locator("#explore-query").get_by_role("textbox")
    query.fill("park")
    page.locator("#explore-search").click()
    expect(page.locator("#explore-results [data-index]").first).to_contain_text("to the park")
    query.fill("99999")
    query.press("Enter")
    expect(page.get_by_text("latent 99999: this SAE has 0 to 1023")).to_be_visible()
    query.fill("71")
    query.press("Enter")
    expect(page.locator("#explore-title h3")).to_have_text("#71 food")
    page.locator("#explore-text textarea").fill("  ")
    page.locator("#explore-look").click()
    expect(page.get_by_text("write at least one word")).to_be_visible()
    page.locator("#explore-text textarea").fill("dog " * 300)
    page.locator("#explore-look").click()
    expect(page.get_by_text(re.compile("the prompt has .* tokens"))).to_be_visible()
    expect(page.locator("#explore-title h3")).to_have_text("#71 food")  # what was shown stays


def test_another_sae_and_one_that_does_not_exist(explore):
    from playwright.sync_api import expect

    page = explore
    choose(page, "#explore-firing", "#")
    expect(page.locator("#explore-title h3")).to_be_visible()
    source = page.locator("#source input")
    source.fill("./nowhere")
    source.press("Enter")
    toast = page.get_by_test_id("toast-body").filter(has_text="The SAE stays")
    expect(toast).to_have_count(1)
    expect(page.get_by_test_id("toast-body")).to_have_count(1)
    expect(source).to_have_value("bundled:resid_post.2")
    expect(page.locator("#explore-title h3")).to_be_visible()
    source.fill("bundled:mlp_in.2")  # a transcoder
    source.press("Enter")
    expect(page.locator("#explore-title h3")).to_have_count(0)
    page.locator("#explore-firing [data-index]").first.wait_for(timeout=90_000)
    choose(page, "#explore-firing", "#")
    expect(page.locator("#explore-logits li")).to_have_count(20)
    expect(page.locator("#explore-effect")).to_contain_text(re.compile("Taken away|changes"))


def test_by_keyboard_on_a_phone(new_page):
    from playwright.sync_api import expect

    page = new_page(size={"width": 390, "height": 844}, dark=True)
    page.get_by_role("tab", name="Explore").click()
    first = page.locator("#explore-tokens [data-index]").first
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    listed = page.locator("#explore-at-token [data-index]").first
    listed.wait_for()
    listed.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#explore-title h3")).to_be_in_viewport()
    page.locator("#explore-steer").click()
    expect(page.locator(".steer-title")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
