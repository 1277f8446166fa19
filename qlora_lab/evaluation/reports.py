"""The report that `train_qlora` writes of a run, in a few lines for people; and several reports side by side."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Mapping

from qlora_lab.errors import UserError

SCORES = {
    "exact_match": "exact match",
    "normalized_match": "normalized match",
    "f1": "token F1",
    "json": "JSON fields",
}
MEANS = ("f1", "json")  # of answers that may be right in part
SCORE_COLUMNS = ("before", "after", "dullest guess")  # of `score_lines`; a report of an older version lacks the last
DULLEST = "dullest guess: one and the same answer to all, the reference that scores most"
ANSWERED, READ = ("test", "shifted"), ("validation", "prose")  # scored by exact match, by perplexity


def read_report(run: pathlib.Path) -> dict:
    """Read the report of an earlier run, for `side_by_side` to show.

    Raises:
        UserError: there is no report, or none that can be shown.
    """
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        side_by_side(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run} holds no finished run to show beside this one: report.json cannot be read") from error
    return report


def describe(report: dict) -> str:
    """The report in a few lines."""
    lines = [f"{report['model']}, {report['method']}: {report['steps']} steps on {report['device']}"]
    if report["interrupted"]:
        lines.append("stopped early; the adapter holds what was learned so far")
    if report.get("out_of_patience"):
        lines.append("stopped early: the validation loss no longer fell")
    if report.get("adapter_step", report["steps"]) != report["steps"]:
        lines.append(f"the adapter is that of step {report['adapter_step']}, whose validation loss was the lowest")
    scores = score_lines(report)
    width = max([24, *(len(label) + 1 for label, *_ in scores)])
    if report["before"]["perplexity"]:
        head = f"{'':<{width}}{'before':>16}{'after':>16}"
        lines.append(head + f"{'dullest guess':>16}" if report.get("dullest_guess") else head)
    lines += [f"{label:<{width}}" + "".join(f"{value:>16}" for value in values) for label, *values in scores]
    losses = report["losses"]
    lines += [f"{'loss':<{width}}{losses[0]:>16.4f}{losses[-1]:>16.4f}"] if losses else []
    if validated := report.get("validation_losses", []):
        measured = [f"{loss:.4f} at step {step:,}" for step, loss in (validated[0], validated[-1])]
        lines += [
            f"{'validation loss':<{width - 8}}{', '.join(dict.fromkeys(measured)):>40}"
        ]  # never before the first step
    lines += [
        f"{'tokens per second':<{width}}{report['tokens_per_second']:>32.0f}",
        f"{'training time':<{width}}{report['train_seconds']:>30.0f} s",
        f"{'peak memory':<{width}}{report['peak_memory_bytes'] / 1e9:>29.2f} GB",
        f"{'trainable parameters':<{width}}{report['trainable_parameters']:>32,}",
        f"adapter: {report['adapter']}",
        *([DULLEST] if report.get("dullest_guess") else []),
    ]
    return "\n".join(lines)


def score_lines(report: Mapping) -> list[tuple[str, ...]]:
    """What was judged, each with its values before and after training as text; "-" for what was not judged after.

    Behind them stands what the dullest guess scores, if the report has it: see `Judge.dullest`. A share comes with
    its count, "33% (1 of 3)"; a mean over answers, such as token F1, with their number.
    """
    before, after, judged = report["before"], report["after"], report.get("judged", {})
    dullest = report.get("dullest_guess", {})
    more = [key for key in before if key not in ("exact_match", "perplexity", "json_fields")]
    lines = []
    for key in ("exact_match", *more, "perplexity"):
        then = after.get(key, {})
        for split in [split for split in (READ if key == "perplexity" else ANSWERED) if split in before[key]]:
            of = "{:.3f}".format if key == "perplexity" else _share_of(judged.get(split), key not in MEANS)
            values = before[key][split], then.get(split), dullest.get(key, {}).get(split)
            lines.append((f"{SCORES.get(key, key)}, {split}", of, values))
        for split, shares in before.get("json_fields", {}).items() if key == "json" else ():
            others = [moment.get("json_fields", {}).get(split, {}) for moment in (after, dullest)]
            for name, value in shares.items():
                lines.append((f"  {name}, {split}", share, (value, *(other.get(name) for other in others))))
    columns = 3 if dullest else 2
    return [(label, *("-" if one is None else of(one) for one in values[:columns])) for label, of, values in lines]


def _share_of(answers: int | None, whole: bool) -> Callable[[float], str]:
    return functools.partial(share, answers=answers, whole=whole)


def share(value: float, answers: int | None = None, whole: bool = True) -> str:
    """A share of answers as text. answers: how many there are. whole: whether each is right or wrong, nothing between.

    >>> share(1 / 3, 3), share(0.6, 3, whole=False), share(1 / 3)
    ('33% (1 of 3)', '60% (of 3)', '33%')
    """
    if not answers:  # a report of a version that did not write them down
        return f"{value:.0%}"
    return f"{value:.0%} ({f'{value * answers:.0f} ' if whole else ''}of {answers})"


def side_by_side(*reports: dict) -> str:
    """One line per run: its scores after training, its speed and its peak memory in GB of 10^9 bytes."""
    columns = ("test", "shifted", "validation", "prose", "tokens/s", "peak GB")
    lines = [f"{'':<8}" + "".join(f"{column:>14}" for column in columns)]
    for report in reports:
        exact, perplexity = report["after"]["exact_match"], report["after"]["perplexity"]
        judged = report.get("judged", {})
        cells = [share(exact[s], judged.get(s), whole=False) if s in exact else "-" for s in ANSWERED]
        cells += [f"{perplexity[s]:.3f}" if s in perplexity else "-" for s in READ]
        cells += [f"{report['tokens_per_second']:.0f}", f"{report['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append(f"{report['method']:<8}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
