"""Bytes: what a training step will need (`estimate`, pure arithmetic) and what it did need (`measure_memory`).

Importing this room is quick: torch and transformers come with `measure_memory`, which is loaded when it is asked for.
The name `estimate` is the function; its module's other names come from `qlora_lab.memory.estimate`.
"""

from qlora_lab.memory.estimate import (
    SHAPES,
    MemoryBreakdown,
    Shape,
    estimate,
    from_config,
    shape_named,
    trainable_parameters,
)

__all__ = [
    "SHAPES",
    "MeasuredMemory",
    "MemoryBreakdown",
    "Shape",
    "estimate",
    "from_config",
    "measure_memory",
    "shape_named",
    "trainable_parameters",
]


def __getattr__(name: str):
    if name in ("MeasuredMemory", "measure_memory"):
        from qlora_lab.memory import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
