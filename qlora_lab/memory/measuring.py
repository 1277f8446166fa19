"""Train two steps and see what they needed: memory, measured on the device that is here."""

from __future__ import annotations

import difflib
import gc
import pathlib
from dataclasses import dataclass

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.errors import UserError
from qlora_lab.memory.meter import memory_bytes, peak_memory_bytes, reset_peak
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.memory.tensors import model_parts
from qlora_lab.models.bundled import CATALOGUE
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.models.loading import load_model
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.loop import train_steps
from qlora_lab.training.presets import Preset


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes on `device`: of the loaded model, and at the peak of a training step.

    On a GPU what tensors occupy ("allocated"), without what was there before. On a CPU what the whole process has
    resident, Python and libraries included; its peak is the highest so far, which may be an earlier one.
    """

    device: str
    loaded: int
    peak: int


def measure_memory(
    model_name: str = "smollm2-135m-instruct",
    use_qlora: bool = True,
    *,
    rank: int = 64,
    targets: str | list[str] = "all-linear",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = True,
    device: str | torch.device | None = None,
) -> MeasuredMemory:
    """Load a model, train two steps on random tokens, and say what the second one needed; nothing is kept.

    Args:
        model_name: anything that `load_model` takes (a hub's model is named owner/name), or a shape in
            `SHAPES`, built with random weights.
        use_qlora: adapters on a 4-bit base (NF4, double quantization); else LoRA on a 16-bit base (fp32 on a CPU
            without bf16).
        rank, targets, batch_size, sequence_length, gradient_checkpointing: as in `estimate`.
        device: default: the GPU if there is one. There the optimizer is paged AdamW, whose states do not count; on a
            CPU it is torch's.

    Raises:
        UserError: no such model or target, a number below 1, no GPU where one is asked for or needed.
    """
    numbers = {"rank": rank, "batch_size": batch_size, "sequence_length": sequence_length - 1}
    for name, number in numbers.items():
        if number < 1:
            least = 2 if name == "sequence_length" else 1
            raise UserError(f"{name}={number + least - 1}: must be at least {least}")
    device = torch.device(device) if device is not None else pick_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU: torch sees none here; leave device out to measure on the CPU")
    known = [*SHAPES, *CATALOGUE]
    near = difflib.get_close_matches(str(model_name).lower(), known, n=2, cutoff=0.7)
    may_be_elsewhere = "/" in str(model_name) or pathlib.Path(model_name).exists()  # on a hub, or a folder
    if near and model_name not in known and not may_be_elsewhere:
        raise UserError(f"unknown model {model_name!r}: did you mean {' or '.join(near)}?")
    shape, dtype = SHAPES.get(model_name), pick_compute_dtype(device)
    if shape and device.type == "cpu":
        _require_room(model_name, shape, use_qlora, dtype)
    gc.collect()
    before = memory_bytes(device) if device.type == "cuda" else 0
    quantization = "nf4" if use_qlora else None
    if shape:
        model = build_random(shape, quantization, device=device, compute_dtype=dtype)
    else:
        model, _ = load_model(model_name, quantization, device=device, compute_dtype=dtype)
    loaded = memory_bytes(device) - before
    model = add_adapter(model, rank=rank, alpha=2 * rank, targets=targets)
    optimizer = "paged_adamw_32bit" if device.type == "cuda" else "adamw_torch"
    preset = Preset("", optimizer=optimizer, gradient_checkpointing=gradient_checkpointing)
    batches = random_batches(model.config.vocab_size, batch_size, sequence_length)
    forget_accelerate()
    # QLoRA's own need, and not what a CPU with room takes to be faster
    settings = {"dense_base": False, **preset.settings(dtype)}
    steps = train_steps(model, batches, steps=2, learning_rate=1e-4, **settings)
    next(steps)  # from now on the optimizer has its states
    reset_peak(device)
    next(steps)
    steps.close()
    peak = peak_memory_bytes(device) - before
    del model
    gc.collect()
    return MeasuredMemory(str(device), loaded, peak)


def random_batches(vocabulary: int, batch_size: int, sequence_length: int):
    """`Batches` of random tokens, all but the first of them targets; the same ones each time."""
    draw = torch.Generator().manual_seed(0)
    rows = (torch.randint(3, vocabulary, (sequence_length,), generator=draw).tolist() for _ in range(batch_size))
    return Batches([TokenizedSample(tuple(row), 1) for row in rows], batch_size)


def forget_accelerate() -> None:
    """Accelerate keeps the first precision that it hears for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def _require_room(name: str, shape, use_qlora: bool, dtype: torch.dtype) -> None:
    import psutil

    parts = model_parts(shape, "qlora" if use_qlora else "lora")  # as on a GPU: what has no 4 bits has 16
    in_4_bits = parts["base weights"] + parts["quantization constants"] if use_qlora else 0
    need = in_4_bits + (sum(parts.values()) - in_4_bits) * dtype.itemsize // 2
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"{name} needs a GPU: its weights take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free here"
        )
