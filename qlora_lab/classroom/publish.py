"""The address of one's own copy, where learners meet it: in every notebook's set-up cell, and in README as badges.

    make publish ADDRESS=https://github.com/you/qlora-lab
    python -m qlora_lab.classroom publish ADDRESS [--branch main]

Nothing is run again: outputs stay. It works in the students' copy, too, which has no sources. An empty address takes
it back. Colab and Kaggle open notebooks from GitHub only: elsewhere there are no badges, but the set-up cell works.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from qlora_lab import colab
from qlora_lab.classroom.drafts import identity
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

CONSTANT = re.compile(r'^ADDRESS = ".*?"', re.MULTILINE)
ROW = re.compile(r"^(\| \[(\w+)\]\((notebooks/\w+\.ipynb)\)).*?( \| .*)$", re.MULTILINE)
COLAB = (
    "[![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{})"
)
KAGGLE = "[![Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src={})"


def publish(address: str, branch: str = "main", root: Path = REPOSITORY) -> bool:
    """Write the address into the set-up cells, `qlora_lab/colab.py` and README; whether README has badges now.

    branch: from which Colab and Kaggle take the notebooks.

    Raises UserError for what is no address that everybody can clone from.
    """
    address = address.removesuffix("/").removesuffix(".git")
    if address and not re.fullmatch(r"https://[\w.-]+(:\d+)?(/[\w.~-]+)+", address):
        raise UserError(f"{address!r} is no address that everybody can clone from: https://github.com/you/qlora-lab")
    if not re.fullmatch(r"[\w./-]+", branch):
        raise UserError(f"{branch!r} is no name of a branch")
    notebooks = sorted(path for path in root.glob("notebooks/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    texts = {path: with_cell(path, address, language_of(path, root)) for path in notebooks}
    module = root / "qlora_lab" / "colab.py"
    texts[module] = CONSTANT.sub(f'ADDRESS = "{address}"', module.read_text(encoding="utf-8"), count=1)
    name = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    readme = root / "README.md"

    def row(found: re.Match) -> str:
        place = f"{name[1]}/blob/{branch}/{found[3]}" if name else ""
        badges = f" {COLAB.format(place)} {KAGGLE.format(f'https://github.com/{place}')}" if name else ""
        return f"{found[1]}{badges}{found[4]}"

    texts[readme] = ROW.sub(row, readme.read_text(encoding="utf-8"))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8", newline="\n")
    return bool(name)


def language_of(path: Path, root: Path) -> str:
    """The language of a notebook, by its folder in notebooks/; empty for English."""
    folder = path.relative_to(root / "notebooks").parts[0]
    return "" if folder in (path.name, "solutions") else folder


def with_cell(path: Path, address: str, language: str) -> str:
    """The file of a notebook with another set-up cell. Raises UserError if it has none."""
    import nbformat

    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith(colab.TITLE):
            known_by = f"{path.stem}\n{cell['cell_type']}\n{colab.cell(address)}"  # in all languages
            cell |= {"source": colab.cell(address, language), "id": identity(known_by)}
            return nbformat.writes(nbformat.from_dict(notebook)) + "\n"
    raise UserError(f"{path.name} has no set-up cell: build it again")
