"""A run's page in a real browser: light and dark, wide and narrow. Screenshots are kept in `screenshots/`."""

from __future__ import annotations

import pytest

from qlora_lab.evaluation.page import page
from tests.browser.test_jupyterlab import CHROMIUM, REQUIRED, SHOTS
from tests.evaluation.test_page import EVIL, REPORT, row

pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium here: apt install chromium"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_readable_and_nothing_in_it_runs(browser, tmp_path, scheme, width):
    rows = [row(False, True), row(True, False, EVIL), row(False, True, "longword" * 60)]
    rows[1].update(asked=[{"role": "user", "content": EVIL}], expected=EVIL)
    file = tmp_path / "report.html"
    file.write_text(page({**REPORT, "model": EVIL}, {"data": "x" * 300}, rows), encoding="utf-8")
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, complaints = [], []
    shown.on("request", lambda request: asked.append(request.url))
    shown.on("console", lambda message: complaints.append(message.text))
    shown.goto(file.as_uri())
    SHOTS.mkdir(exist_ok=True)
    shown.screenshot(path=SHOTS / f"report-{scheme}-{width}.png", full_page=True)
    assert shown.title().startswith("<script>")  # as it was written: nothing has changed it
    assert asked == [file.as_uri()] and complaints == []
    assert (
        shown.evaluate("document.documentElement.scrollWidth") <= width
    )  # only curve and tables scroll, in themselves
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (scheme == "light")
    line = shown.locator("figure svg path[style*='--blue']").first
    assert shown.evaluate("line => getComputedStyle(line).stroke", line.element_handle()).startswith("rgb(")
    tops = [box.bounding_box()["y"] for box in shown.locator("article").first.locator("pre").all()]
    assert (len(set(tops)) == 1) is (width == 1280)  # side by side where there is room
    shown.get_by_label("only those that are wrong").check()
    assert shown.locator("article:visible").count() == 1
    shown.close()
