"""Which training steps are measured for their memory, and what each should need."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from qlora_lab.memory.prediction import MemoryBreakdown, estimate
from qlora_lab.memory.shapes import SHAPES


@dataclass(frozen=True)
class Setting:
    """What `estimate` is asked and a run does."""

    shape: str
    method: str = "qlora"
    batch_size: int = 1
    sequence_length: int = 512
    gradient_checkpointing: bool = True
    rank: int = 64
    targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "paged_adamw_32bit"
    adapter_dtype: str = "float32"
    full_precision: str = "float32"

    def predicted(self, preset: str | None = None) -> MemoryBreakdown:
        """preset: one of `PRESETS`, as in `estimate`."""
        knobs = asdict(self)
        return estimate(SHAPES[knobs.pop("shape")], knobs.pop("method"), **knobs, preset=preset)

    def as_row(self) -> dict:
        """As a record has it, in JSON's types."""
        return {**asdict(self), "targets": self.targets if isinstance(self.targets, str) else [*self.targets]}

    @classmethod
    def of_row(cls, row: dict) -> Setting:
        """That of a recorded run."""
        targets = row["targets"] if isinstance(row["targets"], str) else tuple(row["targets"])
        return cls(**{**{field.name: row[field.name] for field in fields(cls)}, "targets": targets})


def _rows(shape: str, method: str, rank: int, rows: list[tuple[int, int, bool]]) -> list[Setting]:
    return [Setting(shape, method, batch, length, checkpointing, rank) for batch, length, checkpointing in rows]


GRID = [
    *_rows("llama-7b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (1, 2048, True)]),
    *_rows("llama-7b", "qlora", 64, [(4, 512, False), (16, 512, True), (4, 2048, True), (16, 512, False)]),
    *_rows("llama-7b", "qlora", 64, [(16, 2048, True)]),
    *_rows("llama-7b", "qlora", 16, [(1, 512, True), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-7b", "lora", 64, [(1, 512, True), (1, 512, False), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-7b", "lora", 16, [(1, 512, True), (16, 512, True)]),
    *_rows("llama-13b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (4, 512, False)]),
    *_rows("llama-13b", "qlora", 64, [(16, 512, True), (4, 2048, True)]),
    *_rows("llama-13b", "qlora", 16, [(1, 512, True), (1, 2048, False)]),
    *_rows("llama-13b", "lora", 64, [(1, 512, True), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-13b", "lora", 16, [(1, 512, True)]),
    *_rows("llama-33b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (16, 512, True)]),
    *_rows("llama-33b", "qlora", 64, [(1, 2048, False)]),
    *_rows("llama-33b", "qlora", 16, [(1, 512, True), (4, 2048, True)]),
    *_rows("llama-65b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (1, 2048, True)]),
    *_rows("llama-65b", "qlora", 64, [(4, 2048, True)]),
    *_rows("llama-65b", "qlora", 16, [(1, 512, True)]),
]

# Kept aside: no formula in `estimate` was developed on these.
HELD_OUT = [
    Setting("smollm2-135m", "full", 4, 512, False, optimizer="adamw_torch"),
    Setting("smollm2-1.7b", "full", 1, 1024, True, optimizer="adamw_torch"),
    Setting("llama-3-8b", "qlora", 1, 512, True),
    Setting("llama-3-8b", "lora", 2, 1024, False, 16),
    Setting("mistral-7b", "qlora", 1, 1024, True, 16),
    Setting("llama-7b", "qlora", 4, 512, False, targets=("q_proj", "v_proj")),
    Setting("llama-7b", "qlora", 1, 512, True, 16, optimizer="adamw_torch"),
    Setting("llama-7b", "qlora", 2, 1024, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "lora", 2, 1024, False),
    Setting("llama-13b", "qlora", 2, 1024, False, 16),
    Setting("smollm2-360m", "full", 4, 512, False, optimizer="adamw_torch", full_precision="mixed"),
    Setting("smollm2-1.7b", "full", 1, 512, True, full_precision="mixed"),
    Setting("smollm2-1.7b", "full", 2, 1024, False, optimizer="adamw_torch", full_precision="mixed"),
    Setting("llama-7b", "lora", 1, 512, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "lora", 2, 1024, False, adapter_dtype="bfloat16"),
    Setting("llama-13b", "lora", 1, 512, True, 16, adapter_dtype="bfloat16"),
]

EXPLAINED = [
    Setting("llama-7b", "qlora", 1, 512, True),
    Setting("llama-7b", "qlora", 4, 512, False),
    Setting("llama-7b", "qlora", 4, 2048, True),
    Setting("llama-7b", "qlora", 1, 512, True, optimizer="adamw_torch"),
    Setting("llama-7b", "qlora", 1, 512, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "qlora", 4, 512, False, adapter_dtype="bfloat16"),
    Setting("llama-7b", "qlora", 1, 512, True, optimizer="adamw_8bit"),
    Setting("llama-7b", "lora", 1, 512, True),
    Setting("llama-7b", "lora", 4, 512, False),
    Setting("smollm2-360m", "full", 2, 512, True, optimizer="adamw_torch"),
    Setting("smollm2-360m", "full", 4, 512, False, optimizer="adamw_torch"),
    Setting("smollm2-360m", "full", 1, 64, True, optimizer="adamw_torch"),
]


def print_list() -> None:
    """What the grid would do, and what it should need."""
    for held_out, settings in ((False, GRID), (True, HELD_OUT)):
        for setting in settings:
            predicted = setting.predicted()
            need = f"{predicted.peak_allocated / 1e9:6.2f} GB ({predicted.moment})"
            knobs = " ".join(str(value) for value in asdict(setting).values())
            print(f"{knobs}{' held out' if held_out else ''}: {need}")
