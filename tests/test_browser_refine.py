"""The Refine tab in a real browser: refine a text, colour it, look at a token."""

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

pytestmark = pytest.mark.browser


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Refine").click()  # which refines by itself
    expect(page.locator("#refine-status")).to_contain_text("22 tokens refined")
    return page


def test_a_person_refines_a_text_and_looks_at_a_token(tab):
    summary = tab.locator("#refine-summary")
    for name in ("FVU", "error", "shrinkage", "L0", "loss added", "KL"):
        expect(summary).to_contain_text(name)
    expect(summary).to_contain_text("→")
    tokens = tab.locator("#refine-tokens [data-index]")
    expect(tokens).to_have_count(23)
    tokens.nth(5).click()
    expect(tab.locator("#refine-about")).to_contain_text("Token 5, “,”: 16 active latents")
    expect(tab.locator("#refine-latents [data-index]")).to_have_count(16)
    for name in ("model", "spliced", "refined"):
        expect(tab.locator(f"#refine-next-{name} [data-index]")).to_have_count(5)
        expect(tab.locator(f"#refine-next-{name}")).to_contain_text("·there")
    tokens.nth(0).click()
    expect(tab.locator("#refine-about")).to_contain_text("neither refined nor replaced")

    legend = tab.locator("#refine-tokens .saert-legend")
    expect(legend).not_to_contain_text("nats")
    before = tokens.nth(9).get_attribute("title")
    tab.get_by_label("Colour tokens by").click()
    tab.get_by_role("option", name="KL divergence by the splice, refined").click()
    expect(tokens.nth(9)).not_to_have_attribute("title", before)
    said = tokens.nth(9).get_attribute("title")
    assert "kl divergence" in said
    expect(legend).to_contain_text("nats")
    tokens.nth(9).hover()
    expect(tab.locator("#refine-tokens .saert-title")).to_have_text(said)


def test_an_empty_text_is_refused_and_another_sae_asks_again(tab):
    tab.locator("#refine-text textarea").fill("")
    expect(tab.locator("#refine-status")).to_contain_text("The text has changed")
    tab.locator("#refine-run").click()
    expect(tab.get_by_text("rite at least one word")).to_be_visible()
    tab.locator("#source input").click()
    tab.get_by_role("option", name="bundled:mlp_in.2").click()
    expect(tab.locator("#refine-status")).to_contain_text("Another sparse autoencoder")
    tab.locator("#refine-text textarea").fill("The cat sat.")
    tab.locator("#refine-run").click()
    expect(tab.locator("#refine-status")).to_contain_text("4 tokens refined")


def test_it_fits_a_phone(new_page):
    page = new_page(size={"width": 390, "height": 844}, dark=True)
    page.get_by_role("tab", name="Refine").click()
    expect(page.locator("#refine-latents [data-index]").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
