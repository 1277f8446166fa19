"""A dozen lines of the lesson's script with three faults in them, one of each colleague, for the reader to find."""

from __future__ import annotations

from qlora_lab.classroom.lessons.n09.machinery import SCRIPT

FAULTS = {  # by colleague: what the script says, and what that copy says instead
    "Ana": ("weight.data = weight.data.float()", "weight.data = weight.data.to(dtype)"),
    "Ben": ('if part_of.get(group, "train") == part', 'if part in ("train", part_of.get(group))'),
    "Cleo": ("max_length=args.max_length, completion_only_loss", "max_length=64, completion_only_loss"),
}
SHOWN = {  # what is shown: by title, how its first line begins and how many lines there are
    "split": ('for part in ("train"', 4),
    "training, some of its settings": ("    per_device_eval_batch_size", 5),
    "training, the loop before it": ("for weight in trainer", 3),
}


def broken() -> dict[str, list[str]]:
    """The lines by title, without what explains them."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in FAULTS.values():
        if text.count(old) != 1:
            raise ValueError(f"the script has {old!r} {text.count(old)} times, expected once")
        text = text.replace(old, new)
    lines = [line.partition("  # ")[0].rstrip() for line in text.splitlines()]
    parts = {}
    for title, (beginning, count) in SHOWN.items():
        first = next(i for i, line in enumerate(lines) if line.startswith(beginning))
        parts[title] = lines[first : first + count]
    return parts


def faulty_lines() -> dict[str, int]:
    """By colleague, the number of the line to blame, from 1 on."""
    lines = [line for part in broken().values() for line in part]
    return {name: 1 + next(i for i, line in enumerate(lines) if new in line) for name, (_, new) in FAULTS.items()}


def show_broken() -> None:
    """Print the lines under their titles, numbered from 1 on."""
    number = 0
    for title, lines in broken().items():
        print(f"---- {title}")
        for line in lines:
            number += 1
            print(f"{number:>2}  {line}")
