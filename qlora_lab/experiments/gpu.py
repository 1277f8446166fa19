"""The GPU that experiments measure."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import cast

import torch

from qlora_lab.errors import UserError


def require_gpu(why: str) -> torch.device:
    """The current GPU. Raises UserError, with the reason, where there is none."""
    if not torch.cuda.is_available():
        raise UserError(f"no GPU here: {why}")
    return torch.device("cuda", torch.cuda.current_device())


def empty_cache() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    torch.cuda.empty_cache()


def leave_idle(device: torch.device) -> None:
    """Leave the GPU as an idle process does, cuBLAS' workspaces included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


def milliseconds(function: Callable[[], object], warmup: int, rep: int) -> float:
    """The median time of a call with a cold cache, by Triton's `do_bench`, which takes its two numbers in ms."""
    from triton.testing import do_bench

    return cast(float, do_bench(function, warmup=warmup, rep=rep, return_mode="median"))
