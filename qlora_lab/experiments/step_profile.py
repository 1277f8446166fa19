"""One training step, kernel by kernel: how many there are, how long they take, and when each one ran."""

from __future__ import annotations

import torch

from qlora_lab.experiments.step_ways import running

KINDS = (  # of kernels, by what their names contain; the first that fits
    ("attention", ("flash", "fmha", "sdpa")),
    ("matrix product", ("nvjet", "gemm", "cutlass", "splitK", "cublas")),
    ("dequantize", ("dequantize", "kDequantize", "Dequantize")),
    ("AdamW", ("adam", "kOptimizer", "Optimizer32bit")),
    ("copies, fills", ("copy", "Memcpy", "Memset", "Fill", "CatArray")),
    ("norm, rotary, SwiGLU, loss", ("rms_norm", "head_norm", "rotate", "swiglu", "cross_entropy", "border")),
)


def profile(who: str, batch: int, checkpointing: bool) -> dict:
    """One step's kernels: how many, how long by kind; and when each of the first ran."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    steps = running(who, batch, checkpointing, 6)
    for _ in range(4):
        next(steps)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        next(steps)
        torch.cuda.synchronize()
    events = [e for e in profiled.events() or [] if e.device_type == DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, kind_of(e.name)) for e in events)
    steps.close()
    kinds: dict[str, list] = {}
    busy = end_of_last = 0.0
    for start, end, kind in spans:
        count_and_time = kinds.setdefault(kind, [0, 0.0])
        count_and_time[0] += 1
        count_and_time[1] += (end - start) / 1e3
        busy += max(0.0, end - max(start, end_of_last))
        end_of_last = max(end_of_last, end)
    first = spans[0][0]
    middle = spans[len(spans) // 3 :][:150]  # in the forward or backward pass of some layer
    return {
        "kernels": len(spans),
        "span_milliseconds": (end_of_last - first) / 1e3,
        "busy_milliseconds": busy / 1e3,
        "kinds": {kind: {"count": n, "milliseconds": ms} for kind, (n, ms) in sorted(kinds.items())},
        "timeline_microseconds": [
            [round(start - middle[0][0], 1), round(end - middle[0][0], 1), kind] for start, end, kind in middle
        ],
    }


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "elementwise and sums")
