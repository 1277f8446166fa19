"""Ask the device how much memory was used."""

from __future__ import annotations

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
        status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
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
