"""The live log of a run: a line for each step, readable with `tail -f` while the run goes on."""

from __future__ import annotations

import json
import math
import pathlib
from dataclasses import asdict

from qlora_lab.training.step_records import StepRecord


class StepLog:
    """Writes `log.jsonl`: each line is a `StepRecord` as JSON, at once on the disk.

    A line has `step`, `loss`, `learning_rate`, `gradient_norm`, `tokens`, `seconds` and, where the model was validated,
    `validation_loss`. A gradient norm that is not finite (fp16's scaler skips such steps) is null.

    The file begins anew with the first record. A resumed run is told of its earlier steps first, as `train_steps` does
    it, so they are in there again, and what was logged after the checkpoint is not there twice.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.begun = path, False

    def told(self) -> int:
        """How many steps the file has, those of a run that was killed included; a last line may be cut short."""
        return self.path.read_bytes().count(b"\n") if self.path.is_file() else 0

    def write(self, record: StepRecord) -> None:
        with self.path.open("a" if self.begun else "w", encoding="utf-8") as file:
            file.write(json.dumps(line_of(record)) + "\n")
        self.begun = True


def line_of(record: StepRecord) -> dict[str, int | float | None]:
    """The record's values by name, as a line of the log has them."""
    values = {name: value for name, value in asdict(record).items() if value is not None}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
