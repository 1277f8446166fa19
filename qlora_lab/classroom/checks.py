"""Exercise checks and progress, as notebooks import them.

A check takes the learner's answer and shows one line: not attempted yet (·), what is wrong (✗), or right (✓).

    >>> def weight_bytes(parameters, bits):
    ...     return parameters * bits
    >>> check_bytes_of_weights(weight_bytes)
    ✗ 0.1 weight_bytes(134515008, 32) gives 4,304,480,256, expected 538,060,032. These are bits: eight make a byte.

It never raises, unless QLORA_LAB_STRICT=1 is set: then everything but ✓ raises ExerciseUnsolved. Solved exercises are
noted in a small JSON file, and `progress()` shows them by item of the course's checklist.

To add a check, write a function from the answer to a Verdict in the lesson's folder (lessons/n04/checks.py), decorate
it, and give tests/classroom/lessons/n04/answers.py a right answer and the wrong ones it should recognize:

    @exercise("3.2", "level usage", item="nf4", points=2, todo="complete `level_usage`")
    def check_level_usage(level_usage):
        came = call(level_usage, codes)          # catches what the learner's code raises, and stubs
        if ...:
            return wrong("Your shares sum to 0.5. Which of the two codes in each byte is missing?")
        return right("...")

This module then has it: it is listed nowhere else. `check_level_usage(answer)` shows, records and, in strict mode,
raises; `check_level_usage.verdict(answer)` is the pure function for the tests: it returns the Verdict and does nothing
else.
"""

import importlib
import pkgutil

from qlora_lab.classroom import lessons
from qlora_lab.classroom.certificate import Certificate
from qlora_lab.classroom.judging import Check, Exercise, Progress, progress_path, read_progress


def checks_of_lessons() -> dict[str, Check]:
    """The checks in lessons/*/checks.py by name, in the course's order: what `exercise` decorates."""
    found = {}
    rooms = [module.name for module in pkgutil.iter_modules(lessons.__path__)]
    for lesson in sorted(rooms, key=lambda room: (room.startswith("dive_"), room)):
        module = importlib.import_module(f"{lessons.__name__}.{lesson}.checks")
        found |= {name: check for name, check in vars(module).items() if hasattr(check, "exercise")}
    return found


CHECKS = checks_of_lessons()
globals().update(CHECKS)
__all__ = ["CHECKS", "all_exercises", "certificate", "progress", *CHECKS]


def all_exercises() -> tuple[Exercise, ...]:
    """The exercises of all notebooks, in the course's order."""
    return tuple(check.exercise for check in CHECKS.values())


def progress() -> Progress:
    """Your progress: which exercises are solved, by item of the course's checklist."""
    return Progress(all_exercises(), frozenset(solved_days()))


def certificate() -> Certificate:
    """What you have solved, when and with which versions; `.save("certificate.html")` writes a page to print."""
    return Certificate(all_exercises(), solved_days())


def solved_days() -> dict[str, str]:
    """The exercises that are solved, and the day of each; none, with a line that says why, if they cannot be read."""
    try:
        return read_progress(progress_path())
    except OSError as error:
        print(f"· your progress could not be read ({error})")
        return {}
