"""Figures in the language of the kernel: their texts, translated when they are drawn, and a font that has its signs.

A kernel that speaks English is left alone. In another, `speak` asks matplotlib to call `prepare` for each figure that
pyplot makes (its setting "figure.hooks"), and puts an installed font behind the usual one in "font.family": matplotlib
takes from it what the first lacks. Where no such font is installed, labels stay English: boxes would say nothing.

On Colab and Debian `apt-get install fonts-noto-cjk` brings one; then the kernel is restarted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, Formatter, FuncFormatter

from qlora_lab.classroom.languages.texts import ENGLISH, language, translate

FORMULA = re.compile(r"\$[^$]+\$")
POWER = re.compile(r"\$\^\{?(-?\d+)\}?\$")
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
HOOK = f"{__name__}:prepare"
TRADITIONAL = (  # fonts that draw the signs as Taiwan and Hong Kong do, the best first; macOS, Windows, Linux
    *("PingFang TC", "Heiti TC", "Microsoft JhengHei", "Noto Sans CJK TC", "Noto Sans TC", "Source Han Sans TC"),
    *("PingFang HK", "Noto Sans CJK HK", "Noto Serif CJK TC", "AR PL UMing TW", "AR PL UKai TW", "PMingLiU"),
)
FONTS = (  # and those that have the signs, but draw them, and the comma, as Japan and the Mainland do
    *TRADITIONAL,
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "Arial Unicode MS"),
)
FILES = (  # of these, as installed
    *("noto*cjk*", "noto*tc*", "sourcehan*", "wqy*", "uming*", "ukai*", "mingliu*", "pingfang*", "msjh*", "*heiti*"),
)


def find_font() -> str:
    """The name of an installed font that has Chinese signs, a Traditional one if there is any; empty if there is none.

    matplotlib remembers which fonts there were when it was first imported; those that came later are looked for here.
    Of a collection (.ttc) matplotlib sees all faces from 3.11 on, and before only the first: Noto Sans CJK's is JP.
    """
    if (found := known_font()) in TRADITIONAL:
        return found
    for path in font_manager.findSystemFonts():
        if any(Path(path.lower()).match(pattern) for pattern in FILES):
            font_manager.fontManager.addfont(path)
    return known_font()


def known_font() -> str:
    """The best of FONTS that matplotlib knows; empty if it knows none."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in FONTS if name in known), "")


def complete_weights(name: str) -> None:
    """Let a font stand in for its normal and bold weight where it has none: matplotlib would warn at each label."""
    fonts = font_manager.fontManager.ttflist
    entries = [font for font in fonts if font.name == name]
    for word, weight in (("normal", 400), ("bold", 700)):
        if not any(font.weight in (word, weight) for font in entries):
            fonts.append(dataclasses.replace(entries[0], weight=weight))


def speak() -> None:
    """Let figures made from now on speak the kernel's language: `plots.py` calls this when it is imported."""
    if language() == ENGLISH or HOOK in mpl.rcParams["figure.hooks"]:
        return
    if font := find_font():
        complete_weights(font)
        mpl.rcParams["font.family"] = [*mpl.rcParams["font.family"], font]
        mpl.rcParams["figure.hooks"] = [*mpl.rcParams["figure.hooks"], HOOK]


def prepare(figure: Figure) -> None:
    """Have a figure's texts translated whenever it is drawn: only then do legends and ticks have theirs."""
    draw = figure.draw

    def draw_translated(renderer) -> None:
        translate_figure(figure)
        draw(renderer)

    figure.draw = draw_translated  # of this figure only


def translate_figure(figure: Figure) -> None:
    """Translate all texts of a figure: titles, labels, legends, notes, tables, and the names at ticks."""
    for text in texts_of(figure):
        english = text.get_text()
        words = english.strip()  # a space keeps a label off its bar
        said = english.replace(words, in_plain_signs(translate(words)))
        if said != english and not FORMULA.search(said):
            text.set_text(said)
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            translate_ticks(axis)


def in_plain_signs(text: str) -> str:
    """A text whose powers (`10$^9$`) are no formulas: what has formulas, matplotlib sets in fonts of its own."""
    return POWER.sub(lambda found: found[1].translate(RAISED), text) if not text.isascii() else text


def texts_of(figure: Figure) -> Iterator[Text]:
    """The texts of a figure that are there before it is drawn."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for name in ("_suptitle", "_supxlabel", "_supylabel"):
        if (text := getattr(figure, name, None)) is not None:
            yield text
    for ax in figure.axes:
        sides: Any = ax  # titles of set_title(loc=...) have no public names
        yield from (ax.title, sides._left_title, sides._right_title)
        yield from (ax.xaxis.label, ax.yaxis.label, *ax.texts)
        if legend := ax.get_legend():
            yield from (legend.get_title(), *legend.get_texts())
        for table in ax.tables:
            yield from (cell.get_text() for cell in table.get_celld().values())


class Translated(Formatter):
    """Ticks as another formatter has them, translated. seq: their names, for what compares figures' frames."""

    def __init__(self, formatter: Formatter):
        self.formatter = formatter
        self.seq = tuple(getattr(formatter, "seq", ()))

    def __call__(self, x: float, pos: int | None = None) -> str:
        return translate(self.formatter(x, pos))

    def format_ticks(self, values) -> list[str]:
        return [translate(text) for text in self.formatter.format_ticks(values)]

    def set_locs(self, locs) -> None:
        self.formatter.set_locs(locs)


def translate_ticks(axis: Axis) -> None:
    """Wrap the formatter of ticks that have names; those of numbers stay."""
    formatter = axis.get_major_formatter()
    if isinstance(formatter, (FixedFormatter, StrCategoryFormatter, FuncFormatter)):
        axis.set_major_formatter(Translated(formatter))
