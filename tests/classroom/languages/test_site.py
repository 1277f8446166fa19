"""The website in a second language: where pages lie and lead, what is said around a text, and the search's words."""

import json

import pytest

from qlora_lab.classroom.languages import site, texts
from qlora_lab.classroom.languages.labels import NAVIGATION

CHINESE = ["zh-TW"]


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("README.md", ("en", "index")),
        ("README.zh-TW.md", ("zh-TW", "index")),
        ("notebooks/06_lora.ipynb", ("en", "notebooks/06_lora")),
        ("notebooks/zh-TW/06_lora.ipynb", ("zh-TW", "notebooks/06_lora")),
        ("docs/export.md", ("en", "docs/export")),
    ],
)
def test_where_a_file_is_read(place, found):
    assert site.page_at(place, CHINESE) == found


@pytest.mark.parametrize(
    ("place", "seen_from", "address"),
    [
        ("README.md", "README.zh-TW.md", "../index.html"),
        ("README.zh-TW.md", "README.md", "zh-TW/index.html"),
        ("notebooks/06_lora.ipynb", "notebooks/zh-TW/06_lora.ipynb", "../../notebooks/06_lora.html"),
        ("notebooks/zh-TW/06_lora.ipynb", "notebooks/06_lora.ipynb", "../zh-TW/notebooks/06_lora.html"),
        ("notebooks/06_lora.ipynb", "notebooks/05_x.ipynb", "06_lora.html"),
    ],
)
def test_the_address_of_a_page(place, seen_from, address):
    assert site.address(place, seen_from, CHINESE) == address


def test_links_lead_across_languages_and_the_others_stay(tmp_path):
    for name in ("docs/export.md", "notebooks/zh-TW/06_lora.ipynb", "notebooks/dive_x.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = (
        "[`a` [1]](../../docs/export.md#more), [b](06_lora.ipynb#id), [c](../gone.md), [d](https://x.org/y.md)"
        ' <a href="../dive_x.ipynb">e</a> <a href="06_lora.ipynb">f</a>'
    )
    assert site.lead_across(text, "notebooks/zh-TW/05_x.ipynb", CHINESE, tmp_path) == (
        '<a href="../../docs/export.html#more">`a` [1]</a>, [b](/notebooks/06_lora.ipynb#id), [c](../gone.md), '
        '[d](https://x.org/y.md) <a href="../../notebooks/dive_x.html">e</a> <a href="06_lora.html">f</a>'
    )


def test_the_search_cuts_chinese_into_pairs():
    assert site.words_for_search("用 QLoRA微調，雙重量化 4 位元") == [
        *("用", "QLoRA", "微調"),
        *("雙重", "重量", "量化", "4", "位元"),
    ]


@pytest.mark.parametrize("into", texts.editions())
def test_navigation_is_translated(into):
    assert [said for said in NAVIGATION if texts.translate(said, into) == said] == []


@pytest.mark.parametrize("into", texts.editions())
def test_the_names_of_buttons_are_translated(into, tmp_path):
    page = tmp_path / "a.html"
    page.write_text('<i aria-label="Toggle navigation of API"></i><i aria-label="Mine"></i>Toggle', encoding="utf-8")
    site.name_controls([page], into)
    said = texts.translate("Toggle navigation of ", into)
    assert page.read_text(encoding="utf-8") == f'<i aria-label="{said}API"></i><i aria-label="Mine"></i>Toggle'


def test_the_catalogue_has_what_sphinx_lacks(tmp_path):
    pytest.importorskip("sphinx", reason="no Sphinx here: pip install -c constraints.txt -e '.[site]'")
    site.write_catalogue(tmp_path, "zh-TW")
    folder = tmp_path / "zh_TW" / "LC_MESSAGES"
    assert 'msgid "Back to top"\nmsgstr "回到頂端"' in (folder / "sphinx.po").read_text(encoding="utf-8")
    script = (folder / "sphinx.js").read_text(encoding="utf-8")
    messages = json.loads(script[script.index("{") : script.rindex("}") + 1])["messages"]
    found = messages["Search finished, found one page matching the search query."]
    assert found == ["搜尋完成，找到 ${resultCount} 頁。"] and messages["Searching"] == "搜尋中"
