"""The Steer tab in a real browser: preset, run, stop, reset, rows, link, script."""

import json
import re
import time

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

pytestmark = pytest.mark.browser
# In the page, as a machine under load may write all of it before a click from here arrives.
STOP_AT_25 = """() => new Promise(done => { const look = () => {
  if (document.querySelectorAll('#steer-steered .tk').length <= 25) return setTimeout(look, 10);
  document.querySelector('#steer-stop').click(); done(); }; look(); })"""


def written(page, pane):
    return page.locator(f"#steer-{pane} .tk")


def choose(page, name):
    page.get_by_role("button", name=name, exact=True).click()
    page.locator("#steer-0-title").wait_for()


def cleared(page):
    """The page without the latent it begins with."""
    page.locator("#steer-0-remove").click()
    expect(page.locator("#steer-0-title")).to_have_count(0)


def fill(page, part, value):
    box = page.locator(f"#{part} input[type='number']").first
    box.fill(str(value))
    box.press("Tab")


def json_of(page):
    """The setup as the share section has it, once it is open at JSON."""
    text = page.locator("#steer-json .cm-content").inner_text()
    return json.loads(text) if text.strip() else None


def until(what, seconds=15):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def share(page, tab):
    section = page.locator("#steer-share")
    if not section.get_by_role("tab", name="Link").is_visible():
        section.get_by_role("button", name="Share or repeat").click()
    section.get_by_role("tab", name=tab).click()


def test_a_preset_runs_streams_and_is_shared(page, new_page):
    choose(page, "Hungry")
    expect(page.locator("#steer-0-title")).to_contain_text("resid_post.2 · #71 food")
    page.locator("#steer-run").click()
    seen = set()
    until(lambda: seen.add(written(page, "steered").count()) or max(seen) >= 68, 40)
    assert len(seen) > 2, "it came all at once"
    expect(written(page, "default")).to_have_count(68)
    expect(written(page, "steered")).to_have_count(68)
    expect(page.locator("#steer-steered")).to_contain_text("apples")
    expect(page.locator("#steer-default")).not_to_contain_text("apples")

    last = written(page, "steered").last
    pattern = r"log-probability -?\d+\.\d\d steered, .* \(change [+-]\d.*KL \d+\.\d+ nats"
    expect(last).to_have_attribute("title", re.compile(pattern))
    before = last.get_attribute("style")
    page.locator("#steer-heat").get_by_label("KL").check()
    expect(last).not_to_have_attribute("style", before or "")
    for name in ("mean KL", "ms per token, steered", "L0", "FVU", "error norm"):
        expect(page.locator("#steer-figures")).to_contain_text(name)

    share(page, "Link")
    link = page.locator("#steer-link textarea")
    expect(link).to_have_value(re.compile(r"^http://127\.0\.0\.1:\d+/\?setup=.+"))
    other = new_page(query=link.input_value().partition("?")[2])
    other.locator("#steer-run").click()  # at once: it waits for the link
    expect(other.locator("#steer-0-title")).to_contain_text("71 food")
    expect(other.locator("#steer-0-amount input")).to_have_value("6")
    expect(written(other, "steered")).to_have_count(68)
    same = page.locator("#steer-steered .saert-list").inner_text()
    assert other.locator("#steer-steered .saert-list").inner_text() == same
    share(other, "Python")
    expect(other.locator("#steer-snippet")).to_contain_text("import")
    expect(other.locator("#steer-snippet")).to_contain_text("71")


def test_what_runs_is_what_the_page_shows(page):
    """Run at once after whatever changes the setup: never what was there before."""
    page.locator("#steer-0-title").wait_for()
    fill_new = (
        "() => document.querySelector('#steer-preset-1').click() ?? "
        "document.querySelector('#steer-run').click()"
    )
    page.evaluate(fill_new)
    expect(page.locator("#steer-steered")).to_contain_text("sad", timeout=40_000)
    expect(page.locator("#steer-0-title")).to_contain_text("349 sad")
    expect(page.locator("#steer-run")).to_have_attribute("aria-busy", "false")
    # a box, and the keyboard instead of the button
    fill(page, "steer-0-amount", 0)
    page.locator("#steer-prompt textarea").press("Control+Enter")
    until(lambda: written(page, "steered").count() >= 60
          and page.locator("#steer-steered .saert-list").inner_text()
          == page.locator("#steer-default .saert-list").inner_text(), 40)  # fmt: skip
    # what is refused holds nothing back
    page.locator("#steer-asked input").fill("99999")
    page.locator("#steer-asked input").press("Enter")
    page.locator("#steer-add").click()
    expect(page.get_by_text("has latents 0 to 1023")).to_be_visible()
    expect(page.locator("#steer-run")).to_have_attribute("aria-busy", "false")


def test_stop_and_reset(page):
    choose(page, "Sad")
    page.get_by_role("button", name="Sampling").click()
    fill(page, "steer-new-tokens", 200)
    page.locator("#steer-run").click()
    page.evaluate(STOP_AT_25)
    time.sleep(3.0)  # what was on its way, on a machine under load
    held = written(page, "steered").count()
    assert held < 180
    time.sleep(1.0)
    assert written(page, "steered").count() == held
    page.locator("#steer-reset").click()
    expect(page.locator("#steer-0-title")).to_contain_text("71 food")
    expect(written(page, "steered")).to_have_count(0)
    expect(page.locator("#steer-new-tokens input[type='number']")).to_have_value("60")


def test_rows(page):
    cleared(page)
    share(page, "JSON")
    asked = page.locator("#steer-asked input")
    asked.fill("food")
    page.get_by_role("option", name="#71 · food").click()
    page.locator("#steer-add").click()
    amount, slider = page.locator("#steer-0-amount input"), page.get_by_role("slider").first
    expect(amount).to_have_value("10.8")
    expect(slider).to_have_value("50")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    expect(amount).to_have_value("17.5")
    until(lambda: (json_of(page) or {"edits": [{}]})["edits"][0].get("amount") == 17.5)
    assert slider.evaluate("e => e === document.activeElement")
    fill(page, "steer-0-amount", -107.7)
    expect(slider).to_have_value("-100")
    page.locator("#steer-0-amount input").fill("")  # nothing is no strength
    fill(page, "steer-0-when", 532)
    until(lambda: json_of(page)["edits"][0]["when"] == 532)
    assert json_of(page)["edits"][0]["amount"] == -107.7
    page.locator("#steer-0-when input").fill("")
    until(lambda: json_of(page)["edits"][0]["when"] is None)

    page.locator("#steer-0-op").get_by_label("multiply").check()
    expect(amount).to_have_value("2")
    asked.fill("349")
    asked.press("Enter")
    page.locator("#steer-add").click()
    expect(page.locator("#steer-1-title")).to_contain_text("349 sad")
    page.locator("#steer-1-op").get_by_label("ablate").check()
    expect(page.locator("#steer-1-slider")).to_have_count(0)
    page.locator("#steer-0-remove").click()
    expect(page.locator("#steer-0-title")).to_contain_text("349 sad")
    expect(page.locator("#steer-1-title")).to_have_count(0)
    until(lambda: [one["latent"] for one in json_of(page)["edits"]] == [349])


def test_what_is_wrong_is_said(page, new_page):
    cleared(page)
    page.locator("#steer-run").click()
    expect(page.get_by_text("add a latent to steer with first")).to_be_visible()
    asked = page.locator("#steer-asked input")
    asked.fill("to")
    asked.press("Enter")
    page.locator("#steer-add").click()
    expect(page.get_by_text("choose one from the list")).to_be_visible()
    asked.click()
    expect(page.get_by_role("option").first).to_contain_text(re.compile("#.*to"))
    asked.press("Escape")
    choose(page, "Sad")
    page.locator("#steer-prompt textarea").fill("")
    page.locator("#steer-run").click()
    expect(page.get_by_text("the prompt is empty")).to_be_visible()
    page.locator("#steer-prompt textarea").fill("word " * 400)
    page.locator("#steer-run").click()
    expect(page.get_by_text("the model holds 256")).to_be_visible()
    wrong = new_page(query="setup=nonsense")
    expect(wrong.get_by_text("this link does not hold a setup")).to_be_visible()


def test_at_390_pixels_the_panes_stack(new_page):
    narrow = new_page(size={"width": 390, "height": 844})
    choose(narrow, "Toys and dancing")
    boxes = [narrow.locator(f"#steer-{name}").bounding_box() for name in ("default", "steered")]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 390
