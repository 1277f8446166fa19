"""Answers to the exercises of dive_d_training_tricks: right ones, found by another way, and likely mistakes."""

import statistics

import torch

from qlora_lab.classroom.checks import check_accumulate, check_beyond_seeds, check_pack, check_splits


def by_sorting(base, knob):
    """Sorted together, the knob's values stand at one end."""
    ranks = [name for _, name in sorted([(v, "base") for v in base] + [(v, "knob") for v in knob])]
    if ranks == ["knob"] * len(knob) + ["base"] * len(base):
        return "lower"
    return "higher" if ranks == ["base"] * len(base) + ["knob"] * len(knob) else "open"


def by_pairs(base, knob):
    if all(k < b for k, b in zip(knob, base, strict=True)):
        return "lower"
    return "higher" if all(k > b for k, b in zip(knob, base, strict=True)) else "open"


def by_mean(base, knob):
    return "lower" if statistics.mean(knob) < statistics.mean(base) else "higher"


def by_first(base, knob):
    return "lower" if knob[0] < min(base) else "higher" if knob[0] > max(base) else "open"


def by_mean_outside(base, knob):
    mean = statistics.mean(knob)
    return "lower" if mean < min(base) else "higher" if mean > max(base) else "open"


def turned(base, knob):
    return {"lower": "higher", "higher": "lower", "open": "open"}[by_sorting(base, knob)]


SPLITS = {8: (1, 16, True), 12: [8, 2, True], 24: (16, 1, True), 80: (16, 1, False)}


def targets_of(batch):
    return sum(label != -100 for row in batch["labels"].tolist() for label in row[1:])


def one_graph(mean_loss, micro_batches):
    """All losses first, one backward pass."""
    counts = [targets_of(batch) for batch in micro_batches]
    losses = [mean_loss(batch) * count for batch, count in zip(micro_batches, counts, strict=True)]
    (torch.stack(losses).sum() / sum(counts)).backward()


def one_by_one(mean_loss, micro_batches):
    whole = sum(map(targets_of, micro_batches))
    for batch in micro_batches:
        (mean_loss(batch) * targets_of(batch) / whole).backward()


def weighted(weight):
    def accumulate(mean_loss, micro_batches):
        for i in range(len(micro_batches)):
            (weight(micro_batches, i) * mean_loss(micro_batches[i])).backward()

    return accumulate


def share_of(count):
    return weighted(lambda batches, i: count(batches[i]) / sum(map(count, batches)))


def forgets_backward(mean_loss, micro_batches):
    return sum(mean_loss(batch) for batch in micro_batches) / len(micro_batches)


def last_alone(mean_loss, micro_batches):
    whole = sum(map(targets_of, micro_batches))
    (mean_loss(micro_batches[-1]) * targets_of(micro_batches[-1]) / whole).backward()


def best_fit(lengths, width):
    """Longest first, each into the row that it fills best."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [(width - sum(lengths[j] for j in row), n) for n, row in enumerate(rows)]
        fitting = [(room, n) for room, n in rooms if room >= lengths[i]]
        if fitting:
            rows[min(fitting)[1]].append(i)
        else:
            rows.append([i])
    return rows


def into_rows(lengths, width, order, look):
    rows = []
    for i in order:
        for row in rows[look]:
            if sum(lengths[j] for j in row) + lengths[i] <= width:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def first_fit_decreasing(lengths, width):
    return into_rows(lengths, width, longest_first(lengths), slice(None))


RIGHT = [
    (check_beyond_seeds, (by_sorting,)),
    (check_splits, (SPLITS,)),
    (check_accumulate, (one_by_one,)),
    (check_accumulate, (one_graph,)),
    (check_pack, (best_fit,)),
    (check_pack, (first_fit_decreasing,)),
]

WRONG = [  # and what the learner must be told
    (check_beyond_seeds, by_pairs, "inside the base's own spread"),
    (check_beyond_seeds, by_mean, "inside the base's own spread"),
    (check_beyond_seeds, by_mean_outside, "its lowest, 0.0148"),
    (check_beyond_seeds, by_first, "inside the base's own spread"),
    (check_beyond_seeds, turned, "the other way round"),
    (check_beyond_seeds, lambda base, knob: by_sorting(base, knob) != "open", "expected one of 'lower'"),
    (check_beyond_seeds, lambda base, knob: "no", "expected one of 'lower'"),
    (check_splits, [SPLITS], "a dict with the keys 8, 12, 24, 80"),
    (check_splits, SPLITS | {8: (16, 1)}, "expected three things"),
    (check_splits, SPLITS | {8: (1, "16", True)}, "expected whole numbers"),
    (check_splits, SPLITS | {8: (1, 16, "yes")}, "expected True or False"),
    (check_splits, SPLITS | {8: (1, 1, True)}, "another batch size is another training"),
    (check_splits, SPLITS | {8: (2, 8, True)}, "Split further."),
    (check_splits, SPLITS | {12: (4, 4, False)}, "or switch checkpointing on"),
    (check_splits, SPLITS | {24: (4, 4, False)}, "16 samples a pass fit too"),
    (check_splits, SPLITS | {12: (4, 4, True)}, "8 samples a pass fit too"),
    (check_splits, SPLITS | {80: (16, 1, True)}, "why compute everything twice"),
    (check_accumulate, weighted(lambda batches, i: 1 / len(batches)), "the mean of the means"),
    (check_accumulate, weighted(lambda batches, i: 1), "each must be weighted"),
    (check_accumulate, weighted(lambda batches, i: targets_of(batches[i])), "divided by the targets of the whole step"),
    (
        check_accumulate,
        weighted(lambda batches, i: targets_of(batches[i]) / len(batches)),
        "not by the number of micro-batches",
    ),
    (check_accumulate, share_of(lambda batch: len(batch["labels"])), "You weighted by rows"),
    (check_accumulate, share_of(lambda batch: batch["input_ids"].numel()), "prompts and padding are no targets"),
    (check_accumulate, share_of(lambda b: (b["labels"] != -100).sum()), "nothing comes before it"),
    (check_accumulate, forgets_backward, "call `.backward()`"),
    (check_accumulate, last_alone, "Only the last micro-batch"),
    (check_accumulate, weighted(lambda batches, i: 0.1), "differ from those of one large batch by"),
    (check_pack, lambda lengths, width: [[i] for i in range(len(lengths))], "without packing"),
    (check_pack, lambda n, width: into_rows(n, width, range(len(n)), slice(-1, None)), "the last row only"),
    (check_pack, lambda n, width: into_rows(n, width, longest_first(n), slice(-1, None)), "the last row only"),
    (check_pack, lambda n, width: into_rows(n, width, range(len(n)), slice(None)), "The order matters"),
    (check_pack, lambda lengths, width: [list(range(len(lengths)))], "an answer would be cut"),
    (check_pack, lambda n, width: [[n[i] for i in row] for row in best_fit(n, width)], "Your rows hold the lengths"),
    (check_pack, lambda lengths, width: best_fit(lengths, width)[:-1], "loses sample"),
    (check_pack, lambda lengths, width: [*best_fit(lengths, width), [0]], "learned twice"),
    (check_pack, lambda lengths, width: [[i + 1 for i in row] for row in best_fit(lengths, width)], "numbered from 0"),
    (check_pack, lambda lengths, width: [[0.5]], "expected the samples' numbers"),
    (check_pack, lambda lengths, width: len(lengths), "a list of rows"),
]
