"""The glossary: in order, each term once, and explained in a lesson that speaks of it."""

import re
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "notebooks" / "source"
ROW = re.compile(r"^# \| \*\*(.+?)\*\* \| (.+?) \| \[(.+?)\]\((\w+)\.ipynb\) \|$", re.MULTILINE)


def test_terms_are_in_order_and_their_lessons_speak_of_them():
    text = (SOURCES / "glossary.py").read_text(encoding="utf-8")
    rows = ROW.findall(text)
    assert len(rows) == text.count("# | **") > 50
    terms = [term.lower() for term, *_ in rows]
    assert terms == sorted(set(terms))
    for term, sentence, place, stem in rows:
        assert sentence[0].isupper() or sentence.startswith("e to the power"), sentence
        assert sentence.endswith("."), sentence
        key = place.split()[1]
        assert stem.startswith(f"{key}_" if key.isdigit() else f"dive_{key.lower()}_"), place
        lesson = (SOURCES / f"{stem}.py").read_text(encoding="utf-8").replace("\n# ", " ").replace("**", "").lower()
        assert re.split(r" [(]|,", term)[0].lower().rstrip("s") in lesson, f"{stem} does not speak of {term}"
