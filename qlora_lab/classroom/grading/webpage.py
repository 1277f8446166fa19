"""A class as a page for the browser: one HTML file that needs no server and loads nothing.

Whatever comes from hand-ins is escaped, and the page's own policy forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from qlora_lab.classroom.grading.reports import STATES
from qlora_lab.classroom.grading.tables import Row, exercises_of, findings
from qlora_lab.evaluation.page import PAGE, STYLE

OURS = """
td.right { color: var(--right); } td.wrong { color: var(--wrong); } td.mark { text-align: center; }
td { overflow-wrap: normal; } td.said { min-width: 18rem; overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""


def class_page(title: str, rows: Sequence[Row]) -> str:
    """The page as one text: who has what, who fell for which mistake, comments for each student."""
    exercises = exercises_of(rows)
    of = sum(grade.of for grade, _ in exercises.values())
    graded = sum(1 for row in rows if row.grades)
    summary = f"<p>{len(rows)} students, {graded} of them with graded hand-ins; {of} points.</p>"
    legend = ", ".join(f"{mark} {state}" for state, mark in STATES.items() if state != "unavailable")
    sections = [
        ("Students", f"<p class='soft'>{legend}</p>" + _matrix(rows)),
        ("Exercises", _findings(rows)),
        ("Comments", "".join(map(_comments, rows))),
    ]
    return PAGE.format(
        title=html.escape(title),
        style=STYLE + OURS,
        summary=summary,
        sections="\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in sections),
    )


def _table(head: Sequence[str], body: str) -> str:
    cells = "".join(f"<th scope='col'>{html.escape(text)}</th>" for text in head)
    return f"<div class='scroll'><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _matrix(rows: Sequence[Row]) -> str:
    exercises = exercises_of(rows)
    body = ""
    for row in rows:
        cells = ""
        for id in exercises:
            grade = row.grades.get(id)
            title = html.escape(f"{grade.title}: {grade.state}") if grade else "not handed in"
            kind = grade.state.replace(" ", "-") if grade else "none"
            cells += f"<td class='mark {kind}' title='{title}'>{STATES[grade.state] if grade else ''}</td>"
        name = html.escape(row.student.name)
        body += f"<tr><th scope='row'>{name}</th>{cells}<td class='number'>{row.points()}</td></tr>"
    return _table(["student", *exercises, "points"], body)


def _findings(rows: Sequence[Row]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(f'{f.exercise} {f.title}')}</td><td class='{f.state}'>{f.state}</td>"
        f"<td class='number'>{len(f.students)}</td><td class='said'>{html.escape(f.message)}</td>"
        f"<td>{html.escape('' if f.state == 'right' else ', '.join(f.students))}</td></tr>"
        for f in findings(rows)
    )
    return _table(["exercise", "state", "students", "what they were told", "who"], body)


def _comments(row: Row) -> str:
    graded = "".join(
        f"<tr><td>{html.escape(f'{grade.id} {grade.title}')}</td><td class='{grade.state}'>{grade.state}</td>"
        f"<td class='number'>{grade.points}/{grade.of}</td><td class='said'>{html.escape(grade.message)}</td></tr>"
        for grade in row.grades.values()
    )
    notes = "".join(f"<p>{html.escape(comment)}</p>" for comment in row.comments)
    table = _table(["exercise", "state", "points", "message"], graded) if graded else ""
    points = f"{row.points()} of {sum(grade.of for grade in row.grades.values())} points"
    return f"<details><summary>{html.escape(row.student.name)}: {points}</summary>{table}{notes}</details>"
