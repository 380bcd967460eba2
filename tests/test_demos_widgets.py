"""The app's pieces of HTML, without a browser: escaping, data to markup, contrast of colours."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import product

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos import markup as html  # noqa: E402
from saert.demos import theme, widgets  # noqa: E402

NASTY = ["<script>alert(1)</script>", "\"'", "${value}", "{{value}}", "&amp;", "`", "a\nb", "</p>"]
READABLE = 4.5  # WCAG 2.2, 1.4.3 (AA)


class Read(HTMLParser):
    """The elements and the text that a browser would find."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]


def test_a_line_of_heat_escapes_its_tokens():
    page = Read(html.heat(NASTY, [0.5] * len(NASTY), 1.0))
    assert {name for name, _ in page.found} == {"p", "span"}
    assert page.text == "".join(NASTY).replace("\n", "↵")


def test_heat_is_the_share_of_the_largest_and_has_a_sign():
    page = Read(html.heat(["a", "b", "c", "d", "e"], [1.0, -2.0, None, float("nan"), 9.0], 4.0, 1))
    one, two, three, four, five = page.all("span")
    assert one == {"class": "tk", "style": "--heat:0.250", "title": "1"}
    assert two == {"class": "tk peak minus", "style": "--heat:0.500", "title": "-2"}
    assert three == four == {"class": "tk"}
    assert five["style"] == "--heat:1.000"


def test_heat_wants_a_value_for_every_token():
    with pytest.raises(ValueError):
        html.heat(["a"], [1.0, 2.0], 1.0)
    assert "--heat:0.000" in html.heat(["a"], [0.0], 0.0)


def test_histogram_has_its_bars_and_says_what_it_shows():
    markup = html.histogram([1, 4, 0, 2], 0.0, 3.25, "tokens <by> 'activation'")
    tree = ElementTree.fromstring(markup)
    svg = tree.find("svg")
    heights = [float(rect.get("height")) for rect in svg.iter("rect")]
    assert [h / html.TALL for h in heights] == [0.25, 1.0, 0.0, 0.5]
    assert all(float(r.get("y")) + float(r.get("height")) == html.TALL for r in svg.iter("rect"))
    assert svg.get("aria-label") == "tokens <by> 'activation': 4 bins from 0 to 3.25"
    assert ElementTree.fromstring(html.histogram([], 0, 1, "none")) is not None
    assert "nan" not in html.histogram([0, 0], 0, 1, "flat")


def test_logits_are_rows_with_every_space_visible():
    page = Read(html.logits([(" cat", 2.0), ("<b>\n", -1.0)]))
    assert page.all("li") == [
        {"class": "plus", "style": "--share:1.000"},
        {"class": "minus", "style": "--share:0.500"},
    ]
    assert page.text == "·cat+2.00<b>↵-1.00"
    assert html.logits([]) == "<ol class='saert-logits'></ol>"


def test_control_characters_are_named():
    assert Read(html.spelled("\x02é\u00a0")).text == "U+0002éU+00A0"


@pytest.mark.parametrize(
    ("text", "seen"), [(" cat", " cat"), (" ", "·"), ("", ""), ("\n\n", "↵↵"), (" \n", "·↵")]
)
def test_text_reads_as_text_and_what_has_no_ink_is_visible(text, seen):
    assert Read(html.running(text)).text == seen


@pytest.mark.parametrize(
    ("parameters", "said"),
    [(812, "812"), (1_234_567, "1.23 million"), (2_600_000_000, "2.6 billion")],
)
def test_header_names_the_model_and_its_size(parameters, said):
    page = Read(html.header("me/<model>", parameters, "What & why."))
    assert f"me/<model> {said} parameters" in page.text
    assert "What & why." in page.text
    assert [attrs["id"] for attrs in page.all("button")] == ["theme-switch"]


def test_widgets_hand_data_to_the_browser_as_data():
    shown = widgets.tokens("Text", "text", choose=True, empty='say "more"</script>')
    shown.value = [{"text": text, "heat": 0.1} for text in NASTY]
    assert shown.html_template == "<span></span>"  # no value is ever part of a template
    assert "innerHTML" not in shown.js_on_load
    given = dict(re.findall(r"^const (\w+) = (.*);$", shown.js_on_load, re.M)[:4])
    assert {name: json.loads(value) for name, value in given.items()} == {
        "KIND": "tokens", "CHOOSE": True, "EMPTY": 'say "more"</script>', "AT_ONCE": False,
    }  # fmt: skip


def colours(block: str) -> dict[str, tuple[float, ...]]:
    sheet = theme.STYLE.read_text("utf-8")
    body = re.search(rf"^{re.escape(block)} \{{(.*?)\}}", sheet, re.S | re.M)
    assert body is not None
    return {
        name: tuple(int(code[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, code in re.findall(r"--saert-([\w-]+): #(\w{6});", body[1])
    }


def contrast(one, other):
    """WCAG 2.2's contrast ratio of two sRGB colours."""

    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_one_of_wcag():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    grey = 0x77 / 255
    assert contrast((grey,) * 3, (1, 1, 1)) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(
    ("block", "hue", "ink"),
    list(product([":root", ".dark"], ["plus", "minus"], ["text", "mark"])),
)
def test_text_is_readable_at_any_heat(block, hue, ink):
    of = colours(block)
    for step in range(101):
        heat = step / 100
        ground = tuple(
            h * heat + g * (1 - heat) for h, g in zip(of[hue], of["ground"], strict=True)
        )
        assert contrast(of[ink], ground) >= READABLE, f"heat {heat}"


@pytest.mark.parametrize(("block", "hue"), list(product([":root", ".dark"], ["plus", "minus"])))
def test_muted_text_is_readable_at_any_heat(block, hue):
    rule = re.search(r"min\(100%, var\(--heat, 0\) \* (\d+)%\)", theme.STYLE.read_text("utf-8"))
    of = colours(block)

    def mixed(one, other, share):
        return tuple(a * share + b * (1 - share) for a, b in zip(of[one], of[other], strict=True))

    for step in range(101):
        ink = mixed("text", "quiet", min(1.0, step / 100 * int(rule[1]) / 100))
        assert contrast(ink, mixed(hue, "ground", step / 100)) >= READABLE


@pytest.mark.parametrize("block", [":root", ".dark"])
def test_heat_and_its_sign_are_told_apart(block):
    of = colours(block)
    for hue in ("plus", "minus"):
        assert contrast(of[hue], of["ground"]) > 1.5
    # orange against blue: red and blue channels swap order, which every common colour blindness
    # that leaves two kinds of cones keeps apart
    assert of["plus"][0] > of["plus"][2] and of["minus"][0] < of["minus"][2]


@pytest.mark.parametrize("block", [":root", ".dark"])
def test_quiet_text_and_focus_stand_out(block):
    of = colours(block)
    assert contrast(of["quiet"], of["ground"]) >= READABLE
    assert contrast(of["focus"], of["ground"]) >= 3  # 1.4.11, parts of controls
    assert contrast(of["chosen"], of["ground"]) >= 3


def test_no_font_comes_from_elsewhere():
    made = theme.theme()
    assert made._stylesheets == []
    assert "http" not in theme.STYLE.read_text("utf-8")
    assert "http" not in theme.HEAD
