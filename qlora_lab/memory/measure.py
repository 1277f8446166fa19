"""Ask the device how much memory was used."""

from __future__ import annotations

import collections
import difflib
import gc
import pathlib
import sys
import time
from dataclasses import asdict, dataclass

import torch

from qlora_lab.errors import UserError
from qlora_lab.memory.estimate import SHAPES, model_parts


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far, in bytes.

    On a GPU: `torch.cuda.max_memory_allocated`, tensors only, since the last reset. On a CPU: the most that this
    process has ever had resident, Python and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # not ru_maxrss, which a process inherits from the one that started it
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def reset_peak(device: torch.device) -> None:
    """Start a new measurement on a GPU; a CPU's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_bytes(device: torch.device) -> int:
    """Memory in use now: tensors on a GPU; on a CPU what this process has resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


@dataclass(frozen=True)
class Phase:
    """Memory over a stretch of work, in bytes: in use at its end, and at its peak. seconds: wall time.

    allocated is what tensors occupy (on a CPU: what is resident, and the peak is that of the whole process so far);
    reserved is what torch's allocator has taken from the GPU for them (0 on a CPU).
    """

    allocated: int
    peak_allocated: int
    peak_reserved: int
    seconds: float

    def __or__(self, later: Phase) -> Phase:
        """This phase and a later one, taken as one."""
        return Phase(
            later.allocated,
            max(self.peak_allocated, later.peak_allocated),
            max(self.peak_reserved, later.peak_reserved),
            self.seconds + later.seconds,
        )


class Meter:
    """Cuts work into phases: `mark(name)` ends the one that began at the last mark. Marks of one name are joined."""

    def __init__(self, device: torch.device):
        self.device = device
        self.phases: dict[str, Phase] = {}
        self._restart()

    def mark(self, name: str, wait: bool = True) -> Phase:
        """wait: let the GPU finish first, so that `seconds` holds its work. Bytes do not need it."""
        cuda = self.device.type == "cuda"
        if cuda and wait:
            torch.cuda.synchronize(self.device)
        phase = Phase(
            memory_bytes(self.device),
            peak_memory_bytes(self.device),
            torch.cuda.max_memory_reserved(self.device) if cuda else 0,
            time.perf_counter() - self._start,
        )
        self.phases[name] = self.phases[name] | phase if name in self.phases else phase
        self._restart()
        return phase

    def as_dict(self) -> dict[str, dict]:
        return {name: asdict(phase) for name, phase in self.phases.items()}

    def _restart(self) -> None:
        reset_peak(self.device)
        self._start = time.perf_counter()


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
        model_name: anything that `finetuning.load_model` takes (a hub's model is named owner/name), or a shape in
            `SHAPES`, built with random weights.
        use_qlora: adapters on a 4-bit base (NF4, double quantization); else LoRA on a 16-bit base (fp32 on a CPU
            without bf16).
        rank, targets, batch_size, sequence_length, gradient_checkpointing: as in `estimate`.
        device: default: the GPU if there is one. There the optimizer is paged AdamW, whose states do not count; on a
            CPU it is torch's.

    Raises:
        UserError: no such model or target, a number below 1, no GPU where one is asked for or needed.
    """
    from qlora_lab.finetuning import Preset, add_adapter, build_random, load_model, train_steps
    from qlora_lab.finetuning.models import CATALOGUE, pick_compute_dtype, pick_device

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
    steps = train_steps(model, batches, steps=2, learning_rate=1e-4, **preset.settings(dtype))
    next(steps)  # from now on the optimizer has its states
    reset_peak(device)
    next(steps)
    steps.close()
    peak = peak_memory_bytes(device) - before
    del model
    gc.collect()
    return MeasuredMemory(str(device), loaded, peak)


def random_batches(vocabulary: int, batch_size: int, sequence_length: int):
    """`finetuning.Batches` of random tokens, all but the first of them targets; the same ones each time."""
    from qlora_lab.finetuning import Batches, TokenizedSample

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


class MomentsOfAStep:
    """Stands in for 🤗 Accelerate in `train_steps`, and marks where the forward and the backward pass end.

    What follows them (clipping, the optimizer) is the update: mark it when the step's record comes.
    """

    def __init__(self, accelerator, meter: Meter):
        self._accelerator, self._meter = accelerator, meter
        self.step = "step"

    def __getattr__(self, name: str):
        return getattr(self._accelerator, name)

    def backward(self, loss: torch.Tensor) -> None:
        self._meter.mark(f"{self.step}: forward", wait=False)
        self._accelerator.backward(loss)
        self._meter.mark(f"{self.step}: backward", wait=False)


def live_at_peak(trace: list[dict]) -> tuple[int, collections.Counter]:
    """Replay an allocator's history up to its peak: what was alive then, by the line of Python that asked for it.

    Args:
        trace: `torch.cuda.memory._snapshot()["device_traces"][i]`: entries with `action`, `addr`, `size`, and
            `frames`, the innermost first.

    Returns:
        the peak in bytes; for each (place, block size) the number of blocks. Places are "file:line function", three
        of them at most, or "C++" where autograd's own code asked.
    """
    alive: dict[int, dict] = {}
    total = peak = 0
    at_peak = 0  # length of the history that leads to the peak
    for index, entry in enumerate(trace):
        total += _apply(entry, alive)
        if total > peak:
            peak, at_peak = total, index + 1
    alive.clear()
    for entry in trace[:at_peak]:
        _apply(entry, alive)
    return peak, collections.Counter((_place(entry.get("frames", [])), entry["size"]) for entry in alive.values())


def _apply(entry: dict, alive: dict[int, dict]) -> int:
    """Take one entry of the history; return by how much the allocated memory grew."""
    if entry["action"] == "alloc":
        alive[entry["addr"]] = entry
        return entry["size"]
    if entry["action"] == "free_requested":
        gone = alive.pop(entry["addr"], None)
        return -gone["size"] if gone else 0
    return 0


def _place(frames: list[dict]) -> str:
    python = [frame for frame in frames if frame["filename"].endswith(".py")]
    telling = [frame for frame in python if not any(part in frame["filename"] for part in _PLUMBING)] or python
    names = ["/".join(pathlib.PurePath(frame["filename"]).parts[-2:]) for frame in telling[:3]]
    places = [f"{name}:{frame['line']} {frame['name']}" for name, frame in zip(names, telling, strict=False)]
    return " < ".join(places) or "C++"


_PLUMBING = ("torch/nn/modules/", "torch/_ops.py", "torch/_library", "torch/_compile", "torch/utils/_contextlib")
