"""A copy of the lesson's script with three faults in it, for the reader to find."""

from __future__ import annotations

from qlora_lab.classroom.lessons.n09.machinery import SCRIPT

FAULTS = {  # by name: what the script says, and what the copy says instead
    "held out": ('if part_of.get(group, "train") == part', 'if part in ("train", part_of.get(group))'),
    "length": ("max_length=args.max_length, completion_only_loss", "max_length=64, completion_only_loss"),
    "dtype": ("weight.data = weight.data.float()", "weight.data = weight.data.to(dtype)"),
}
LEFT_OUT = ("# ---- look", "trainer.train(")  # from the line that begins so up to the other


def broken() -> list[str]:
    """The lines of the copy, without what explains them."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in FAULTS.values():
        if text.count(old) != 1:
            raise ValueError(f"the script has {old!r} {text.count(old)} times, expected once")
        text = text.replace(old, new)
    lines = [line.partition("  # ")[0].rstrip() for line in text.splitlines()]
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(words)) for words in LEFT_OUT)
    return lines[:first] + lines[last:]


def faulty_lines() -> dict[str, int]:
    """The line number of each fault, from 1."""
    lines = broken()
    return {name: 1 + next(i for i, line in enumerate(lines) if new in line) for name, (_, new) in FAULTS.items()}


def show_broken() -> None:
    """Print the copy from its split on, with line numbers."""
    lines = broken()
    first = next(i for i, line in enumerate(lines) if line.startswith("# ---- split"))
    last = next(i for i, line in enumerate(lines) if line.startswith("# ---- judge"))
    for number, line in enumerate(lines[first:last], first + 1):
        if line and not line.startswith("#"):
            print(f"{number:>3}  {line}")
