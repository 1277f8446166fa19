"""The report that `train_qlora` writes of a run, in a few lines for people; and several reports side by side."""

from __future__ import annotations

import json
import pathlib

from qlora_lab.errors import UserError

SCORES = {"normalized_match": "normalized match", "f1": "token F1", "regex": "regex", "json": "JSON fields"}
ANSWERED, READ = ("test", "shifted"), ("validation", "prose")  # scored by exact match, by perplexity


def read_report(run: pathlib.Path) -> dict:
    """Read the report of an earlier run, for `side_by_side` to show.

    Raises:
        UserError: there is no report, or none that can be shown.
    """
    try:
        report = json.loads((run / "report.json").read_text())
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
    rows = [(f"exact match, {s}", "exact_match", s, "{:.0%}") for s in ANSWERED]
    rows += [(f"perplexity, {s}", "perplexity", s, "{:.3f}") for s in READ]
    if report["before"]["perplexity"]:
        lines.append(f"{'':<24}{'before':>10}{'after':>10}")
    more = [key for key in report["before"] if key not in ("exact_match", "perplexity", "json_fields")]
    rows[len(ANSWERED) : len(ANSWERED)] = [(f"{SCORES.get(k, k)}, {s}", k, s, "{:.0%}") for k in more for s in ANSWERED]
    for label, kind, split, form in rows:
        if split in report["before"][kind]:
            after = report["after"].get(kind, {}).get(split)
            lines.append(_line(label, report["before"][kind][split], after, form))
    for split, fields in report["before"].get("json_fields", {}).items():
        after = report["after"].get("json_fields", {}).get(split, {})
        lines += [_line(f"  {name}, {split}", share, after.get(name), "{:.0%}") for name, share in fields.items()]
    losses = report["losses"]
    lines += [f"{'loss':<24}{losses[0]:>10.4f}{losses[-1]:>10.4f}"] if losses else []
    validated = [loss for _, loss in report.get("validation_losses", [])]
    lines += [f"{'validation loss':<24}{validated[0]:>10.4f}{validated[-1]:>10.4f}"] if validated else []
    lines += [
        f"{'tokens per second':<24}{report['tokens_per_second']:>20.0f}",
        f"{'training time':<24}{report['train_seconds']:>18.0f} s",
        f"{'peak memory':<24}{report['peak_memory_bytes'] / 1e9:>17.2f} GB",
        f"{'trainable parameters':<24}{report['trainable_parameters']:>20,}",
        f"adapter: {report['adapter']}",
    ]
    return "\n".join(lines)


def _line(label: str, before: float, after: float | None, form: str) -> str:
    return f"{label:<24}{form.format(before):>10}{form.format(after) if after is not None else '-':>10}"


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
