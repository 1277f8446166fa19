"""What trackers are told. TensorBoard's files are read with its own reader; Trackio and wandb are stood in for."""

import math
import sys
import types

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training import tracking as module
from qlora_lab.training.step_log import StepLog
from qlora_lab.training.step_records import StepRecord
from qlora_lab.training.tracking import TRACKERS, Tracking, require_tracker

SETTINGS = {"model": "tiny", "lr": "0.001"}


def record(step: int, **values) -> StepRecord:
    return StepRecord(**{"step": step, "loss": 4.0 / step, "learning_rate": 0.5, "gradient_norm": 1.0, "tokens": 10,
                         "seconds": 0.25, **values})  # fmt: skip


def read(folder) -> dict[str, list[tuple[int, float]]]:
    """By name, the steps and values that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_and_the_scores(tmp_path):
    """Killed after four steps, resumed after two: steps 3 and 4 come again, and are not told again."""
    first = Tracking("tensorboard", tmp_path, "run-1", SETTINGS, told=0)
    for step in (1, 2, 3, 4):
        first.write(record(step, **({"validation_loss": 0.5} if step == 2 else {})))
    again = Tracking("tensorboard", tmp_path, "run-1", SETTINGS, told=4)
    for step in (1, 2, 3, 4, 5):
        again.write(record(step, loss=100.0, gradient_norm=math.inf))
    again.finish({"exact_match": {"test": 0.75}, "json_fields": {"test": {"a": 1.0}}}, step=5)
    seen = read(tmp_path / "tensorboard")
    assert seen["loss"] == [(1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3)), (4, 1.0), (5, 100.0)]
    assert seen["gradient_norm"] == [(step, 1.0) for step in (1, 2, 3, 4)]  # and none that is no number
    assert seen["validation_loss"] == [(2, 0.5)]
    assert seen["exact_match/test"] == [(5, 0.75)]
    assert set(seen) == {
        "loss",
        "gradient_norm",
        "validation_loss",
        "exact_match/test",
        "learning_rate",
        "tokens",
        "seconds",
    }
    assert len(list((tmp_path / "tensorboard").rglob("hparams.yml"))) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trackio", {"project": "qlora_lab", "name": "run-1", "resume": "allow"}),
        ("wandb", {"project": "qlora_lab", "name": "run-1", "id": "run-1", "resume": "allow", "dir": "FOLDER"}),
    ],
)
@pytest.mark.parametrize("told", [0, 1])
def test_a_resumed_run_goes_on_under_its_name(monkeypatch, capsys, tmp_path, name, expected, told):
    """What a tracker prints, and Trackio does, is not mistaken for the report."""
    begun, configured, logged, ended = [], [], [], []
    run = types.SimpleNamespace(
        log=lambda values, step: print("logged") or logged.append((step, values)),
        finish=lambda: print("ended") or ended.append(1),
    )
    stand_in = types.ModuleType(name)
    stand_in.init = lambda **named: print("begun") or begun.append(named) or run
    stand_in.config = types.SimpleNamespace(update=lambda values, **_: configured.append(values))
    monkeypatch.setitem(sys.modules, name, stand_in)
    tracking = Tracking(name, tmp_path, "run-1", SETTINGS, told)
    for step in (1, 2):
        tracking.write(record(step, gradient_norm=math.inf))
    tracking.finish({"f1": {"test": 0.5}, "json_fields": {"test": {"a": 1.0}}}, step=2)
    assert begun == [{key: str(tmp_path) if value == "FOLDER" else value for key, value in expected.items()}]
    assert configured == [SETTINGS] * (told == 0)
    assert [step for step, _ in logged] == [*[1, 2][told:], 2]
    assert logged[-2][1] == {"loss": 2.0, "learning_rate": 0.5, "tokens": 10, "seconds": 0.25}
    assert logged[-1][1] == {"f1/test": 0.5}
    assert ended == [1]
    out, err = capsys.readouterr()
    assert out == "" and err.split() == ["begun", *["logged"] * (3 - told), "ended"]


def test_a_tracker_that_does_not_start_is_a_sentence(monkeypatch, tmp_path):
    stand_in = types.ModuleType("wandb")

    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(UserError, match=r"--track wandb does not start: api_key not configured \(no-tty\)"):
        Tracking("wandb", tmp_path, "run-1", SETTINGS, told=0)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_and_none_is_imported(monkeypatch, name):
    monkeypatch.delitem(sys.modules, name, raising=False)
    looked = []
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda of: looked.append(of) or object())
    require_tracker(name)
    assert looked == [name] and name not in sys.modules
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda of: None)
    with pytest.raises(
        UserError, match=f"--track {name} needs the package {name}, which is not installed: pip install"
    ):
        require_tracker(name)


def test_what_was_told_is_counted_by_whole_lines(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    assert log.told() == 0
    for step in (1, 2):
        log.write(record(step))
    assert StepLog(log.path).told() == 2
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    assert StepLog(log.path).told() == 2
