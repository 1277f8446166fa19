"""The templates of what a lesson's code says (labels of figures, titles, checks' messages), and their translations.

`templates` finds them in the code: string literals, and f-strings with their fields numbered. What is plainly no text
for a reader is left out: options of matplotlib, names of columns and weights, what `print` shows (a notebook's code is
the same in all languages, and prints English). The rest errs on the side of more: repeating the English text keeps it.

A lesson's file is JSON: English template -> translated template, "" for what is missing. An entry of which the English
has changed begins with OUTDATED, the old English and the old translation, until somebody has looked at it.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_lab.classroom.drafts import draft_notebooks
from qlora_lab.classroom.languages.texts import is_specific
from qlora_lab.classroom.source import BuildError, room
from qlora_lab.places import PACKAGE

CLASSROOM = PACKAGE / "classroom"
SHARED = ("plots.py", "widgets.py", "judging.py", "certificate.py", "checks.py")
NAVIGATION = (  # what the website's pages say around a text: Sphinx's messages, the theme's, and names of buttons
    *("On this page", "Skip to content", "Back to top", "Next", "Previous", "Home", "View this page", "Search"),
    *("Made with ", '<a href="https://www.sphinx-doc.org/">Sphinx</a> and ', "Link to this heading", "Permalink"),
    *("Error", "Please activate JavaScript to enable the search functionality.", "Hide Search Matches"),
    "Search finished, found one page matching the search query.",
    *("Toggle site navigation sidebar", "Toggle table of contents sidebar", "Toggle navigation of "),
    *("Toggle Light / Dark / Auto color theme", "Toggle hidden content"),
    *("The path", "More", "Other languages"),
)
PHRASES = (  # of the build itself, and single words of tables and buttons, which code does not tell from other names
    *NAVIGATION,
    "Solution",
    "your code here",
    "your code (about 1 line)",
    "your code (about {0} lines)",
    *("exercise", "points", "day", "solved", "next", "With", "Ask", "model", "answer", "name"),
    *("load", "forward", "backward", "weight update", "equal"),  # phases of a record; matplotlib has "equal" as well
    "Download this notebook",
    "outputs from",
)
OUTDATED = "??"
SILENT_CALLS = {"print", "getattr", "setattr", "open", "run", "import_module", "load_model", "replace", "add_parser"}
PLOT_OPTIONS = set(
    "color colors linestyle linestyles linewidth marker markersize fmt ha va loc textcoords xycoords xytext bbox pad "
    "layout hatch edgecolor facecolor markerfacecolor markeredgecolor fontsize frameon ncols which axis sharex sharey "
    "family weight arrowstyle connectionstyle where interpolation transform xscale yscale cmap align orientation "
    "coords spines gid icon button_style".split()
)
OPTIONS = PLOT_OPTIONS | set(
    "device dtype mode encoding item optimizer targets format padding_side model_name schedule method quantization "
    "compute_dtype".split()
)
TECHNICAL = set(
    "white black none center left right top bottom upper lower both log linear constrained inline major minor same "
    "full auto equal png int float str bool data axes figure utf".split()
)
SENTENCE = re.compile(r"[A-Za-z][a-z]+['’,.:;!?)]*\s+\S|\S\s+[A-Za-z]?[a-z]{2,}", re.DOTALL)
LABEL = re.compile(r"[A-Za-z][a-z]{2,}(-[a-z]{2,})*:?")
MARKUP = re.compile(r"</?\w|<\{|;[a-z-]+:|@media")


def templates(code: str, *, sentences_only: bool = False) -> list[str]:
    """The templates in Python code, in order, each once."""
    tree = ast.parse(code)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = {}
    for node in ordered(tree):
        text = text_of(node)
        if text is None or MARKUP.search(text) or is_part_of_a_text(node, parents) or not is_said(node, parents):
            continue
        is_title = is_argument(node, parents, "exercise", 1)
        said = SENTENCE.search(text) or (not sentences_only and LABEL.fullmatch(text) and text not in TECHNICAL)
        if (said or is_title) and is_specific(text):
            found[text] = None
    return list(found)


def ordered(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, in the order in which they are written."""
    for child in ast.iter_child_nodes(node):
        yield child
        yield from ordered(child)


def text_of(node: ast.AST) -> str | None:
    """The template of a literal or f-string; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if not isinstance(node, ast.JoinedStr):
        return None
    text, number = "", 0
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue):
            text += f"{{{number}{specification(part)}}}"
            number += 1
    return text


def specification(field: ast.FormattedValue) -> str:
    """The format of a field, with its colon; empty if there is none, or one that is computed."""
    if not isinstance(field.format_spec, ast.JoinedStr):
        return ""
    parts = field.format_spec.values
    if len(parts) != 1 or not isinstance(parts[0], ast.Constant):
        return ""
    return f":{parts[0].value}"


def is_part_of_a_text(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a node is the plain part of an f-string, or its format."""
    parent = parents.get(node)
    return isinstance(parent, ast.JoinedStr) or (isinstance(parent, ast.FormattedValue) and node is parent.format_spec)


def is_said(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a text may be one that a learner reads, judged by where it stands."""
    child, parent = node, parents.get(node)
    if isinstance(parent, (ast.Expr, ast.Compare, ast.Assert)):
        return False
    while parent is not None and not isinstance(parent, ast.stmt):
        if isinstance(parent, ast.arg):
            return False
        if isinstance(parent, ast.Subscript) and child is parent.slice:
            names_a_bar = isinstance(parent.ctx, ast.Store) and text_of(node) not in PLOT_OPTIONS
            if not names_a_bar:
                return False
        if isinstance(parent, ast.Call) and child is not parent.func and name_of_call(parent) in SILENT_CALLS:
            return False
        if isinstance(parent, ast.keyword) and parent.arg in OPTIONS:
            return False
        if isinstance(parent, ast.Dict) and is_option(child, parent):
            return False
        child, parent = parent, parents.get(parent)
    if isinstance(parent, ast.FunctionDef) and child is parent.returns:
        return False
    if isinstance(parent, ast.Raise):
        return "Mistake" in ast.unparse(parent)
    return not isinstance(parent, (ast.Assert, ast.Import, ast.ImportFrom))


def is_option(child: ast.AST, options: ast.Dict) -> bool:
    """Whether a part of a dict is the name or the value of an option, as in `{"textcoords": "offset points"}`."""
    for key, value in zip(options.keys, options.values, strict=True):
        if child in (key, value) and isinstance(key, ast.Constant):
            return key.value in PLOT_OPTIONS or (key.value == "label" and child is key)
    return False


def name_of_call(call: ast.Call) -> str:
    """The last name in what is called: "set_title" of `ax.set_title(...)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def is_argument(node: ast.AST, parents: dict[ast.AST, ast.AST], name: str, place: int) -> bool:
    """Whether a node is the argument at a place, from 0, of a call of that name."""
    call = parents.get(node)
    return isinstance(call, ast.Call) and name_of_call(call) == name and call.args[place : place + 1] == [node]


# --- Of a lesson ------------------------------------------------------------------------------------------------------


def shared_templates() -> list[str]:
    """Those of all lessons together: of shared plots, widgets, verdicts and progress, and of the build."""
    found = dict.fromkeys(PHRASES)
    for name in SHARED:
        code = (CLASSROOM / name).read_text(encoding="utf-8")
        found |= dict.fromkeys(templates(code, sentences_only=name != "plots.py"))
    return list(found)


def lesson_templates(source: Path) -> list[str]:
    """Those of a lesson: its figures, machinery, checks and the code of its notebook; without the shared ones."""
    found: dict[str, None] = {}
    for path in sorted((CLASSROOM / "lessons" / room(source.stem)).glob("*.py")):
        code = path.read_text(encoding="utf-8")
        found |= dict.fromkeys(templates(code, sentences_only=path.name == "checks.py"))
    for cell in draft_notebooks(source)[1]["cells"]:
        if cell["cell_type"] == "code" and not cell.get("claims") and "line" in cell:
            code = re.sub(r"^(\s*)([%!])", r"\1# \2", cell["source"], flags=re.MULTILINE)
            found |= dict.fromkeys(templates(code))
    shared = set(shared_templates())
    return [template for template in found if template not in shared]


# --- The file ---------------------------------------------------------------------------------------------------------


def read_labels(path: Path) -> dict[str, str]:
    """The translations in a file; none if there is no file. Raises BuildError if it is damaged."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(text, str) for text in labels.values()):
            raise ValueError("not all values are texts")
        return labels
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise BuildError(f"{path.name} is no JSON of English and translated texts: {error}") from None


def renewed(wanted: list[str], labels: dict[str, str]) -> dict[str, str]:
    """The content of a file that has an entry for each template; at the end, those that belong to none.

    A new template that resembles one that is gone gets its translation, marked as outdated.
    """
    gone = {english: text for english, text in labels.items() if english not in wanted}
    new = {english: labels.get(english, "") for english in wanted}
    for english in wanted:
        if not new[english] and (near := difflib.get_close_matches(english, list(gone), n=1, cutoff=0.7)):
            new[english] = f"{OUTDATED} {near[0]} {OUTDATED} {gone.pop(near[0])}"
    return new | gone


def file_of_labels(labels: dict[str, str]) -> str:
    return json.dumps(labels, ensure_ascii=False, indent=1) + "\n"
