"""Ask the device how much memory was used."""

from __future__ import annotations

import collections
import pathlib
import sys
import time
from dataclasses import asdict, dataclass

import torch


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
