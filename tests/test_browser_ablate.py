"""The Ablate tab in a real browser: look, choose, ablate, undo, steer with it."""

import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

pytestmark = pytest.mark.browser
DOT = 13  # "… named Lily." of the first example


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Ablate").click()
    page.locator("#ablate-look").click()
    expect(page.locator("#ablate-tokens [data-index='17']")).to_have_class(re.compile(r"\bon\b"))
    return page


def test_a_person_ablates_a_latent_and_steers_with_it(tab):
    status, latents = tab.locator("#ablate-status"), tab.locator("#ablate-latents [data-index]")
    expect(status).to_contain_text("Token 17, “she”: 16 active latents, 16 true ablations in")
    expect(latents).to_have_count(16)
    tab.locator(f"#ablate-tokens [data-index='{DOT}']").click()
    expect(status).to_contain_text("Token 13, “.”")
    tab.locator("#ablate-latents [data-index='1']").click()
    expect(tab.locator("#ablate-sentence")).to_contain_text("Latent 196")
    expect(tab.locator("#ablate-sentence")).to_contain_text("of the 10,240 logits")
    expect(tab.locator("#ablate-promoted")).to_contain_text("·her")
    expect(tab.locator("#ablate-suppressed")).to_contain_text("·he")
    expect(tab.locator("#ablate-by-token [data-index]")).to_have_count(5)

    tab.locator("#ablate-run").click()
    ablated, default = (
        tab.locator(f"#ablate-{name} [data-index]") for name in ("ablated", "default")
    )
    expect(ablated).to_have_count(40)
    expect(default).to_have_count(40)
    assert (
        tab.locator("#ablate-ablated").inner_text() != tab.locator("#ablate-default").inner_text()
    )
    expect(tab.locator("#ablate-several")).to_contain_text("196")
    tab.locator("#ablate-undo").click()
    expect(ablated).to_have_count(0)
    expect(default).to_have_count(40)

    tab.locator("#ablate-steer").click()
    expect(tab.get_by_role("tab", name="Steer", selected=True)).to_be_visible()
    expect(tab.locator("body")).to_contain_text("196")


def test_attribution_ranks_by_a_tokens_logit(tab):
    tab.get_by_label("Rank latents by").click()
    tab.get_by_role("option", name="Attribution: logit of the next token").click()
    expect(tab.locator("#ablate-status")).to_contain_text("with one backward pass")
    target = tab.get_by_label("Next token")
    target.fill("was")
    target.press("Enter")
    expect(tab.locator("#ablate-status")).to_contain_text("of “was”")
    expect(tab.locator("#ablate-latents [data-index]")).to_have_count(16)


def test_what_cannot_be_done_is_said(tab):
    tab.get_by_label("Rank latents by").click()
    tab.get_by_role("option", name="True effect: change of the loss").click()
    expect(tab.get_by_text("nothing comes after the last token")).to_be_visible()
    tab.locator("#ablate-text textarea").fill("  ")
    tab.locator("#ablate-look").click()
    expect(tab.get_by_text("write at least one word")).to_be_visible()
    assert tab.locator("#ablate-tokens [data-index]").count() == 18  # what was there stays


def test_it_fits_a_phone(new_page):
    page = new_page(size={"width": 390, "height": 844}, dark=True)
    page.get_by_role("tab", name="Ablate").click()
    page.locator("#ablate-look").click()
    expect(page.locator("#ablate-latents [data-index]")).to_have_count(16)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
