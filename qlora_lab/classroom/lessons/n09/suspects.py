"""A copy of the lesson's script with three faults in it, for the reader to find."""

from __future__ import annotations

from qlora_lab.classroom.lessons.n09.machinery import SCRIPT

FAULTS = {  # by name: what the script says, and what the copy says instead
    "validation": (
        "data = data.train_test_split(test_size=max(1, min(64, len(data) // 10)), seed=0)",
        'data = {"train": data, "test": data.select(range(min(64, len(data))))}',
    ),
    "length": (
        "per_device_eval_batch_size=args.batch, max_length=1024,",
        "per_device_eval_batch_size=args.batch, max_length=64,",
    ),
    "dtype": ("weight.data = weight.data.float()", "weight.data = weight.data.to(dtype)"),
}


def broken() -> list[str]:
    """The lines of the copy, without what explains them."""
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in FAULTS.values():
        if text.count(old) != 1:
            raise ValueError(f"the script has {old!r} {text.count(old)} times, expected once")
        text = text.replace(old, new)
    return [line.partition("  # ")[0].rstrip() for line in text.splitlines()]


def faulty_lines() -> dict[str, int]:
    """The line number of each fault, from 1."""
    lines = broken()
    return {name: 1 + next(i for i, line in enumerate(lines) if new in line) for name, (_, new) in FAULTS.items()}


def show_broken() -> None:
    """Print the copy from its model on, with line numbers."""
    lines = broken()
    first = next(i for i, line in enumerate(lines) if line.startswith("# ---- model"))
    last = next(i for i, line in enumerate(lines) if line.startswith("# ---- answer"))
    for number, line in enumerate(lines[first:last], first + 1):
        if line and not line.startswith("#"):
            print(f"{number:>3}  {line}")
