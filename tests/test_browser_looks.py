"""How the app looks and whom it serves: axe-core, keyboard, light and dark, widths, requests."""

from importlib.resources import files

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from browser import settled  # noqa: E402

from saert.demos import widgets  # noqa: E402

pytestmark = pytest.mark.browser
TABS = ("Steer", "Explore", "Ablate", "Refine")
NASTY = ["<script>alert(1)</script>", "\"'", "${value}", "{{value}}", "&amp;", "`\\", "a\nb", " \t"]
# What cannot be put right from outside gradio: (rule, part of the element's HTML), and why.
KNOWN: list[tuple[str, str]] = []


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()
    settled(page)


def violations(page):
    """What axe-core finds, without the exceptions of `KNOWN`."""
    source = pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python")
    page.evaluate((files(source.__name__) / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run().then(result => result.violations)")
    return [
        f"{rule['id']}: {node['html'][:300]} {node['failureSummary']}"
        for rule in found
        for node in rule["nodes"]
        if not any(rule["id"] == known and part in node["html"] for known, part in KNOWN)
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_and_no_tab_is_too_wide(new_page, dark, width):
    page = new_page(size={"width": width, "height": 844}, dark=dark)
    wrong = []
    for name in TABS:
        open_tab(page, name)
        wrong += [f"{name}: {one}" for one in violations(page)]
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
    assert not wrong, "\n".join(wrong)


def test_axe_finds_nothing_in_a_card_or_a_message(page):
    open_tab(page, "Explore")
    page.locator("#explore-tokens .tk").nth(6).click()
    page.locator("#explore-tokens .tk").nth(6).and_(page.locator("[aria-pressed=true]")).wait_for()
    page.locator("[role=tabpanel] .bar:visible").first.click()
    page.locator("#explore-card h3").or_(page.locator("#explore-title h3")).first.wait_for()
    assert not violations(page)
    open_tab(page, "Steer")
    page.locator("#steer-0-remove").click()
    page.locator("#steer-0-remove").wait_for(state="hidden")
    page.locator("#steer-run").click()  # with no latent to steer with
    page.get_by_test_id("toast-close").wait_for()
    assert not violations(page)


def test_the_page_says_what_it_is(page, app_url):
    assert page.title() == "saert"
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").all_inner_texts() == ["saert"]
    said = page.locator("meta[name=description]").get_attribute("content")
    assert said and "sparse autoencoder" in said
    assert page.request.get(f"{app_url}favicon.ico").headers["content-type"] == "image/svg+xml"


def test_light_and_dark_switch_at_once_and_are_remembered(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Switch to dark colours").click()
    page.wait_for_function(f"{ground} !== '{light}'")
    address = page.url.partition("?")[0]
    settled(page)
    page = page.context.new_page()  # to leave a page makes gradio log its aborted connection
    page.goto(address)
    page.get_by_role("button", name="Switch to light colours").click()
    page.wait_for_function(f"{ground} === '{light}'")


def test_tabs_and_controls_are_reached_by_keyboard(page):
    page.get_by_role("tab", name="Steer", exact=True).focus()
    for name in TABS:
        page.get_by_role("tab", name=name, exact=True).press("Enter")
        page.get_by_role("tab", name=name, exact=True, selected=True).wait_for()
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.role") == "tab":
            page.keyboard.press("Tab")
        inside = "document.activeElement.closest('[role=tabpanel]') !== null"
        assert page.evaluate(inside), f"Tab after {name} leaves it"
        ring = "parseFloat(getComputedStyle(document.activeElement).outlineWidth)"
        assert page.evaluate(ring) >= 2, f"the focus is not seen in {name}"


# the widgets by themselves, in a page without gradio

HARNESS = """([script, value, legend]) => {
    document.body.innerHTML = '<div id="w"></div><button id="after">after</button>';
    window.chosen = []; window.watched = [];
    window.props = {value, legend, label: 'Text'};
    const watch = (names, call) => watched.push(call);
    new Function('element', 'trigger', 'props', 'server', 'upload', 'watch', script)(
        document.getElementById('w'), (name, data) => chosen.push([name, data.index]),
        props, {}, null, watch);
}"""
UPDATE = """value => new Promise(done => {
    props.value = value; watched.forEach(call => call());
    requestAnimationFrame(() => requestAnimationFrame(done));
})"""


@pytest.fixture
def blank(browser):
    page = browser.new_page()
    yield page
    page.close()


def put(page, kind, value, choose=False, empty="", marks=False, legend=()):
    page.evaluate(HARNESS, [widgets.script(kind, choose, empty, marks), value, list(legend)])


def test_text_of_a_token_never_becomes_markup(blank):
    put(blank, "tokens", [{"text": text, "title": text} for text in NASTY])
    seen = blank.evaluate("[...document.querySelectorAll('.tk')].map(e => e.textContent)")
    assert seen == [*NASTY[:6], "a↵\nb", "·→\t"]
    assert blank.evaluate("document.querySelectorAll('#w script').length") == 0
    titles = blank.evaluate("[...document.querySelectorAll('.tk')].map(e => e.title)")
    assert titles == NASTY
    put(blank, "bars", [{"name": text, "label": text, "value": text} for text in NASTY])
    assert blank.locator(".bar b").all_text_contents() == NASTY
    put(blank, "figures", [{"name": text, "value": text, "note": text} for text in NASTY])
    assert blank.locator(".figure small").all_text_contents() == NASTY


def test_a_strip_is_one_stop_for_tab_and_arrows_move_in_it(blank):
    put(blank, "tokens", [{"text": f" {i}", "selected": i == 2} for i in range(9)], choose=True)
    group = blank.get_by_role("group", name="Text")
    assert group.get_by_role("button", pressed=True).all_text_contents() == [" 2"]
    for key in ("Tab", "ArrowRight", "Enter", "End", "Space", "ArrowRight", "Home", "Enter"):
        blank.keyboard.press(key)
    assert blank.evaluate("chosen") == [["select", 3], ["select", 8], ["select", 0]]
    blank.keyboard.press("Tab")
    assert blank.evaluate("document.activeElement.id") == "after"


def test_numbers_of_a_strip_that_nobody_can_choose_from_are_read_without_a_mouse(blank):
    items = [{"text": f" {i}", "title": f"number {i}", "heat": 0.1} for i in range(4)]
    put(blank, "tokens", items, legend=("", "4 nats"))
    line = blank.locator(".saert-title")
    assert line.inner_text() == "Point at a token for its numbers."
    for key, said in (("Tab", "number 0"), ("ArrowRight", "number 1"), ("End", "number 3")):
        blank.keyboard.press(key)
        assert line.inner_text() == said
    blank.keyboard.press("Enter")
    assert blank.evaluate("chosen") == []
    blank.locator(".tk").nth(2).hover()
    assert line.inner_text() == "number 2"
    blank.keyboard.press("Tab")
    assert blank.evaluate("document.activeElement.id") == "after"
    assert blank.locator(".saert-legend span").all_inner_texts() == ["0", "4 nats"]
    blank.evaluate(UPDATE, [{"text": "plain"}])
    assert line.is_hidden() and blank.locator(".saert-legend").is_hidden()
    assert blank.locator(".tk").get_attribute("tabindex") is None


def test_what_is_chosen_is_marked_before_the_server_answers(blank):
    put(blank, "bars", [{"name": str(i), "selected": i == 0} for i in range(3)], True, marks=True)
    blank.locator("button.bar").nth(2).click()
    assert blank.evaluate("props.value.map(one => one.selected)") == [False, False, True]
    assert blank.locator("button.bar.on").all_text_contents() == ["2  "]
    assert blank.evaluate("chosen") == [["select", 2]]


def test_bars_are_buttons(blank):
    put(blank, "bars", [{"name": str(i), "share": 0.5} for i in range(3)], choose=True)
    for key in ("Tab", "ArrowDown", "Enter"):
        blank.keyboard.press(key)
    blank.locator("button.bar").last.click()
    assert blank.evaluate("chosen") == [["select", 1], ["select", 2]]


def test_an_update_keeps_the_focus_and_the_elements(blank):
    items = [{"text": f" {i}", "heat": 0.1 * i} for i in range(5)]
    put(blank, "tokens", items, choose=True)
    blank.locator(".tk").nth(3).focus()
    blank.evaluate("window.before = document.activeElement")
    items[3] = {"text": " new", "heat": -0.5, "title": "less likely"}
    blank.evaluate(UPDATE, [*items, {"text": " more"}])
    assert blank.evaluate("document.activeElement === before && before.isConnected")
    assert blank.locator(".tk").all_text_contents() == [" 0", " 1", " 2", " new", " 4", " more"]
    assert blank.locator(".tk.minus").get_attribute("title") == "less likely"
    blank.evaluate(UPDATE, [{"text": "one"}])
    assert blank.locator(".tk").count() == 1
    assert blank.locator(".tk[tabindex='0']").count() == 1


def test_nothing_yet_is_said(blank):
    put(blank, "tokens", [], empty="nothing <yet>")
    assert blank.locator("#w").inner_text() == "nothing <yet>"
    blank.evaluate(UPDATE, [{"text": "a"}])
    assert blank.locator("#w").inner_text() == "a"
    blank.evaluate(UPDATE, [])
    assert blank.locator("#w").inner_text() == "nothing <yet>"


def test_two_strips_keep_up_with_sixty_tokens_a_second(blank):
    put(blank, "tokens", [])
    spent = blank.evaluate(
        """() => { const start = performance.now(); let items = [];
            for (let i = 0; i < 2 * 300; i++) {
                items = [...items, {text: ' word', heat: Math.sin(i), title: 'a title'}];
                if (items.length > 300) items = items.slice(0, 1);
                props.value = items; watched.forEach(call => call());
            }
            return performance.now() - start; }"""
    )
    assert spent / 600 < 1000 / 60 / 2  # milliseconds per update
