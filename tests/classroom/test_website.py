"""The course as a website, built once from this checkout: what its pages say, and where their links lead."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from qlora_lab.classroom import website
from qlora_lab.classroom.publish import publish
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

pytest.importorskip("myst_nb", reason="no Sphinx here: pip install -c constraints.txt -e '.[site]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Sphinx's and its extensions', of one another
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]

NOTEBOOKS = sorted([*REPOSITORY.glob("notebooks/*.ipynb"), *REPOSITORY.glob("notebooks/zh-TW/*.ipynb")])


class Page(HTMLParser):
    """The ids of a page, its links, its pictures' alt texts, and what a browser loads with it."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.alts, self.loaded = set(), [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update(value for key in ("id", "name") if (value := given.get(key)))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.alts.append(given.get("alt"))
            self.loaded.append(given.get("src"))
        if tag == "script" and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])


@pytest.fixture
def site(website_folder) -> Path:
    return website_folder


@pytest.fixture(scope="module")
def pages(website_folder) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(website_folder.rglob("*.html"))}


def page_of(path: Path) -> Path:
    """Where a notebook's page is in the website: notebooks/zh-TW/05_... in zh-TW/notebooks/."""
    folder = Path("zh-TW") if path.parent.name == "zh-TW" else Path()
    return folder / "notebooks" / f"{path.stem}.html"


def test_each_notebook_and_document_is_a_page(site):
    for path in NOTEBOOKS:
        assert (site / page_of(path)).is_file()
    for path in [*(REPOSITORY / "docs").glob("*.md"), REPOSITORY / "CONTRIBUTING.md"]:
        assert (site / path.relative_to(REPOSITORY).with_suffix(".html")).is_file()


def test_no_link_of_any_page_leads_nowhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids
            if not (target.is_file() and there):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_pages_need_nothing_from_elsewhere(site, pages):
    for path, page in pages.items():
        for source in page.loaded:
            assert not urlsplit(source).scheme or source.startswith("data:"), (path.name, source)
            if not source.startswith("data:"):
                assert (path.parent / urlsplit(source).path).is_file(), (path.name, source)


def test_each_figure_says_what_it_shows(site, pages):
    """Every figure's description of the notebook is that of the page, word by word."""
    for path in NOTEBOOKS:
        told = pages[site / page_of(path)].alts
        figures = [
            output.metadata["image/png"]["alt"]
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code"
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        assert [alt for alt in told if alt is not None] == figures
        assert None not in told


def test_pages_turn_figures_over_on_dark_and_keep_them_legible_on_narrow_screens(site, pages):
    """Each page with figures loads the rules for them, and has the figures where the rules reach."""
    for path in NOTEBOOKS:
        page = pages[site / page_of(path)]
        if page.alts:
            sheets = [
                (site / page_of(path)).parent / urlsplit(name).path for name in page.loaded if "figures.css" in name
            ]
            assert [sheet.read_text(encoding="utf-8") for sheet in sheets] == [website.FIGURES], path
            assert 'class="cell_output ' in page.text
    assert website.FIGURES.count(".cell_output img { filter: invert(") == 2


def test_a_lesson_leads_to_itself_in_the_other_language(site, pages):
    english = pages[site / "notebooks" / "05_double_quantization.html"]
    chinese = pages[site / "zh-TW" / "notebooks" / "05_double_quantization.html"]
    assert "../zh-TW/notebooks/05_double_quantization.html" in english.links
    assert "../../notebooks/05_double_quantization.html" in chinese.links
    assert "../zh-TW/index.html" in english.links and "../../index.html" in chinese.links  # in the sidebar
    assert re.search('<html[^>]* lang="zh-TW"', chinese.text) and re.search('<html[^>]* lang="en"', english.text)
    assert "下載這本筆記本" in chinese.text
    (file,) = [link for link in chinese.links if link.endswith(".ipynb")]
    kept = (site / "zh-TW" / "notebooks" / file).resolve().read_bytes()
    assert kept == (REPOSITORY / "notebooks" / "zh-TW" / "05_double_quantization.ipynb").read_bytes()


def test_chinese_pages_have_a_chinese_frame(site, pages):
    """Around the text nothing is English, but names; and the search is of the Chinese pages."""
    text = pages[site / "zh-TW" / "notebooks" / "05_double_quantization.html"].text
    frame = text[: text.index("<article")] + text[text.index("</article>") :]
    said = re.sub(r"<(script|style|svg|title).*?</\1>", " ", frame[frame.index("<body") :], flags=re.DOTALL)
    said = " ".join(re.findall(r'(?:aria-label|title|placeholder)="([^"]*)"', said)) + re.sub("<[^>]*>", " ", said)
    names = ("QLoRA Lab", "LLM", "GPU", "GB", "English", "Sphinx", "@pradyunsg", "'s", "Furo")
    assert re.findall("[A-Za-z]{2,}", re.sub("|".join(map(re.escape, names)), "", said)) == []
    assert {"本頁內容", "下一頁", "上一頁", "課程路徑", "其他語言", "搜尋"} <= set(re.findall("[\u4e00-\u9fff]+", said))
    word = json.dumps("縮放")  # as the index has it
    assert word in (site / "zh-TW" / "searchindex.js").read_text(encoding="utf-8")
    assert word not in (site / "searchindex.js").read_text(encoding="utf-8")


def test_a_page_is_the_notebook_for_reading(site, pages):
    page = pages[site / "notebooks" / "06_lora.html"]
    assert "does nothing on your own machine" not in page.text  # the set-up cell
    assert "@title" not in page.text
    (download,) = [link for link in page.links if link.endswith("06_lora.ipynb")]
    offered = (site / "notebooks" / download).resolve()
    assert offered.read_bytes() == (REPOSITORY / "notebooks" / "06_lora.ipynb").read_bytes()
    stored = nbformat.read(REPOSITORY / "notebooks" / "06_lora.ipynb", as_version=4)
    folded = [cell.source for cell in stored.cells if cell.metadata.get("jupyter", {}).get("source_hidden")]
    titles = [website.TITLE.match(source)[1] for source in folded][1:]  # but that of the set-up cell
    assert titles and all(f">{title}<" in page.text.replace("&#39;", "'") for title in titles)


def small_copy(folder: Path) -> Path:
    """A course of one notebook, without a list of changes, as a students' copy is."""
    (folder / "notebooks").mkdir(parents=True)
    name = "05_double_quantization.ipynb"
    text = (REPOSITORY / "notebooks" / name).read_text(encoding="utf-8").replace("06_lora.ipynb", name)
    (folder / "notebooks" / name).write_text(text, encoding="utf-8")
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    (folder / "qlora_lab").mkdir()
    shutil.copy(REPOSITORY / "qlora_lab" / "colab.py", folder / "qlora_lab")
    (folder / "CONTRIBUTING.md").write_text("# Changing it\n", encoding="utf-8")
    (folder / "README.md").write_text(
        "# A course\n\n| notebook | question | minutes |\n|---|---|---|\n"
        "| [05_double_quantization](notebooks/05_double_quantization.ipynb) | what do the scales cost? | 1 |\n",
        encoding="utf-8",
    )
    return folder


def test_a_published_copy_links_to_colab_and_kaggle(tmp_path):
    root = small_copy(tmp_path / "copy")
    publish("https://github.com/you/qlora-lab", root=root)
    pages = tmp_path / "pages"
    website.write_pages(pages, root)
    links = nbformat.read(pages / "notebooks" / "05_double_quantization.ipynb", as_version=4).cells[1].source
    assert "Download" in links and "github/you/qlora-lab/blob/main/notebooks/05_double" in links
    assert links.count("img") == 0 and links.count("https://") >= 3


def test_a_text_whose_link_is_broken_makes_no_website(tmp_path):
    root = small_copy(tmp_path / "copy")
    website.build(tmp_path / "whole", root)
    with open(root / "CONTRIBUTING.md", "a", encoding="utf-8") as file:
        file.write("See [nothing](docs/nothing.md).\n")
    with pytest.raises(UserError, match=r"CONTRIBUTING\.md.*docs/nothing"):
        website.build(tmp_path / "site", root)
    assert not (tmp_path / "site").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert website.main([str(tmp_path)]) == 2
    assert "is not empty, and no website of before" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"
