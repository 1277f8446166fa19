"""Ask the device how much memory was used."""

import pathlib
import sys

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
