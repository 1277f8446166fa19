"""A page to print at the course's end: what was solved, on which days, and with which versions.

It has a line for a name, which is written by hand: none is asked for or kept.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_lab.classroom.judging import Exercise, Progress
from qlora_lab.classroom.languages.texts import translate
from qlora_lab.errors import UserError
from qlora_lab.evaluation.page import PAGE, STYLE

PACKAGES = ("qlora_lab", "torch", "transformers", "peft", "bitsandbytes")
NOBODY_WATCHED = "The checks of the notebooks found these answers right, on the learner's own machine; nobody watched."
OURS = """
.name { margin: 3rem 0 .2rem; border-bottom: 1px solid var(--ink); max-width: 24rem; height: 2rem; }
@media print { :root { color-scheme: light; } body { padding: 0; } section { break-inside: avoid; } }
"""


@dataclass(frozen=True, repr=False)
class Certificate:
    """days: the exercises that were solved, by id, and the day of each, such as "2026-11-30"."""

    exercises: tuple[Exercise, ...]
    days: Mapping[str, str]

    def __repr__(self) -> str:
        what = 'certificate().save("certificate.html") writes a page to open and to print.'
        return f"{translate(f'{self.progress().summary()} on the path.')} {translate(what)}"

    def progress(self) -> Progress:
        return Progress(self.exercises, frozenset(self.days))

    def save(self, path: str | Path) -> Path:
        """Write the page and return its path. Raises UserError for another ending than .html."""
        path = Path(path)
        if path.suffix != ".html":
            raise UserError(f"{path.name}: the certificate is a page for the browser, so its name ends in .html")
        path.write_text(self.page(), encoding="utf-8")
        return path

    def page(self) -> str:
        """The page as one text, which loads nothing from elsewhere."""
        progress = self.progress()
        path, dives = progress.parts()
        items = [(box, sentence, count) for box, sentence, count, _ in progress.rows() if box]
        done = f"{progress.summary()} on the path{self.between()}."
        sections = {
            "What I can do now": table(("", translate("I can"), translate("solved")), items),
            "Solved on the path": self.solved(path),
            "Solved in deep dives": self.solved(dives),
            "With": ", ".join(f"{name} {number}" for name, number in versions().items()),
        }
        return PAGE.format(
            title=translate("QLoRA Lab: what I have done"),
            style=STYLE + OURS,
            summary=(
                f"<div class='name'></div><p class='soft'>{translate('name')}</p><p>{translate(done)}</p>"
                f"<p class='soft'>{translate(NOBODY_WATCHED)}</p>"
            ),
            sections="\n".join(
                f"<section><h2>{translate(name)}</h2>{body}</section>" for name, body in sections.items()
            ),
        )

    def between(self) -> str:
        """When: ", all on DAY", or " from DAY to DAY"; empty if nothing is solved."""
        days = sorted(self.days[exercise.id] for exercise in self.exercises if exercise.id in self.days)
        if not days:
            return ""
        return f", all on {days[0]}" if days[0] == days[-1] else f" from {days[0]} to {days[-1]}"

    def solved(self, exercises: list[Exercise]) -> str:
        rows = [
            (exercise.id, translate(exercise.title), "●" * exercise.points, self.days[exercise.id])
            for exercise in exercises
            if exercise.id in self.days
        ]
        if not rows:
            return f"<p>{translate('none yet')}</p>"
        return table((translate("exercise"), "", translate("points"), translate("day")), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def cells(tag: str, texts: tuple[str, ...]) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def versions() -> dict[str, str]:
    """The versions of what the course is about; without those that are not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
