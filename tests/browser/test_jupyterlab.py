"""The course in a real browser: JupyterLab in headless Chromium, as a learner meets it.

With QLORA_LAB_SCREENSHOTS=1, whole notebooks are kept as pictures in `screenshots/` (git does not see it).
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
RECORD = json.loads((ROOT / "data" / "records" / "notebooks.json").read_text(encoding="utf-8"))["notebooks"]
LONG = {name for name, took in RECORD.items() if took["seconds"] > 60}  # they train: here they are opened as stored
# In `make test`: between them they have every kind of slider. nbval runs all notebooks, test_sliders.py moves all of
# their sliders, and test_website.py looks at all stored pages. In `make test-all` JupyterLab, too, shows all of them.
LIVE = {"02_memory_wall", "dive_c_small_differences", "dive_i_the_offset"}
LOOKS = [pytest.param(name, True, id=f"{name}-live") for name in sorted(LIVE)]
LOOKS += [pytest.param(name, False, id=f"{name}-stored", marks=pytest.mark.whole) for name in NAMES]
LOOKS += [
    pytest.param(name, True, id=f"{name}-live", marks=pytest.mark.whole) for name in NAMES if name not in LIVE | LONG
]
SHOTS = ROOT / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = {  # a notebook's cells are all in the page, on a light ground or a dark one
    "notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}

REQUIRED = os.environ.get("QLORA_LAB_BROWSER") == "required"  # as CI has it: it has Chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium here: apt install chromium"),
]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks."""
    home = tmp_path_factory.mktemp("home")
    settings = home / "settings" / "@jupyterlab"
    for name, values in SETTINGS.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    course = home / "qlora-lab"  # notebooks read ../data
    course.mkdir()
    notebooks = course / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns("source", "runs", ".*"))
    (course / "data").symlink_to(ROOT / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--no-browser", f"--port={port}", "--ServerApp.token=", "--ServerApp.password=", "--allow-root"]
    flags += [f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True"]
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "QLORA_LAB_PROGRESS": str(home / "p.json")}
    env |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "PYTHONPATH": str(ROOT)}
    env.pop("QLORA_LAB_STRICT", None)
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((home / "lab.log").read_text()[-3000:])
        yield address
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:  # its kernels are killed with it
            server.kill()


@pytest.fixture(scope="module")
def browser():
    playwright.expect.set_options(timeout=60_000)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Lab:
    """A notebook that is open in JupyterLab."""

    def __init__(self, browser, address: str, name: str, width: int = 1200, height: int = 2800):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(60_000)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")

    def command(self, name: str, **arguments) -> None:
        """Execute one of JupyterLab's commands, as its menus do, and wait for its end."""
        execute = "([name, given]) => window.jupyterapp.commands.execute(name, given).then(() => null)"
        self.page.evaluate(execute, [name, arguments])

    def change_theme(self, name: str) -> None:
        """And wait until JupyterLab took its splash screen away: one shown again before that is removed twice."""
        splash = self.page.locator("#jupyterlab-splash")
        splash.wait_for(state="detached")
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=name)
        splash.wait_for(state="detached")

    def cell(self, text: str):
        """The first code cell that holds `text`."""
        return self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".cm-content", has_text=text)).first

    def write(self, cell, source: str) -> None:
        """Replace a cell's source by hand, and run it."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.insert_text(source)
        self.run(cell)

    def run(self, cell) -> None:
        cell.locator(".cm-content").click()
        self.command("notebook:run-cell")

    def outputs(self, kind: str) -> list[str]:
        return self.page.locator(
            f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']"
        ).all_inner_texts()

    def narrow(self, width: int) -> None:
        """Make the window so wide, and wait until JupyterLab has laid its cells out in it."""
        self.page.set_viewport_size({"width": width, "height": 2800})
        fits = "width => document.querySelector('.jp-Notebook').getBoundingClientRect().right <= width"
        self.page.wait_for_function(fits, arg=width)

    def too_wide(self) -> list[str]:
        """Texts, tables and pictures that do not fit into the page: one would have to scroll sideways.

        A page that is still being laid out gets some time.
        """
        script = """() => [...document.querySelectorAll('.jp-RenderedMarkdown, .jp-RenderedHTML, .jp-RenderedImage')]
            .filter(e => e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 2)
            .map(e => e.textContent.trim().slice(0, 90) || 'a picture')"""
        for _ in range(20):
            if not (found := self.page.evaluate(script)):
                break
            self.page.wait_for_timeout(500)
        return found

    def shoot(self, name: str) -> None:
        """Screenshots of the whole notebook, page by page, if they are wanted: nothing is compared with them."""
        if not os.environ.get("QLORA_LAB_SCREENSHOTS"):
            return
        SHOTS.mkdir(exist_ok=True)
        panel = self.page.locator(".jp-WindowedPanel-outer").first
        panel.evaluate("e => e.scrollTo(0, 0)")
        for number in range(1, 40):
            self.page.wait_for_timeout(150)
            self.page.screenshot(path=str(SHOTS / f"{name}-{number:02d}.jpg"), type="jpeg", quality=85)
            if panel.evaluate(
                "e => { const t = e.scrollTop; e.scrollBy(0, e.clientHeight - 60); return e.scrollTop == t }"
            ):
                break

    def close(self) -> None:
        """Shut the kernel down too: a small machine holds few of them."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()


@pytest.fixture
def open_lab(course, browser):
    """Opens a notebook by its name, and closes it after the test."""
    opened = []

    def open_notebook(name: str) -> Lab:
        opened.append(Lab(browser, course, name))
        return opened[-1]

    yield open_notebook
    for lab in opened:
        lab.close()


@pytest.mark.parametrize("name, live", LOOKS)
def test_a_notebook_is_clean_in_every_look(open_lab, name, live):
    """As stored or after a run; then on a dark ground, and in a window as wide as half a screen."""
    lab = open_lab(name)
    if live:
        lab.command("notebook:run-all-cells")
        move_every_slider(lab, at_least=sliders_in(name))
    assert lab.outputs("stderr") == [] and lab.outputs("error") == []
    assert lab.too_wide() == []
    lab.shoot(f"{name}-light")
    lab.change_theme("JupyterLab Dark")
    lab.shoot(f"{name}-dark")
    lab.change_theme("JupyterLab Light")
    lab.command("application:toggle-left-area")
    lab.narrow(700)
    lab.page.wait_for_timeout(500)
    assert lab.too_wide() == []
    lab.shoot(f"{name}-narrow")
    assert lab.errors == []


def sliders_in(name: str) -> int:
    """How many sliders a notebook's code makes at least: a function may make several."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return sum("".join(cell["source"]).count("Slider(") for cell in cells if cell["cell_type"] == "code")


def move_every_slider(lab: Lab, at_least: int) -> None:
    """With each move, the figure under the sliders is another."""
    handles = lab.page.locator(".jp-OutputArea-output .widget-slider .noUi-handle")
    if at_least:
        playwright.expect(handles.nth(at_least - 1)).to_be_visible()
    for number in range(handles.count()):
        handle = handles.nth(number)
        figure = handle.locator("xpath=ancestor::*[contains(@class, 'widget-vbox')][1]//img")
        before = figure.get_attribute("src")
        handle.focus()
        at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
        lab.page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
        playwright.expect(figure).to_be_visible()
        playwright.expect(figure).not_to_have_attribute("src", before or "")


def test_an_exercise_is_solved_and_ticked(open_lab):
    lab = open_lab("00_start_here")
    exercise, check = lab.cell("def weight_bytes"), lab.cell("check_bytes_of_weights(weight_bytes)")
    lab.run(exercise)
    lab.run(check)
    said = check.locator(".jp-OutputArea-output")
    playwright.expect(said).to_have_text("· 0.1 not attempted yet: complete `weight_bytes`.")
    lab.write(exercise, "def weight_bytes(parameters, bits): return parameters * bits")
    lab.run(check)
    playwright.expect(said).to_contain_text("✗ 0.1")
    playwright.expect(said).to_contain_text("These are bits: eight make a byte.")
    lab.write(exercise, "def weight_bytes(parameters, bits): return parameters * bits / 8")
    lab.run(check)
    playwright.expect(said).to_contain_text("✓ 0.1")
    progress = lab.cell("progress()")
    lab.run(progress)
    playwright.expect(progress.locator(".jp-OutputArea-output").last).to_contain_text("1 of ")
    lab.page.screenshot(path=str(SHOTS / "an_exercise_solved.png"))
