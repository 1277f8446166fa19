import pytest
import torch

from qlora_lab.evaluation.intervals import paired_interval, seeds_needed, share_excluding_zero, t_quantile
from qlora_lab.experiments.methods_compared import (
    best_of_grid,
    chosen_otherwise,
    closest,
    differences,
    losses_by_rate,
    values,
)
from qlora_lab.experiments.record import Record


def run(method, seed, right, loss):
    after = {"validation": loss, "prose": 3.0}
    exact = {"test": "1" * right + "0" * (10 - right), "shifted": "0" * 10}
    return {"method": method, "task": "orders", "seed": seed, "after": after, "exact": exact}


@pytest.fixture
def record():
    runs = [run("QLoRA", s, 5, 0.2) for s in range(4)]
    runs += [run("good", s, right, loss) for s, (right, loss) in enumerate([(9, 0.1), (8, 0.11), (9, 0.09), (8, 0.1)])]
    runs += [run("same", s, right, loss) for s, (right, loss) in enumerate([(5, 0.3), (6, 0.1), (4, 0.2), (5, None)])]
    return Record(None, {"runs": runs})


def test_values_are_percent_or_nats_by_seed(record):
    assert values(record, "good", "orders", "test") == {0: 90, 1: 80, 2: 90, 3: 80}
    assert values(record, "same", "orders", "validation") == {0: 0.3, 1: 0.1, 2: 0.2}


def test_each_method_beside_qlora(record):
    good, same = differences(record, "orders", "test")
    assert (good.method, good.each, good.mean, good.verdict) == ("good", (40, 30, 40, 30), 35, "better")
    assert (same.method, same.each, same.verdict) == ("same", (0, 10, -10, 0), "not told apart")
    assert good.half == pytest.approx(paired_interval(good.each)[1])
    assert good.corrected == pytest.approx(paired_interval(good.each, 0.975)[1])


def test_of_losses_less_is_better(record):
    good, same = differences(record, "orders", "validation")
    assert (good.verdict, good.mean) == ("better", pytest.approx(-0.1))
    assert len(same.each) == 3, "a run that diverged has no pair"
    assert differences(record, "orders", "validation", base="good")[0].verdict == "worse"


def test_the_closest_two(record):
    first, second, each, seeds = closest(record, "orders", "validation", ["QLoRA", "good", "same"])
    assert (first, second) == ("good", "same")
    assert each == pytest.approx((-0.2, 0.01, -0.11))
    assert seeds == pytest.approx(seeds_needed(each))
    with pytest.raises(ValueError, match="no two of QLoRA"):
        closest(record, "orders", "shifted", ["QLoRA", "good"])


def test_told_apart_only_by_the_corrected_interval():
    """A method whose 95 % interval excludes zero, and whose corrected one does not."""
    runs = [run("QLoRA", s, 5, 0.2) for s in range(4)]
    runs += [run("near", s, right, 0.2) for s, right in enumerate((6, 7, 6, 8))]
    runs += [run(f"same {n}", s, 5, 0.2) for n in range(9) for s in range(4)]
    near = differences(Record(None, {"runs": runs}), "orders", "test")[0]
    assert near.half < near.mean < near.corrected
    assert near.verdict == "not told apart"


def test_losses_by_rate_are_in_the_order_of_the_seeds():
    rows = [
        {"method": "QLoRA", "task": "orders", "rate": r, "seed": s, "validation": r + s} for s in (1, 0) for r in (3, 2)
    ]
    assert losses_by_rate(Record(None, {"rates": rows}), "QLoRA", "orders") == {2: [2, 3], 3: [3, 4]}


def test_how_often_few_seeds_choose_otherwise():
    """All seeds choose 1. Of the three pairs, only the one of the last two chooses 2."""
    losses = {1: [0.1, 0.5, 0.5], 2: [0.6, 0.4, 0.4]}
    assert chosen_otherwise(losses) == pytest.approx(1 / 3)
    assert chosen_otherwise(losses, seeds=1) == pytest.approx(2 / 3)
    assert chosen_otherwise(losses, seeds=3) == 0


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_how_many_seeds_it_takes(effect, seeds):
    """As the noncentral t distribution says: R's pwr.t.test gives 198.15, 33.37, 14.30 and 9.94, rounded up here."""
    each = [effect - 1, effect, effect + 1]
    assert seeds_needed(each) == seeds
    assert seeds_needed([-gain for gain in each]) == seeds


@pytest.mark.parametrize(("effect", "seeds"), [(0.0, 3), (1.0, 3), (3.0, 3), (0.9, 8)])
def test_power_is_what_a_simulation_finds(effect, seeds):
    drawn = effect + torch.randn(200_000, seeds, generator=torch.Generator().manual_seed(0))
    apart = drawn.mean(1).abs() > t_quantile(seeds - 1) * drawn.std(1) / seeds**0.5
    assert share_excluding_zero(effect, seeds) == pytest.approx(float(apart.float().mean()), abs=0.004)


def test_seeds_of_extreme_differences():
    assert seeds_needed([5.0, 5.1, 4.9]) == 2
    assert seeds_needed([1.0, 1.0]) == 2
    assert seeds_needed([0.0, 0.0]) == float("inf")


def test_the_grid_keeps_the_rate_with_the_lowest_mean():
    """By hand: at 0.003 one seed is the best of all, but the mean of both is lower at 0.001."""

    def row(point, who, samples, batch_size, rate, seed, validation):
        return dict(zip(GRID_KEYS, (point, who, samples, batch_size, rate, seed, validation), strict=True))

    record = Record(
        None,
        {
            "grid": [
                row("rank 1, amounts", "rank 1", 50, 8, 0.001, 1, 0.4),
                row("rank 1, amounts", "rank 1", 50, 8, 0.001, 0, 0.2),
                row("rank 1, amounts", "rank 1", 50, 8, 0.003, 0, 0.1),
                row("rank 1, amounts", "rank 1", 50, 8, 0.003, 1, 0.6),
                row("rank 1, amounts", "rank 1", 200, 8, 0.003, 0, 0.05),
                row("full, batch 16", "full", 2000, 16, 0.0001, 0, 0.3),
            ]
        },
    )
    assert best_of_grid(record) == {
        "samples": {"rank 1": {50: [0.2, 0.4], 200: [0.05]}},
        "batch size": {"full": {16: [0.3]}},
    }


GRID_KEYS = ("point", "who", "samples", "batch_size", "rate", "seed", "validation")
