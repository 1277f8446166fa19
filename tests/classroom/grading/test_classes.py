"""Whose hand-ins are whose, what tables are made of them, and exports merged. No notebook is run here."""

import csv
import io
import json
from pathlib import Path

import pytest

from qlora_lab.classroom import __main__ as classroom
from qlora_lab.classroom import grade as command
from qlora_lab.classroom.checks import all_exercises
from qlora_lab.classroom.grading import tables
from qlora_lab.classroom.grading.classes import Student, read_roster, students_in
from qlora_lab.classroom.grading.reports import Grade, Report
from qlora_lab.classroom.grading.webpage import class_page
from qlora_lab.classroom.judging import Progress
from qlora_lab.errors import UserError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def names_of(students, folder):
    return {student.name: [path.relative_to(folder).as_posix() for path in student.files] for student in students}


# ----------------------------------------------------------------------------------------------------------- who is who


def test_folders_name_students_and_copies_are_passed_over(tmp_path):
    folder = touch(
        tmp_path / "class",
        "Zoë Müller/04.ipynb",
        "Zoë Müller/.ipynb_checkpoints/04-checkpoint.ipynb",
        "Zoë Müller/__MACOSX/04.ipynb",
        "ann/deep/er/05.ipynb",
        "ann/answers.zip",
        "notes.txt",
    )
    (folder / "bob").mkdir()
    assert names_of(students_in(folder), folder) == {
        "Zoë Müller": ["Zoë Müller/04.ipynb"],
        "ann": ["ann/answers.zip", "ann/deep/er/05.ipynb"],
        "bob": [],
    }
    touch(folder, "05.ipynb")
    with pytest.raises(UserError, match=r"05\.ipynb lies in no student's folder: give each student a folder, or say"):
        students_in(folder)


def test_a_roster_says_whose_files_are(tmp_path):
    folder = touch(tmp_path / "class", "Ann Bee_77_assignsubmission_file/a.ipynb", "bob/b.ipynb", "cee_12_04.ipynb")
    roster = tmp_path / "roster.csv"
    roster.write_text(
        "\ufeffFirst name;Surname;hand_in;Email address\r\n"
        "Ann;Bee;Ann Bee_*;ann@x.org\r\n;;;\r\nCee;Dee;cee_*.ipynb;cee@x.org\r\n"
        "Eve;Eff;;eve@x.org\r\nBob;B;bob;b@x.org\r\n",
        encoding="utf-8",
    )
    students = students_in(folder, roster)
    assert names_of(students, folder) == {
        "Ann Bee": ["Ann Bee_77_assignsubmission_file/a.ipynb"],
        "Cee Dee": ["cee_12_04.ipynb"],
        "Eve Eff": [],
        "Bob B": ["bob/b.ipynb"],
    }
    assert students[0].columns["Email address"] == "ann@x.org"


@pytest.mark.parametrize(
    "text, why",
    [
        ("Student\nAnn\n", "b.ipynb belongs to nobody in .*: name it there in a column hand_in"),
        ("Student,hand_in\nAnn,\nBob,bob\nCee,b*\n", r"b\.ipynb belongs to Bob and Cee in .*: make hand_in more exact"),
        ("Student,hand_in\nBob,../class/bob\n", "Bob has hand_in '../class/bob' in the roster: expected a path inside"),
        ("Name,Mail\nBob,b@x\n", 'has no column "Student", nor "First name" and "Last name": its columns are Name'),
        ("Student\nBob\nBob\n", "names Bob twice"),
        ("Student\n", "names no student"),
        ("Student\nB\xf6b\n".encode("latin-1"), "cannot be read as CSV in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_roster_is_told(tmp_path, text, why):
    folder = touch(tmp_path / "class", "bob/b.ipynb")
    roster = tmp_path / "roster.csv"
    roster.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=why):
        students_in(folder, roster)


# --------------------------------------------------------------------------------------------------------------- tables


def grade(id, state, message="", of=1):
    return Grade(id, f"title of {id}", of if state == "right" else 0, of, state, message)


def handed_in(name, *reports, columns=None):
    files = (Path("a.ipynb"), Path("b.ipynb"))[: len(reports)]  # which nobody opens
    return tables.row_of(Student(name, columns or {}, files), reports)


ANN = Report(
    "ann/04.ipynb", "04_d", [grade("4.2", "wrong", "it gives 3.5. No"), grade("4.10", "right", of=2)], ["slow"]
)
BOB = Report("bob/04.ipynb", "04_d", [grade("4.2", "wrong", "it gives 17. No"), grade("4.10", "open", "not yet", 2)])
CEE = Report("cee/04.ipynb", "04_d", [grade("4.2", "wrong", "<b>=1+1</b>"), grade("4.10", "right", of=2)])
CEES = Report("cee/05.ipynb", "05_l", [grade("5.1", "right", of=3)])


def test_the_matrix_has_a_row_for_everybody_and_blanks_for_what_was_not_handed_in():
    rows = [handed_in("Ann", ANN), handed_in("Cee", CEE, CEES), handed_in("Eve")]
    assert tables.matrix(rows) == [
        ["student", "4.2", "4.10", "5.1", "points", "comments"],
        ["points possible", 1, 2, 3, 6, ""],
        ["Ann", 0, 2, "", 2, "04.ipynb: slow"],
        ["Cee", 0, 2, 3, 5, ""],
        ["Eve", "", "", "", 0, "no notebook handed in"],
    ]


def test_of_several_hand_ins_of_a_lesson_the_best_answers_count():
    better = Report("a", "04_d", [grade("4.2", "right"), grade("4.10", "open", of=2)])
    for reports in ((ANN, better), (better, ANN)):
        row = handed_in("Ann", *reports)
        assert {id: grade.state for id, grade in row.grades.items()} == {"4.2": "right", "4.10": "right"}


def test_statistics_say_who_fell_for_which_mistake():
    rows = [handed_in("Cee", CEE), handed_in("Ann", ANN), handed_in("Bob", BOB)]
    assert tables.statistics(rows) == [
        ["exercise", "title", "state", "students", "message", "who"],
        ["4.2", "title of 4.2", "wrong", 2, "it gives 3.5. No", "Ann; Bob"],  # the same mistake with another number
        ["4.2", "title of 4.2", "wrong", 1, "<b>=1+1</b>", "Cee"],
        ["4.10", "title of 4.10", "open", 1, "", "Bob"],
        ["4.10", "title of 4.10", "right", 2, "", "Cee; Ann"],
    ]


CANVAS = """Student,ID,SIS User ID,SIS Login ID,Section,Homework (12)
    Points Possible,,,,,10
"Bee, Ann",101,s1,ann@x.org,"CS 1"
"Eff, Eve",102,s2,eve@x.org,"CS 1"
"""


def test_canvas_gets_its_own_columns_back(tmp_path):
    (tmp_path / "roster.csv").write_text(CANVAS, encoding="utf-8")
    ann, eve = read_roster(tmp_path / "roster.csv")
    rows = [handed_in(ann.name, ANN, columns=ann.columns), handed_in(eve.name, columns=eve.columns)]
    assert list(csv.reader(io.StringIO(tables.as_csv(tables.canvas(rows))))) == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "04_d"],
        ["    Points Possible", "", "", "", "", "3"],
        ["Bee, Ann", "101", "s1", "ann@x.org", "CS 1", "2"],
        ["Eff, Eve", "102", "s2", "eve@x.org", "CS 1", ""],
    ]
    assert tables.moodle(rows) is None
    assert tables.canvas([handed_in("Ann", ANN)]) is None


def test_moodle_gets_points_and_feedback():
    rows = [
        handed_in("Ann", ANN, columns={"email address": "ann@x.org"}),
        handed_in("Cee", CEES, columns={"email address": "cee@x.org"}),
    ]
    assert tables.moodle(rows) == [
        ["Name", "Email address", "04_d", "04_d (feedback)", "05_l", "05_l (feedback)"],
        ["Ann", "ann@x.org", 2, "4.2 title of 4.2: it gives 3.5. No", "", ""],
        ["Cee", "cee@x.org", "", "", 3, "all right"],
    ]


def test_a_spreadsheet_runs_nothing():
    text = tables.as_csv([["=1+1", "@x", "-", -1, "a=b", "+"]])
    assert list(csv.reader(io.StringIO(text))) == [["'=1+1", "'@x", "'-", "-1", "a=b", "'+"]]


def test_the_page_escapes_what_comes_from_hand_ins():
    rows = [handed_in("<script>", CEE), handed_in("Eve")]
    page = class_page("Grades of <x>", rows)
    assert "<script" not in page and "<b>=" not in page
    assert page.count("&lt;b&gt;=1+1&lt;/b&gt;") == 2  # among the mistakes, and in the student's comments
    assert "<title>Grades of &lt;x&gt;</title>" in page and "no notebook handed in" in page
    assert "default-src 'none'" in page


# -------------------------------------------------------------------------------------------- the command, without runs


def test_tables_are_written_as_reports_come(tmp_path, monkeypatch, capsys):
    folder = touch(tmp_path / "class", "ann/04.ipynb", "bob/04.ipynb")
    (folder / "eve").mkdir()
    results, seen = tmp_path / "results", []

    def grade_all(hand_ins, limits, results, jobs, course, image):
        for path, report in zip(reversed(hand_ins), (BOB, ANN), strict=True):
            if seen or path.parent.name == "bob":
                seen.append((results / "grades.csv").read_text(encoding="utf-8"))
            yield path, report

    monkeypatch.setattr(command, "grade_all", grade_all)
    assert command.main(["--class", str(folder), "--results", str(results), "--csv"]) == 0
    assert [text.splitlines()[-3:] for text in seen] == [
        ["ann,0,1 not graded yet", "bob,0,1 not graded yet", "eve,0,no notebook handed in"],
        ["ann,,,0,1 not graded yet", "bob,0,0,0,", "eve,,,0,no notebook handed in"],
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "student,notebook,exercise,title,points,of,state,message"
    assert lines[1] == "bob,bob/04.ipynb,4.2,title of 4.2,0,1,wrong,it gives 17. No"
    assert len(lines) == 5
    written = {path.name for path in results.iterdir()}
    assert written == {"grades.csv", "grades.json", "grades.html", "exercises.csv", "statistics.csv"}
    stored = json.loads((results / "grades.json").read_text(encoding="utf-8"))
    assert [(row["student"], len(row["hand_ins"])) for row in stored] == [("ann", 1), ("bob", 1), ("eve", 0)]


def test_reports_are_printed_as_one_list_of_json(tmp_path, monkeypatch, capsys):
    broken = Report("c.ipynb", "", fault="it is no notebook")
    for reports in ((), (ANN,), (ANN, broken)):
        monkeypatch.setattr(command, "grade_all", lambda *_, r=reports: ((report.notebook, report) for report in r))
        assert command.main(["x.ipynb", "--json"]) == (2 if broken in reports else 0)
        out, err = capsys.readouterr()
        assert [Report.from_dict({**row}) for row in json.loads(out)] == list(reports)
        assert ("error: c.ipynb: it is no notebook" in err) == (broken in reports)


# ---------------------------------------------------------------------------------------------------------------- merge


def test_exports_are_merged(tmp_path, capsys):
    exercises = all_exercises()
    first, second = exercises[0], exercises[1]
    for name, ending, solved in (("ann", "csv", first), ("ann", "json", second), ("bob", "csv", None)):
        (tmp_path / "class" / name).mkdir(parents=True, exist_ok=True)
        progress = Progress(exercises, frozenset([solved.id] if solved else []))
        progress.export(tmp_path / "class" / name / f"mine.{ending}")
    touch(tmp_path / "class", "eve/other.json")
    assert classroom.main(["merge", str(tmp_path / "class")]) == 2
    out, err = capsys.readouterr()
    assert "other.json is no export of progress: KeyError: 'exercises'" in err
    rows = {row["student"]: row for row in csv.DictReader(out.splitlines())}
    assert list(rows) == ["points possible", "ann", "bob", "eve"]
    assert (rows["ann"]["solved"], rows["ann"]["points"]) == ("2", str(first.points + second.points))
    assert [rows["ann"][exercise.id] for exercise in exercises[:3]] == ["1", "1", "0"]
    assert (rows["bob"][first.id], rows["bob"]["solved"]) == ("0", "0")
    assert (rows["eve"][first.id], rows["eve"]["solved"]) == ("", "0")
    (tmp_path / "class" / "eve" / "other.json").unlink()
    assert classroom.main(["merge", str(tmp_path / "class"), "--output", str(tmp_path / "all.csv")]) == 0
    assert (tmp_path / "all.csv").read_text(encoding="utf-8").count("\n") == 5
    touch(tmp_path / "class", "loose.csv")
    assert classroom.main(["merge", str(tmp_path / "class")]) == 2
    assert "loose.csv lies in no student's folder" in capsys.readouterr().err
