"""A run's report as a page for the browser: one HTML file that needs no server and loads nothing.

Whatever comes from the data, the model or the command line is text there: it is escaped, and the page's own policy
(https://www.w3.org/TR/CSP3/) forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Mapping

from qlora_lab.evaluation.reports import ANSWERED, DULLEST, SCORE_COLUMNS, SCORES, score_lines

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5a5a62; --paper: #ffffff; --card: #f4f4f6; --rule: #d4d4da;
  --blue: #0072b2; --orange: #b35900; --right: #00704a; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a6a6b0; --paper: #17171a; --card: #232328;
  --rule: #43434c; --blue: #6cb8ef; --orange: #f0a24a; --right: #5fd0a0; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .85rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 600; }
p { margin: .25rem 0; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td { overflow-wrap: anywhere; }
th[scope=row] { font-weight: normal; white-space: pre-wrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figure svg { display: block; width: 100%; min-width: 28rem; max-width: 56rem; height: auto; }
article { background: var(--card); border-radius: .5rem; padding: .9rem 1rem; margin: 0 0 .9rem; }
article > div { display: grid; gap: .9rem 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .875rem/1.45 ui-monospace, monospace; }
.asked { margin: 0 0 .9rem; padding: 0 0 .7rem; border-bottom: 1px solid var(--rule); }
.asked p { white-space: pre-wrap; overflow-wrap: anywhere; }
.is-right { color: var(--right); font-weight: 600; }
.is-wrong { color: var(--wrong); font-weight: 600; }
body:has(#wrong-only:checked) article.right { display: none; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{summary}
{sections}
</main>
</body>
</html>
"""


def page(report: Mapping, settings: Mapping[str, str], answers: Iterable[Mapping]) -> str:
    """The page as one text.

    Args:
        report: what `train_qlora` reports of the run.
        settings: its flags, as text.
        answers: rows of `kept_answers.py`; those of a run that was interrupted have no "after".
    """
    sections = [
        ("Scores", _scores(report)),
        ("Loss", _curve(report) if report["losses"] else ""),
        ("Answers", _answers(list(answers))),
        ("Settings", _settings({**settings, **_facts(report)})),
    ]
    return PAGE.format(
        title=html.escape(f"{report['model']}, {report['method']}, {report['steps']} steps"),
        style=STYLE,
        summary="".join(f"<p>{html.escape(line)}</p>" for line in _summary(report)),
        sections="\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections if body),
    )


def _summary(report: Mapping) -> list[str]:
    lines = [f"Trained on {report['device']} in {report['compute_dtype']} for {report['train_seconds']:.0f} s."]
    if report["interrupted"]:
        lines.append("Interrupted: the model was not judged after training.")
    if report["out_of_patience"]:
        lines.append("Stopped early: the validation loss no longer fell.")
    if report["adapter_step"] != report["steps"]:
        lines.append(f"The adapter is that of step {report['adapter_step']}, whose validation loss was the lowest.")
    return lines


def _scores(report: Mapping) -> str:
    lines = score_lines(report)
    if not lines:
        return ""
    columns = SCORE_COLUMNS[: len(lines[0]) - 1]
    head = "".join(f"<th scope='col' class='number'>{column}</th>" for column in columns)
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(label)}</th>"
        + "".join(f"<td class='number'>{value}</td>" for value in values)
        + "</tr>"
        for label, *values in lines
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    note = f"<p class='soft'>{DULLEST[0].upper()}{DULLEST[1:]}.</p>" if len(columns) == 3 else ""
    return f"<div class='scroll'>{table}</div>{note}"


def _settings(settings: Mapping) -> str:
    rows = (
        f"<tr><th scope='row'>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    return f"<div class='scroll'><table><tbody>{''.join(rows)}</tbody></table></div>"


def _facts(report: Mapping) -> dict[str, str]:
    return {
        "trainable parameters": f"{report['trainable_parameters']:,}",
        "tokens per second": f"{report['tokens_per_second']:.0f}",
        "peak memory": f"{report['peak_memory_bytes'] / 1e9:.2f} GB",
        "processes": str(report["processes"]),
        "samples left out": str(report["samples_left_out"]),
        "adapter": report["adapter"],
    }


# ------------------------------------------------------------------------------------------------------------- answers


def _answers(rows: list[Mapping]) -> str:
    if not rows:
        return ""
    parts = ["<p><label><input type='checkbox' id='wrong-only'> only those that are wrong after training</label></p>"]
    for split in ANSWERED:
        of_split = [row for row in rows if row["split"] == split]
        if of_split:
            parts.append(f"<h2>{split}: {_count(of_split)}</h2>")
            parts += [_answer(number, row) for number, row in enumerate(of_split, 1)]
    return "\n".join(parts)


def _count(rows: list[Mapping]) -> str:
    right = {
        moment: sum(row[moment]["exact"] for row in rows)
        for moment in ("before", "after")
        if all(moment in row for row in rows)
    }
    return f"of {len(rows)} answers, " + ", ".join(f"{count} exactly right {moment}" for moment, count in right.items())


def _answer(number: int, row: Mapping) -> str:
    last = row.get("after") or row.get("before")
    turns = "".join(
        f"<h3>{html.escape(turn['role'])}</h3><p dir='auto'>{html.escape(str(turn['content']))}</p>"
        for turn in row["asked"]
    )
    cells = [_cell(moment, row[moment]) for moment in ("before", "after") if moment in row]
    cells.append(f"<div><h3>expected</h3><pre dir='auto'>{html.escape(row['expected'])}</pre></div>")
    kind = "right" if last and last["exact"] else "wrong"
    return (
        f"<article class='{kind}' aria-label='{row['split']} {number}'><section class='asked'>{turns}</section>"
        f"<div>{''.join(cells)}</div></article>"
    )


def _cell(moment: str, judged: Mapping) -> str:
    mark = "<span class='is-right'>✓ right</span>" if judged["exact"] else "<span class='is-wrong'>✗ wrong</span>"
    scores = "".join(
        f", {html.escape(str(SCORES.get(name, name)))} {value:.0%}" for name, value in judged["scores"].items()
    )
    answer = html.escape(judged["answer"]) or "<span class='soft'>(nothing)</span>"
    return f"<div><h3>{moment}: {mark}{scores}</h3><pre dir='auto'>{answer}</pre></div>"


# --------------------------------------------------------------------------------------------------------------- curve

INK, LOSS, VALIDATION = "#000001", "#000002", "#000003"  # stand for the page's own colours, light or dark
COLOURS = {INK: "currentColor", LOSS: "var(--blue)", VALIDATION: "var(--orange)"}


def _curve(report: Mapping) -> str:
    """The losses over the steps, as a drawing within the page, and in words."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    losses, validated = report["losses"], report["validation_losses"]
    words = f"Training loss: {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}."
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qlora_lab"}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        ax = figure.add_subplot()
        ax.plot(range(1, len(losses) + 1), losses, color=LOSS, marker="o", markersize=3, label="training")
        if validated:
            steps, values = zip(*validated, strict=True)
            ax.plot(steps, values, color=VALIDATION, linestyle="--", marker="s", markersize=4, label="validation")
            lowest = min(range(len(values)), key=values.__getitem__)
            words += (
                f" Validation loss: lowest at step {steps[lowest]}, {values[lowest]:.4f}; at last {values[-1]:.4f}."
            )
        ax.set_xlabel("optimizer step", color=INK)
        ax.set_ylabel("loss (nats per token)", color=INK)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.tick_params(colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(INK)
        ax.legend(frameon=False, labelcolor=INK)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    svg = drawn.getvalue()
    svg = re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], svg[svg.index("<svg") :])
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{html.escape(words)}" \1>', svg)
    return f"<figure><div class='scroll'>{svg}</div><figcaption class='soft'>{html.escape(words)}</figcaption></figure>"
