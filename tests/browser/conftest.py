"""What several files of browser tests start."""

import pytest


@pytest.fixture(scope="module")
def browser():
    """Chromium, as a page from a file or a string wants it; JupyterLab's tests start their own."""
    from playwright.sync_api import sync_playwright

    from tests.browser.test_jupyterlab import CHROMIUM

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
