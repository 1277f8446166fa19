"""The notebooks' sliders, moved at the notebook's own sample size: every figure follows, and within 100 ms.

How soon is a property of the machine, too: only `make test-all` measures it.
"""

import contextlib
import itertools
import pathlib
import time
from collections.abc import Iterator

import ipywidgets
import matplotlib
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from qlora_lab.classroom import widgets
from qlora_lab.classroom.needs import names_of
from qlora_lab.classroom.source import read_cells

matplotlib.use("agg")

SOURCES = sorted((pathlib.Path(__file__).parent.parent / "notebooks" / "source").glob("*.py"))
WITH_SLIDERS = [source for source in SOURCES if "explore(" in source.read_text(encoding="utf-8")]
LIMIT_MS = 100
MOVES = 60  # the limit holds for 95 of 100 moves: three of these may take longer
ROUNDS = 3  # other work on the machine only ever adds time: what is too slow three times over is ours


def positions(slider: ipywidgets.Widget) -> list:
    """Some values that a learner can move it to, ends included."""
    if hasattr(slider, "options"):
        return [value for _, value in slider._options_full]
    if isinstance(slider, ipywidgets.Checkbox):
        return [True, False]
    steps = round((slider.max - slider.min) / slider.step)
    return [slider.min + type(slider.value)(step * slider.step) for step in sorted({0, *range(0, steps, 7), steps})]


def pictures_at_ends(slider: ipywidgets.Widget, live: ipywidgets.Image) -> set[bytes]:
    """The figures with a slider at its last value and at its first; it is put back."""
    before, pictures = slider.value, []
    for value in (positions(slider)[0], positions(slider)[-1], positions(slider)[0]):
        slider.value = value
        pictures.append(bytes(live.value))
    slider.value = before
    return set(pictures[1:])


def milliseconds_of_moves(sliders: list[ipywidgets.Widget], live: ipywidgets.Image, moves: int) -> list[float]:
    """Move one slider after the other until so many moves have been made."""
    times = []
    for turn in itertools.count():
        for slider in sliders:
            values = positions(slider)
            value = values[turn * 5 % len(values)]
            if value == slider.value:
                value = values[(turn * 5 + 1) % len(values)]
            start = time.perf_counter()
            slider.value = value
            times.append(1000 * (time.perf_counter() - start))
            assert bytes(live.value) != b"" and slider.value == value, (slider.description, value)
            if len(times) == moves:
                return times


def needed_cells(sources: list[str]) -> list[str]:
    """The cells that make sliders, and those before them that make what these need, directly or through others.

    A cell is needed if it gives a needed name a value, calls something on it (`model.eval()`), or puts something in it.
    So a training that no slider shows is left out.
    """
    kept, needed = [], set()
    for source in reversed(sources):
        read, bound, changed = names_of(source)
        if "explore(" in source or (bound | changed) & needed:
            kept.insert(0, source)
            needed = (needed - bound) | read
    return kept


def test_what_sliders_need():
    cells = [
        "import torch",
        "slow = x = 9",
        "x = torch.ones(3)",
        "y = 2",
        "y += 1",
        "x.mul_(2)",
        "slow = 1",
        "print(x)",
    ]
    cells += [
        "def f(x):\n    slow = x\n    return slow",
        "for slow in 1, 2:\n    print(slow)",
        "z = [f(y) for y in (x, y)]",
    ]
    cells += ["def draw(n):\n    return z, x", "check_x(x)", "explore(draw)", "later = 1"]
    assert needed_cells(cells) == [cells[i] for i in (0, 2, 3, 4, 5, 8, 10, 11, 13)]


def test_a_slider_that_the_figure_does_not_follow():
    def draw(followed, passed_over):
        ax = matplotlib.figure.Figure(figsize=(2, 1)).subplots()
        ax.bar(0, followed)
        return ax

    sliders = [ipywidgets.IntSlider(value=5, min=1, max=5) for _ in range(2)]
    with capture_output():
        box = widgets.explore(draw, followed=sliders[0], passed_over=sliders[1])
    assert [len(pictures_at_ends(slider, box.children[-1])) for slider in sliders] == [2, 1]
    assert [slider.value for slider in sliders] == [5, 5]


@contextlib.contextmanager
def boxes_of(source: pathlib.Path, monkeypatch) -> Iterator[list[ipywidgets.Widget]]:
    """What `explore` makes in a notebook: of its cells, those run that sliders need."""
    boxes = []
    explore = widgets.explore
    monkeypatch.setattr(widgets, "explore", lambda *args, **kwargs: boxes.append(explore(*args, **kwargs)) or boxes[-1])
    cells = read_cells(source.read_text(encoding="utf-8"))
    cells = [cell.source for cell in cells if cell.type == "code" and not cell.is_claims]
    names: dict = {"__name__": "__main__"}
    InteractiveShell.instance()
    try:
        with capture_output():
            for cell in needed_cells(cells):
                exec(compile(cell, source.name, "exec"), names)
            assert boxes
            yield boxes
    finally:
        InteractiveShell.clear_instance()
        matplotlib.pyplot.close("all")


@pytest.fixture(autouse=True)
def progress_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "progress.json"))


@pytest.mark.slow
@pytest.mark.parametrize("source", WITH_SLIDERS, ids=lambda source: source.stem)
def test_figures_follow(source, monkeypatch):
    with boxes_of(source, monkeypatch) as boxes:
        for *sliders, live in (box.children for box in boxes):
            for slider in sliders:
                assert len(pictures_at_ends(slider, live)) == 2, f"the figure does not follow {slider.description}"


@pytest.mark.slow
@pytest.mark.latency
@pytest.mark.parametrize("source", WITH_SLIDERS, ids=lambda source: source.stem)
def test_figures_follow_within_100_ms(source, monkeypatch):
    with boxes_of(source, monkeypatch) as boxes:
        for *sliders, live in (box.children for box in boxes):
            milliseconds_of_moves(sliders, live, 5)  # warm up
            measured = []  # p95 and median of each round
            while len(measured) < ROUNDS and not (measured and measured[-1][0] < LIMIT_MS):
                times = sorted(milliseconds_of_moves(sliders, live, MOVES))
                measured.append((times[round(0.95 * MOVES) - 1], times[MOVES // 2]))
            assert measured[-1][0] < LIMIT_MS, f"{[s.description for s in sliders]}: p95 and median {measured} ms"
