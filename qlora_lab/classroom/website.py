"""The course as a website: the learner's notebooks with their stored outputs, docs/, and the library's pages.

    make site
    python -m qlora_lab.classroom.website site

Nothing is run. The pages open from the folder, without a server or the internet, and can be searched. An edition in
another language is a website of its own in the folder of its name, `zh-TW/`, and pages lead to the same lesson in the
other. In a published copy (`make publish`), each lesson has links to Colab and Kaggle.
"""

from __future__ import annotations

import importlib
import io
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from qlora_lab import __version__, colab
from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.classroom.languages.edition import Edition, editions
from qlora_lab.classroom.languages.page import page_of
from qlora_lab.classroom.languages.site import (
    address,
    lead_across,
    name_controls,
    page_at,
    search_in_pairs,
    sphinx_name,
    write_catalogue,
)
from qlora_lab.classroom.languages.texts import ENGLISH, translate
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError
from qlora_lab.places import require_checkout

ROOMS = ("quantization", "memory", "finetuning")  # those that say in __all__ what is public
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md")
BADGES = re.compile(r"^\| \[(\w+)\]\(notebooks/\w+\.ipynb\) (\[!\[Colab\].*?) \|", re.MULTILINE)
PUBLIC = """# qlora_lab.{room}

```{{eval-rst}}
.. automodule:: qlora_lab.{room}
   :members:
   :imported-members:
   :exclude-members: {others}
```
"""
COLOUR = re.compile(r"\x1b\[\d+(;\d+)*m")
TITLE = re.compile(r"# @title (.*)\n")
LANGUAGES = """{% if languages %}<div class="sidebar-tree">
<p class="caption" role="heading"><span class="caption-text">{{ _("Other languages") }}</span></p>
<ul>{% for name, place in languages %}
<li class="toctree-l1"><a class="reference internal" href="{{ pathto(place, 1) }}">{{ name }}</a></li>
{% endfor %}</ul></div>{% endif %}
"""
# Figures are drawn on white. On a dark page they are turned over, white to black and each hue to itself. On a narrow
# screen they keep a width at which their words are legible, and are pushed sideways.
FIGURES = """@media screen {
  body[data-theme="dark"] .cell_output img { filter: invert(0.93) hue-rotate(180deg); }
}
@media screen and (prefers-color-scheme: dark) {
  body:not([data-theme="light"]) .cell_output img { filter: invert(0.93) hue-rotate(180deg); }
}
@media screen and (max-width: 46em) {
  .cell_output { overflow-x: auto; }
  .cell_output img { max-width: none; width: 36em; }
}
"""
SIDEBAR = ("brand", "search", "scroll-start", "navigation", "languages", "scroll-end")  # Furo's, and LANGUAGES
SETTINGS = {
    "project": "QLoRA Lab",
    "release": __version__,
    "html_title": "QLoRA Lab",
    "html_theme": "furo",
    "html_show_copyright": False,
    "html_show_search_summary": False,  # fetches pages, which browsers refuse when there is no server
    "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"],
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # sliders need a kernel: what they drew when they were stored is a picture
    "nb_code_prompt_show": "{type}",
    "nb_code_prompt_hide": "Fold",
    "myst_heading_anchors": 4,
    "autodoc_member_order": "bysource",
    "autodoc_typehints": "signature",
    "exclude_patterns": ["files"],
    "templates_path": ["templates"],
    "html_static_path": ["static"],
    "html_css_files": ["figures.css"],
    "html_sidebars": {"**": [f"sidebar/{part}.html" for part in SIDEBAR]},
}


def build(folder: Path, root: Path = REPOSITORY) -> None:
    """Write the website into `folder`, which is made anew; its first page is index.html.

    Raises UserError if Sphinx is not installed, if a link in a text leads nowhere (or anything else makes Sphinx
    warn), or if the folder has something else in it.
    """
    try:
        import sphinx  # noqa: F401
    except ImportError:
        raise UserError("the website is made by Sphinx: pip install -c constraints.txt -e '.[site]'") from None
    if folder.exists() and any(folder.iterdir()) and not (folder / "searchindex.js").is_file():
        raise UserError(f"{folder} is not empty, and no website of before: name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        made, found = Path(scratch, "html", ENGLISH), editions(root / "notebooks")
        pages = Path(scratch, "pages")
        write_pages(pages, root)
        names = [(each.name, f"{each.language}/index.html") for each in found]
        run_sphinx(pages, made, SETTINGS | {"html_context": {"languages": names}})
        for edition in found:
            pages = Path(scratch, f"pages-{edition.language}")
            write_edition(pages, edition, root)
            others = [("English", "../index.html")]
            others += [(name, f"../{place}") for name, place in names if name != edition.name]
            catalogue = Path(scratch, "catalogue", edition.language)
            run_sphinx(pages, made.with_name(edition.language), settings_of(edition, catalogue, others))
            name_controls(made.with_name(edition.language).rglob("*.html"), edition.language)
            shutil.move(made.with_name(edition.language), made / edition.language)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv"))


def settings_of(edition: Edition, catalogue: Path, others: list[tuple[str, str]]) -> dict:
    """Sphinx's settings for an edition. others: the websites in other languages, as LANGUAGES needs them."""
    write_catalogue(catalogue, edition.language)
    return SETTINGS | {
        "language": sphinx_name(edition.language),
        "locale_dirs": [str(catalogue)],
        "html_use_index": False,
        "html_context": {"languages": others},
    }


def run_sphinx(pages: Path, made: Path, settings: dict) -> None:
    """Make HTML of a folder of pages. Raises UserError with the first of Sphinx's warnings, if there are any."""
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace

    (pages / "templates" / "sidebar").mkdir(parents=True)
    (pages / "templates" / "sidebar" / "languages.html").write_text(LANGUAGES, encoding="utf-8")
    (pages / "static").mkdir()
    (pages / "static" / "figures.css").write_text(FIGURES, encoding="utf-8")
    warnings = io.StringIO()
    try:
        with docutils_namespace():  # a second website of this process begins anew
            cache = pages.with_name(f"{pages.name}-cache")
            app = Sphinx(pages, None, made, cache, "html", settings, status=None, warning=warnings)
            app.connect("autodoc-process-docstring", keep_lists)
            if app.config.language.startswith("zh"):
                app.add_search_language(search_in_pairs(app.config.language))
            app.build()
    except SphinxError as error:
        raise UserError(f"the website was not made: {error}") from None
    if warnings.getvalue():
        told = COLOUR.sub("", warnings.getvalue()).replace(f"{pages}/", "").splitlines()
        more = f"\nand {len(told) - 10} more lines" if len(told) > 10 else ""
        raise UserError("the website was not made, because Sphinx warns:\n" + "\n".join(told[:10]) + more)


def write_pages(pages: Path, root: Path) -> None:
    """What Sphinx reads: README as the first page, docs/, the notebooks for reading, a page for each public room."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    badges = dict(BADGES.findall(readme))
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        write_page(path, pages, badges.get(path.stem, ""), root)
    shutil.copytree(root / "docs", pages / "docs")
    for name in OTHERS:
        if (root / name).is_file():  # a students' copy has none
            shutil.copy(root / name, pages)
    (pages / "api").mkdir()
    described = set()
    for room in ROOMS:  # each name once
        names = importlib.import_module(f"qlora_lab.{room}").__all__
        others = ", ".join(name for name in names if name in described)
        (pages / "api" / f"{room}.md").write_text(PUBLIC.format(room=room, others=others), encoding="utf-8")
        described.update(names)
    docs = sorted(f"docs/{path.stem}" for path in (root / "docs").glob("*.md"))
    names = [f"notebooks/{path.stem}" for path in notebooks]
    on_path = [name for name in names if re.match(r"notebooks/\d", name)]
    parts = {
        "The path": on_path,
        "Deep dives": [name for name in names if name not in on_path],
        "More": [*docs, *(Path(name).stem for name in OTHERS if (root / name).is_file())],
        "Library": [f"api/{room}" for room in ROOMS],
    }
    write_index(pages, lead_across(readme, "README.md", languages_of(root), root), parts)


def write_edition(pages: Path, edition: Edition, root: Path) -> None:
    """What Sphinx reads for an edition: its README as the first page, and its notebooks for reading."""
    badges = dict(BADGES.findall((root / "README.md").read_text(encoding="utf-8")))
    notebooks = sorted((root / "notebooks" / edition.language).glob("*.ipynb"))
    for path in notebooks:
        write_page(path, pages, badges.get(path.stem, ""), root)
    page = page_of(edition)
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {SETTINGS['project']}\n"
    names = [f"notebooks/{path.stem}" for path in notebooks]
    on_path = [name for name in names if re.match(r"notebooks/\d", name)]
    parts = {"The path": on_path, "More": [name for name in names if name not in on_path]}
    parts = {translate(caption, edition.language): entries for caption, entries in parts.items()}
    write_index(pages, lead_across(text, page.name, languages_of(root), root), parts)


def write_index(pages: Path, text: str, parts: dict[str, list[str]]) -> None:
    """Write the first page. parts: by caption in the sidebar, the pages below it."""
    for caption, entries in parts.items():
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"
    pages.mkdir(parents=True, exist_ok=True)
    (pages / "index.md").write_text(text, encoding="utf-8")


def languages_of(root: Path) -> list[str]:
    return [each.language for each in editions(root / "notebooks")]


def write_page(path: Path, pages: Path, badges: str, root: Path) -> None:
    """Write a notebook's page, with links to its file, and to the same lesson in other languages.

    badges: Markdown, links to Colab and Kaggle for the English notebook, or empty.
    """
    place = path.relative_to(root).as_posix()  # notebooks/05_....ipynb, or notebooks/zh-TW/05_....ipynb
    languages = languages_of(root)
    language, page = page_at(place, languages)
    others = {} if language == ENGLISH else {"English": f"notebooks/{path.name}"}
    for edition in editions(root / "notebooks"):
        if edition.language != language:
            others[edition.name] = f"notebooks/{edition.language}/{path.name}"
    links = [f"{{download}}`{translate('Download this notebook', language)} <../files/{path.name}>`"]
    links += [badges.replace("notebooks/", f"{posixpath.dirname(place)}/")] if badges else []
    links += [
        f'<a href="{address(other, place, languages)}">{name}</a>'
        for name, other in others.items()
        if (root / other).exists()
    ]
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = lead_across(cell.source, place, languages, root)
    (pages / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(for_reading(notebook, " ".join(links)), pages / f"{page}.ipynb")
    (pages / "files").mkdir(exist_ok=True)
    shutil.copy(path, pages / "files")  # what learners download: the notebook itself, not the page's copy of it


def for_reading(notebook: NotebookNode, links: str) -> NotebookNode:
    """A notebook as a page: without its set-up cell, folded cells under their titles, figures with their alt texts.

    links: Markdown, below the title.
    """
    cells = [cell for cell in notebook.cells if not cell.source.startswith(colab.TITLE)]
    for cell in cells:
        if cell.cell_type != "code":
            continue
        settings = {}
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            if found := TITLE.match(cell.source):
                cell.source = cell.source[found.end() :]
                settings["code_prompt_show"] = found[1]
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                settings["image"] = {"alt": alt}
        if settings:
            cell.metadata["mystnb"] = settings
    cells.insert(1, nbformat.v4.new_markdown_cell(links))
    cells[1]["id"] = "links"  # another one each time otherwise
    notebook.cells = cells
    return notebook


def keep_lists(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Sphinx's hook for docstrings: what a room's files hold stands line by line, as in the source."""
    if what == "module":
        inner = [i for i, line in enumerate(lines) if line.startswith(" ") and not lines[i - 1].strip()]
        for i in reversed(inner):
            lines[i:i] = ["::", ""]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence."""
    print_anywhere()
    parser = Parser(prog="python -m qlora_lab.classroom.website", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is made anew; its first page is index.html")
    args = parser.parse_args(arguments)
    try:
        require_checkout()
        build(args.folder)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"open {args.folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
