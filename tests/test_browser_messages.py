"""Messages quote what visitors send; on the page they stay text."""

import pytest

gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")

from saert.demos.errors import shown, warn  # noqa: E402

pytestmark = pytest.mark.browser
ELSEWHERE = "http://elsewhere.invalid"
EVIL = (
    f"<img src='{ELSEWHERE}/a.png'> ![image]({ELSEWHERE}/b.png) &lt;img src={ELSEWHERE}/c.png&gt;"
)


def refused():
    raise ValueError(f"refused {EVIL}")


def test_no_message_asks_another_host(browser):
    with gr.Blocks(analytics_enabled=False) as app:
        gr.Button("Fail", elem_id="fail").click(shown(refused), None, None)
        gr.Button("Warn", elem_id="warn").click(shown(lambda: warn(f"warned {EVIL}")), None, None)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    context = browser.new_context()
    try:
        asked = []
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        for name, word in (("#fail", "refused"), ("#warn", "warned")):
            page.locator(name).click()
            page.get_by_text(f"{word} ‹img").wait_for()
        page.wait_for_timeout(500)
        assert not [one for one in asked if one.startswith(ELSEWHERE)]
    finally:
        context.close()
        app.close()
