"""The website in a real browser, from its folder: light and dark, wide and narrow. Screenshots: `screenshots/`."""

from __future__ import annotations

import pytest

from tests.browser.test_jupyterlab import CHROMIUM, REQUIRED, SHOTS

pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")
pytest.importorskip("myst_nb", reason="no Sphinx here: pip install -c constraints.txt -e '.[site]'")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium here: apt install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
PAGES = (
    *("index", "notebooks/05_double_quantization", "docs/instructors", "api/memory"),
    *("zh-TW/index", "zh-TW/notebooks/05_double_quantization"),
)
# Texts whose contrast with the ground behind them is below WCAG's 4.5 (3 for large ones), with the contrast
PALE = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c; } return [255, 255, 255]; };
  const walker = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT), found = [];
  for (let node; node = walker.nextNode();) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.textContent.trim() || !e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (e.closest('.headerlink, .copybtn, svg, style')) continue;
    const [a, b] = [light(rgba(style.color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(1)}: ${node.textContent.trim().slice(0, 60)}`);
  }
  return found;
}"""


@pytest.fixture
def open_page(browser, website_folder):
    """Opens a page of the website, and notes what it asks for and complains of."""

    def opened(page: str, width: int = 1280, scheme: str = "light"):
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.asked, shown.complaints = [], []
        shown.on("request", lambda request: shown.asked.append(request.url))
        shown.on("console", lambda message: shown.complaints.append(message.text))
        shown.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.on("requestfailed", lambda request: shown.complaints.append(request.url))
        shown.goto((website_folder / f"{page}.html").as_uri())
        return shown

    return opened


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_is_readable(open_page, website_folder, page, scheme, width):
    shown = open_page(page, width, scheme)
    SHOTS.mkdir(exist_ok=True)
    shown.screenshot(path=SHOTS / f"website-{page.replace('/', '-')}-{scheme}-{width}.png", full_page=True)
    assert shown.complaints == []
    assert [url for url in shown.asked if not url.startswith((website_folder.as_uri(), "data:"))] == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate(PALE) == []
    shown.close()


def test_every_page_fits_a_telephone(open_page, website_folder):
    pages = [path.relative_to(website_folder).with_suffix("") for path in sorted(website_folder.rglob("*.html"))]
    assert {page.as_posix() for page in pages} > set(PAGES)
    for page in pages:
        shown = open_page(page.as_posix(), width=360, scheme="dark")
        assert shown.complaints == [], page
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360, page
        shown.close()


def search(shown, words: str, ended: str) -> list[str]:
    """The titles of what is found, once the page says that it has found all: it shows them one by one."""
    shown.fill("input[name=q]", words)
    shown.press("input[name=q]", "Enter")
    shown.locator("#search-results p.search-summary").filter(has_text=ended).wait_for()
    return shown.locator("ul.search li a").all_inner_texts()


def test_the_search_finds_a_lesson(open_page):
    shown = open_page("index")
    assert any("05 · " in title for title in search(shown, "quantized scales", "found"))
    assert shown.complaints == []
    shown.close()


def test_the_chinese_search_finds_a_lesson(open_page):
    shown = open_page("zh-TW/index")
    found = search(shown, "雙重量化", "找到")
    assert any("05 · " in title for title in found) and not any("Exporting" in title for title in found)
    assert shown.complaints == []
    shown.close()


def test_a_folded_cell_unfolds(open_page):
    shown = open_page("notebooks/05_double_quantization")
    imports = shown.get_by_text("from qlora_lab.classroom.checks import").first
    assert not imports.is_visible()
    shown.get_by_text("Imports", exact=True).first.click()
    assert imports.is_visible()
    shown.close()
