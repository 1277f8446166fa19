import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

from qlora_lab.classroom.lessons.dive_l.figures import plot_waterfall
from qlora_lab.classroom.plots import new_axes


def test_no_number_stands_on_a_bar_even_where_bars_are_cut_off():
    parts = {"weights": 25.0, "activations": 84.0, "logits": 3.0}
    ax = plot_waterfall(new_axes(), parts, {"predicted": 112.0, "measured": None}, "GB", limit=60)
    ax.figure.canvas.draw()
    bars = [bar.get_window_extent() for bar in ax.patches if bar.get_width() > 0]
    assert not any(bar.overlaps(text.get_window_extent()) for bar in bars for text in ax.texts)
    assert [text.get_text() for text in ax.texts] == ["25.00", "84.00 →", "3.00 →", "112.00 →", "not recorded"]
    plt.close("all")
