"""Machinery of 00_start_here: how long a matrix product takes."""

import time

import torch


def milliseconds(dtype: torch.dtype, device: torch.device, repeats: int = 7) -> float:
    """The shortest time of a product of two square matrices: 512 rows on a CPU, 8192 on a GPU."""
    rows = 512 if device.type == "cpu" else 8192
    matrix = torch.randn(rows, rows, device=device).to(dtype)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # .item() waits until a GPU is done
        times.append(1000 * (time.perf_counter() - start))
    return min(times)  # whatever else runs on the machine only adds
