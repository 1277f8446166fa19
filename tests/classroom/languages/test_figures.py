"""Figures speak the kernel's language where a font has its signs, and English where none has: never boxes."""

import os
import subprocess
import sys
import time

import matplotlib as mpl
import pytest
from matplotlib import font_manager
from matplotlib import pyplot as plt

from qlora_lab.classroom.languages import figures, texts
from qlora_lab.classroom.source import REPOSITORY

HAS_FONT = bool(figures.find_font())
needs_font = pytest.mark.skipif(not HAS_FONT, reason="no font with Chinese signs is installed")


@pytest.fixture
def chinese(monkeypatch):
    """A kernel that speaks Chinese; afterwards, matplotlib's settings are as they were."""
    monkeypatch.setenv("QLORA_LAB_LANGUAGE", "zh-TW")
    with mpl.rc_context():
        yield
    plt.close("all")


def drawn(figure) -> None:
    figure.draw_without_rendering()


def test_there_is_a_font_in_ci():
    if os.environ.get("QLORA_LAB_BROWSER") != "required":
        pytest.skip("only .ci/run installs what these tests need")
    assert HAS_FONT


@needs_font
def test_every_text_of_a_figure_is_translated_when_it_is_drawn(chinese):
    figures.speak()
    figures.speak()  # twice is once
    assert mpl.rcParams["figure.hooks"] == [figures.HOOK] and len(mpl.rcParams["font.family"]) == 2
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    left.barh(["measured", "your guess"], [1, 2], label="scales")
    left.set(title="density", xlabel="relative error", ylabel="nobody has translated this")
    left.annotate("yours, ringed: 3.126 bits, error 0.1069", (1, 1))
    left.annotate(" equal", (1, 1))
    left.set_title("scales", loc="left")
    left.set_title("codes", loc="right")
    left.legend(title="block size")
    right.plot([0.5, 1.5])
    right.set_yticks([0, 1], ["codes", "0.5"])
    figure.suptitle("double quantization")
    for _ in range(2):  # a figure may be drawn again
        drawn(figure)
        assert [label.get_text() for label in left.get_yticklabels()] == ["實測", "你的猜測"]
        assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
            "密度", "相對誤差", "nobody has translated this",
        )  # fmt: skip
        assert [text.get_text() for text in left.texts] == ["你的選擇（圓圈）：3.126 位元，誤差 0.1069", " 相等"]
        assert (left.get_title("left"), left.get_title("right")) == ("縮放因子", "代碼")
        legend = left.get_legend()
        assert (legend.get_title().get_text(), legend.get_texts()[0].get_text()) == ("區塊大小", "縮放因子")
        assert [label.get_text() for label in right.get_yticklabels()] == ["代碼", "0.5"]
        assert figure._suptitle.get_text() == "雙重量化"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("權重（10$^9$）", "權重（10⁹）"),
        ("10$^{-3}$ 秒", "10⁻³ 秒"),
        ("GB (10$^9$)", "GB (10$^9$)"),
        ("長 $x^2$", "長 $x^2$"),
    ],
)
def test_powers_need_no_formula(text, plain):
    """In formulas, matplotlib has no second font."""
    assert figures.in_plain_signs(text) == plain


@needs_font
def test_no_sign_is_missing_and_nothing_is_warned_of():
    """In a kernel of its own, since warnings of fonts are given once."""
    code = """
import logging, warnings
logging.basicConfig()
warnings.simplefilter("error")
from qlora_lab.classroom.plots import new_axes
ax = new_axes()
ax.set(title="relative error", xlabel="weights (GB, 10$^9$ bytes)")
ax.set_title("density", loc="left", fontweight="bold")
ax.figure.canvas.draw()
print(ax.get_title())
"""
    env = os.environ | {"QLORA_LAB_LANGUAGE": "zh-TW", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("相對誤差\n", "")


def test_without_a_font_labels_stay_english(chinese, monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    before = list(mpl.rcParams["font.family"])
    figures.speak()
    assert list(mpl.rcParams["figure.hooks"]) == [] and list(mpl.rcParams["font.family"]) == before


def test_an_english_kernel_is_left_alone(monkeypatch):
    monkeypatch.setenv("QLORA_LAB_LANGUAGE", "en")
    figures.speak()
    assert figures.HOOK not in mpl.rcParams["figure.hooks"]


@needs_font
def test_a_font_that_came_later_is_found(monkeypatch):
    kept = [font for font in font_manager.fontManager.ttflist if font.name not in figures.FONTS]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", kept)
    assert figures.known_font() == "" and figures.find_font() in figures.FONTS


@pytest.mark.parametrize(
    ("installed", "best"),
    [
        (["Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK HK", "Noto Sans CJK TC"], "Noto Sans CJK TC"),
        (["Microsoft YaHei", "Noto Sans CJK TC"], "Noto Sans CJK TC"),
        (["WenQuanYi Zen Hei", "Noto Sans CJK HK"], "Noto Sans CJK HK"),
        (["DejaVu Sans", "Noto Sans CJK JP"], "Noto Sans CJK JP"),
    ],
)
def test_a_traditional_face_is_taken_where_there_is_one(monkeypatch, installed, best):
    """Others draw the comma at the lower left."""
    entries = [font_manager.FontEntry(name=name) for name in installed]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    assert figures.find_font() == best


def test_a_traditional_font_that_came_later_is_taken(monkeypatch):
    """matplotlib knew another one already, which must not hide it."""
    entries = [font_manager.FontEntry(name="WenQuanYi Zen Hei", fname="/fonts/wqy-zenhei.ttc")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/fonts/NotoSansCJK.ttc"])
    monkeypatch.setattr(
        font_manager.fontManager,
        "addfont",
        lambda path: entries.append(font_manager.FontEntry(name="Noto Sans CJK TC", fname=path)),
    )
    assert figures.find_font() == "Noto Sans CJK TC"


@needs_font
def test_translating_costs_little(chinese):
    """Of a redraw's 100 ms a quarter of one; in seconds of this process, for others may keep it waiting."""
    figures.speak()
    figure, axes = plt.subplots(1, 2)
    for ax in axes:
        ax.barh(["measured", "your guess"], [1, 2], label="scales")
        ax.legend()
    drawn(figure)
    times = []
    for number in range(20):
        axes[0].set_title(f"yours, ringed: {number / 7:.3f} bits, error {number / 9:.4f}")  # never seen before
        start = time.process_time()
        figures.translate_figure(figure)
        times.append(time.process_time() - start)
    assert min(times) < 0.005 and axes[0].get_title().endswith("，誤差 2.1111")
    assert texts.translated.cache_info().hits > 0
