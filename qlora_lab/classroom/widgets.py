"""Interactive parts and tables of the notebooks: thin ipywidgets over pure functions, and a few lines of HTML.

A widget is always shown together with a first static figure, so that a page without a kernel shows something too.
"""

import contextlib
import gc
import html
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image

from qlora_lab import colab
from qlora_lab.classroom.languages.texts import translate
from qlora_lab.classroom.plots import new_axes, plot_loss


class Slider(Protocol):
    """What `explore` needs of a widget: ipywidgets' sliders, drop-down lists and check boxes have it."""

    value: Any
    description: str
    style: Any
    layout: Any

    def observe(self, handler: Callable, names: Any = ...) -> None: ...


def explore(draw: Callable[..., Axes], **sliders: Slider) -> "ipywidgets.Widget | Instead":
    """Sliders above a figure that follows them. `draw` takes their values by name and returns Axes.

    The first figure is a plain output of the cell; the first move replaces it by the live one. A redraw costs
    `draw` and some 40 ms as long as limits, ticks and labels of the axes stay the same, twice as much when they change.
    Where sliders do not show, the call that draws it stands below the first figure.
    """
    first = DisplayHandle()
    figure = draw(**{name: slider.value for name, slider in sliders.items()}).figure.figure
    first.display(figure)
    render = Renderer(figure)
    plt.close("all")
    if os.environ.get("QLORA_LAB_TRY_SLIDERS"):
        try_ends(draw, sliders)
    if not colab.shows_widgets():
        return call_of(draw, sliders)
    live = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none", max_width="100%"))

    @without_collections()
    def redraw(_change) -> None:
        figure = draw(**{name: slider.value for name, slider in sliders.items()}).figure.figure
        live.value = render(figure)
        plt.close(figure)
        if live.layout.display == "none":
            live.layout.display = "inline"
            first.update(HTML(""))

    for slider in sliders.values():
        slider.style.description_width, slider.layout.width = "initial", "60%"
        slider.description = translate(slider.description)
        slider.observe(redraw, names="value")
    return Panel([*sliders.values(), live])


def try_ends(draw: Callable[..., Axes], sliders: dict[str, Slider]) -> None:
    """Draw with each slider at both of its ends, and with all there: `classroom.build` has this done when it runs.

    Raises ValueError, with the sliders' values, if `draw` raises.
    """
    begun = {name: slider.value for name, slider in sliders.items()}
    ends = {name: ends_of(slider) for name, slider in sliders.items()}
    places = [begun | {name: end} for name in sliders for end in ends[name]]
    places += [{name: both[side] for name, both in ends.items()} for side in (0, 1)]
    for place in places:
        try:
            plt.close(draw(**place).figure.figure)
        except Exception as error:  # whatever an author's function raises
            moved = ", ".join(f"{name}={value!r}" for name, value in place.items())
            raise ValueError(f"the figure cannot be drawn with {moved}: {type(error).__name__}: {error}") from error


def ends_of(slider: Any) -> tuple:
    """The first and the last value that a slider, a drop-down list or a check box can have."""
    if hasattr(slider, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in slider.options]
        return values[0], values[-1]
    return (slider.min, slider.max) if hasattr(slider, "max") else (False, True)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Switch the garbage collector off: going through all that a notebook has loaded takes longer than a redraw.

    It runs right afterwards, when the figure is young garbage, and then need not go through everything.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Instead:
    """A text in the place of widgets that do not show."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def call_of(draw: Callable, sliders: dict[str, Slider]) -> Instead:
    """In the place of sliders: the call that draws their figure, and what it can be given."""
    given = ", ".join(f"{name}={slider.value!r}" for name, slider in sliders.items())
    choices = "; ".join(f"{name} {choices_of(slider)}" for name, slider in sliders.items())
    call = f"{getattr(draw, '__name__', 'draw')}({given})"
    text = translate("Sliders do not show here. Run this in a new cell, with other values:")
    return Instead(f"{text}\n\n    {call}\n\n{choices}")


def choices_of(slider: Any) -> str:
    """The values that a slider, a drop-down list or a check box can have, in words."""
    if hasattr(slider, "options"):
        values = [option[1] if isinstance(option, tuple) else option for option in slider.options]
        return "is one of " + ", ".join(map(repr, values))
    return f"is from {slider.min:g} to {slider.max:g}" if hasattr(slider, "max") else "is True or False"


class Panel(ipywidgets.VBox):
    """Widgets in a column, or a text where no kernel has made them: on GitHub, or before the cell is run."""

    def __repr__(self) -> str:
        return translate("(Run this cell: here is something to move.)")


KEPT_FRAMES = 6  # about a megabyte each
RUNS = 3  # zlib's Z_RLE: looks for runs of equal bytes only, quick on a figure's plain ground


class Renderer:
    """Figure -> PNG bytes, for figures that differ from the first only in their data.

    Two thirds of the time that matplotlib needs go into tick labels. So the frame (axes, ticks, labels, and a legend
    whose gid is "frame") is drawn once and kept, and later figures with the same frame are drawn on top of it. The last
    few frames are kept. The layout is the first figure's.
    """

    def __init__(self, figure: Figure):
        figure.draw_without_rendering()  # computes the layout
        self.boxes = [ax.get_position() for ax in figure.axes]
        self.frames: dict[tuple, np.ndarray] = {}

    def __call__(self, figure: Figure) -> bytes:
        figure.set_layout_engine("none")
        for ax, box in zip(figure.axes, self.boxes, strict=True):
            ax.set_position(box)
        canvas = FigureCanvasAgg(figure)
        frames = [part for ax in figure.axes for part in (ax.patch, ax.xaxis, ax.yaxis, *ax.spines.values())]
        frames += [legend for ax in figure.axes if (legend := framed_legend(ax))]
        content = [
            part for ax in figure.axes for part in ax.get_children() if part not in frames and part.get_visible()
        ]
        key = tuple(frame_of(ax) for ax in figure.axes)
        if key not in self.frames:
            for part in content:
                part.set_visible(False)
            canvas.draw()
            if len(self.frames) == KEPT_FRAMES:
                del self.frames[next(iter(self.frames))]  # the oldest
            self.frames[key] = np.array(canvas.buffer_rgba())
            for part in content:
                part.set_visible(True)
        for part in [figure.patch, *frames]:
            part.set_visible(False)
        canvas.draw()  # on a transparent ground
        picture = Image.fromarray(self.frames[key])
        picture.alpha_composite(Image.fromarray(np.asarray(canvas.buffer_rgba())))
        png = io.BytesIO()
        picture.convert("RGB").save(png, "png", compress_level=1, compress_type=RUNS)
        return png.getvalue()


def frame_of(ax: Axes) -> tuple:
    """What the look of the axes' frame depends on: a key for kept frames."""
    labels = ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale(), ax.get_xlim(), ax.get_ylim()
    ticks = [
        (tuple(axis.get_majorticklocs()), tuple(getattr(axis.get_major_formatter(), "seq", ())))
        for axis in (ax.xaxis, ax.yaxis)
    ]
    legend = framed_legend(ax)
    entries = [text.get_text() for text in legend.get_texts()] if legend else []
    return (*labels, *ticks, *entries)


def framed_legend(ax: Axes) -> Legend | None:
    """The legend, if it belongs to the frame."""
    legend = ax.get_legend()
    return legend if legend and legend.get_gid() == "frame" else None


def live_loss(steps: Iterable, total: int, guess: int | None = None) -> list:
    """Run a training (an iterator of StepRecords) to its end and draw its loss as it falls; return the records.

    Interrupting the kernel (the black square) ends the training early: the model keeps what it has learned.
    """
    records: list = []
    ax = new_axes()
    handle = DisplayHandle()
    handle.display(ax.figure)
    try:
        for record in steps:
            records.append(record)
            ax.clear()
            plot_loss(ax, [r.loss for r in records], total, guess)
            handle.update(ax.figure)
    except KeyboardInterrupt:
        said = f"stopped after {len(records)} of {total} steps; the adapter holds what was learned so far"
        print(translate(said))
    finally:
        plt.close(ax.figure.figure)
    return records


def show_tokens(pieces: list[str], learned: list[bool]) -> HTML:
    """A sample token by token: learned tokens are framed and bold, those that are only read plain and grey."""
    spans = []
    for piece, is_learned in zip(pieces, learned, strict=True):
        text = html.escape(piece).replace("\n", "⏎<br>").replace(" ", "·")
        # no colour for the border: it is the text's, and JupyterLab drops "currentColor" with the whole border
        style = "border:1px solid;font-weight:bold" if is_learned else "opacity:0.6"
        spans.append(f'<span style="{style};border-radius:3px;padding:0 1px;margin:1px">{text}</span>')
    return HTML(f'<div style="font-family:monospace;line-height:1.9">{"<wbr>".join(spans)}</div>')


def show_answers(rows: Iterable[tuple[str, ...]], columns: tuple[str, ...]) -> HTML:
    """A table of texts with left-aligned, wrapped cells. Columns of short texts are narrow."""
    rows, columns = list(rows), tuple(map(translate, columns))
    style = "text-align:left;vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere"

    def heading(i: int) -> str:
        longest = max(len(text) for text in (columns[i], *(row[i] for row in rows)))
        width = f";width:{8 if longest <= 3 else 15}%" if longest <= 10 else ""
        return f'<th style="{style}{width}">{html.escape(columns[i])}</th>'

    def cell(text: str) -> str:
        breakable = html.escape(text).replace(",&quot;", ",<wbr>&quot;")  # JSON without spaces
        return f'<td style="{style}">{breakable}</td>'

    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    head = "".join(map(heading, range(len(columns))))
    return HTML(f'<table style="width:100%"><tr>{head}</tr>{body}</table>')


def ask_box(answer: Callable[[str], dict[str, str]], first: str) -> "ipywidgets.Widget | Instead":
    """A text field for a question; below it, the answers of several models. answer: question -> answers by model."""
    if not colab.shows_widgets():
        name = getattr(answer, "__name__", "answer")
        text = translate("Text fields do not show here. Ask in a new cell:")
        return Instead(f"{text}\n\n    {name}({first!r})")
    line = ipywidgets.Text(value=first, layout=ipywidgets.Layout(width="95%"))
    asking = translate("Ask")
    button = ipywidgets.Button(description=asking, button_style="primary")
    output = ipywidgets.Output()

    def ask(_=None) -> None:
        button.description, button.disabled = "…", True
        try:
            answers = answer(line.value)
            with output:
                output.clear_output(wait=True)
                display(show_answers(list(answers.items()), ("model", "answer")))
        finally:
            button.description, button.disabled = asking, False

    button.on_click(ask)
    return Panel([line, button, output])
