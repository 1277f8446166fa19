import pytest

from qlora_lab.training.step_records import StepRecord, seconds_per_step, tokens_per_second


def records(*seconds: float, tokens: int = 100) -> list[StepRecord]:
    return [StepRecord(n, 1.0, 1.0, 1.0, tokens=tokens, seconds=s) for n, s in enumerate(seconds, 1)]


def test_speed_is_the_median_of_steps_that_are_warm():
    run = records(100.0, 50.0, 1.0, 2.0, 10.0)
    assert (tokens_per_second(run), seconds_per_step(run)) == (50, 2)
    assert (tokens_per_second(run[:2]), seconds_per_step(run[:2])) == (1.5, 75)
    assert (tokens_per_second([]), seconds_per_step([])) == (None, None)


def test_each_step_counts_with_its_own_tokens():
    run = [*records(9.0, 9.0), *records(1.0, tokens=10), *records(2.0, tokens=80), *records(1.0, tokens=30)]
    assert tokens_per_second(run) == pytest.approx(30)  # of 10, 40 and 30
