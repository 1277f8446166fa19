"""Which samples occur twice, and which of those to judge on are nearly among those to train on.

Repeats are found by a 64-bit hash of each sample. Two samples are nearly the same if the sets of their shingles (each
three words or signs in a row) have a Jaccard similarity, shared over all, of at least 0.7: in a sample of twenty words,
one differs. (For documents, five words and 0.8 are usual: Lee et al. 2022, arXiv 2107.06499.) It is computed exactly:
the judged samples' shingles are an index in which every trained sample is looked up, so memory depends on the judged
ones alone. System messages play no part in it, nor do shingles that many samples have: a task's fixed words do not make
samples alike.

Samples that are made from a template ("Where is order 4711?") differ in a number, and so in each shingle that holds it.
So they are compared once more with every number read as 0, and what is alike only then is told apart (NUMBERS): sums
are alike in this way, too, and no two of them are the same task. Samples whose words are all the same then are alike
whatever many samples have.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.training.formats import Chat

SHINGLE = 3
NEARLY = 0.7
# Thai, Lao, Burmese, Khmer, kana, Han: there are no blanks between words
NO_BLANKS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# a character of such a script; a run of other letters and digits; a sign
WORDS = re.compile(rf"[{NO_BLANKS}]|(?:(?![{NO_BLANKS}])[^\W_])+|[^\w\s]")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LONGEST = 100_000  # characters of a sample that are compared


def question(chat: Chat) -> str:
    """All that comes before the last answer, as a text to compare: kinds of white space make no difference."""
    return _text(chat[:-1])


def fingerprint(chat: Chat) -> int:
    """64 bits of a hash, the same for samples that are the same up to kinds of white space; in this process only."""
    return hash(_text(chat))


def _text(messages: Chat) -> str:
    return json.dumps([{**message, "content": " ".join(message["content"].split())} for message in messages])


class Places:
    """Where samples stand ("file, line 3"), in eight bytes each."""

    def __init__(self):
        self._numbers, self._names, self._begins = array("Q"), [], []

    def append(self, where: str) -> None:
        name, _, number = where.rpartition(" ")
        if self._names[-1:] != [name]:
            self._names.append(name)
            self._begins.append(len(self._numbers))
        self._numbers.append(int(number))

    def __getitem__(self, index: int) -> str:
        return f"{self._names[bisect_right(self._begins, index) - 1]} {self._numbers[index]}"


@dataclass(frozen=True)
class Repeated:
    """repeats: samples that are an earlier one again; of which the first is `example`: where it and the earlier stand.

    disagreeing: questions that have several different answers, of which one is in `disagreement`: where two stand.
    same_answer: how many samples have the most frequent last answer; plain text has none. It stands at `answered`.
    """

    repeats: int
    example: tuple[str, str] | None
    disagreeing: int
    disagreement: tuple[str, str] | None
    same_answer: int = 0
    answered: str = ""


class Repeats:
    """Is told every sample; keeps 40 bytes of each."""

    def __init__(self):
        self.places = Places()
        self._samples, self._questions = array("q"), array("q")
        self._answers, self._answered = array("q"), array("q")  # hashes; numbers of the samples that they are of

    def see(self, where: str, chat: Chat) -> None:
        self.places.append(where)
        self._samples.append(fingerprint(chat))
        self._questions.append(hash(question(chat) if len(chat) > 1 else _text(chat)))
        if len(chat) > 1:
            self._answered.append(len(self._samples) - 1)
            self._answers.append(hash(_text(chat[-1:])))

    def found(self) -> Repeated:
        import numpy

        samples, questions = numpy.array(self._samples), numpy.array(self._questions)
        first, again = _first_and_again(samples)
        example = self._pair(again[0], first[again[0]]) if len(again) else None
        once = numpy.setdiff1d(numpy.arange(len(samples)), again)  # a question that is here twice has two answers
        first, other = _first_and_again(questions[once])
        disagreement = self._pair(once[other[0]], once[first[other[0]]]) if len(other) else None
        disagreeing = len(numpy.unique(questions[once][other]))
        return Repeated(len(again), example, disagreeing, disagreement, *self._most_frequent())

    def _most_frequent(self) -> tuple[int, str]:
        """How many samples have the most frequent answer, and where it first stands."""
        import numpy

        if not self._answers:
            return 0, ""
        _, first, counts = numpy.unique(self._answers, return_index=True, return_counts=True)
        at = int(first[counts == counts.max()].min())  # of several, the first
        return int(counts.max()), self.places[self._answered[at]]

    def _pair(self, one, other) -> tuple[str, str]:
        return self.places[int(one)], self.places[int(other)]


def first_ones(fingerprints: Sequence[int]) -> list[int]:
    """The numbers, ascending, of those that have not occurred before."""
    import numpy

    return numpy.sort(numpy.unique(numpy.asarray(fingerprints), return_index=True)[1]).tolist()


def _first_and_again(values):
    """The index of each value's first occurrence, and the indices of those that have occurred before, ascending."""
    import numpy

    _, first, which = numpy.unique(values, return_index=True, return_inverse=True)
    return first[which], numpy.flatnonzero(first[which] != numpy.arange(len(values)))


SAME, ASKED, NEAR = "word for word", "with another answer", "nearly the same"
NUMBERS = "nearly the same, numbers aside"
STRENGTH = (NUMBERS, NEAR, ASKED, SAME)


@dataclass(frozen=True)
class Twin:
    """Where a judged sample stands, and the trained one that is most like it.

    kind: SAME, ASKED (the same question, another answer), NEAR, or NUMBERS (nearly the same if all numbers were).
    likeness: the Jaccard similarity of their shingles, for those that are NEAR or NUMBERS; 1 for the others.
    """

    judged: str
    trained: str
    kind: str
    likeness: float


class Alike:
    """Finds those of some samples whose shingles are mostly those of another one.

    Args:
        samples: the words of each; None for one that is not to be found.
    """

    def __init__(self, samples: Sequence[list[str] | None]):
        shingles = [set() if words is None else shingles_of(words) for words in samples]
        counts = Counter(shingle for of in shingles for shingle in of)
        most = max(10, len(samples) // 20)
        self._common = {shingle for shingle, count in counts.items() if count > most}
        self._sizes = [len(of - self._common) for of in shingles]
        self._index = defaultdict(list)
        for number, of in enumerate(shingles):
            for shingle in of - self._common:
                self._index[shingle].append(number)

    def to(self, words: list[str]) -> list[tuple[int, float]]:
        """The numbers of the samples that are like this one, each with the Jaccard similarity of their shingles."""
        shingles = shingles_of(words)
        shared = Counter(number for shingle in shingles for number in self._index.get(shingle, ()))
        size = len(shingles - self._common) if shared else 0
        shares = ((number, both / (size + self._sizes[number] - both)) for number, both in shared.items())
        return [(number, share) for number, share in shares if share >= NEARLY]


class Twins:
    """Finds those of the judged samples that are among the trained ones, or nearly.

    Args:
        judged: where each stands, and the chat.
    """

    def __init__(self, judged: list[tuple[str, Chat]]):
        self.judged = judged
        words = [words_of(text_of(chat)) for _, chat in judged]
        templates = [template_of(text_of(chat)) for _, chat in judged]
        self._near, self._but_numbers = Alike(words), Alike(templates)
        self._exact, self._asked, self._template = defaultdict(list), defaultdict(list), defaultdict(list)
        for number, ((_, chat), template) in enumerate(zip(judged, templates, strict=True)):
            self._exact[fingerprint(chat)].append(number)
            if len(chat) > 1:
                self._asked[hash(question(chat))].append(number)
            if template:
                self._template[hash(tuple(template))].append(number)
        self._best: dict[int, Twin] = {}

    def see(self, where: str, chat: Chat) -> bool:
        """Compare a trained sample with the judged ones, except with itself.

        Returns whether it is like one of them with its numbers as they are.
        """
        like = [(number, SAME, 1.0) for number in self._exact.get(fingerprint(chat), ())]
        if len(chat) > 1:
            like += [(number, ASKED, 1.0) for number in self._asked.get(hash(question(chat)), ())]
        like += [(number, NEAR, likeness) for number, likeness in self._near.to(words_of(text_of(chat)))]
        like = [(number, *how) for number, *how in like if self.judged[number][0] != where]
        for number, kind, likeness in like:
            self._like(number, where, kind, likeness)
        if template := template_of(text_of(chat)):
            self._see_template(where, template)
        return bool(like)

    def _see_template(self, where: str, template: list[str]) -> None:
        of_it = hash(tuple(template))
        same = self._template.get(of_it)
        if same:  # those that have found another have no use for a third
            self._template[of_it] = [number for number in same if self.judged[number][0] == where]
        like = [*((number, 1.0) for number in same or ()), *self._but_numbers.to(template)]
        for number, likeness in like:
            if self.judged[number][0] != where:
                self._like(number, where, NUMBERS, likeness)

    def _like(self, number: int, where: str, kind: str, likeness: float) -> None:
        judged, best = self.judged[number][0], self._best.get(number)
        rank = (STRENGTH.index(kind), likeness)
        if best is None or rank > (STRENGTH.index(best.kind), best.likeness):
            self._best[number] = Twin(judged, where, kind, likeness)

    def found(self) -> list[Twin]:
        """A twin of each judged sample that has one, in the order of the judged samples."""
        return [self._best[number] for number in sorted(self._best)]


def text_of(chat: Chat) -> str:
    """What is compared of a sample: all its messages but those of the system."""
    return "\n".join(message["content"] for message in chat if message["role"] != "system")[:LONGEST]


def words_of(text: str) -> list[str]:
    """The words and signs of a text, whatever their case."""
    return WORDS.findall(text.casefold())


def template_of(text: str) -> list[str] | None:
    """Its words with every number read as 0; None if it has no number."""
    return words_of(NUMBER.sub("0", text)) if NUMBER.search(text) else None


def shingles_of(words: list[str]) -> set[int]:
    """Hashes of each three words in a row; of all words, if there are fewer."""
    if len(words) <= SHINGLE:
        return {hash(tuple(words))}
    return set(map(hash, zip(words, words[1:], words[2:], strict=False)))
