"""The files of a new lesson, exercise or data set, with all that must know of them; and a lesson taken out again.

Nothing here is listed a second time: checks and answers are found by their folders. What names a lesson beside its
files are README's table and `data/records/notebooks.json`, what its card promises; both are written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qlora_lab.classroom import templates
from qlora_lab.classroom.judging import CHECKLIST
from qlora_lab.classroom.source import NAME, REPOSITORY, exercises_of, find_all, room
from qlora_lab.errors import UserError
from qlora_lab.training.data import read_chats

LESSONS, ANSWERS = "qlora_lab/classroom/lessons", "tests/classroom/lessons"
RECORD = "data/records/notebooks.json"
ROW = re.compile(r"^\| \[(\w+)\]\(notebooks/.*\|\n", re.MULTILINE)  # of README's table


def new_lesson(stem: str, title: str, root: Path = REPOSITORY) -> list[Path]:
    """Write the source, checks, figures and answers of a lesson, and its row in README's table.

    stem: such as "17_my_lesson", or "dive_z_my_dive" for a deep dive. title: a question, as those of the other lessons.

    Returns the files. Raises UserError for a name that is no lesson's, or whose number is taken.
    """
    if not NAME.fullmatch(stem):
        raise UserError(
            f"{stem!r} is no name of a lesson: two digits and a word, such as 17_my_lesson, or dive_z_my_dive"
        )
    here = room(stem)
    if taken := [path for path in find_all(root / "notebooks") if room(path.stem) == here]:
        raise UserError(f"the {'letter' if stem[0] == 'd' else 'number'} is taken by {taken[0].stem}: take another")
    if not title or re.search(r'[|\n"`]', title):
        raise UserError(f'{title!r} is no title: one line of text without ", | and `, such as "what does it cost?"')
    number = stem[:2] if stem[0] != "d" else f"Dive {exercises_of(stem)}"
    names = {"stem": stem, "room": here, "id": exercises_of(stem), "number": number, "title": title}
    names["Title"] = capital(title)
    files = {
        root / "notebooks" / "source" / f"{stem}.py": templates.LESSON.format(**names),
        root / LESSONS / here / "__init__.py": f'"""{stem}: {title}"""\n',
        root / LESSONS / here / "figures.py": templates.FIGURES.format(**names),
        root / LESSONS / here / "checks.py": templates.CHECKS.format(**names),
        root / ANSWERS / here / "answers.py": templates.ANSWERS.format(**names),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    before = [row for row in ROW.finditer(readme) if row[1] < stem]
    place = before[-1].end() if before else next(ROW.finditer(readme)).start()
    row = f"| [{stem}](notebooks/{stem}.ipynb) | {title} | 1 |\n"
    (root / "README.md").write_text(readme[:place] + row + readme[place:], encoding="utf-8")
    return [*files, root / "README.md"]


def new_exercise(lesson: str, name: str, title: str, item: str, points: int, root: Path = REPOSITORY) -> list[Path]:
    """Write an exercise into a lesson: stub and check into its source, the check, and answers for the tests.

    lesson: the beginning of its name. name: of the learner's function. item: of the course's checklist.

    Returns the files. Raises UserError for a lesson that is not there, or a name that is taken or is none.
    """
    source = find_lesson(lesson, root)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{name!r} is no name of a function: small letters, digits and _, such as mean_scale")
    if re.search(r'[\n"`{}]', title) or not title:
        raise UserError(f'{title!r} is no title: one line of text without ", ` and braces')
    if item not in CHECKLIST:
        raise UserError(f"the checklist has no item {item!r}: it has {', '.join(CHECKLIST)}")
    here = room(source.stem)
    taken = [
        path
        for path in (root / LESSONS).glob("*/checks.py")
        if f"def check_{name}(" in path.read_text(encoding="utf-8")
    ]
    if taken:
        raise UserError(f"{taken[0].parent.name} has a check_{name} already: take another name")
    checks, answers = root / LESSONS / here / "checks.py", root / ANSWERS / here / "answers.py"
    number = exercises_of(source.stem)
    used = re.findall(rf'@exercise\(\s*"{number}\.(\d+)"', checks.read_text(encoding="utf-8"))
    names = {"id": f"{number}.{1 + max(map(int, used), default=0)}", "name": name, "title": title, "item": item}
    names |= {"Title": capital(title), "points": points, "dots": "●" * points + "○" * (3 - points)}

    text = source.read_text(encoding="utf-8")
    place = re.search(r"^# %%[^\n]*\n(# ## Recap\n|(#[^\n]*\n)*progress\(\))", text, re.MULTILINE)
    at = place.start() if place else len(text)
    text = text[:at] + templates.EXERCISE.format(**names) + text[at:]
    source.write_text(with_import(text, "qlora_lab.classroom.checks", f"check_{name}"), encoding="utf-8")

    text = checks.read_text(encoding="utf-8").rstrip() + "\n" + templates.CHECK.format(**names)
    for needed in ("Verdict", "call", "exercise", "expect_number", "right"):
        text = with_import(text, "qlora_lab.classroom.judging", needed)
    checks.write_text(text, encoding="utf-8")

    text = with_import(answers.read_text(encoding="utf-8"), "qlora_lab.classroom.checks", f"check_{name}")
    for collection, lines in (("RIGHT", templates.RIGHT_ANSWER), ("WRONG", templates.WRONG_ANSWERS)):
        text = re.sub(rf"^{collection} = \[\]", f"{collection} = [\n]", text, flags=re.MULTILINE)
        ends = re.search(rf"^{collection} = \[(?:.*\n)*?\](?=.*$)", text, re.MULTILINE)
        if not ends:
            raise UserError(f"{answers.relative_to(root)} has no list {collection} = [...] whose ] begins a line")
        text = text[: ends.end() - 1] + lines.format(**names) + text[ends.end() - 1 :]
    answers.write_text(text, encoding="utf-8")
    tidy([source, checks, answers], root)
    return [source, checks, answers]


def new_dataset(name: str, files: list[Path], made_by: str, root: Path = REPOSITORY) -> list[Path]:
    """Copy JSON lines of chats to data/NAME, or write an example, and list them in data/README.md with their sums.

    files: named by their split, such as train.jsonl. made_by: where they are from, and the licence.

    Returns the files. Raises UserError for a name that is taken, a file that is no such data, or without `made_by`.
    """
    folder = root / "data" / name
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or folder.exists():
        raise UserError(f"{name!r} is taken, or no name of a data set: small letters, digits and -, such as tickets")
    if not made_by or re.search(r"[|\n]", made_by):
        raise UserError('say in one line where the data is from and under which licence: --made-by "..."')
    if wrong := next((path for path in files if path.suffix != ".jsonl"), None):
        raise UserError(f"{wrong.name} is not named as JSON lines are: train.jsonl, one chat a line")
    for path in files:
        read_chats(path)
    folder.mkdir(parents=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if not files:
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(templates.SAMPLES, encoding="utf-8", newline="\n")
    written = sorted(folder.glob("*.jsonl"))
    lines = [path.read_bytes().count(b"\n") for path in written]
    what = ", ".join(f"{count} `{path.stem}`" for count, path in zip(lines, written, strict=True))
    readme = (root / "data" / "README.md").read_text(encoding="utf-8")
    row = f"| `{name}/` | chats: {what} | {made_by} | see below |\n"
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}/{path.name}\n" for path in written)
    readme = readme.replace("| `records/` |", f"{row}| `records/` |", 1)
    readme = re.sub(r"((?:^[0-9a-f]{64}  \S+\n)+)", lambda found: found[1] + sums, readme, count=1, flags=re.MULTILINE)
    (root / "data" / "README.md").write_text(readme, encoding="utf-8")
    return [*written, root / "data" / "README.md"]


def drop_lesson(lesson: str, root: Path = REPOSITORY) -> list[str]:
    """Delete a lesson's files, its row and its record. Returns the lines elsewhere that still speak of it.

    Raises UserError for a name that is no lesson's whole name.
    """
    source = find_lesson(lesson, root)
    stem, here = source.stem, room(source.stem)
    if lesson != stem:
        raise UserError(f"{lesson!r} is only the beginning of {stem}: what is to be deleted must be named in full")
    checks = re.findall(r"def (check_\w+)", (root / LESSONS / here / "checks.py").read_text(encoding="utf-8"))
    for path in (source, source.with_suffix(".json"), *(root / "notebooks").glob(f"**/{stem}.*")):
        path.unlink(missing_ok=True)
    for folder in (root / LESSONS / here, root / ANSWERS / here):
        shutil.rmtree(folder, ignore_errors=True)
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = "".join(row[0] for row in ROW.finditer(readme) if row[1] == stem)
    (root / "README.md").write_text(readme.replace(rows, "") if rows else readme, encoding="utf-8")
    record = json.loads((root / RECORD).read_text(encoding="utf-8"))
    record["notebooks"].pop(stem, None)
    (root / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    spoken = rf"\b(notebook|lesson)s? {stem[:2]}\b" if stem[0] != "d" else rf"\b[Dd]ive {exercises_of(stem)}\b"
    told = re.compile(rf"\b({'|'.join([stem, here, *checks])})\b|{spoken}")
    places = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("notebooks/source/*.py")]
    places += root.glob("notebooks/source/*/edition.json")
    places += [*root.glob("tests/**/*.py"), *root.glob("qlora_lab/**/*.py")]
    return [
        f"{path.relative_to(root).as_posix()}:{count}: {line.strip()[:80]}"
        for path in places
        for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if told.search(line)
    ]


def capital(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def find_lesson(lesson: str, root: Path) -> Path:
    """The source of the one lesson whose name begins so. Raises UserError if it is none, or several."""
    sources = find_all(root / "notebooks")
    found = [path for path in sources if path.stem.startswith(lesson)]
    if len(found) != 1:
        raise UserError(f"{lesson!r} is no lesson: there are {', '.join(path.stem for path in sources)}")
    return found[0]


def with_import(text: str, module: str, name: str) -> str:
    """A script that imports a name, too; `tidy` puts the line where it belongs."""
    imported = re.search(rf"^from {re.escape(module)} import (\([^)]*\)|.*)$", text, re.MULTILINE)
    if imported and re.search(rf"\b{name}\b", imported[1]):
        return text
    line = f"from {module} import {name}\n"
    first = re.search(r"^(from|import) ", text, re.MULTILINE)
    place = imported.start() if imported else first.start() if first else -1
    if place < 0:  # below the docstring
        head, _, rest = text.partition('"""\n')
        return f'{head}"""\n\n{line}\n{rest.lstrip()}' if rest else f"{text}\n{line}\n"
    return text[:place] + line + text[place:]


def tidy(paths: list[Path], root: Path) -> None:
    """Put imports in order and lay the code out as `make check` wants it."""
    files = [str(path) for path in paths]
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=root, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(
                f"ruff is missing, or fails: pip install -e '.[dev]' ({(done.stdout + done.stderr).strip()})"
            )


def run(source: Path, *, record: bool, root: Path = REPOSITORY) -> None:
    """Build both notebooks and run them; record: run the learner's under nbval, too, and write down what it took.

    Raises UserError if a run fails; the command has said why.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    build = [sys.executable, "-m", "qlora_lab.classroom.build"]
    if subprocess.run([*build, "--execute", source.stem], cwd=root, env=env).returncode:
        raise UserError(
            f"{source.stem} does not run yet, see above; then: {' '.join(['python', *build[1:]])} --execute"
        )
    if not record:
        return
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run([*build, "--with-claims", folder, source.stem], cwd=root, env=env).returncode:
            raise UserError(f"{source.stem} is out of step, see above")
        target = Path(folder) / "record.json"
        nbval = [
            "-c",
            "pyproject.toml",
            f"--rootdir={folder}",
            "-p",
            "tests.labels",
            "-p",
            "no:cacheprovider",
            "--nbval",
        ]
        nbval += ["--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
        command = [sys.executable, "-m", "pytest", "--quiet", *nbval, "--record-labels", str(target)]
        if subprocess.run([*command, str(Path(folder) / f"{source.stem}.ipynb")], cwd=root, env=env).returncode:
            raise UserError(f"{source.stem} shows other things when it is run again, see above")
        took = json.loads(target.read_text(encoding="utf-8"))
    kept = json.loads((root / RECORD).read_text(encoding="utf-8"))
    details = {"device": took["device"], "date": took["date"]}
    kept["notebooks"][source.stem] = took["notebooks"][source.stem] | details
    kept["notebooks"] = dict(sorted(kept["notebooks"].items()))
    (root / RECORD).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
