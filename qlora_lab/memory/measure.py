"""Ask the device how much memory was used."""

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
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def reset_peak(device: torch.device) -> None:
    """Start a new measurement on a GPU; a CPU's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
