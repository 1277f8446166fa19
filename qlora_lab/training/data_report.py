"""What is in a data set, before anything is trained on it: how much, how long, how often, in which scripts.

All samples are counted and compared. Tokens are counted on `DRAWN` of them at most, drawn at random. A file of any size
is read a row at a time, and about a hundred bytes are kept of each sample.
"""

from __future__ import annotations

import pathlib
import random
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.training.chat import TokenizedSample, fitting_chats
from qlora_lab.training.data import JUDGED, has_split, has_splits, load_prose, number_of, stream_rows, stream_samples
from qlora_lab.training.formats import Chat, Understood
from qlora_lab.training.holding_out import LEAST, HeldOut, hold_out, interval
from qlora_lab.training.likeness import ASKED, NEAR, NUMBERS, SAME, Repeated, Repeats, Twin, Twins
from qlora_lab.training.picture import BLANK, picture
from qlora_lab.training.templates import LEARN, remarks
from qlora_lab.training.vocabulary import ScriptUse, script_use

DRAWN = 10_000  # samples whose tokens are counted
COMPARED = 1_000  # samples of a split that are compared with all that is trained on
NO_LIMIT = 2**62
NUMBERS_IN_WORDS = (
    "  (If the numbers are what is asked about, as in sums, each of these is a task of its own. If they are not,",
    "  as with an order's number, the score tells little about other wordings: ask the model in some of those, too.)",
)


@dataclass(frozen=True)
class Spread:
    """The least, median, 95th percentile and most of some whole numbers, each of them one of the numbers."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, numbers) -> Spread:
        import numpy

        return cls(*map(int, numpy.quantile(numbers, [0, 0.5, 0.95, 1], method="inverted_cdf")))


@dataclass(frozen=True)
class Compared:
    """What of a split is in the data that is trained on. samples: how many it has; judged: how many were compared."""

    samples: int
    judged: int
    twins: list[Twin]


@dataclass(frozen=True)
class DataReport:
    """What is known of a data set.

    model, learn, max_length: what the tokens were made for.
    understood: how the rows to train on were read, and which were left out.
    messages, answers, characters: of each sample.
    repeated: samples that occur more than once.
    compared: by split that a model is judged on; without splits under "test", what a run would hold out.
    held_out: how many samples a run would hold out to judge and to validate; None where there are splits.
    most: at most so many samples of a split are judged. split_by: the column by which a run would hold out, if any.
    drawn: the number of samples behind all that follows: all of them, or so many drawn at random.
    tokens, learned: of each drawn sample; None if none can be tokenized.
    token_sum, learned_sum: of all those drawn.
    too_long: drawn samples of more than `max_length` tokens, which training would leave out.
    refused: a sentence about drawn samples that the chat template cannot serve; "" if there are none.
    notes: how the template serves the rest.
    scripts, without_letters: see `script_use`.
    prose: how the vocabulary serves English prose, to compare with; None where `scripts` is empty.
    first: where the first sample stands, and its tokens; None if the template cannot serve it.
    """

    model: str
    learn: str
    max_length: int
    understood: Understood
    messages: Spread
    answers: Spread
    characters: Spread
    repeated: Repeated
    compared: dict[str, Compared]
    held_out: tuple[int, int] | None
    most: int
    split_by: str | None
    drawn: int
    tokens: Spread | None
    learned: Spread | None
    token_sum: int
    learned_sum: int
    too_long: int
    refused: str
    notes: list[str]
    scripts: list[ScriptUse]
    without_letters: int
    prose: ScriptUse | None
    first: tuple[str, TokenizedSample] | None


class Draw:
    """At most `most` of the things it is given, each with the same chance (Vitter's algorithm R), seeded."""

    def __init__(self, most: int, seed: int = 0):
        self.most, self.seen, self.things = most, 0, []
        self._random = random.Random(seed)

    def see(self, thing) -> None:
        self.seen += 1
        if len(self.things) < self.most:
            self.things.append(thing)
        elif (place := self._random.randrange(self.seen)) < self.most:
            self.things[place] = thing


def report_on(
    source: str | pathlib.Path,
    tokenizer,
    model: str,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    learn: str = "all",
    max_length: int = 256,
    watched=iter,
    most: int = 50,
    seed: int = 0,
    split_by: str | None = None,
) -> DataReport:
    """Read all of a data set, and say what is in it.

    Args:
        source, columns, format: as in `data.load_samples`.
        tokenizer: a model's, with its chat template.
        model: its name, for the reader.
        learn: one of LEARN.
        max_length: longer samples would be left out of a training.
        watched: is given each stream of samples and gives it back, for a progress bar.
        most, seed, split_by: how a run would hold samples out, see `data.split_chats`.

    Raises:
        UserError: what `load_samples` and `split_chats` raise.
    """
    if split_by and has_splits(source):
        raise UserError(f"--split-by {split_by}: {source} comes in splits of its own, so nothing is held out of it")
    splits = [split for split in JUDGED if has_splits(source) and has_split(source, split)]
    judged = {split: _drawn(stream_samples(source, split, columns, format), COMPARED) for split in splits}
    twins = {split: Twins(draw.things) for split, draw in judged.items()}
    understood, repeats, draw, first = Understood(), Repeats(), Draw(DRAWN), []
    messages, answers, characters, values = array("Q"), array("Q"), array("Q"), array("q")
    for where, row, chat in watched(stream_rows(source, "train", columns, format, understood)):
        messages.append(len(chat))
        answers.append(sum(message["role"] in ("assistant", "text") for message in chat))
        characters.append(sum(len(message["content"]) for message in chat))
        repeats.see(where, chat)
        draw.see((where, chat))
        if split_by:
            values.append(number_of(row, split_by, where))
        first = first or [(where, chat)]
        for of in twins.values():
            of.see(where, chat)
    compared = {split: Compared(of.seen, len(of.things), twins[split].found()) for split, of in judged.items()}
    held_out = None
    if not has_splits(source):
        held_out = hold_out(understood.samples, most, seed, validates=True, values=values if split_by else None)
        if held_out.judged:
            compared = {"test": _compare(held_out, lambda: watched(stream_samples(source, "train", columns, format)))}
    return DataReport(
        model=model,
        learn=learn,
        max_length=max_length,
        understood=understood,
        messages=Spread.of(messages),
        answers=Spread.of(answers),
        characters=Spread.of(characters),
        repeated=repeats.found(),
        compared=compared,
        held_out=held_out and (len(held_out.judged), len(held_out.validating)),
        most=most,
        split_by=split_by,
        **_tokens([*first, *draw.things], tokenizer, learn, max_length),
    )


def _compare(held_out: HeldOut, read: Callable[[], Iterable[tuple[str, Chat]]]) -> Compared:
    """Those held out to judge on, among all the others. read: gives the samples once more."""
    aside = set(held_out.judged)
    twins = Twins([sample for number, sample in enumerate(read()) if number in aside])
    for number, sample in enumerate(read()):
        if number not in aside:
            twins.see(*sample)
    return Compared(len(aside), len(aside), twins.found())


def _drawn(samples: Iterable[tuple[str, Chat]], most: int) -> Draw:
    draw = Draw(most)
    for sample in samples:
        draw.see(sample)
    return draw


def _tokens(samples: list[tuple[str, Chat]], tokenizer, learn: str, max_length: int) -> dict[str, Any]:
    """What the report says about tokens. samples: the first of the data set, then those that were drawn."""
    first, *drawn = samples
    chats = [chat for _, chat in drawn]
    fitting, refused = fitting_chats(chats, tokenizer, NO_LIMIT, learn, none_is_fine=True)
    served = [sample for _, sample in fitting]
    lengths, learned = [len(sample.ids) for sample in served], [sample.target_count for sample in served]
    texts = (message["content"] for chat in chats for message in chat)
    scripts, without_letters = script_use(texts, tokenizer) if tokenizer.is_fast else ([], 0)
    prose = script_use(load_prose(), tokenizer)[0][0] if scripts else None
    shown, _ = fitting_chats([first[1]], tokenizer, NO_LIMIT, learn, none_is_fine=True)
    return {
        "drawn": len(drawn),
        "tokens": Spread.of(lengths) if lengths else None,
        "learned": Spread.of(learned) if lengths else None,
        "token_sum": sum(lengths),
        "learned_sum": sum(learned),
        "too_long": sum(length > max_length for length in lengths),
        "refused": refused,
        "notes": remarks(tokenizer, chats) if lengths else [],
        "scripts": scripts,
        "without_letters": without_letters,
        "prose": prose,
        "first": (first[0], shown[0][1]) if shown else None,
    }


# ------------------------------------------------------------------------------------------------------------- in words


def describe(report: DataReport, tokenizer) -> str:
    """The report for people, in lines for any console."""
    understood = report.understood
    parts = [
        [understood.summary(), *([understood.remarks()] if understood.remarks() else [])],
        _lengths(report),
        _repeated(report.repeated) + _dullest(report),
        _judged(report),
        _scripts(report),
        _first(report, tokenizer),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _lengths(report: DataReport) -> list[str]:
    lines = [f"{'':24}{'least':>9}{'median':>9}{'p95':>9}{'most':>9}"]
    rows = {
        "messages a sample": report.messages,
        "answers": report.answers,
        "characters": report.characters,
        "tokens": report.tokens,
        "tokens learned": report.learned,
    }
    for name, spread in rows.items():
        if spread is not None:
            values = (spread.least, spread.median, spread.p95, spread.most)
            lines.append(f"{name:<24}" + "".join(f"{value:>9,}" for value in values))
    lines.append("")
    if report.tokens is not None:
        of = "" if report.drawn == report.understood.samples else f" of {report.drawn:,} samples drawn at random"
        share = report.learned_sum / report.token_sum
        lines.append(
            f"{report.token_sum:,} tokens of {report.model}{of}, {share:.0%} of them learned: {LEARN[report.learn]}"
        )
        if report.too_long:
            lines.append(
                f"{report.too_long:,} of {report.drawn:,} samples are longer than --max-length {report.max_length} and "
                f"would be left out: --max-length {report.tokens.most} keeps all"
            )
    if report.refused:
        lines.append(report.refused.replace("are left out", "would be left out"))
    return [*lines, *(f"note: {note}" for note in report.notes)]


def _repeated(repeated: Repeated) -> list[str]:
    lines = ["no sample occurs twice"]
    if repeated.example:
        again, earlier = repeated.example
        count = "1 sample repeats" if repeated.repeats == 1 else f"{repeated.repeats:,} samples repeat"
        lines = [f"{count} an earlier one ({again} repeats {earlier})"]
    if repeated.disagreement:
        one, other = repeated.disagreement
        count = "1 question has" if repeated.disagreeing == 1 else f"{repeated.disagreeing:,} questions have"
        lines.append(f"{count} several different answers ({one} and {other})")
    return lines


def _dullest(report: DataReport) -> list[str]:
    """What a model must beat: the score of one that always gives the same answer."""
    same, samples = report.repeated.same_answer, report.understood.samples
    if same < 2:
        return []
    return [
        f"always giving the most frequent answer ({report.repeated.answered}) would be right for {same:,} of "
        f"{samples:,} samples ({same / samples:.0%})"
    ]


def _judged(report: DataReport) -> list[str]:
    """What a run would be judged on, and what of that is known from training, a line for each kind of likeness."""
    lines = []
    if report.held_out and not report.held_out[0]:
        why = f"fewer than {LEAST} samples" if report.understood.samples < LEAST else "--eval-samples 0"
        lines.append(f"a run would hold out none of these samples to judge on: {why}")
    elif report.held_out:
        by = f"by {report.split_by}" if report.split_by else "at random"
        judged, validating = report.held_out
        lines.append(
            f"a run would hold out {judged:,} of {report.understood.samples:,} samples to judge on, drawn {by}, and "
            f"{validating:,} more to validate on, if it has --validate-every"
        )
        points = round(100 * interval(judged))
        lines.append(
            f"(a share of {judged:,} answers is uncertain by up to 0.98 / sqrt({judged}) = {points} percentage points, "
            "up and down)"
        )
    if report.compared and report.answers.most > 1:
        lines.append("of a conversation with several answers the last is judged; the others are given as they are here")
    if report.compared and report.held_out is None:
        lines.append(f"a run would judge on the first {report.most:,} of each split at most (--eval-samples)")
    for split, compared in report.compared.items():
        lines += _compared(split, compared, report.held_out is None)
    return lines


def _compared(split: str, compared: Compared, is_given: bool) -> list[str]:
    drawn = f", {compared.judged:,} of them drawn" if compared.judged < compared.samples else ""
    samples = "1 sample" if compared.samples == 1 else f"{compared.samples:,} samples"
    head = f"{split} ({samples}{drawn})" if is_given else f"those {compared.judged:,} to judge on"
    there = "in the training data" if is_given else "among the others"
    found = []
    for kind in (SAME, ASKED, NEAR, NUMBERS):
        twins = [twin for twin in compared.twins if twin.kind == kind]
        if twins:
            first = max(twins, key=lambda twin: twin.likeness)
            like = f"is {first.likeness:.0%} like" if kind == NEAR else "and"
            found.append(f"  {len(twins):,} {kind} ({first.judged} {like} {first.trained})")
    if any(twin.kind == NUMBERS for twin in compared.twins):
        found += NUMBERS_IN_WORDS
    nearly = "nearly " if all(twin.kind in (NEAR, NUMBERS) for twin in compared.twins) else ""
    return [f"{head}: {f'some are {nearly}{there}' if found else f'none is {there}, not even nearly'}", *found]


def _scripts(report: DataReport) -> list[str]:
    if report.prose is None:
        return []
    letters = sum(use.letters for use in report.scripts)
    tokens = sum(use.tokens for use in report.scripts) + report.without_letters
    lines = [f"{'script':<24}{'letters':>9}{'tokens':>9}"]
    for use in report.scripts[:8]:
        lines.append(
            f"{use.script:<24}{use.letters / letters:>9.1%}{use.tokens / tokens:>9.1%}   {_tokens_of_each(use)}"
        )
    lines.append(f"{'digits, signs, blanks':<24}{'':>9}{report.without_letters / tokens:>9.1%}")
    return [*lines, f"(English prose, to compare with: {_tokens_of_each(report.prose)})"]


def _tokens_of_each(use: ScriptUse) -> str:
    return f"{use.tokens / use.words:.2f} a word" if use.words else f"{use.tokens / use.letters:.2f} a letter"


def _first(report: DataReport, tokenizer) -> list[str]:
    if report.first is None:
        return []
    where, sample = report.first
    shown = picture(sample, tokenizer)
    several = "; (2): two tokens that only together make a character" if ")" in shown else ""
    return [f"{where}, token by token ({BLANK} is a blank{several}):", shown]
