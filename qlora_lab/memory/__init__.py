"""Bytes: what a training step will need (`estimate`, pure arithmetic) and what it did need (`measure_memory`).

    prediction.py     `estimate`: the peak of a training step, part by part
    moments.py        the moments that may be the peak, and what is there then
    processes.py      several processes: what each holds, and what goes over the wire
    training_step.py  what is trained, in which precision, on how many tokens
    activations.py    what autograd keeps of the forward pass, tensor by tensor
    tensors.py        which tensors a model and its training hold
    shapes.py         sizes of LLaMA-like models and mixtures of experts, by name or from a config
    meter.py          asks the device, phase by phase
    measuring.py      measure_memory: train two steps and see

All but the last two are plain numbers. Importing this room is quick: torch and transformers come with
`measure_memory`, which is loaded when it is asked for.
"""

from qlora_lab.facts import LINEARS, bits_per_parameter
from qlora_lab.memory.activations import layer_activation_bytes
from qlora_lab.memory.prediction import CUDA_CONTEXT, MemoryBreakdown, estimate
from qlora_lab.memory.processes import traffic
from qlora_lab.memory.shapes import SHAPES, MixtureShape, Shape, from_config, shape_named
from qlora_lab.memory.tensors import (
    kbit_preparation_bytes,
    optimizer_state_bytes,
    trainable_parameters,
    trained_tensors,
)

__all__ = [
    "CUDA_CONTEXT",
    "LINEARS",
    "SHAPES",
    "MeasuredMemory",
    "MemoryBreakdown",
    "MixtureShape",
    "Shape",
    "bits_per_parameter",
    "estimate",
    "from_config",
    "kbit_preparation_bytes",
    "layer_activation_bytes",
    "measure_memory",
    "optimizer_state_bytes",
    "shape_named",
    "traffic",
    "trainable_parameters",
    "trained_tensors",
]


def __getattr__(name: str):
    if name in ("MeasuredMemory", "measure_memory"):
        from qlora_lab.memory import measuring

        return getattr(measuring, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
