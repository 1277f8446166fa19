"""The website in a second language: where its pages lie, what its navigation says, and how its search cuts words.

Each language is a website of its own, made by Sphinx: the English one in the folder itself, the Chinese one in
`zh-TW/`. Sphinx brings most of what its pages say around a text; what it and the theme do not translate is in
`common.labels.json`, under NAVIGATION.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qlora_lab.classroom.languages.labels import NAVIGATION
from qlora_lab.classroom.languages.texts import ENGLISH, translate

LINK = re.compile(r"\[(?P<text>(?:[^][]|\[[^][]*\])*)\]\((?P<to>[^)\s:#]+\.(?:md|ipynb))(?P<part>#[^)\s]*)?\)")
HTML_LINK = re.compile(r'<a href="(?P<to>[\w./-]+\.ipynb)"')
LABELS = re.compile(r'(?<=aria-label=")([^"]+)(?=")')  # which the theme has in English only
OF_A_BRANCH = "Toggle navigation of "
HAN = "\u3400-\u9fff"
RUN = re.compile(rf"[{HAN}]+|[^\W{HAN}]+")
SPLIT_QUERY = f"""var splitQuery = (query) =>
  (query.match(/[{HAN}]+|(?:(?![{HAN}])[\\p{{Letter}}\\p{{Number}}_])+/gu) || []).flatMap((run) =>
    /[{HAN}]/.test(run) && run.length > 1
      ? Array.from({{length: run.length - 1}}, (_, i) => run.slice(i, i + 2))
      : [run]
  );
"""


def sphinx_name(language: str) -> str:
    """What Sphinx calls a language: "zh_TW"."""
    return language.replace("-", "_")


def page_at(place: str, languages: Iterable[str]) -> tuple[str, str]:
    """The language and the page, without its suffix, that a file of the course is read as.

    place: from the course's folder, with slashes: "notebooks/zh-TW/05_....ipynb" is "notebooks/05_..." in "zh-TW".
    """
    path = PurePosixPath(place)
    for language in languages:
        if place == f"README.{language}.md":
            return language, "index"
        if path.parts[:2] == ("notebooks", language):
            return language, str(PurePosixPath("notebooks", *path.parts[2:]).with_suffix(""))
    return ENGLISH, "index" if place == "README.md" else str(path.with_suffix(""))


def address(place: str, seen_from: str, languages: list[str]) -> str:
    """The relative address of one file's page in another's. Both as in `page_at`."""
    to, start = (
        posixpath.join("" if language == ENGLISH else language, page)
        for language, page in (page_at(each, languages) for each in (place, seen_from))
    )
    return posixpath.relpath(f"{to}.html", posixpath.dirname(start) or ".")


def lead_across(text: str, place: str, languages: list[str], root: Path) -> str:
    """A page's Markdown, whose links to pages of another language are plain addresses: Sphinx knows its own only.

    place: the file's, as in `page_at`. What leads to no file of the course is left for Sphinx to complain of.
    """
    own = page_at(place, languages)[0]

    def across(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found["to"]))
        language, page = page_at(target, languages)
        if not (root / target).is_file():
            return found[0]
        if language == own:
            return f"[{found['text']}](/{page}{PurePosixPath(target).suffix}{found['part'] or ''})"
        return f'<a href="{address(target, place, languages)}{found["part"] or ""}">{found["text"]}</a>'

    def in_html(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found["to"]))
        return f'<a href="{address(target, place, languages)}"'

    return LINK.sub(across, HTML_LINK.sub(in_html, text))


# --- Around the text --------------------------------------------------------------------------------------------------


def write_catalogue(folder: Path, language: str) -> None:
    """Write what Sphinx's own catalogues lack, as its locale_dirs want it: for pages, and for the search's JavaScript.

    Sphinx has an empty text for the number of pages found; theme and notebooks have none.
    """
    import sphinx

    place = Path(sphinx_name(language), "LC_MESSAGES")
    (folder / place).mkdir(parents=True)
    said = {english: translate(english, language) for english in NAVIGATION}
    entries = [f"msgid {json.dumps(a)}\nmsgstr {json.dumps(b, ensure_ascii=False)}" for a, b in said.items()]
    head = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=utf-8\\n"'
    (folder / place / "sphinx.po").write_text("\n\n".join([head, *entries]) + "\n", encoding="utf-8")
    theirs = Path(sphinx.package_dir) / "locale" / place / "sphinx.js"
    if theirs.is_file():
        catalogue = json.loads(theirs.read_text(encoding="utf-8").partition("(")[2].rpartition(")")[0])
        catalogue["messages"] |= {
            a: [b] if isinstance(catalogue["messages"].get(a), list) else b for a, b in said.items()
        }
        (folder / place / "sphinx.js").write_text(
            f"Documentation.addTranslations({json.dumps(catalogue)});\n", encoding="utf-8"
        )


def name_controls(pages: Iterable[Path], language: str) -> None:
    """Translate the names of buttons that are read aloud: the theme has them in English in its templates."""

    def said(found: re.Match) -> str:
        if found[1].startswith(OF_A_BRANCH):
            return translate(OF_A_BRANCH, language) + found[1].removeprefix(OF_A_BRANCH)
        return translate(found[1], language) if found[1] in NAVIGATION else found[1]

    for path in pages:
        path.write_text(LABELS.sub(said, path.read_text(encoding="utf-8")), encoding="utf-8")


def words_for_search(text: str) -> list[str]:
    """The words of a text, and of what has no spaces between its words, each two neighbouring signs."""
    words = []
    for run in RUN.findall(text):
        pairs = [run[i : i + 2] for i in range(len(run) - 1)] if "\u3400" <= run[0] <= "\u9fff" else []
        words += pairs or [run]
    return words


def search_in_pairs(language: str):
    """Sphinx's class for the search in a language without spaces. (Its own cuts words with a dictionary's package.)"""
    from sphinx.search import SearchLanguage

    class SearchPairs(SearchLanguage):
        lang = sphinx_name(language)
        language_name = language
        js_splitter_code = SPLIT_QUERY

        def split(self, input: str) -> list[str]:
            return words_for_search(input)

        def stem(self, word: str) -> str:
            return word.lower()

    return SearchPairs
