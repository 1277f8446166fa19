"""The certificate says what was solved, when and with what, and nothing else."""

import re
from importlib.metadata import version

import pytest

from qlora_lab.classroom import checks
from qlora_lab.classroom.certificate import Certificate
from qlora_lab.classroom.judging import CHECKLIST, Exercise, record
from qlora_lab.errors import UserError

EXERCISES = (
    Exercise("1.1", "one <b>", "memory", 1),
    Exercise("1.2", "two", "memory", 3),
    Exercise("3.1", "three", "nf4", 2),
    Exercise("A.1", "deep", "nf4", 3),
)


def rows(page: str) -> list[str]:
    return [re.sub(r"(</?t[dhr]>)+", "|", row) for row in re.findall(r"<tr>.*?</tr>", page)]


def test_it_lists_what_was_solved_and_when():
    page = Certificate(EXERCISES, {"1.1": "2026-11-28", "A.1": "2026-11-30", "9.9": "2020-01-01"}).page()
    assert "|1.1|one &lt;b&gt;|●|2026-11-28|" in rows(page) and "|A.1|deep|●●●|2026-11-30|" in rows(page)
    assert "two" not in page and "three" not in page and "2020" not in page  # open, or of another course
    assert "1 of 3 exercises solved, 1 of 6 points on the path from 2026-11-28 to 2026-11-30." in page
    assert f"torch {version('torch')}" in page and page.index("Solved on the path") < page.index("Solved in deep dives")
    assert f"|☐|{CHECKLIST['memory']}|1 of 2|" in rows(page)


def test_a_day_and_none():
    assert " on the path, all on 2026-11-28.<" in Certificate(EXERCISES, {"3.1": "2026-11-28"}).page()
    nothing = Certificate(EXERCISES, {}).page()
    assert "0 of 3 exercises solved, 0 of 6 points on the path.<" in nothing and nothing.count("none yet") == 2


def test_it_loads_nothing_and_keeps_no_name():
    page = Certificate(EXERCISES, {"3.1": "2026-11-28"}).page()
    assert "default-src 'none'" in page and not re.search(r"<(script|img|link|input|form)|src=|href=", page)


def test_from_the_learners_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "progress.json"))
    record("0.1")
    certificate = checks.certificate()
    assert repr(certificate).startswith("1 of ") and certificate.days["0.1"] not in repr(certificate)
    assert list(certificate.days) == ["0.1"]
    path = certificate.save(tmp_path / "certificate.html")
    assert "<td>0.1</td>" in path.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"mine.pdf: .* its name ends in .html"):
        certificate.save("mine.pdf")
