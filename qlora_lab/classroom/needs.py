"""Which cells of a notebook need which, by the names that they read, give a value, or may change.

So that CI runs of the solved notebook only what the learner's, which it runs whole, does not prove already: behind it,
in the same kernel, where models are loaded and trained.
"""

import ast
import dis
import re
import types
from collections.abc import Iterator

MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)


def cells_to_prove(learner: list[dict], solved: list[dict]) -> set[int]:
    """The places of the solved notebook's code cells that have to run behind the learner's notebook, run whole.

    They are: cells that differ from the learner's in source, or in outputs that nbval compares; those that read,
    directly or through others, what these give a value or may change; and all before them that make what is read, if
    the learner's notebook ends with another value of it, or one of these cells gives it another. Any other cell has the
    same source, finds the same values and stores the same outputs in both notebooks.

    What a function changes of its arguments is not followed: there only `make test-all`, which runs the solved
    notebooks whole, sees a cell that ought to have run again.

    learner, solved: their code cells with outputs, the first cell of the one beside the first of the other, and so on.
    """
    names = [names_of(cell["source"]) for cell in solved]
    kept, different = set(), set()
    for place, (theirs, ours) in enumerate(zip(learner, solved, strict=True)):
        read, bound, changed = names[place]
        if theirs["source"] != ours["source"] or show_different(theirs, ours) or read & different:
            kept.add(place)
            different |= bound | changed
        else:
            different -= bound
    last: dict[str, int] = {}  # by name, the last of the learner's cells that gives it a value or may change it
    for place, cell in enumerate(learner):
        _, bound, changed = names_of(cell["source"])
        last |= dict.fromkeys(bound | changed, place)
    before: set[int] = set()
    while kept != before:
        before = set(kept)
        first: dict[str, int] = {}  # by name, the first of these cells that gives it a value or may change it
        for place in sorted(kept, reverse=True):
            _, bound, changed = names[place]
            first |= dict.fromkeys(bound | changed, place)
        needed: set[str] = set()
        for place in reversed(range(len(solved))):
            read, bound, changed = names[place]
            made = (bound | changed) & needed
            used_up = "seed(" in solved[place]["source"]  # a generator does not stay as it was set
            if place in kept or any(
                used_up or last.get(name) != place or first.get(name, place) < place for name in made
            ):
                kept.add(place)
                needed = (needed - bound) | read
            else:
                needed -= made  # there at the learner's end
    return kept


def show_different(learner: dict, solved: dict) -> bool:
    """Whether outputs differ. Those that nbval is told to ignore, as times and rates, do not count."""
    compared = "nbval-ignore-output" not in solved.get("metadata", {}).get("tags", [])
    return compared and shown(learner) != shown(solved)


def shown(cell: dict) -> list[dict]:
    """The outputs of a code cell, without counts and the pixels of pictures."""
    outputs = []
    for output in cell["outputs"]:
        data = {kind: what for kind, what in output.get("data", {}).items() if kind != "image/png"}
        outputs.append({**output, "data": data, "execution_count": None})
    return outputs


def names_of(source: str) -> tuple[set[str], set[str], set[str]]:
    """Of a cell, the names that it reads from before, that it gives a value, and whose objects it may change.

    What it calls something on may change (`model.eval()`), but not a function that it calls.
    """
    tree = ast.parse(MAGIC.sub(r"\1pass", source))
    read, bound = set(), set()
    for code in codes_of(compile(tree, "cell", "exec")):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and instruction.argval not in bound:
                read.add(instruction.argval)
            elif instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
                bound.add(instruction.argval)
    changed = set()
    for node in executed(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if not isinstance(node.value.func, ast.Name):
                changed.add(root_of(node.value.func))
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            changed.add(root_of(node))
    return read, bound - {"_"}, changed - {"", "__import__"}


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    """A cell's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """What runs with the cell: all but the bodies of its functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from executed(child)


def root_of(node: ast.expr) -> str:
    """The name that an expression such as model.layers[0].weight begins with; empty if it begins with none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
