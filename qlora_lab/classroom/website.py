"""The course as a website: the learner's notebooks with their stored outputs, docs/, and the library's pages.

    make site
    python -m qlora_lab.classroom.website site

Nothing is run. The pages open from the folder, without a server or the internet, and can be searched. In a published
copy (`make publish`), each lesson has links to Colab and Kaggle.
"""

from __future__ import annotations

import importlib
import io
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from qlora_lab import __version__, colab
from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.classroom.languages.edition import editions
from qlora_lab.classroom.languages.page import page_of
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
LINK = re.compile(r'<a href="([\w./-]+)\.ipynb"')  # inside of HTML; Sphinx follows those of Markdown
TITLE = re.compile(r"# @title (.*)\n")
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
}


def build(folder: Path, root: Path = REPOSITORY) -> None:
    """Write the website into `folder`, which is made anew; its first page is index.html.

    Raises UserError if Sphinx is not installed, if a link in a text leads nowhere (or anything else makes Sphinx
    warn), or if the folder has something else in it.
    """
    try:
        from sphinx.application import Sphinx
        from sphinx.errors import SphinxError
        from sphinx.util.docutils import docutils_namespace
    except ImportError:
        raise UserError("the website is made by Sphinx: pip install -c constraints.txt -e '.[site]'") from None
    if folder.exists() and any(folder.iterdir()) and not (folder / "searchindex.js").is_file():
        raise UserError(f"{folder} is not empty, and no website of before: name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        pages, made = Path(scratch, "pages"), Path(scratch, "html")
        write_pages(pages, root)
        warnings = io.StringIO()
        try:
            with docutils_namespace():  # a second website of this process begins anew
                app = Sphinx(pages, None, made, Path(scratch, "cache"), "html", SETTINGS, status=None, warning=warnings)
                app.connect("autodoc-process-docstring", keep_lists)
                app.build()
        except SphinxError as error:
            raise UserError(f"the website was not made: {error}") from None
        if warnings.getvalue():
            told = COLOUR.sub("", warnings.getvalue()).replace(f"{pages}/", "").splitlines()
            more = f"\nand {len(told) - 10} more lines" if len(told) > 10 else ""
            raise UserError("the website was not made, because Sphinx warns:\n" + "\n".join(told[:10]) + more)
        for edition in editions(root / "notebooks"):
            say_language((made / "notebooks" / edition.language).glob("*.html"), edition.language)
            say_language(made.glob(f"{page_of(edition).stem}.html"), edition.language)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv"))


def write_pages(pages: Path, root: Path) -> None:
    """What Sphinx reads: README as the first page, docs/, the notebooks for reading, a page for each public room."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    badges = dict(BADGES.findall(readme))
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    translated = {
        each: sorted((root / "notebooks" / each.language).glob("*.ipynb")) for each in editions(root / "notebooks")
    }
    for path in [*notebooks, *sum(translated.values(), [])]:
        write_page(path, pages, badges.get(path.stem, ""), root)
    shutil.copytree(root / "docs", pages / "docs")
    for name in OTHERS:
        if (root / name).is_file():  # a students' copy has none
            shutil.copy(root / name, pages)
    for each in translated:
        if (page := page_of(each)).is_file():
            links = page.read_text(encoding="utf-8").replace("](README.md)", "](index.md)")
            (pages / page.name).write_text(links, encoding="utf-8")
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
        **{
            each.name: [
                *([page_of(each).stem] if page_of(each).is_file() else []),
                *[f"notebooks/{each.language}/{path.stem}" for path in of],
            ]
            for each, of in translated.items()
        },
        "More": [*docs, *(Path(name).stem for name in OTHERS if (root / name).is_file())],
        "Library": [f"api/{room}" for room in ROOMS],
    }
    for caption, entries in parts.items():
        readme += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(entries) + "\n```\n"
    (pages / "index.md").write_text(readme, encoding="utf-8")


def write_page(path: Path, pages: Path, badges: str, root: Path) -> None:
    """Write a notebook's page, with links to its file, and to the same lesson in other languages.

    badges: Markdown, links to Colab and Kaggle for the English notebook, or empty.
    """
    place = path.relative_to(root)  # notebooks/05_....ipynb, or notebooks/zh-TW/05_....ipynb
    language = ENGLISH if len(place.parts) == 2 else place.parts[1]
    up = "../" * (len(place.parts) - 1)
    others = {} if language == ENGLISH else {"English": root / "notebooks" / path.name}
    for edition in editions(root / "notebooks"):
        if edition.language != language:
            others[edition.name] = root / "notebooks" / edition.language / path.name
    links = [f"{{download}}`{translate('Download this notebook', language)} <{up}files/{place}>`"]
    links += [badges.replace("notebooks/", f"{place.parent.as_posix()}/")] if badges else []
    links += [f"[{name}](/{other.relative_to(root).as_posix()})" for name, other in others.items() if other.exists()]
    page = for_reading(nbformat.read(path, as_version=4), " ".join(links))
    (pages / place).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page, pages / place)
    file = pages / "files" / place  # what learners download: the notebook itself, not the page's copy of it
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, file)


def say_language(paths: Iterable[Path], language: str) -> None:
    """Let pages say in which language they are: Sphinx knows one for all."""
    for path in paths:
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r'(<html[^>]* lang=)"en"', rf'\1"{language}"', text, count=1), encoding="utf-8")


def for_reading(notebook: NotebookNode, links: str) -> NotebookNode:
    """A notebook as a page: without its set-up cell, folded cells under their titles, figures with their alt texts.

    links: Markdown, below the title.
    """
    cells = [cell for cell in notebook.cells if not cell.source.startswith(colab.TITLE)]
    for cell in cells:
        if cell.cell_type != "code":
            cell.source = LINK.sub(r'<a href="\1.html"', cell.source)
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
