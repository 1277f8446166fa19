"""Recorded training steps beside what is predicted for them now."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from qlora_lab.experiments.memory_settings import Setting
from qlora_lab.experiments.record import Record


@dataclass(frozen=True)
class Comparison:
    """A recorded run and what `estimate` says of it now, in bytes of peak allocated.

    kind: "development", "held out" or "preset" (made under a cap). explained: the sum of the tensors that were alive
    at the peak, where the run's history was replayed; what is measured beyond is the allocator's rounding.
    """

    name: str
    kind: str
    measured: int
    predicted: int
    explained: int | None = None

    @property
    def deviation(self) -> float:
        """As a share of what was measured; negative when too little was predicted."""
        return self.predicted / self.measured - 1


def comparisons(path: pathlib.Path) -> list[Comparison]:
    """Every run in a record that was measured, beside what is predicted for it."""
    record = Record.read(path)
    explained = {}
    rows = []
    for section in ("explained", "runs", "caps"):
        for run in record.rows(section):
            if "measured" not in run:
                continue
            setting = Setting.of_row(run)
            preset = run.get("preset")
            if section == "explained":
                explained[setting, preset] = run["replayed_peak"]
            kind = "preset" if preset else "held out" if run.get("held_out") else "development"
            predicted = setting.predicted(preset).peak_allocated
            of_tensors = explained.get((setting, preset)) if "card_gb" not in run else None
            rows.append(Comparison(run_name(run), kind, run["measured"]["peak_allocated"], predicted, of_tensors))
    return rows


def print_comparisons(folder: pathlib.Path) -> None:
    """Of all memory records in a folder, each run and the range of each kind."""
    for path in sorted(folder.glob("memory-*.json")):
        rows = comparisons(path)
        print(f"{path.name}: peak allocated in GB; what is unexplained in MB")
        print(f"{'kind':<12}{'measured':>9}{'predicted':>10}{'':>8}{'unexplained':>12}  run")
        for row in sorted(rows, key=lambda row: row.kind):
            line = f"{row.kind:<12}{row.measured / 1e9:9.3f}{row.predicted / 1e9:10.3f}{row.deviation:+8.2%}"
            line += f"{(row.measured - row.predicted) / 1e6:12.1f}  {row.name}"
            if row.explained:
                line += f" (tensors alive: {row.explained / 1e9:.3f})"
            print(line)
        for kind in sorted({row.kind for row in rows}):
            of_kind = [row.deviation for row in rows if row.kind == kind]
            print(f"{kind}: {len(of_kind)} runs, {min(of_kind):+.2%} to {max(of_kind):+.2%}")


def run_name(run: dict) -> str:
    name = " ".join(str(run.get(k)) for k in ("shape", "method", "preset", "batch_size", "sequence_length", "rank"))
    name += " checkpointing" * run["gradient_checkpointing"] if "gradient_checkpointing" in run else ""
    name += f" {run['optimizer']} {run['adapter_dtype']}" if "optimizer" in run else ""
    name += " mixed" if run.get("full_precision") == "mixed" else ""
    return name + (f" on {run['card_gb']} GB" if "card_gb" in run else "")
