"""The course's page in the edition's language: what is stale, missing or wrong is named, and its links are kept."""

import shutil

import pytest

from qlora_lab.classroom.languages import page
from qlora_lab.classroom.languages.edition import Edition
from qlora_lab.classroom.languages.entries import Text
from qlora_lab.classroom.source import REPOSITORY

SOURCES = "notebooks/source/zh-TW"


@pytest.fixture
def edition(tmp_path) -> Edition:
    """A copy of what is read."""
    (tmp_path / SOURCES).mkdir(parents=True)
    for name in ("README.md", "README.zh-TW.md", f"{SOURCES}/edition.json", f"{SOURCES}/terms.json"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return Edition(tmp_path / "notebooks", "zh-TW")


def change(edition: Edition, name: str, before: str, after: str) -> None:
    path = edition.notebooks.parent / name
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def test_the_page_is_in_step_and_each_link_leads_somewhere(edition):
    assert list(page.find_faults(edition)) == []
    rows = list(page.ROW.finditer((REPOSITORY / "README.zh-TW.md").read_text(encoding="utf-8")))
    assert len(rows) >= 27 and all((REPOSITORY / row["link"]).is_file() for row in rows)
    assert any(row["link"] == "notebooks/zh-TW/glossary.ipynb" for row in rows)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "](README.zh-TW.md)" in readme and len(page.blocks(readme.partition(page.LAST)[0])) == 14


@pytest.mark.parametrize(
    "name, before, after, told",
    [
        ("README.md", "takes a few minutes", "takes an hour", ["missing, or another text", "stale, README.md has no"]),
        ("README.md", "make run\n", "make runs\n", ["missing, or another text", "stale, README.md has no"]),
        ("README.zh-TW.md", "make lab  ", "make labs ", ["has other commands"]),
        ("README.zh-TW.md", "訓練 93 秒", "訓練 94 秒", ["has the number 94", "lacks the number 93"]),
        ("README.zh-TW.md", "`progress()` 顯示", "它顯示", ["lacks the code `progress()`"]),
        ("README.zh-TW.md", "小顯示卡", "小顯卡", ["has 顯卡"]),
        ("README.zh-TW.md", "嗎？ | 1 |", "嗎？ | 2 |", ["00_start_here takes 2 minutes there, in README.md 1"]),
        ("README.zh-TW.md", "zh-TW/glossary.ipynb", "glossary.ipynb", ["leads to notebooks/glossary.ipynb, not to"]),
        ("README.zh-TW.md", "| [glossary]", "| glossary", ["its table lacks glossary"]),
        ("README.md", "| [glossary]", "| glossary", ["its table has glossary, which README.md does not have"]),
    ],
)
def test_what_is_out_of_step_is_named(edition, name, before, after, told):
    change(edition, name, before, after)
    faults = list(page.find_faults(edition))
    assert len(faults) == len(told)
    assert all(any(words in fault for fault in faults) for words in told), faults
    assert all(fault.startswith("README.zh-TW.md") for fault in faults)


def test_a_paragraph_is_mended_with_the_new_id(edition):
    change(edition, "README.md", "takes a few minutes", "takes some minutes")
    missing, stale = page.find_faults(edition)
    old, new = stale.split()[1].rstrip(":"), missing.split()[1].rstrip(":")
    change(edition, "README.zh-TW.md", f"<!-- {old} -->", f"<!-- {new} -->")
    assert list(page.find_faults(edition)) == []


def test_blocks_and_their_order(edition):
    text = "# A\n\n[B](README.md)\n\n<!-- 0123abcd -->\nC\nD\n\n```\nE\n\nF # G\n```\n\n| [h](h.ipynb) | i | 1 |\n"
    assert page.blocks(text) == [("0123abcd", "C\nD"), ("", "```\nE\n\nF # G\n```")]
    assert page.commands("```\nE  # F\n```") == ["```", "E", "```"]
    english = (edition.notebooks.parent / "README.md").read_text(encoding="utf-8")
    one, two = (Text("markdown", block).id for _, block in page.blocks(english)[2:4])
    path = page.page_of(edition)
    parts = path.read_text(encoding="utf-8").split("\n\n<!-- ")
    (first,), (second,) = ([i for i, part in enumerate(parts) if part.startswith(id)] for id in (one, two))
    parts[first], parts[second] = parts[second], parts[first]
    path.write_text("\n\n<!-- ".join(parts), encoding="utf-8")
    assert list(page.find_faults(edition)) == ["README.zh-TW.md: its blocks stand in another order than in README.md"]


def test_a_build_leads_the_links_to_the_edition(edition):
    whole = page.page_of(edition).read_text(encoding="utf-8")
    change(edition, "README.zh-TW.md", "notebooks/zh-TW/glossary.ipynb", "notebooks/glossary.ipynb")
    page.relink(edition)
    assert page.page_of(edition).read_text(encoding="utf-8") == whole
    change(edition, f"{SOURCES}/edition.json", '"00_start_here",', "")
    page.relink(edition)
    assert "(notebooks/00_start_here.ipynb)" in page.page_of(edition).read_text(encoding="utf-8")


def test_an_edition_needs_no_page(edition):
    page.page_of(edition).unlink()
    page.relink(edition)
    assert list(page.find_faults(edition)) == []
