"""The mechanism behind every check (what it shows, records and raises), and the file that keeps progress."""

import csv
import datetime
import functools
import html
import io
import json
import math
import os
import reprlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import platformdirs
from filelock import FileLock

from qlora_lab.classroom.languages.texts import translate

CHECKLIST = {
    "quantization": "explain how quantization works (INT8, INT4, NF4)",
    "nf4": "say how NF4 differs from plain INT4",
    "config": "configure BitsAndBytesConfig",
    "train": "train a QLoRA model successfully",
    "memory": "measure and compare memory, LoRA against QLoRA",
    "accuracy": "analyse the loss of accuracy, LoRA against QLoRA",
}
MARKS = {"open": "·", "wrong": "✗", "right": "✓", "unavailable": "·"}


@dataclass(frozen=True)
class Exercise:
    """id: lesson and number, such as "7.2", or "D.1" in a deep dive. item: a key of CHECKLIST.

    points: 1 to 3, the difficulty's dots. optional: the item is ticked without it, since not every machine can do it.
    """

    id: str
    title: str
    item: str
    points: int
    optional: bool = False

    def __post_init__(self):
        if self.item not in CHECKLIST:
            raise ValueError(f"exercise {self.id} has item={self.item!r}: expected one of {', '.join(CHECKLIST)}")

    @property
    def in_a_dive(self) -> bool:
        """Whether it belongs to a deep dive: those do not count for the checklist."""
        return self.id[:1].isalpha()


@dataclass(frozen=True)
class Verdict:
    """state: "open", "wrong", "right", or "unavailable" if this machine lacks what the exercise needs.

    message: one sentence or two for the learner.
    """

    state: str
    message: str


class Check(Protocol):
    """What `exercise` returns: shows the verdict on an answer, records it and, in strict mode, raises it."""

    exercise: Exercise
    verdict: Callable[..., Verdict]

    def __call__(self, answer, /, *others) -> None: ...


class Mistake(Exception):
    """Ends a check from within a helper: the answer is wrong, and the message says why."""


class ExerciseUnsolved(Exception):
    """In strict mode: an exercise is open or wrong."""


# --- The mechanism ----------------------------------------------------------------------------------------------------


def right(message: str) -> Verdict:
    return Verdict("right", message)


def wrong(message: str) -> Verdict:
    return Verdict("wrong", message)


def exercise(
    id: str, title: str, *, item: str, points: int, todo: str, optional: bool = False
) -> Callable[[Callable[..., Verdict]], Check]:
    """Turn a function from an answer (and what else it needs) to a Verdict into a check that shows it.

    todo: completes the sentence "not attempted yet: ...".
    The check has the attributes `exercise` and `verdict`, see checks.py.
    """

    task = Exercise(id, title, item, points, optional)

    def decorate(judge: Callable[..., Verdict]) -> Check:
        @functools.wraps(judge)
        def verdict(answer, *others):
            try:
                if is_stub(answer):
                    raise NotImplementedError
                return judge(answer, *others)
            except NotImplementedError:
                return Verdict("open", f"not attempted yet: {todo}.")
            except Mistake as mistake:
                return wrong(str(mistake))
            except Exception as error:  # an answer that the check did not foresee
                return wrong(f"{described(answer)} could not be checked. {error_text(error)}")

        @functools.wraps(judge)
        def check(answer, *others):
            show(task, verdict(answer, *others))

        vars(check).update(exercise=task, verdict=verdict)
        return cast(Check, check)

    return decorate


def show(exercise: Exercise, verdict: Verdict) -> None:
    """Print the verdict on one line, record a solved exercise, and raise ExerciseUnsolved in strict mode."""
    line = " ".join(f"{MARKS[verdict.state]} {exercise.id} {translate(verdict.message)}".split())
    print(line)
    if verdict.state == "right":
        record(exercise.id)
    elif verdict.state != "unavailable" and os.environ.get("QLORA_LAB_STRICT", "0") not in ("", "0"):
        raise ExerciseUnsolved(line)


def is_stub(answer) -> bool:
    """Whether `answer` is None or `...`, or a tuple, list or dict that still holds a `...` or only None."""
    if isinstance(answer, (tuple, list, dict)) and answer:
        parts = list(answer.values() if isinstance(answer, dict) else answer)
        return any(part is ... for part in parts) or all(part is None for part in parts)
    return answer is None or answer is ...


def call(function: Callable, *arguments):
    """Return `function(*arguments)`. Call the learner's function only through here.

    Raises Mistake for what the function raises, with its line, and NotImplementedError if it returns a stub.
    """
    if not callable(function):
        raise Mistake(f"expected a function, got {described(function)}: hand over its name, without parentheses.")
    try:
        came = function(*arguments)
    except NotImplementedError as error:
        if not error.args:  # a stub's; torch's say what is not implemented
            raise
        raise Mistake(f"{written(function, arguments)} raised {error_text(error)}") from error
    except Exception as error:
        said, line = error_text(error), line_of(function, error)
        if line:
            raise Mistake(f"{written(function, arguments)} raised {said}, in the line `{line}`") from error
        raise Mistake(f"{written(function, arguments)} raised {said}") from error
    if is_stub(came):
        raise NotImplementedError
    return came


def line_of(function: Callable, error: Exception) -> str:
    """The source line of `function`, or of its cell, where `error` came up; empty if there is none."""
    file = function.__code__.co_filename if hasattr(function, "__code__") else None
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] or "" if lines else ""


def expect_number(source: str, came, expected: float, mistakes: Sequence[tuple[float, str]], tolerance=1e-9) -> None:
    """Raise Mistake unless `came` is the number `expected`, and say which mistake it looks like.

    source: what gave the number, to name it. came: a number, or a tensor with one element. tolerance: relative.
    mistakes: pairs of the value that a mistake leads to, and its explanation; the first that fits is shown.
    """
    try:
        if isinstance(came, (str, bytes)):  # float("3") would be 3.0
            raise TypeError
        value = float(came)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise Mistake(f"{source} gives {described(came)}, expected one number.") from None
    if not math.isclose(value, expected, rel_tol=tolerance):
        likely = (why for wrong_value, why in mistakes if math.isclose(value, wrong_value, rel_tol=tolerance))
        raise Mistake(f"{source} gives {value:,.10g}, expected {expected:,.10g}. {next(likely, '')}")


def expect_diagnosis(came, patients: dict[str, str], diseases: dict[str, str], clues: dict) -> None:
    """Raise Mistake unless `came` names the disease of each patient; it is about the first wrong one.

    patients: by name, a key of diseases. diseases: by key, what it is. clues: by (patient, wrong disease), what to look
    at.
    """
    *most, last = patients
    if not isinstance(came, dict) or not set(patients) <= set(came):
        raise Mistake(f"expected a dict with a diagnosis for {', '.join(most)} and {last}, got {described(came)}.")
    for patient, disease in patients.items():
        named = came[patient]
        if not isinstance(named, str) or named not in diseases:
            raise Mistake(f"{patient} has {described(named)}, expected one of {', '.join(map(repr, diseases))}.")
        if named != disease:
            raise Mistake(f"{patient} is not {named!r} ({diseases[named]}). {clues.get((patient, named), '')}")


def described(value) -> str:
    """What `value` is, in few characters, and in no language: "'bfloat16' (str)"."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def error_text(error: BaseException) -> str:
    """An error in one line: its type and message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def written(function: Callable, arguments: tuple) -> str:
    """The call as the learner would write it: "mask_prompt([1, 43], [53, 2])"."""
    return f"{getattr(function, '__name__', 'your function')}({', '.join(map(reprlib.repr, arguments))})"


# --- Progress ---------------------------------------------------------------------------------------------------------


def progress_path() -> Path:
    """Where progress is kept: the file named by QLORA_LAB_PROGRESS, else one in the user's data folder."""
    return Path(os.environ.get("QLORA_LAB_PROGRESS") or platformdirs.user_data_path("qlora-lab") / "progress.json")


def record(exercise_id: str) -> None:
    """Note that an exercise is solved, and the day. If that fails, say so; the verdict stands."""
    path = progress_path()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=10):  # two notebooks may solve something at once
            solved = read_progress(path)
            if exercise_id not in solved:
                solved[exercise_id] = datetime.date.today().isoformat()
                temporary.write_text(json.dumps({"solved": solved}), encoding="utf-8")
                os.replace(temporary, path)  # in one step: never half a file
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        print(f"· your progress could not be saved ({error})")


def read_progress(path: Path) -> dict[str, str]:
    """The ids of the solved exercises, and the day on which each was solved first, such as "2026-11-30".

    A file that cannot be understood is renamed, never deleted; so is one of the course's first edition (a list of ids),
    in which the lessons had other numbers.
    """
    try:
        solved = json.loads(path.read_text(encoding="utf-8"))["solved"]
        if isinstance(solved, list):
            return set_aside(path, "first-edition", "is of the course's first edition, whose lessons had other numbers")
        if not isinstance(solved, dict) or not all(isinstance(day, str) for day in solved.values()):
            raise ValueError("no exercises with their days")
        return solved
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError):
        return set_aside(path, "damaged", "was damaged")


def set_aside(path: Path, mark: str, why: str) -> dict[str, str]:
    """Rename a progress file, say so, and return the progress of somebody who begins."""
    aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.stem}.{mark}-{n}.json")).exists())
    os.replace(path, aside)
    print(f"· your progress file {why}: counting starts anew, and the old file is kept as {aside}")
    return {}


@dataclass(frozen=True, repr=False)
class Progress:
    """Which exercises are solved. Shows itself by item of the checklist: a table in Jupyter, text elsewhere.

    language: in which it does; empty: the kernel's. The exercises' ids, and what is kept, are the same in all.
    """

    exercises: tuple[Exercise, ...]
    solved: frozenset[str]
    language: str = ""

    def say(self, text: str) -> str:
        return translate(text, self.language)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """One row an item, for the path: its box, its sentence, "2 of 3", the next open exercise. Last, the dives."""
        rows, (path, dives) = [], self.parts()
        for item, sentence in CHECKLIST.items():
            mine = [exercise for exercise in path if exercise.item == item]
            still_open = [exercise for exercise in mine if exercise.id not in self.solved]
            waiting = [exercise for exercise in still_open if not exercise.optional]
            box = "☑" if mine and not waiting else "☐"
            count = f"{len(mine) - len(still_open):d} of {len(mine):d}" if mine else "no exercise yet"
            following = f"{still_open[0].id} {self.say(still_open[0].title)}" if still_open else ""
            rows.append((box, self.say(sentence), self.say(count), following))
        done = [exercise for exercise in dives if exercise.id in self.solved]
        last = ("", self.say("deep dives, for those who want more"), self.say(f"{len(done):d} of {len(dives):d}"), "")
        return rows + [last] * bool(dives)

    def parts(self) -> tuple[list[Exercise], list[Exercise]]:
        """The exercises of the path, and of the deep dives."""
        path = [exercise for exercise in self.exercises if not exercise.in_a_dive]
        return path, [exercise for exercise in self.exercises if exercise.in_a_dive]

    def summary(self) -> str:
        """What is solved on the path; the deep dives are counted in `rows`."""
        path, _ = self.parts()
        done = [exercise for exercise in path if exercise.id in self.solved]
        points = sum(exercise.points for exercise in done), sum(exercise.points for exercise in path)
        return self.say(f"{len(done):d} of {len(path):d} exercises solved, {points[0]:d} of {points[1]:d} points")

    def export(self, path: str | Path) -> Path:
        """Write one line an exercise (id, title, item, points, solved) to a .csv or .json file, and return its path.

        Raises ValueError for another ending.
        """
        path = Path(path)
        lines = [{**asdict(exercise), "solved": exercise.id in self.solved} for exercise in self.exercises]
        for line in lines:
            del line["optional"]
        if path.suffix == ".json":
            text = json.dumps({"summary": self.summary(), "exercises": lines}, indent=1) + "\n"
        elif path.suffix == ".csv":
            table = io.StringIO()
            writer = csv.DictWriter(table, ["id", "title", "item", "points", "solved"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
            text = table.getvalue()
        else:
            raise ValueError(f"{path.name}: the name of an export ends in .csv or .json")
        path.write_text(text, encoding="utf-8")
        return path

    def __repr__(self) -> str:
        say_next = self.say("next")
        lines = [
            f"{box or '+'} {sentence:<50} {count:<22} {say_next + ': ' + following if following else ''}".rstrip()
            for box, sentence, count, following in self.rows()
        ]
        return "\n".join([self.summary(), *lines])

    def _repr_html_(self) -> str:
        def cells(tag, texts):
            return "".join(f'<{tag} style="text-align:left">{html.escape(text)}</{tag}>' for text in texts)

        head = ("", self.say("I can"), self.say("solved"), self.say("next"))
        rows = [cells("th", head), *(cells("td", row) for row in self.rows())]
        return f"<p>{self.summary()}</p><table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
