"""An edition of the course in another language: its files, its notebooks, and what is out of step.

    python -m qlora_lab.classroom.build --language zh-TW --extract 05    write what is to be translated into its files
    python -m qlora_lab.classroom.build --language zh-TW 05              make its notebooks
    python -m qlora_lab.classroom.build --language zh-TW --execute 05    the same, and run them

`notebooks/zh-TW/05_double_quantization.ipynb` has the cells of the English notebook: the same ids, the same code up to
comments and docstrings, the values of the same run. Without --execute its outputs are those that it has, and where it
has none yet, those of the English notebook. `edition.json` lists the lessons that must be there.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lab import colab
from qlora_lab.classroom import values
from qlora_lab.classroom.drafts import finish, values_in
from qlora_lab.classroom.files import (
    errors_at,
    find_difference,
    find_sources,
    read_notebook,
    show_path,
    targets,
    write,
    write_notebook,
)
from qlora_lab.classroom.languages import labels, page, prose, rules
from qlora_lab.classroom.languages.entries import in_language, same_code, texts_of
from qlora_lab.classroom.languages.texts import pattern_of
from qlora_lab.classroom.outputs import MACHINE, code_cells, credit, execute, keep_outputs, restore_outputs
from qlora_lab.classroom.source import BuildError

LINK = re.compile(r"(?P<before>\]\(|href=\"|src=\")(?!https?:|#|mailto:)(?P<link>[^)\s\"#]+)")
COMMON = "common.labels.json"


@dataclass(frozen=True)
class Edition:
    """The course in a language. notebooks: the course's folder of that name. language: "zh-TW"."""

    notebooks: Path
    language: str

    @property
    def sources(self) -> Path:
        return self.notebooks / "source" / self.language

    @property
    def name(self) -> str:
        """What the language calls itself."""
        return json.loads((self.sources / "edition.json").read_text(encoding="utf-8")).get("name", self.language)

    @property
    def common(self) -> dict[str, str]:
        return labels.read_labels(self.sources / COMMON)

    def lessons(self) -> list[str]:
        """The lessons that the edition has, by name. Raises BuildError if edition.json is damaged."""
        path = self.sources / "edition.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["lessons"]
            if not all(isinstance(name, str) for name in found):
                raise ValueError("a lesson is no text")
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{show_path(path)} is no list of lessons: {error}") from None

    def prose_of(self, source: Path) -> Path:
        return self.sources / f"{source.stem}.md"

    def labels_of(self, source: Path) -> Path:
        return self.sources / f"{source.stem}.labels.json"


def editions(notebooks: Path) -> list[Edition]:
    """The editions beside the English one."""
    found = sorted((notebooks / "source").glob("*/edition.json"))
    return [Edition(notebooks, path.parent.name) for path in found]


def find_edition(notebooks: Path, language: str) -> Edition:
    """The edition in a language. Raises BuildError if there is none."""
    known = editions(notebooks)
    for edition in known:
        if edition.language == language:
            return edition
    names = ", ".join(edition.language for edition in known) or "none"
    raise BuildError(
        f"there is no edition in {language} (there are: {names}): begin one with an edition.json, see docs"
    )


# --- What a translator works on ---------------------------------------------------------------------------------------


def extract(edition: Edition, source: Path) -> str:
    """Bring both files of a lesson, and the common one, up to date; a line that says what is to be done."""
    english = [draft for _, draft in targets(source)]
    with errors_at(f"{show_path(edition.prose_of(source))}, "):
        entries = prose.renewed(texts_of(*english), prose.read_prose(edition.prose_of(source)))
    write(prose.file_of_prose(entries), edition.prose_of(source))
    found = []
    for path, wanted in (
        (edition.labels_of(source), labels.lesson_templates(source)),
        (edition.sources / COMMON, labels.shared_templates()),
    ):
        renewed = labels.renewed(wanted, labels.read_labels(path))
        write(labels.file_of_labels(renewed), path)
        found += [text for english, text in renewed.items() if english in wanted]
    missing = sum(not entry.translation for entry in entries) + sum(not text for text in found)
    stale = sum(entry.state == "stale" for entry in entries) + sum(text.startswith(labels.OUTDATED) for text in found)
    orphans = sum(entry.state == "orphan" for entry in entries)
    return f"{show_path(edition.prose_of(source))}: {missing} missing, {stale} stale, {orphans} orphans"


def find_faults(edition: Edition, source: Path) -> Iterator[str]:
    """What is missing, stale, orphaned or wrong in a lesson's files, each with file and entry."""
    path = edition.prose_of(source)
    if not path.exists():
        yield f"{show_path(path)} is missing: build --language {edition.language} --extract {source.stem[:2]} begins it"
        return
    with errors_at(f"{show_path(path)}, "):
        entries = prose.read_prose(path)
    terms = rules.read_terms(edition.sources / "terms.json")
    texts = texts_of(*(draft for _, draft in targets(source)))
    by_id = {entry.id: entry for entry in entries}
    changed = prose.pairs(texts, entries)
    for text in texts:
        entry = by_id.get(text.id)
        where = f"{show_path(path)}, {text.id}"
        begin = " ".join(text.english.split())[:60]
        if old := changed.get(text.id):
            yield f"{where}: stale, the English text of {old.id} has changed ({begin} ...)"
        elif entry is None or not entry.translation:
            yield f"{where}: missing ({text.kind}: {begin} ...)"
        elif entry.state:
            yield f"{where}: {entry.state} ({begin} ...): mend the translation, then delete the word"
        else:
            with errors_at(f"{where}: "):
                wrong = [*rules.faults(text.kind, text.english, entry.translation)]
            wrong += rules.faults_of_terms(text.english, entry.translation, terms)
            yield from (f"{where}: {fault}" for fault in wrong)
    kept = {text.id for text in texts} | {old.id for old in changed.values()}
    for entry in entries:
        if entry.id not in kept:
            yield f"{show_path(path)}, {entry.id}: orphaned, no text of the lesson is translated by it: delete it"
    yield from faults_of_labels(edition.labels_of(source), labels.lesson_templates(source), terms)


def faults_of_labels(path: Path, wanted: list[str], terms: list[rules.Term]) -> Iterator[str]:
    """The same for a file of labels."""
    given = labels.read_labels(path)
    for english in wanted:
        where = f"{show_path(path)}, {english[:60]!r}"
        text = given.get(english, "")
        if not text:
            yield f"{where}: missing"
        elif text.startswith(labels.OUTDATED):
            yield f"{where}: stale, its English text has changed"
        else:
            wrong = [*rules.faults_of_label(english, text), *rules.faults_of_terms(english, text, terms)]
            yield from (f"{where}: {fault}" for fault in wrong)
    for english in given:
        if english not in wanted:
            yield f"{show_path(path)}, {english[:60]!r}: orphaned, no code of the lesson says it: delete it"


# --- Notebooks --------------------------------------------------------------------------------------------------------


def translated_targets(edition: Edition, source: Path) -> list[tuple[Path, dict, list[values.Kept]]]:
    """Where the two notebooks of a lesson belong, their drafts in the language, and what was kept of their values.

    Raises BuildError for a text without translation, and for a cell whose code would differ.
    """
    english = targets(source)
    with errors_at(f"{show_path(source)}, "):
        kept = values.recall(values_in(english[0][1]), values.read_values(source))
    entries = {entry.id: entry.translation for entry in prose.read_prose(edition.prose_of(source))}
    by_text = {(text.kind, text.english): entries.get(text.id, "") for text in texts_of(*(d for _, d in english))}
    phrases = edition.common

    def say(kind: str, text: str) -> str:
        said = phrase_of(text, phrases) if kind == "phrase" else by_text[kind, text]
        if not said:
            raise BuildError(f"{show_path(edition.prose_of(source))} has no translation of {text[:60]!r}")
        return said

    found = []
    for path, draft in english:
        place = edition.notebooks / edition.language / path.relative_to(edition.notebooks)
        cells, filled = [], []
        following = iter(kept)
        for cell in draft["cells"]:
            own = {value.text: next(following) for value in values.values_of(cell)}
            translated = in_language(cell, say)
            if cell["cell_type"] == "code" and not same_code(cell["source"], translated["source"]):
                where = show_path(edition.prose_of(source))
                raise BuildError(f"{where}: a comment or docstring becomes code in\n{translated['source']}")
            if translated["cell_type"] == "markdown":
                translated = translated | {"source": relinked(translated["source"], path, place, edition)}
            elif translated["source"] == colab.CELL:
                translated = translated | {"source": colab.cell(colab.ADDRESS, edition.language)}
            with errors_at(f"{show_path(edition.prose_of(source))}: "):
                filled += [own[value.text] for value in values.values_of(translated)]
            cells.append(translated)
        found.append((place, draft | {"cells": cells}, filled))
    return found


def phrase_of(text: str, phrases: dict[str, str]) -> str:
    """The translation of one of the build's phrases, such as "your code (about 2 lines)"; empty if there is none."""
    if text in phrases:
        return phrases[text]
    for english, said in phrases.items():
        if said and "{0}" in english and (match := pattern_of(english).fullmatch(text)):
            return said.replace("{0}", match[1])
    return ""


def relinked(text: str, english: Path, place: Path, edition: Edition) -> str:
    """Markdown whose relative links lead from the notebook at `place` where they led from the English one.

    A link to a lesson that the edition has leads to the edition's.
    """
    lessons = edition.lessons()

    def link(found: re.Match) -> str:
        target = posixpath.normpath((english.parent.relative_to(edition.notebooks) / found["link"]).as_posix())
        if Path(target).suffix == ".ipynb" and Path(target).stem in lessons:
            target = posixpath.join(edition.language, target)
        here = place.parent.relative_to(edition.notebooks).as_posix()
        return found["before"] + posixpath.relpath(posixpath.join("/n/n", target), posixpath.join("/n/n", here))

    return LINK.sub(link, text)


def build(edition: Edition, source: Path, *, run: bool) -> None:
    """Write both notebooks of a lesson in the language, executed if `run`."""
    for path, draft, kept in translated_targets(edition, source):
        if run:
            start = time.perf_counter()
            path.parent.mkdir(parents=True, exist_ok=True)
            with errors_at(f"{show_path(path)}: "):
                answers = execute(
                    draft,
                    edition.notebooks / edition.language,
                    strict=path.parent.name == "solutions",
                    language=edition.language,
                )
                now = [what for asked, printed in answers for what in values.answered(asked, printed)]
                check_values(values_in(draft), kept, now)
            print(f"{show_path(path)} ran in {time.perf_counter() - start:.0f} s", flush=True)
        else:
            if path.exists():
                keep_outputs(draft, read_notebook(path), edition.language)
            theirs = edition.notebooks / path.relative_to(edition.notebooks / edition.language)
            borrow_outputs(draft, read_notebook(theirs), edition.language)
        write_notebook(finish(draft, kept), path)
    page.relink(edition)


def copy_with_claims(edition: Edition, source: Path, folder: Path) -> None:
    """Write copies of both notebooks of a lesson, as CI runs them, into a folder's folder of the language.

    They hold the claims of the English lesson. Raises BuildError if a notebook is out of step with its source.
    """
    check(edition, source)
    for path, draft, kept in translated_targets(edition, source):
        restore_outputs(draft, read_notebook(path), edition.language)
        write_notebook(finish(draft, kept, with_claims=True), folder / path.relative_to(edition.notebooks))


def check_values(wanted: list[values.Value], kept: list[values.Kept], now: list[values.Kept]) -> None:
    """Raise BuildError for a value that is not what the English notebook has."""
    for value, theirs, ours in zip(wanted, kept, now, strict=True):
        if not values.agree(value, theirs, ours):
            raise BuildError(f"{value.text} is {values.shown(value, ours)}, in English {values.shown(value, theirs)}")


def borrow_outputs(draft: dict, english: dict, language: str) -> None:
    """Give cells that have never run the outputs of the same cells of the English notebook."""
    if MACHINE not in draft["metadata"]:
        credit(draft, english["metadata"].get(MACHINE, ""), language)
    by_id = {cell["id"]: cell for cell in code_cells(english)}
    for cell in code_cells(draft):
        if not cell.get("claims") and cell["execution_count"] is None and cell["id"] in by_id:
            same = by_id[cell["id"]]
            cell |= {"outputs": same["outputs"], "execution_count": same["execution_count"]}


def check(edition: Edition, source: Path) -> None:
    """Raise BuildError with all that is wrong with a lesson of the edition: its texts, else its notebooks."""
    wrong = list(find_faults(edition, source))
    if not wrong:
        for path, draft, kept in translated_targets(edition, source):
            if difference := find_difference(path, finish(draft, kept), edition.language):
                wrong.append(f"{show_path(path)} {difference}")
    if wrong:
        raise BuildError("\n".join(wrong))


def work(notebooks: Path, options: argparse.Namespace) -> int:
    """What the command line asks of one edition; its exit code. Without names: of all lessons that the edition has."""
    errors = []
    try:
        edition = find_edition(notebooks, options.language)
        sources = find_sources(notebooks, options.names or edition.lessons())
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        errors += check_all(notebooks, sources, whole=not options.names, only=options.language)
    for source in sources if not options.check else []:
        try:
            if options.extract:
                print(extract(edition, source))
            else:
                build(edition, source, run=options.execute)
        except (BuildError, OSError) as error:
            errors.append(str(error))
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


def copy_all_with_claims(notebooks: Path, source: Path, folder: Path) -> None:
    """The copies that CI runs of a lesson in all languages that have it."""
    for edition in editions(notebooks):
        if source.stem in edition.lessons():
            copy_with_claims(edition, source, folder)


def check_all(notebooks: Path, sources: list[Path], *, whole: bool, only: str = "") -> list[str]:
    """What is wrong with the editions' lessons among `sources`, and if `whole` with the editions themselves.

    only: a language, if just that one is asked for.
    """
    errors = []
    for edition in editions(notebooks):
        if only and edition.language != only:
            continue
        try:
            lessons = edition.lessons()
            if whole:
                errors += check_files(edition, find_sources(notebooks, []))
        except BuildError as error:
            errors.append(str(error))
            continue
        for source in sources:
            try:
                if source.stem in lessons:
                    check(edition, source)
            except (BuildError, OSError) as error:
                errors.append(str(error))
    return errors


def check_files(edition: Edition, sources: list[Path]) -> Iterator[str]:
    """What is wrong with the edition as a whole: lessons without files, files without lessons, common labels."""
    lessons = edition.lessons()
    known = {source.stem for source in sources}
    for name in lessons:
        if name not in known:
            yield f"{show_path(edition.sources / 'edition.json')} lists {name}, which is no lesson"
    files = [*edition.sources.glob("*.md"), *edition.sources.glob("*.labels.json")]
    folder = edition.notebooks / edition.language
    for path in sorted([*files, *folder.glob("*.ipynb"), *folder.glob("solutions/*.ipynb")]):
        if path.name != COMMON and path.name.partition(".")[0] not in lessons:
            yield f"{show_path(path)} belongs to no lesson of edition.json"
    terms = rules.read_terms(edition.sources / "terms.json")
    yield from faults_of_labels(edition.sources / COMMON, labels.shared_templates(), terms)
    yield from page.find_faults(edition)
