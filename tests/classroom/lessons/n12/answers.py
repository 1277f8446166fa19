"""Answers to the exercises of 12_ship_it: right ones, found by another way, and likely mistakes."""

from qlora_lab.classroom.checks import check_ends_taught, check_file_bytes, check_riddle

BLOCK_BYTES = {"f16": 64, "q8_0": 34, "q4_0": 18}  # of 32 weights


def file_bytes(linear, vocabulary, kind, blocks=BLOCK_BYTES, spared="q8_0"):
    of_vocabulary = blocks[spared if kind == "q4_0" else kind]
    return linear // 32 * blocks[kind] + vocabulary // 32 * of_vocabulary


def ends_taught(samples, end_ids, blank_ids):
    skipped = {-100, *blank_ids}
    lasts = [next((label for label in reversed(sample.labels) if label not in skipped), None) for sample in samples]
    return sum(last in end_ids for last in lasts) / len(lasts)


RIDDLE = {"culprit": "inputs", "file": "whole"}


RIGHT = [
    (check_file_bytes, (file_bytes,)),
    (check_ends_taught, (ends_taught,)),
    (check_riddle, (RIDDLE,)),
]

WRONG = [  # and what the learner must be told
    (check_file_bytes, lambda *of: 8 * file_bytes(*of), "eight make a byte"),
    (check_file_bytes, lambda *of: file_bytes(*of, spared="q4_0"), "holds the vocabulary in Q8_0"),
    (
        check_file_bytes,
        lambda *of: file_bytes(*of, {"f16": 64, "q8_0": 32, "q4_0": 16}),
        "Each block has a scale, too.",
    ),
    (check_file_bytes, lambda *of: file_bytes(*of, {"f16": 64, "q8_0": 36, "q4_0": 20}), "16 bits, not 32"),
    (check_file_bytes, lambda linear, _, kind: file_bytes(linear, 0, kind), "left the vocabulary out"),
    (check_ends_taught, lambda samples, *ids: ends_taught(samples, *ids) * len(samples), "divide by how many"),
    (check_ends_taught, lambda *of: 100 * ends_taught(*of), "in per cent"),
    (check_ends_taught, lambda *of: 1 - ends_taught(*of), "does not teach it"),
    (check_ends_taught, lambda samples, ends, _: ends_taught(samples, ends, []), "leave all of `blank_ids` out"),
    (
        check_ends_taught,
        lambda samples, ends, blanks: ends_taught(samples, ends[:1], blanks),
        "look at all of `end_ids`",
    ),
    (
        check_ends_taught,
        lambda samples, ends, _: sum(sample.ids[-1] in ends for sample in samples) / len(samples),
        "look at `labels`",
    ),
    (
        check_ends_taught,
        lambda samples, ends, blanks: (
            sum([id for id in sample.ids if id not in blanks][-1] in ends for sample in samples) / len(samples)
        ),
        "look at `labels`",
    ),
    (
        check_ends_taught,
        lambda samples, ends, _: sum(any(end in sample.labels for end in ends) for sample in samples) / len(samples),
        "in the middle does not count",
    ),
    (
        check_ends_taught,
        lambda samples, *ids: ends_taught([s for s in samples if s.target_count], *ids),
        "nothing is learned counts",
    ),
    (check_riddle, RIDDLE | {"culprit": "template", "file": "broken"}, "It was not: template. Clue 1"),
    (check_riddle, RIDDLE | {"culprit": "tokens"}, "the very same tokens"),
    (check_riddle, RIDDLE | {"culprit": "weights"}, "ever French"),
    (check_riddle, RIDDLE | {"file": "broken"}, "no clue accuses what the file holds"),
    (check_riddle, RIDDLE | {"culprit": "llama.cpp"}, "'culprit': one of 'template'"),
    (check_riddle, {"culprit": "inputs"}, "'file': one of 'whole'"),
    (check_riddle, "inputs", "expected a dict"),
]
