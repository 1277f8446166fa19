import gc
import io
import weakref

import matplotlib

matplotlib.use("agg")

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Bbox
from PIL import Image

from qlora_lab.classroom import plots, widgets
from qlora_lab.classroom.lessons.n02 import figures as n02
from qlora_lab.classroom.lessons.n05 import figures as n05
from qlora_lab.classroom.lessons.n07 import figures as n07
from qlora_lab.classroom.lessons.n12 import figures as n12
from qlora_lab.finetuning import StepRecord


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step, loss, 1e-3, 1.0, 700, 3.0)


@pytest.fixture(autouse=True)
def shell():
    """What a kernel provides: without it, `display` prints."""
    InteractiveShell.instance()
    yield
    InteractiveShell.clear_instance()


@pytest.fixture(autouse=True)
def no_figure_left_open():
    yield
    assert plt.get_fignums() == [], "each figure would be shown once more at the end of its cell"


def test_explore_redraws_with_the_sliders_value():
    drawn = []

    def draw(height):
        drawn.append(height)
        ax = plots.new_axes()
        ax.plot([0, 1], [0, height])
        return ax

    slider = ipywidgets.IntSlider(value=3, min=1, max=9)
    with capture_output() as shown:
        box = widgets.explore(draw, height=slider)
    assert drawn == [3]
    assert "image/png" in shown.outputs[0].data or "text/plain" in shown.outputs[0].data  # a static figure first
    assert slider in box.children
    slider.value = 7
    assert drawn == [3, 7]
    live = box.children[-1]
    assert bytes(live.value).startswith(b"\x89PNG") and live.layout.display != "none"


def bars(height: int):
    ax = plots.new_axes()
    ax.bar([0], [height])
    return ax


class Model:
    """Like a model that refers to itself: only the garbage collector frees it."""

    def __init__(self):
        self.myself = self


def test_a_range_that_cannot_be_drawn_is_an_error_when_the_build_runs_the_notebook(monkeypatch):
    drawn = []

    def draw(blocks, exact, name):
        drawn.append((blocks, exact, name))
        ax = plots.new_axes()
        ax.plot([0, 1], [0, 1 / (9 - blocks)])
        return ax

    def sliders(most):
        return {
            "blocks": ipywidgets.IntSlider(value=3, min=1, max=most),
            "exact": ipywidgets.Checkbox(value=False),
            "name": ipywidgets.Dropdown(options=[("one", 1), ("two", 2)]),
        }

    with capture_output():
        widgets.explore(draw, **sliders(9))  # learners do not wait for it
        assert drawn == [(3, False, 1)]
        monkeypatch.setenv("QLORA_LAB_TRY_SLIDERS", "1")
        widgets.explore(draw, **sliders(8))
        assert set(drawn) == {(3, False, 1), (1, False, 1), (8, False, 1), (3, True, 1), (3, False, 2), (8, True, 2)}
        with pytest.raises(ValueError, match="with blocks=9, exact=False, name=1: ZeroDivisionError: division"):
            widgets.explore(draw, **sliders(9))
    plt.close("all")


def test_explore_lets_models_be_freed_that_were_there_before():
    model = Model()
    freed, frozen = weakref.ref(model), gc.get_freeze_count()
    with capture_output():
        widgets.explore(bars, height=ipywidgets.IntSlider(value=3))
    del model
    gc.collect()
    assert freed() is None
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection_interrupts_a_redraw_and_the_collector_is_left_as_it_was(enabled, request):
    request.addfinalizer(gc.enable)
    seen = []

    def draw(height):
        seen.append(gc.isenabled())
        if height == 9:
            raise ZeroDivisionError
        return bars(height)

    slider = ipywidgets.IntSlider(value=3, max=9)
    if not enabled:
        gc.disable()
    with capture_output():
        widgets.explore(draw, height=slider)
    slider.value = 7
    assert seen == [enabled, False] and gc.isenabled() == enabled
    with pytest.raises(ZeroDivisionError):
        slider.value = 9
    assert gc.isenabled() == enabled
    plt.close("all")


def two_panels(height: float, top: float = 10, gid: str | None = None) -> Figure:
    figure, axes = plt.subplots(1, 2, layout="constrained")
    for ax in axes:
        ax.bar([0, 1], [1, height], label="a label")
        ax.set(ylim=(0, top), xlabel="x (units)", title=f"{height:g}")
        ax.legend().set_gid(gid)
    return figure


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


@pytest.mark.parametrize("gid", [None, "frame"])
def test_renderer_draws_what_matplotlib_draws(gid, monkeypatch):
    monkeypatch.setattr(widgets, "KEPT_FRAMES", 2)
    render = widgets.Renderer(two_panels(3, gid=gid))
    for height, top in [(3, 10), (7, 10), (7, 20), (3, 10), (3, 30), (3, 10)]:  # another limit is another frame
        figure = two_panels(height, top, gid)
        came = pixels(render(figure))
        assert len(render.frames) <= 2
        whole = two_panels(height, top, gid)
        whole.set_layout_engine("none")
        for ax, box in zip(whole.axes, render.boxes, strict=True):
            ax.set_position(box)
        whole.savefig(expected := io.BytesIO(), format="png", dpi=whole.dpi)
        difference = np.abs(came - pixels(expected.getvalue())[..., :3]).max(axis=2)
        assert (difference > 32).mean() < 0.001, (height, top)  # where content crosses an axis, which is now below it
        plt.close("all")
    figure = two_panels(3)
    other = pixels(render(two_panels(8)))
    assert (np.abs(other - pixels(render(figure))).max(axis=2) > 32).mean() > 0.01
    plt.close("all")


def test_live_loss_returns_all_records():
    with capture_output():
        records = widgets.live_loss(iter([record(1, 1.5), record(2, 0.4)]), total=2, guess=2)
    assert [r.loss for r in records] == [1.5, 0.4]


def test_interrupted_training_keeps_its_records():
    def steps():
        yield record(1, 1.5)
        raise KeyboardInterrupt

    with capture_output() as shown:
        records = widgets.live_loss(steps(), total=9)
    assert len(records) == 1
    assert "stopped after 1 of 9 steps" in shown.stdout


def test_tokens_are_escaped_and_told_apart_without_colour():
    page = widgets.show_tokens(["<|im_end|>", " a"], [True, False]).data
    assert "&lt;|im_end|&gt;" in page
    learned, read = page.split("</span>")[:2]
    assert "font-weight:bold" in learned and "border:1px solid;" in learned  # a colour's name may cost the border
    assert "bold" not in read and "·a" in read


def test_answers_are_escaped_and_json_may_wrap():
    page = widgets.show_answers([("<b>", '{"a":1,"b":2}')], ("order", "answer")).data
    assert "&lt;b&gt;" in page
    assert "{&quot;a&quot;:1,<wbr>&quot;b&quot;:2}" in page


def test_columns_of_marks_are_narrow():
    page = widgets.show_answers(zip(["an order of many words"], ["✓"], strict=True), ("order", "")).data
    assert [";width:8%" in head for head in page.split("</th>")[:2]] == [False, True]


def test_ask_box_asks_what_stands_in_the_line():
    asked = []
    box = widgets.ask_box(lambda text: asked.append(text) or {"before": "?", "after": "!"}, first="hello")
    line, button, _ = box.children
    button.click()
    line.value = "again"
    button.click()
    assert asked == ["hello", "again"]
    assert not button.disabled


def test_figures_have_labelled_axes_and_tell_nothing_by_colour_alone():
    ax = plots.plot_loss(plots.new_axes(), [1.5, 0.4, 0.05], steps=3, guess=2)
    assert ax.get_xlabel() == "optimizer step" and "nats" in ax.get_ylabel()
    assert ax.lines[0].get_marker() == "o" and ax.lines[-1].get_linestyle() == "--"
    plt.close("all")
    ax = plots.plot_shares(plots.new_axes(), {"test": {"measured": 0.9, "your guess": 0.5}}, "share")
    assert {bar.get_hatch() for bar in ax.patches} == {"", "//"}
    assert {text.get_text() for text in ax.texts} == {"90%", "50%"}
    plt.close("all")
    ax = plots.plot_times(plots.new_axes(), {"float32": 2.0, "bfloat16": 80.0}, guess={"bfloat16": 1.0})
    assert "ms" in ax.get_xlabel()
    plt.close("all")
    ax = plots.plot_weights(plots.new_axes(), {"4 bits": 3.5}, {"this machine": 25.0})
    assert "GB" in ax.get_xlabel()
    plt.close("all")


def marks_and_labels(ax) -> tuple[list[Bbox], list[Bbox]]:
    """Where the diamonds of guesses are, and the texts of a figure, in pixels."""
    ax.figure.canvas.draw()
    diamonds = [line for line in ax.lines if line.get_marker() == "D"]
    half = [line.get_markersize() / 2 * ax.figure.dpi / 72 for line in diamonds]
    points = [ax.transData.transform(line.get_xydata()) for line in diamonds]
    marks = [Bbox([at - size, at + size]) for size, each in zip(half, points, strict=True) for at in each]
    return marks, [text.get_window_extent() for text in ax.texts if text.get_text()]


@pytest.mark.parametrize("right", [1.03, 1.06, 1.1])
def test_no_good_guess_hides_the_number_at_its_bars_end(right):
    sizes = {"a": 100.0, "b": 60.0}
    guess = {name: right * size for name, size in sizes.items()}
    charts = [
        plots.plot_times(plots.new_axes(height=1.8), sizes, guess),
        n02.plot_memory(plots.new_axes(height=1.8), {name: {"weights": sizes[name]} for name in sizes}, (), guess),
        n05.plot_savings(plots.new_axes(height=2), sizes, guess),
        n07.plot_megabytes(plots.new_axes(height=2), sizes, "MB", guess),
        n12.plot_merges(plots.new_axes(height=2), sizes, {}, guess),
    ]
    for ax in charts:
        marks, labels = marks_and_labels(ax)
        assert len(marks) == 2 and len(labels) >= 2
        assert not any(mark.overlaps(label) for mark in marks for label in labels), (ax.get_xlabel(), right)
    plt.close("all")


def test_an_interval_beyond_the_limits_ends_in_a_whole_arrow_inside_them():
    ax = plots.plot_intervals(plots.new_axes(), {"a": (0, 9), "b": (0, 1)}, {"a": [], "b": []}, "points", (-2, 2))
    ax.figure.canvas.draw()
    arrows = {line.get_xdata()[0]: MarkerStyle(line.get_marker()) for line in ax.lines if len(line.get_xdata()) == 1}
    left, right = (arrows[edge].get_path().transformed(arrows[edge].get_transform()).vertices for edge in (-2, 2))
    assert left[:, 0].min() == 0 < left[:, 0].max() and right[:, 0].max() == 0 > right[:, 0].min()
    plt.close("all")
