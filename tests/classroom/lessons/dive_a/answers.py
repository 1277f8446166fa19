"""Answers to the exercises of dive_a_better_codebooks: right ones, found by another way, and likely mistakes."""

import itertools

import numpy as np
import torch

from qlora_lab.classroom.checks import check_best_levels, check_choose, check_find_past


def best_levels(values, count, rounds, centre=np.median, moving=None):
    levels, numbers = np.linspace(0, 1, count + 1)[1:], values.numpy()
    for _ in range(rounds):
        nearest = np.abs(numbers[:, None] - levels).argmin(1)
        for i in range(count - 1 if moving is None else moving):
            levels[i] = centre(numbers[nearest == i])
    return torch.tensor(levels, dtype=torch.float32)


def lost(x, of):
    return ((of(x) - x).double().norm() / x.double().norm()).item()


def find_past(x, formats, limit=0.01):
    found = [name for name, of in formats.items() if lost(x, of) < limit]
    return found[0] if found else "never"


def smallest(x, formats):
    return min(formats, key=lambda name: lost(x, formats[name]))


def absolute(x, formats):
    found = [name for name, of in formats.items() if (of(x) - x).abs().mean() < 1e-4]
    return found[0] if found else "never"


def choose(extra, gains, room):
    """The best of all plans."""
    every = [names for n in range(len(extra) + 1) for names in itertools.combinations(extra, n)]
    fitting = [names for names in every if sum(map(extra.get, names)) <= room and all(gains[k] > 0 for k in names)]
    return max(fitting, key=lambda names: sum(map(gains.get, names)))


def in_order(key, stop=False, losers=False):
    def choose(extra, gains, room):
        chosen = []
        for name in sorted(extra, key=lambda name: -key(extra[name], gains[name])):
            if gains[name] <= 0 and not losers:
                continue
            if extra[name] <= room:
                chosen.append(name)
                room -= extra[name]
            elif stop:
                break
        return chosen

    return choose


per_byte = in_order(lambda extra, gain: gain / extra)

RIGHT = [
    (check_best_levels, (best_levels,)),
    (check_find_past, (find_past,)),
    (check_choose, (choose,)),
    (check_choose, (per_byte,)),
]

WRONG = [  # and what the learner must be told
    (check_best_levels, lambda *of: best_levels(*of, centre=np.mean), "take medians"),
    (check_best_levels, lambda values, count, rounds: best_levels(values, count, rounds, moving=count), "at 1"),
    (check_best_levels, lambda values, count, rounds: best_levels(values, count, 0), "No level has moved"),
    (check_best_levels, lambda values, count, rounds: best_levels(values, count, 1), "That is one round"),
    (check_best_levels, lambda values, count, rounds: best_levels(values, count, 5), "expected"),
    (check_best_levels, lambda *of: best_levels(*of).tolist(), "expected a tensor"),
    (check_best_levels, lambda *of: best_levels(*of)[1:], "expected a tensor of 4 levels"),
    (check_find_past, smallest, "as large as usual"),
    (check_find_past, absolute, "relative to the weights"),
    (check_find_past, lambda x, formats: "never", "almost nothing is lost"),
    (check_find_past, lambda x, formats: "Q4_1", "leaves almost nothing to lose"),
    (check_find_past, lambda x, formats: {n: lost(x, of) for n, of in formats.items()}, "expected the name"),
    (check_choose, in_order(lambda extra, gain: gain), "gain *per byte*"),
    (check_choose, in_order(lambda extra, gain: -extra), "smallest first"),
    (check_choose, in_order(lambda extra, gain: gain / extra, stop=True), "a smaller one after it still may"),
    (check_choose, in_order(lambda extra, gain: gain / extra, losers=True), "gains nothing"),
    (check_choose, lambda extra, gains, room: list(extra), "leave out what does not fit"),
    (check_choose, lambda extra, gains, room: 2 * per_byte(extra, gains, room / 4), "twice"),
    (check_choose, lambda extra, gains, room: sum(gains.values()), "expected"),
]
