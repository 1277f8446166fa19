"""Which samples of a file are held out, and how many."""

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training.holding_out import hold_out, interval, wanted


@pytest.mark.parametrize("samples", [10, 11, 19, 20, 60, 249, 250, 5000, 100_000])
@pytest.mark.parametrize("most", [3, 8, 50, 400])
def test_the_rule_holds_from_ten_samples_to_a_hundred_thousand(samples, most):
    judged, validating = wanted(samples, most)
    assert judged == min(most, samples // 5) >= 2
    assert validating == min(most, samples // 10) >= 1
    drawn = hold_out(samples, most, 0, validates=True)
    assert (len(drawn.judged), len(drawn.validating)) == (judged, validating)
    assert sorted([*drawn.judged, *drawn.validating, *drawn.trained]) == list(range(samples))
    assert len(drawn.trained) >= 0.7 * samples


def test_what_is_judged_is_the_same_with_validation_and_without():
    plain, careful = hold_out(60, 8, 3), hold_out(60, 8, 3, validates=True)
    assert plain.judged == careful.judged and len(plain.judged) == 8
    assert set(plain.trained) == {*careful.trained, *careful.validating}
    assert hold_out(60, 8, 4).judged != plain.judged
    assert not hold_out(9, 8, 0).judged and hold_out(60, 0, 0).trained


def test_the_interval_is_the_one_that_holds_the_truth_19_times_in_20():
    import numpy

    draw = numpy.random.default_rng(0)
    for judged in (12, 50, 400):
        shares = draw.binomial(judged, 0.5, 20_000) / judged
        assert 0.93 < (abs(shares - 0.5) <= interval(judged)).mean() < 0.965
    assert interval(1) < 1


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    values = [n // 3 - 5 for n in range(90)]
    drawn = hold_out(90, 50, seed, validates=True, values=values)
    sides = [{values[n] for n in of} for of in (drawn.judged, drawn.validating, drawn.trained)]
    assert (len(drawn.judged), len(drawn.validating)) == (18, 9)
    assert sum(map(len, sides)) == 30 == len(set.union(*sides))
    assert drawn.judged == hold_out(90, 50, seed, values=values).judged
    assert drawn != hold_out(90, 50, seed + 1, validates=True, values=values)


def test_a_group_that_is_too_large_is_passed_over():
    values = [0] * 30 + list(range(1, 11))  # 8 to judge, 4 to validate; the first has 30
    drawn = hold_out(40, 50, 0, validates=True, values=values)
    assert len(drawn.judged) == 8 and len(drawn.validating) == 2 and set(range(30)) <= set(drawn.trained)
    with pytest.raises(
        UserError, match="has 2 different values among 40 samples, and each stands in more of them than th"
    ):
        hold_out(40, 50, 0, values=[0] * 20 + [1] * 20)
    with pytest.raises(UserError, match="has 5 different values among 40 samples.*than the 4"):
        hold_out(40, 50, 0, validates=True, values=[n // 8 for n in range(40)])
