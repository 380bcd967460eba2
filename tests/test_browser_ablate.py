"""The Ablate tab in a real browser: look, choose, ablate, undo, steer with it."""

import re

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="needs playwright").expect

pytestmark = pytest.mark.browser
DOT = 13  # "… named Lily." of the first example


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Ablate").click()  # which looks by itself
    expect(page.locator("#ablate-tokens [data-index='17']")).to_have_class(re.compile(r"\bon\b"))
    expect(page.locator("#ablate-run")).to_be_enabled()
    return page


def test_a_person_ablates_a_latent_and_steers_with_it(tab):
    status, latents = tab.locator("#ablate-status"), tab.locator("#ablate-latents [data-index]")
    expect(status).to_contain_text("Token 17, “she”: 16 active latents, 16 true ablations in")
    expect(latents).to_have_count(16)
    expect(tab.locator("#ablate-by-token")).to_be_hidden()  # of one token: a figure says it
    tab.locator(f"#ablate-tokens [data-index='{DOT}']").click()
    expect(status).to_contain_text("Token 13, “.”")
    tab.locator("#ablate-latents [data-index='1']").click()
    expect(tab.locator("#ablate-sentence")).to_contain_text("Latent #196")
    expect(tab.locator("#ablate-sentence")).to_contain_text("of the 10,240 logits")
    expect(tab.locator("#ablate-promoted")).to_contain_text("·her")
    expect(tab.locator("#ablate-suppressed")).to_contain_text("·he")
    expect(tab.locator("#ablate-by-token [data-index]")).to_have_count(5)
    expect(tab.locator("#ablate-by-token .saert-legend")).to_contain_text("nats")

    tab.locator("#ablate-run").click()
    ablated, default = (
        tab.locator(f"#ablate-{name} [data-index]") for name in ("ablated", "default")
    )
    expect(ablated).to_have_count(40)
    expect(default).to_have_count(40)
    assert ablated.all_text_contents() != default.all_text_contents()
    expect(tab.locator("#ablate-ablated")).to_contain_text("The same with #196 ablated")
    expect(tab.locator("#ablate-stop")).to_be_disabled()
    tab.locator("#ablate-undo").click()
    expect(ablated).to_have_count(0)
    expect(default).to_have_count(40)

    tab.locator("#ablate-steer").click()
    expect(tab.get_by_role("tab", name="Steer", selected=True)).to_be_visible()
    expect(tab.locator("body")).to_contain_text("196")


def test_what_is_ablated_is_what_was_chosen_and_no_more(tab):
    tab.evaluate(
        """() => { document.querySelector("#ablate-latents [data-index='3']").click();
                   document.querySelector('#ablate-run').click(); }"""
    )  # faster than the server
    latents, title = tab.locator("#ablate-latents [data-index]"), tab.locator("#ablate-ablated")
    third, fourth = (latents.nth(i).locator("b").inner_text() for i in (2, 3))
    expect(title).to_contain_text(f"with {fourth} ablated")
    latents.nth(2).click()
    tab.locator("#ablate-run").click()
    expect(title).to_contain_text(f"with {third} ablated")  # alone: nobody added the fourth
    expect(tab.locator("#ablate-ablated [data-index]")).to_have_count(40)


def test_another_text_is_looked_at_before_it_is_ablated(tab):
    tab.locator("#ablate-text textarea").fill("The cat sat on the")
    expect(tab.locator("#ablate-status")).to_contain_text("The text has changed")
    tab.locator("#ablate-run").click()
    expect(tab.get_by_test_id("toast-body")).to_contain_text("press Look")
    assert tab.locator("#ablate-ablated [data-index]").count() == 0
    tab.locator("#ablate-look").click()
    expect(tab.locator("#ablate-tokens [data-index]")).to_have_count(6)
    expect(tab.locator("#ablate-status")).to_contain_text("Token 5, “the”")


def test_a_special_token_stands_back_and_says_why(tab):
    special = tab.locator("#ablate-tokens [data-index='0']")
    expect(special).to_have_class(re.compile(r"\bmuted\b"))
    special.click()
    expect(tab.locator("#ablate-status")).to_contain_text("is a special token")
    expect(tab.locator("#ablate-latents [data-index]")).to_have_count(16)


def test_attribution_ranks_by_a_tokens_logit(tab):
    tab.get_by_label("Rank latents by").click()
    tab.get_by_role("option", name="Attribution: logit of the next token").click()
    expect(tab.locator("#ablate-status")).to_contain_text("with one backward pass")
    target = tab.get_by_label("Next token")
    target.fill("was")
    target.press("Enter")
    expect(tab.locator("#ablate-status")).to_contain_text("of “was”")
    expect(tab.locator("#ablate-latents [data-index]")).to_have_count(16)


def test_losses_are_of_the_token_before_the_last(tab):
    tab.get_by_label("Rank latents by").click()
    tab.get_by_role("option", name="True effect: change of the loss").click()
    expect(tab.locator("#ablate-status")).to_contain_text("Token 16, “,”")
    tab.locator("#ablate-tokens [data-index='17']").click()
    expect(tab.get_by_text("othing comes after the last token")).to_be_visible()
    tab.locator("#ablate-text textarea").fill("  ")
    tab.locator("#ablate-look").click()
    expect(tab.get_by_text("rite at least one word")).to_be_visible()
    assert tab.locator("#ablate-tokens [data-index]").count() == 18  # what was there stays
    badge = tab.locator("[data-testid='status-tracker'] .error")
    assert not any(one.is_visible() for one in badge.all())  # the message says it


def test_it_fits_a_phone(new_page):
    page = new_page(size={"width": 390, "height": 844}, dark=True)
    page.get_by_role("tab", name="Ablate").click()
    expect(page.locator("#ablate-latents [data-index]")).to_have_count(16)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
