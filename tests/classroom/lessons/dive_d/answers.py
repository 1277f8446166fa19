"""Answers to the exercises of dive_d_training_tricks: right ones, found by another way, and likely mistakes."""

import math
import statistics

import torch

from qlora_lab.classroom.checks import check_accumulate, check_beyond_seeds, check_clipped, check_splits


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


def best_split(needs, card):
    """Of all ways that fit, the first by passes, then by checkpointing."""
    ways = [(16 // samples, on, samples) for samples in (1, 2, 4, 8, 16) for on in (True, False)]
    fitting = sorted(way for way in ways if needs(way[2], way[1]) <= 0.9 * card)
    return [fitting[0][2], fitting[0][0], fitting[0][1]] if fitting else None


def split_by(order, room=0.9, nothing=None):
    """The first of some ways, (samples, checkpointing), that fits."""

    def split(needs, card):
        for samples, on in order:
            if needs(samples, on) <= room * card:
                return samples, 16 // samples, on
        return nothing

    return split


SIZES = (16, 8, 4, 2, 1)
RULE = [(samples, on) for samples in SIZES for on in (False, True)]


def changed(change):
    """`best_split`, and then a mistake."""

    def split(needs, card):
        best = best_split(needs, card)
        return best and change(*best)

    return split


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


def clipped(gradients, limit):
    whole = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
    return [g * (limit / whole) if whole > limit else g for g in gradients]


def by_torch(gradients, limit):
    parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for parameter, g in zip(parameters, gradients, strict=True):
        parameter.grad = g
    torch.nn.utils.clip_grad_norm_(parameters, limit)
    return tuple(parameter.grad for parameter in parameters)


def scaled(divisor):
    """All gradients times limit over a divisor, if that is less than 1."""
    return lambda gradients, limit: [g * min(1.0, limit / float(divisor(gradients))) for g in gradients]


def norm(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


RIGHT = [
    (check_beyond_seeds, (by_sorting,)),
    (check_splits, (best_split,)),
    (check_splits, (split_by(RULE),)),
    (check_accumulate, (one_by_one,)),
    (check_accumulate, (one_graph,)),
    (check_clipped, (clipped,)),
    (check_clipped, (by_torch,)),
]

WRONG = [  # and what the learner must be told
    (check_beyond_seeds, by_pairs, "inside the base's own spread"),
    (check_beyond_seeds, by_mean, "inside the base's own spread"),
    (check_beyond_seeds, by_mean_outside, "its lowest, 0.0148"),
    (check_beyond_seeds, by_first, "inside the base's own spread"),
    (check_beyond_seeds, turned, "the other way round"),
    (check_beyond_seeds, lambda base, knob: by_sorting(base, knob) != "open", "expected one of 'lower'"),
    (check_beyond_seeds, lambda base, knob: "no", "expected one of 'lower'"),
    (check_splits, lambda needs, card: 16, "expected three things"),
    (check_splits, changed(lambda samples, passes, on: (samples, passes)), "expected three things"),
    (check_splits, changed(lambda samples, passes, on: (samples, str(passes), on)), "expected whole numbers"),
    (check_splits, changed(lambda samples, passes, on: (samples, passes, "yes")), "expected True or False"),
    (check_splits, changed(lambda samples, passes, on: (samples, 1, on)), "another batch size is another training"),
    (check_splits, changed(lambda n, passes, on: (2 * n, passes // 2, on) if passes > 1 else (n, 1, on)), "Split fur"),
    (check_splits, lambda needs, card: (16, 1, False), "or switch checkpointing on"),
    (check_splits, split_by([(samples, on) for on in (False, True) for samples in SIZES]), "samples a pass fit too"),
    (check_splits, split_by([(samples, True) for samples in SIZES]), "why compute everything twice"),
    (check_splits, split_by(RULE[::-1]), "samples a pass fit too"),
    (check_splits, split_by(RULE, room=1.0), "may be used"),
    (check_splits, split_by(RULE, nothing=(1, 16, True)), "so return None"),
    (check_splits, split_by(RULE[:-2]), "something fits"),
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
    (check_clipped, scaled(lambda gs: norm(gs) ** 2), "take its root"),
    (check_clipped, scaled(lambda gs: sum(g.norm() for g in gs)), "the tensors' norms"),
    (check_clipped, scaled(lambda gs: max(g.abs().max() for g in gs)), "the largest number"),
    (check_clipped, lambda gs, limit: [g * limit / norm(gs) for g in gs], "leave them alone"),
    (check_clipped, lambda gs, limit: [g * torch.clamp(limit / g.norm(), max=1) for g in gs], "by its own norm"),
    (check_clipped, lambda gs, limit: [g.clamp(-limit, limit) for g in gs], "cut each number off"),
    (check_clipped, lambda gs, limit: [g / max(1, norm(gs)) for g in gs], "not at most the limit"),
    (check_clipped, lambda gs, limit: gs, "as they were"),
    (check_clipped, lambda gs, limit: [0.5 * g for g in clipped(gs, limit)], "yours have a norm of"),
    (check_clipped, lambda gs, limit: clipped(gs, limit)[:1], "of other shapes"),
    (check_clipped, lambda gs, limit: norm(gs), "expected a list of tensors"),
]
