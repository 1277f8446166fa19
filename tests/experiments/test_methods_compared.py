import pytest

from qlora_lab.evaluation.intervals import holm, paired_interval, paired_p_value, seeds_needed
from qlora_lab.experiments.methods_compared import closest, differences, values
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
    assert (good.p, same.p) == pytest.approx((2 * paired_p_value(good.each), 1.0))


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


def test_holm_is_the_textbooks():
    """Three p-values of 0.01, 0.04 and 0.03: times 3, then 2 for the second smallest, and never falling."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("differences", "p"), [((1.0, 2.0, 3.0), 0.0741799), ((1.0, -1.0), 1.0), ((2.0, 3.0, 2.5, 1.0, 4.0), 0.0074902)]
)
def test_p_values_are_students(differences, p):
    """As `scipy.stats.ttest_1samp` gives them."""
    assert paired_p_value(differences) == pytest.approx(p, abs=2e-5)


def test_an_interval_ends_at_zero_where_p_is_one_minus_its_level():
    each = (0.3, 0.1, 0.4, 0.2, 0.05)
    mean, half = paired_interval(each, 1 - paired_p_value(each))
    assert half == pytest.approx(mean, rel=1e-3)


def test_differences_without_spread():
    assert paired_p_value([1.0, 1.0]) == 0.0
    assert paired_p_value([0.0, 0.0]) == 1.0
    assert seeds_needed([0.0, 0.0]) == float("inf")


def test_how_many_seeds_it_takes():
    """(1.96 + 0.84)² times the variance over the squared mean: variance 1, mean 0.5 -> 31.4."""
    each = [0.5 - 1, 0.5, 0.5 + 1]
    assert seeds_needed(each) == pytest.approx(31.4, abs=0.1)
    assert seeds_needed([5.0, 5.1, 4.9]) == 2
