"""Exercises of dive_c_small_differences."""

import math
import statistics
from collections.abc import Callable, Sequence

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, expect_number, right, wrong

# In turn: open at every look; below 0 at first; above 0 at the last look only; above 0 at the first look only.
SERIES = ([2.0, 1.0, -3.0, 2.0], [-2.0, -2.1, -1.9, 4.0], [2.0, 0.4, 1.6, 1.4], [3.0, 3.1, -4.0])
BY_HAND = (1.0, 2.0, 6.0)  # mean 3, squares 4 + 1 + 9
T_OF_2 = 4.3026527  # of Student, with two degrees of freedom, 95 %


@exercise("C.1", "an interval by hand", item="accuracy", points=1, todo="give the two ends")
def check_by_hand(ends: tuple[float, float]) -> Verdict:
    """ends: of the 95 % interval of BY_HAND."""
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        return wrong(f"expected two numbers, low and high, got {described(ends)}.")
    count, mean = len(BY_HAND), sum(BY_HAND) / len(BY_HAND)
    spread = math.sqrt(sum((x - mean) ** 2 for x in BY_HAND) / (count - 1))
    half = T_OF_2 * spread / math.sqrt(count)
    mistakes = [
        (mean - T_OF_2 * spread, "You left out √3: the mean is steadier than a single difference."),
        (mean - spread / math.sqrt(count), "That is one standard error: multiply it by t."),
        (mean - 1.96 * spread / math.sqrt(count), "1.96 is for hundreds: with three differences t is 4.30."),
        (mean - half * math.sqrt((count - 1) / count), "You divided the squares by 3: divide by n - 1."),
        (mean - T_OF_2 * spread**2 / math.sqrt(count), "You forgot the root of the squares' mean."),
        (mean + half, "That is the upper end: give the lower one first."),
    ]
    expect_number("The lower end", ends[0], mean - half, mistakes, tolerance=0.01)
    expect_number("The upper end", ends[1], mean + half, [], tolerance=0.01)
    return right("From three differences that are all above 0, an interval that holds 0: three are few.")


def runs_of(scores: dict[str, dict[int, float]]) -> list[dict]:
    """Runs like those of the record, with a score each."""
    return [
        {"method": method, "seed": seed, "score": score}
        for method, by_seed in scores.items()
        for seed, score in by_seed.items()
    ]


# Luck of the seed is large, the difference small; one seed has no partner; the orders of the seeds differ.
SCORES = [
    {
        "lora-bf16": {0: 90.0, 1: 96.0, 2: 93.0, 3: 98.5, 4: 91.0},
        "nf4": {3: 96.0, 0: 88.5, 4: 90.5, 2: 92.0, 1: 93.0},
        "fp4": {0: 70.0, 1: 71.0},
    },
    {
        "nf4": {5: 71.0, 1: 60.5, 7: 66.0, 2: 81.0, 9: 40.0},
        "lora-bf16": {7: 69.0, 2: 80.0, 4: 99.0, 1: 64.5, 5: 71.5},
    },
]


@exercise("C.2", "a paired interval", item="accuracy", points=2, todo="complete `paired_difference`")
def check_paired_difference(paired_difference: Callable[[list[dict], str, Callable], tuple[float, float]]) -> Verdict:
    """paired_difference(runs, method, score): mean of score(run) less lora-bf16's at the same seed, and half the width
    of its 95 % t interval.
    """
    from qlora_lab.evaluation.intervals import t_quantile

    for scores in SCORES:
        mine, base = scores["nf4"], scores["lora-bf16"]
        pairs = [mine[seed] - base[seed] for seed in mine if seed in base]
        count, mean, spread = len(pairs), statistics.fmean(pairs), statistics.stdev(pairs)
        half = t_quantile(count - 1) * spread / math.sqrt(count)
        came = call(paired_difference, runs_of(scores), "nf4", lambda run: run["score"])
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"paired_difference gives {described(came)}, expected the pair mean, half.")
        name = "The mean of paired_difference, on a small made-up record,"
        expect = [
            (-mean, "The sign: a method that does worse than lora-bf16 has a negative difference."),
            (statistics.fmean(mine.values()), "That is the method's own mean: subtract lora-bf16's."),
            (
                statistics.fmean(mine.values()) - statistics.fmean(base.values()),
                "A seed without a partner slipped in: only seeds that both methods have make a pair.",
            ),
            (mean - half, "That is the interval's lower end: return its middle and half its width."),
            (mean / 100, "The scores are points already: do not divide by 100."),
            (
                100 * (mean / statistics.fmean(base.values())),
                "That is per cent of lora-bf16's score: points are asked for.",
            ),
            (statistics.median(pairs), "That is the median of the differences."),
        ]
        expect_number(name, came[0], mean, expect, tolerance=1e-3)
        by_place = [a - b for a, b in zip(mine.values(), base.values(), strict=True)]
        a, b = (statistics.variance(values.values()) for values in (mine, base))
        apart = math.sqrt(a / len(mine) + b / len(base))
        root, t = math.sqrt(count), t_quantile(count - 1)
        unpaired = "You treated the two methods as strangers: take the difference at each seed, then its spread."
        mistakes = [
            (t * statistics.stdev(by_place) / math.sqrt(len(by_place)), "You paired by place: pair by `seed`."),
            (1.96 * spread / root, f"1.96 is for hundreds of seeds: with {count} take t_quantile({count - 1})."),
            (2 * spread / root, f"2 is for dozens of seeds: with {count} take t_quantile({count - 1})."),
            (t_quantile(count) * spread / root, "The degrees of freedom are n - 1: the mean has used up one."),
            (t * statistics.pstdev(pairs) / root, "The spread of a sample divides by n - 1: `statistics.stdev`."),
            (t * spread, "That is the spread of single differences: the mean's is √n times smaller."),
            (t * spread / count, "You divided by n: the mean's spread is √n times smaller."),
            (t * spread / math.sqrt(count - 1), "Divide by √n; stdev has taken care of the n - 1."),
            (t * spread**2 / root, "That is the variance: take its square root."),
            (2 * half, "That is the whole width: return half of it."),
            (spread / root, "That is one standard error: how many of them hold 95 %? See `t_quantile`."),
            (mean + half, "That is the interval's upper end: return half its width."),
            (t * apart, unpaired),
            (t_quantile(len(mine) + len(base) - 2) * apart, unpaired),
            (t_quantile(2 * count - 2) * apart, unpaired),
            (1.96 * apart, unpaired),
        ]
        expect_number(name.replace("mean", "half width"), came[1], half, mistakes, tolerance=1e-3)
    return right("On the H100's record: -2.19 ± 1.77 points for NF4.")


def looks(differences: Sequence[float], first: int = 2, factor: float | None = None, sides: int = 2) -> bool:
    """The reference: does the interval exclude 0 after any look, the first of them at `first` values?

    factor: standard errors to each side, in place of Student's. sides: 1 sees only differences above 0.
    """
    from qlora_lab.evaluation.intervals import paired_interval, t_quantile

    for count in range(first, len(differences) + 1):
        mean, half = paired_interval(differences[:count])
        half *= factor / t_quantile(count - 1) if factor else 1
        if (abs(mean) if sides == 2 else mean) > half:
            return True
    return False


@exercise("C.3", "looking too often", item="accuracy", points=2, todo="complete `finds_something`")
def check_finds_something(finds_something: Callable[[list[float]], bool]) -> Verdict:
    """finds_something(differences): whether the interval excludes 0 after any of 2, 3, ... of the differences."""
    mistakes = [
        (lambda d: looks(d, first=len(d)), "You looked once, at the end: look after 2, 3, ... of them."),
        (lambda d: looks(d, sides=1), "A difference below 0 is a finding, too."),
        (lambda d: looks(d[:-1]), "The last look, at all of them, is missing."),
        (lambda d: looks(d, first=3), "The first look is at two differences."),
        (lambda d: looks(d, factor=1.96), "1.96 is for hundreds of seeds: take `paired_interval`."),
        (lambda d: not looks(d), "That is the other way round: True where 0 lies outside the interval."),
    ]
    came = []
    for series in SERIES:
        answer = call(finds_something, list(series))
        if not isinstance(answer, bool) and type(answer).__name__ not in ("bool_", "bool"):
            raise Mistake(f"finds_something({series}) gives {described(answer)}, expected True or False.")
        came.append(bool(answer))
    expected = [looks(series) for series in SERIES]
    if came != expected:
        at = next(i for i, pair in enumerate(zip(came, expected, strict=True)) if len(set(pair)) == 2)
        likely = next((why for rule, why in mistakes if [rule(s) for s in SERIES] == came), "")
        return wrong(f"finds_something({SERIES[at]}) gives {came[at]}, expected {expected[at]}. {likely}")
    return right("Every look is another chance to be wrong.")


@exercise("C.4", "seeds for a margin", item="accuracy", points=2, todo="complete `seeds_for_margin`")
def check_seeds_for_margin(seeds_for_margin: Callable[[float, float], int]) -> Verdict:
    """seeds_for_margin(spread, margin): the smallest n >= 2 whose 95 % t interval is within ± margin."""
    from qlora_lab.evaluation.intervals import t_quantile

    def smallest(half: Callable[[int], float], margin: float) -> int:
        return next(n for n in range(2, 5000) if half(n) <= margin)

    for spread, margin in [(2.0, 1.0), (2.0, 0.5), (1.0, 4.0), (1.0, 20.0)]:
        expected = smallest(lambda n, s=spread: t_quantile(n - 1) * s / math.sqrt(n), margin)
        z = (1.96 * spread / margin) ** 2
        mistakes = [
            (
                math.ceil(z),
                "That is (1.96 · spread / margin)²: with few seeds 1.96 is too small, take t_quantile(n - 1).",
            ),
            (z, "That is (1.96 · spread / margin)²: take t_quantile(n - 1), and try n = 2, 3, ... in turn."),
            (
                smallest(lambda n, s=spread: t_quantile(n) * s / math.sqrt(n), margin),
                "The degrees of freedom are n - 1.",
            ),
            (
                smallest(lambda n, s=spread: 2 * t_quantile(n - 1) * s / math.sqrt(n), margin),
                "You compared the whole width with the margin: half of it counts.",
            ),
            (
                smallest(lambda n, s=spread: t_quantile(n - 1) * s / n, margin),
                "You divided by n: the mean's spread is √n times smaller.",
            ),
            (math.ceil((spread / margin) ** 2), "That holds one standard error: 95 % takes more."),
            (expected - 1, "One too few: the half width is still above the margin."),
            (expected + 1, "One too many: one seed less is enough. (Did you divide by √(n - 1)? By √n.)"),
            (1, "One difference has no spread: at least 2 are needed."),
        ]
        came = call(seeds_for_margin, spread, margin)
        expect_number(f"seeds_for_margin({spread:g}, {margin:g})", came, expected, mistakes)
    return right("Half the margin costs four times the seeds, nearly.")


@exercise("C.5", "your own pilot", item="accuracy", points=2, todo="describe your pilot")
def check_my_pilot(mine: dict) -> Verdict:
    """mine: "differences" of the learner's own runs, seed by seed, and "minutes" that one run takes."""
    from qlora_lab.evaluation.intervals import paired_interval, seeds_needed

    if not isinstance(mine, dict) or not {"differences", "minutes"} <= set(mine):
        return wrong(f'expected a dict with "differences" and "minutes", got {described(mine)}.')
    differences, minutes = mine["differences"], mine["minutes"]
    if differences is ... or minutes is ...:
        raise NotImplementedError
    if not isinstance(differences, (list, tuple)) or not all(map(is_finite, differences)) or len(differences) < 2:
        return wrong(f'"differences" is {described(differences)}, expected a list of at least two numbers.')
    if not is_finite(minutes) or minutes <= 0:
        return wrong(f'"minutes" is {described(minutes)}, expected a number above 0.')
    mean, half = paired_interval(differences)
    if len(set(differences)) == 1:
        return wrong("All differences are equal, so they show no spread: take a score that tells runs apart.")
    seeds = seeds_needed(differences)
    if abs(mean) > half:
        return right(f"{mean:+.3g} ± {half:.2g}: your {len(differences)} seeds show a difference already.")
    if math.isinf(seeds):
        return right(f"{mean:+.3g} ± {half:.2g}: a mean of 0 is never told from 0. Say how wide the interval is.")
    hours = 2 * seeds * minutes / 60
    return right(
        f"{mean:+.3g} ± {half:.2g} is open. If mean and spread stay as they are, {seeds:,} seeds show a difference in "
        f"80 of 100 experiments: {hours:,.0f} hours of training for both methods."
    )


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@exercise("C.6", "coins", item="accuracy", points=2, todo="complete `coin`")
def check_coin(coin: Callable[[int, int], float]) -> Verdict:
    """coin(lost, gained): how probable it is that lost + gained fair coins fall at least as unevenly, either way."""

    def exactly(n: int, k: int) -> float:
        return math.comb(n, k) / 2**n

    for lost, gained in [(1, 5), (14, 2), (4, 0), (3, 3)]:
        n, few = lost + gained, min(lost, gained)
        tail = sum(exactly(n, k) for k in range(few + 1))
        mistakes = [
            (tail, "That is one side: as many gained as lost would be as uneven."),
            (exactly(n, few), "That is exactly this outcome, on one side: add the more uneven ones."),
            (2 * exactly(n, few), "That is exactly this outcome: add the more uneven ones."),
            (2 * (tail - exactly(n, few)), "At least as unevenly: this very outcome counts, too."),
            (2 * tail, "Equal numbers are counted on both sides: a probability is at most 1."),
            (
                sum(exactly(n, k) for k in range(gained + 1)),
                "That goes by `gained`: which is the rarer one?",
            ),
            (
                min(1.0, 2 * sum(exactly(n, k) for k in range(gained + 1))),
                "Take the rarer of the two, whichever it is.",
            ),
            (1 - min(1.0, 2 * tail), "That is the probability of a *less* uneven outcome."),
        ]
        expect_number(f"coin({lost}, {gained})", call(coin, lost, gained), min(1.0, 2 * tail), mistakes)
    return right("Four lost, none gained: one chance in eight. Four coins prove nothing.")
