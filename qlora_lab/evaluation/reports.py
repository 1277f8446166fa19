"""The report that `train_qlora` writes of a run, in a few lines for people; and several reports side by side."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from qlora_lab.errors import UserError

SCORES = {
    "exact_match": "exact match",
    "normalized_match": "normalized match",
    "f1": "token F1",
    "regex": "regex",
    "json": "JSON fields",
}
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
    if report["before"]["perplexity"]:
        lines.append(f"{'':<24}{'before':>10}{'after':>10}")
    lines += [f"{label:<24}{before:>10}{after:>10}" for label, before, after in score_lines(report)]
    losses = report["losses"]
    lines += [f"{'loss':<24}{losses[0]:>10.4f}{losses[-1]:>10.4f}"] if losses else []
    if validated := report.get("validation_losses", []):
        steps = f"at step {validated[0][0]:,} and {validated[-1][0]:,}"  # never before the first step
        lines += [f"{'validation loss':<24}{validated[0][1]:>10.4f}{validated[-1][1]:>10.4f} {steps}"]
    lines += [
        f"{'tokens per second':<24}{report['tokens_per_second']:>20.0f}",
        f"{'training time':<24}{report['train_seconds']:>18.0f} s",
        f"{'peak memory':<24}{report['peak_memory_bytes'] / 1e9:>17.2f} GB",
        f"{'trainable parameters':<24}{report['trainable_parameters']:>20,}",
        f"adapter: {report['adapter']}",
    ]
    return "\n".join(lines)


def score_lines(report: Mapping) -> list[tuple[str, str, str]]:
    """What was judged, each with its values before and after training as text; "-" for what was not judged after."""
    before, after = report["before"], report["after"]
    more = [key for key in before if key not in ("exact_match", "perplexity", "json_fields")]
    lines = []
    for key in ("exact_match", *more, "perplexity"):
        splits, form = (READ, "{:.3f}") if key == "perplexity" else (ANSWERED, "{:.0%}")
        then = after.get(key, {})
        lines += [
            (f"{SCORES.get(key, key)}, {s}", form, before[key][s], then.get(s)) for s in splits if s in before[key]
        ]
        for split, shares in before.get("json_fields", {}).items() if key == "json" else ():
            then = after.get("json_fields", {}).get(split, {})
            lines += [(f"  {name}, {split}", form, share, then.get(name)) for name, share in shares.items()]
    return [(label, form.format(one), "-" if two is None else form.format(two)) for label, form, one, two in lines]


def side_by_side(*reports: dict) -> str:
    """One line per run: its scores after training, its speed and its peak memory in GB of 10^9 bytes."""
    columns = ("test", "shifted", "validation", "prose", "tokens/s", "peak GB")
    lines = [f"{'':<8}" + "".join(f"{column:>12}" for column in columns)]
    for report in reports:
        exact, perplexity = report["after"]["exact_match"], report["after"]["perplexity"]
        cells = [f"{exact[s]:.0%}" if s in exact else "-" for s in ANSWERED]
        cells += [f"{perplexity[s]:.3f}" if s in perplexity else "-" for s in READ]
        cells += [f"{report['tokens_per_second']:.0f}", f"{report['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append(f"{report['method']:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)
