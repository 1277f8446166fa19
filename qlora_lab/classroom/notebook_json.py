"""A notebook's JSON, as nbformat 4 stores it."""

from __future__ import annotations

import json

CELL_TYPES = ("code", "markdown", "raw")


def parse_notebook(text: str | bytes) -> dict:
    """A notebook whose sources and outputs are strings: nbformat may have stored them as lists of lines.

    Bytes may be in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        ValueError: this is no notebook of version 4; the message says what was in the way.
    """
    try:
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
            if cell["cell_type"] not in CELL_TYPES:
                raise ValueError(f"a cell of type {cell['cell_type']!r}")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                data.update({mime: joined(content) for mime, content in data.items()})
                if "text" in output:
                    output["text"] = joined(output["text"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return notebook


def joined(content):
    """A text that may be a list of lines, as one string; anything else as it is."""
    is_lines = isinstance(content, list) and all(isinstance(line, str) for line in content)
    return "".join(content) if is_lines else content
