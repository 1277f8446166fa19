import math
import statistics

import pytest
import torch

from qlora_lab.evaluation.intervals import by_group, paired_interval, t_quantile


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_t_quantile_where_it_has_a_closed_form(level):
    assert t_quantile(1, level) == pytest.approx(math.tan(level * math.pi / 2), rel=1e-7)
    assert t_quantile(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-7)
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    z, freedom = normal, 10_000  # the first term of the expansion in 1 / freedom
    assert t_quantile(freedom, level) == pytest.approx(z + (z**3 + z) / (4 * freedom), rel=1e-6)


@pytest.mark.parametrize(
    ("freedom", "table"), [(3, "3.182"), (4, "2.776"), (7, "2.365"), (10, "2.228"), (30, "2.042"), (199, "1.972")]
)
def test_t_quantile_is_that_of_the_printed_tables(freedom, table):
    assert f"{t_quantile(freedom):.3f}" == table


@pytest.mark.parametrize("count", [2, 3, 8])
def test_95_of_100_intervals_hold_the_true_mean(count):
    draw = torch.Generator().manual_seed(count)
    trials = (3 + 2 * torch.randn(4000, count, generator=draw, dtype=torch.float64)).tolist()
    held = sum(abs(mean - 3) <= half for mean, half in map(paired_interval, trials))
    assert abs(held / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_paired_interval_by_hand():
    mean, half = paired_interval([1.0, 2.0, 6.0])  # variance (4 + 1 + 9) / 2 = 7
    assert (mean, half) == (pytest.approx(3), pytest.approx(4.3026527 * math.sqrt(7 / 3), rel=1e-7))
    assert paired_interval([2.5, 2.5]) == (2.5, 0)


@pytest.mark.parametrize("differences", [[], [1.0]])
def test_one_difference_has_no_interval(differences):
    with pytest.raises(ValueError, match="at least 2 are needed"):
        paired_interval(differences)


@pytest.mark.parametrize("wrong", [(0, 0.95), (3, 1.0), (3, 95)])
def test_t_quantile_refuses(wrong):
    with pytest.raises(ValueError, match="expected at least 1"):
        t_quantile(*wrong)


def test_groups_by_hand():
    """Mean 3; "a" is off it by -2 - 1 = -3, "b" by 3; an average group has 1.5 values."""
    assert by_group([1, 6, 2], ["a", "b", "a"]) == pytest.approx([3 - 3 / 1.5, 3 + 3 / 1.5])
    assert by_group([1, 6, 2], [0, 1, 2]) == pytest.approx([1, 6, 2])  # each on its own


def test_intervals_over_groups_hold_the_true_mean_where_those_over_values_do_not():
    draw = torch.Generator().manual_seed(0)
    groups = [group for group in range(30) for _ in range(1 + group % 5)]
    held = {"values": 0, "groups": 0}
    for luck in torch.randn(400, 30, generator=draw, dtype=torch.float64).tolist():
        values = [2 + luck[group] for group in groups]
        for name, numbers in (("values", values), ("groups", by_group(values, groups))):
            mean, half = paired_interval(numbers)
            held[name] += abs(mean - 2) <= half
    assert held["groups"] / 400 > 0.9 and held["values"] / 400 < 0.8


@pytest.mark.parametrize(("values", "groups"), [([], []), ([1.0], []), ([1.0], ["a", "b"])])
def test_groups_belong_to_values(values, groups):
    with pytest.raises(ValueError, match="one group for each value"):
        by_group(values, groups)
