"""A run's numbers, step by step, in TensorBoard, Trackio or Weights & Biases, by way of 🤗 Accelerate's trackers.

Nothing is tracked unless it is asked for. TensorBoard and Trackio write on this machine; wandb sends what it is told to
its server, as its own settings say (`WANDB_MODE=offline` keeps it here).
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Mapping

from qlora_lab.errors import UserError
from qlora_lab.training.step_log import line_of
from qlora_lab.training.step_records import StepRecord

TRACKERS = ("tensorboard", "trackio", "wandb")  # Accelerate's names, which are the packages', too
PROJECT = "qlora_lab"


def require_tracker(name: str) -> None:
    """Raise UserError unless the tracker's package is installed. It is not imported."""
    if importlib.util.find_spec(name) is None:
        source = " -c constraints.txt -e '.[tensorboard]'" if name == "tensorboard" else f" {name}"
        raise UserError(f"--track {name} needs the package {name}, which is not installed: pip install{source}")


class Tracking:
    """Tells a tracker of a run's steps and scores. Only the main process may make one.

    Args:
        name: one of TRACKERS.
        folder: the run's. TensorBoard's files go into its `tensorboard/`.
        run: names the run for Trackio and wandb; a resumed run has the same.
        settings: the run's, as text; the tracker is told of them if it has been told of no step.
        told: the number of steps, from the first, of which it was told before the run was resumed. What a GPU computes
            again may differ from that in the last digits; the tracker keeps what it was told first.

    Raises:
        UserError: the tracker does not start.
    """

    def __init__(self, name: str, folder: pathlib.Path, run: str, settings: Mapping[str, str], told: int):
        from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

        self.told = told
        if name == "tensorboard":
            self.tracker = TensorBoardTracker("tensorboard", folder)
        elif name == "trackio":
            self.tracker = TrackioTracker(PROJECT, name=run, resume="allow")
        else:
            self.tracker = WandBTracker(PROJECT, name=run, id=run, resume="allow", dir=str(folder))
        try:
            with _standard_output_kept():
                self.tracker.start()
                if not told:
                    self.tracker.store_init_configuration(dict(settings))
        except OSError:
            raise
        except Exception as error:  # of any kind: a login that is missing, a server that is not there
            raise UserError(
                f"--track {name} does not start: {error}; with --resume, the run goes on from here"
            ) from error

    def write(self, record: StepRecord) -> None:
        """Tell of a step, unless it is one of those that the tracker was told of before."""
        if record.step > self.told:
            values = {key: value for key, value in line_of(record).items() if key != "step" and value is not None}
            with _standard_output_kept():
                self.tracker.log(values, step=record.step)

    def finish(self, judged: Mapping[str, Mapping], step: int) -> None:
        """Tell of the judgement after training, and end.

        judged: numbers by score and split, as `train_qlora` reports them; what is deeper is left out. step: the last.
        """
        scores = {
            f"{score}/{split}": value
            for score, splits in judged.items()
            for split, value in splits.items()
            if isinstance(value, int | float)
        }
        with _standard_output_kept():
            if scores:
                self.tracker.log(scores, step=step)
            self.tracker.finish()


def _standard_output_kept():
    """A context in which what a tracker prints goes to standard error: standard output is the report's."""
    return contextlib.redirect_stdout(sys.stderr)
