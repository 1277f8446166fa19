"""Exercises of dive_a_better_codebooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, wrong

if TYPE_CHECKING:
    import torch

ROUNDS = 60


def lloyd(values: torch.Tensor, count: int, rounds: int = ROUNDS, squared: bool = False, last: bool = False):
    """The reference. squared: means instead of medians. last: the largest level moves, too."""
    import torch

    levels = torch.linspace(0, 1, count + 1)[1:]
    for _ in range(rounds):
        nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        for i in range(count if last else count - 1):
            mine = values[nearest == i]
            levels[i] = mine.mean() if squared else mine.median()
    return levels


@exercise("A.1", "the levels of AF4", item="nf4", points=2, todo="complete `best_levels`")
def check_best_levels(best_levels: Callable[..., torch.Tensor]) -> Verdict:
    """best_levels(values, count, rounds): levels with the least absolute error, the largest fixed at 1."""
    import torch

    draw = torch.Generator().manual_seed(17)
    for count in (4, 7):
        values = torch.rand(20_001, generator=draw) ** 3
        source = f"best_levels(values, {count}, {ROUNDS})"
        came = call(best_levels, values.clone(), count, ROUNDS)
        if not isinstance(came, torch.Tensor) or came.shape != (count,):
            shape = f"shape {tuple(came.shape)}" if isinstance(came, torch.Tensor) else described(came)
            raise Mistake(f"{source} gives {shape}, expected a tensor of {count} levels.")
        if torch.allclose(came, expected := lloyd(values, count), atol=2e-3):
            continue
        mistakes = [
            (lloyd(values, count, squared=True), "Those are means, which suit the squared error: take medians."),
            (lloyd(values, count, last=True), "The largest level moved: leave it at 1."),
            (lloyd(values, count, rounds=0), "No level has moved from where it began."),
            (lloyd(values, count, rounds=1), "That is one round: repeat both steps `rounds` times."),
        ]
        likely = (why for other, why in mistakes if torch.allclose(came, other, atol=2e-3))
        i = int((came - expected).abs().argmax())
        default = f"Level {i} is {came[i]:.4f}, expected {expected[i]:.4f}."
        return wrong(f"{source} gives other levels. {next(likely, default)}")
    return right("Lloyd's algorithm, with medians. With means instead, it minimizes the squared error.")


@exercise("A.2", "a checkpoint's past", item="quantization", points=3, todo="complete `find_past`")
def check_find_past(find_past: Callable[..., str]) -> Verdict:
    """find_past(x, formats): the name of the format that x was in once, or "never"."""
    from .pasts import FORMATS, weights

    cases = [(past, size) for past in (*FORMATS, "never") for size in (0.02, 3e-5, 40.0)]
    for past, size in cases:
        x = weights(past, seed=17, size=size)
        came = call(find_past, x.clone(), dict(FORMATS))
        if not isinstance(came, str):
            raise Mistake(f'find_past gives {described(came)}, expected the name of a format, or "never".')
        if came == past:
            continue
        if past == "never":
            why = "No format is too good here. The smallest error proves nothing if it is as large as usual."
        elif size != 0.02:
            why = f"These weights are of size {size:g}. Is your limit relative to the weights?"
        elif came == "never":
            why = "Once more in its own format, almost nothing is lost: compare the errors."
        else:
            why = "Which of the formats leaves almost nothing to lose?"
        return wrong(f"find_past says {came!r} of weights that were {_told(past)}. {why}")
    return right("Ask every checkpoint before you compare formats on it, your own included.")


def _told(past: str) -> str:
    return "never quantized" if past == "never" else f"in {past} once"


Choice = Sequence[str]


def greedy(extra: Mapping[str, float], gains: Mapping[str, float], room: float, by=None) -> list[str]:
    """The reference: by gain per byte, those that fit and gain. by: another order, largest first."""
    chosen = []
    for name in sorted(extra, key=by or (lambda name: gains[name] / extra[name]), reverse=True):
        if gains[name] > 0 and extra[name] <= room:
            chosen.append(name)
            room -= extra[name]
    return chosen


@exercise("A.3", "which layers deserve the bytes", item="quantization", points=2, todo="complete `choose`")
def check_choose(choose: Callable[..., Choice]) -> Verdict:
    """choose(extra, gains, room): names of the layers that get more bits."""
    for extra, gains, room in [
        ({"q": 2, "k": 1, "down": 6, "up": 6}, {"q": 0.10, "k": 0.07, "down": 0.18, "up": 0.06}, 9),
        ({"big": 8, "a": 4, "b": 4}, {"big": 0.5, "a": 0.4, "b": 0.3}, 8),
        ({"a": 4, "b": 3, "c": 2, "d": 2, "e": 1}, {"a": 0.9, "b": 0.6, "c": 0.3, "d": -0.2, "e": 0.1}, 7),
        ({"a": 6, "b": 7, "c": 2}, {"a": 0.9, "b": 0.7, "c": 0.1}, 8),
        ({"a": 5, "b": 5}, {"a": -0.1, "b": 0.2}, 20),
    ]:
        source = f"choose({extra}, {gains}, {room})"
        came = call(choose, dict(extra), dict(gains), room)
        if not isinstance(came, (list, tuple, set)) or not all(name in extra for name in came):
            raise Mistake(f"{source} gives {described(came)}, expected a list of names from `extra`.")
        chosen = list(came)
        spent, gained = sum(extra[name] for name in chosen), sum(gains[name] for name in chosen)
        if len(set(chosen)) < len(chosen):
            return wrong(f"{source} names a layer twice.")
        if spent > room:
            return wrong(f"{source} spends {spent:g} of {room:g}: leave out what does not fit any more.")
        if any(gains[name] <= 0 for name in chosen):
            return wrong(f"{source} spends bytes on a layer that gains nothing: its gain is not above 0.")
        if gained < sum(gains[name] for name in greedy(extra, gains, room)) - 1e-12:
            mistakes = [
                (greedy(extra, gains, room, gains.get), "Sort by gain *per byte*: a large layer must gain more."),
                (
                    greedy(extra, gains, room, lambda name, of=extra: -of[name]),
                    "That is the smallest first: look at gains.",
                ),
                (_stopped(extra, gains, room), "When one does not fit, a smaller one after it still may."),
            ]
            likely = (why for other, why in mistakes if set(other) == set(chosen))
            return wrong(f"{source} gains {gained:g}, and more is possible. {next(likely, 'Sort by gain per byte.')}")
    return right("Greedy is not always the best possible, but with small layers it is close.")


def _stopped(extra: Mapping[str, float], gains: Mapping[str, float], room: float) -> list[str]:
    """Greedy that stops at the first that does not fit."""
    ranked = sorted(extra, key=lambda name: gains[name] / extra[name], reverse=True)
    sums = itertools.accumulate(extra[name] for name in ranked)
    return [name for name, spent in zip(ranked, sums, strict=True) if spent <= room]
