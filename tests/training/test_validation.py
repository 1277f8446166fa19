"""Validation while training: when, what the best is, when it is over, and that a run goes on as if never stopped."""

import itertools
import json
import math

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import Batches, TrainingDiverged, text_loss, train, train_steps
from qlora_lab.training.checkpoints import checkpoints_in, newest_checkpoint
from qlora_lab.training.step_log import StepLog, line_of
from qlora_lab.training.step_records import StepRecord
from qlora_lab.training.validation import Validation, best_of, validated
from tests.training.test_loop import random_samples, stopped_at, trained

BATCHES = Batches(random_samples(40), 4, seed=5)


def records(*losses: float | None) -> list[StepRecord]:
    return [StepRecord(step, 1.0, 1.0, 1.0, 10, 0.1, loss) for step, loss in enumerate(losses, 1)]


def scripted(*losses: float):
    """A measure that returns these losses, one after the other."""
    coming = iter(losses)
    return lambda model: next(coming)


def held_out(model) -> float:
    return text_loss(model, random_samples(6, seed=9)).per_token


def facts(of: list[StepRecord]) -> list[tuple]:
    return [(r.step, r.loss, r.gradient_norm, r.validation_loss) for r in of]


def test_the_best_is_the_first_of_the_lowest():
    assert best_of(records()) is best_of(records(None, None)) is None
    assert best_of(records(None, 3.0, 0.0, None, 0.0)).step == 3  # a loss of 0 is a loss
    assert [r.step for r in validated(records(None, 3.0, 0.0, None))] == [2, 3]


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ((), 1, False),
        ((3, 2, 1), 1, False),
        ((3, 2, 2), 1, True),  # as low is not lower
        ((3, 1, 2), 2, False),
        ((3, 1, 2, None, 2), 2, True),
        ((3, 1, 2, 0.5, 2), 2, False),  # what is better begins the count anew
        ((3, 4, 5, 2, 9, 9, 9), None, False),
    ],
)
def test_patience_counts_validations_since_the_best(losses, patience, over):
    assert Validation(held_out, 1, patience).over(records(*losses)) is over


def test_it_validates_every_so_many_steps_and_after_the_last(tiny):
    measured = []

    def measure(model) -> float:
        model.eval()  # as judging does
        measured.append(trained(model))
        return 1.0

    seen = train(tiny, BATCHES, steps=7, progress=False, validation=Validation(measure, 3))
    assert [r.step for r in validated(seen)] == [3, 6, 7]
    for name, weight in trained(tiny).items():
        assert torch.equal(measured[-1][name], weight)  # after the update, not before


def test_training_goes_on_in_training_mode_and_draws_what_it_would_have_drawn(make_tiny):
    settings = {"steps": 6, "progress": False}
    runs = []
    for validation in (None, Validation(held_out, 1, keep_best=True)):
        model = make_tiny(dropout=0.5)
        torch.manual_seed(3)
        runs.append(([r.loss for r in train(model, BATCHES, validation=validation, **settings)], trained(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())


def test_it_stops_when_patience_is_at_its_end_and_keeps_the_best(tiny, tmp_path):
    after, losses = [], [5.0, 3.0, 4.0, 3.0, 9.0]

    def measure(model) -> float:
        after.append(trained(model))
        return losses[len(after) - 1]

    validation = Validation(measure, 2, patience=2, keep_best=True)
    seen = train(tiny, BATCHES, steps=40, progress=False, validation=validation, checkpoints=tmp_path)
    assert [r.validation_loss for r in validated(seen)] == [5.0, 3.0, 4.0, 3.0]
    assert len(seen) == 8
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-000008"]  # not due before step 10
    assert validation.restore_best(tiny) == 4
    assert all(torch.equal(weight, after[1][name]) for name, weight in trained(tiny).items())
    assert any(not torch.equal(weight, after[-1][name]) for name, weight in trained(tiny).items())


def test_the_last_is_left_alone_unless_the_best_is_to_be_kept(tiny):
    validation = Validation(scripted(1.0, 2.0), 1)
    train(tiny, BATCHES, steps=2, progress=False, validation=validation)
    last = trained(tiny)
    assert validation.best is None and validation.restore_best(tiny) is None
    assert all(torch.equal(weight, last[name]) for name, weight in trained(tiny).items())


@pytest.mark.parametrize("at", range(1, 8))
def test_a_stopped_run_goes_on_as_if_it_had_not_been(make_tiny, tmp_path, at):
    """Stopped after each of its steps: the same losses, the same best adapter, the same end."""
    losses = (4.0, 2.0, 3.0, 1.0, 1.0, 5.0, 0.5, 6.0)  # by step; the best of the first four, then patience's end
    settings = {"steps": 30, "checkpoint_every": 3, "learning_rate": 1e-2}

    def validation(steps_before: int = 0) -> Validation:
        return Validation(scripted(*losses[steps_before:]), 1, patience=2, keep_best=True)

    def seeded():
        model = make_tiny(dropout=0.5)
        torch.manual_seed(0)
        return model

    whole, one = seeded(), validation()
    expected = train(whole, BATCHES, progress=False, validation=one, **settings)
    assert [r.step for r in expected] == [1, 2, 3, 4, 5, 6] and one.restore_best(whole) == 4

    if at < 7:
        stopped_at(at, seeded(), BATCHES, tmp_path, validation=validation(), **settings)
    else:
        train(seeded(), BATCHES, progress=False, checkpoints=tmp_path, validation=validation(), **settings)
    begun = newest_checkpoint(tmp_path)
    assert (len(begun.records) if begun else 0) == (6 if at == 7 else 3 if at > 3 else 0)
    other, two = seeded(), validation(len(begun.records) if begun else 0)
    named = {"checkpoints": tmp_path, "resume": True, "progress": False, "validation": two}
    assert facts(train(other, BATCHES, **named, **settings)) == facts(expected)
    assert (two.best_step, two.best_loss) == (4, 1.0) and two.restore_best(other) == 4
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(other).items())


def test_a_run_without_patience_left_takes_no_step_and_with_more_goes_on(make_tiny, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 1, "progress": False, "checkpoints": tmp_path}
    first = train(make_tiny(), BATCHES, validation=Validation(scripted(1.0, 2.0), 1, 1), **settings)
    assert len(first) == 2
    again = train(make_tiny(), BATCHES, validation=Validation(scripted(), 1, 1), resume=True, **settings)
    assert again == first
    more = train(make_tiny(), BATCHES, validation=Validation(scripted(3.0, 4.0, 5.0), 1, 3), resume=True, **settings)
    assert [r.validation_loss for r in more] == [1.0, 2.0, 3.0, 4.0]
    assert more[:2] == first


def test_a_checkpoint_without_the_best_is_not_gone_on_with_to_keep_it(make_tiny, tmp_path):
    settings = {"steps": 4, "checkpoint_every": 2, "checkpoints": tmp_path}
    train(make_tiny(), BATCHES, validation=Validation(held_out, 1), progress=False, **settings)
    keeping = Validation(held_out, 1, keep_best=True)
    with pytest.raises(UserError, match="checkpoint-000004 does not hold the best adapter so far"):
        train_steps(make_tiny(), BATCHES, validation=keeping, resume=True, **settings)
    (tmp_path / "checkpoint-000004" / "best.safetensors").write_bytes(b"of another file")
    assert newest_checkpoint(tmp_path).best is None


def test_the_best_of_a_checkpoint_is_no_longer_kept_if_nobody_asks(make_tiny, tmp_path):
    settings = {"steps": 4, "checkpoint_every": 2, "checkpoints": tmp_path, "progress": False}
    train(make_tiny(), BATCHES, validation=Validation(scripted(1, 2, 3, 4), 1, keep_best=True), **settings)
    last = Validation(scripted(), 1)
    model = make_tiny()
    train(model, BATCHES, validation=last, resume=True, **settings)
    assert last.restore_best(model) is None


def test_a_checkpoint_whose_best_is_damaged_is_passed_over(make_tiny, tmp_path, capsys):
    settings = {"steps": 4, "checkpoint_every": 2, "checkpoints": tmp_path, "progress": False}
    train(make_tiny(), BATCHES, validation=Validation(held_out, 1, keep_best=True), **settings)
    (tmp_path / "checkpoint-000004" / "best.safetensors").unlink()
    train(make_tiny(), BATCHES, validation=Validation(held_out, 1, keep_best=True), resume=True, **settings)
    assert "going on from checkpoint-000002" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_ends_the_training(tiny, tmp_path, loss):
    validation = Validation(scripted(1.0, 1.0, loss), 1)
    with pytest.raises(TrainingDiverged, match="the validation loss is .* after step 3"):
        train(tiny, BATCHES, steps=5, checkpoint_every=1, checkpoints=tmp_path, progress=False, validation=validation)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-000001", "checkpoint-000002"]


def test_impossible_settings():
    for settings in ({"every": 0}, {"every": 1, "patience": 0}):
        with pytest.raises(UserError, match="both must be at least 1"):
            Validation(held_out, **settings)


# ------------------------------------------------------------------------------------------------------------- the log


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_has_a_line_as_soon_as_a_step_is_taken(tiny, tmp_path):
    """Each can be read by another program before the next step begins."""
    log, there = StepLog(tmp_path / "log.jsonl"), []

    def note(record: StepRecord) -> None:
        log.write(record)
        there.append(lines(log.path)[-1])

    named = {"progress": False, "each_step": note, "validation": Validation(held_out, 2)}
    seen = train(tiny, BATCHES, steps=4, **named)
    assert there == lines(log.path) == [line_of(record) for record in seen]
    assert [line["step"] for line in there] == [1, 2, 3, 4]
    always = {"step", "loss", "learning_rate", "gradient_norm", "tokens", "seconds"}
    assert [set(line) - always for line in there] == [set(), {"validation_loss"}] * 2
    assert all(always <= set(line) for line in there)


def test_a_resumed_log_has_each_step_once(make_tiny, tmp_path):
    """Five steps are logged, and the checkpoint is of the fourth."""
    settings = {"steps": 7, "checkpoint_every": 2, "checkpoints": tmp_path / "checkpoints"}
    path = tmp_path / "log.jsonl"
    log = StepLog(path)
    steps = train_steps(make_tiny(), BATCHES, **settings)
    for record in itertools.islice(steps, 5):
        log.write(record)
    steps.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]
    resumed = StepLog(path)
    assert len(lines(path)) == 5  # nothing is lost before the resumed run has told of the first steps
    seen = train(make_tiny(), BATCHES, resume=True, progress=False, each_step=resumed.write, **settings)
    assert lines(path) == [line_of(record) for record in seen]
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_gradient_that_overflowed_is_null_in_the_log():
    line = json.dumps(line_of(StepRecord(1, 2.0, 0.1, math.inf, 10, 0.1)), allow_nan=False)
    assert json.loads(line)["gradient_norm"] is None
