"""Run a script where memory is short: `python -m qlora_lab.classroom.lessons.n09.limited GB SCRIPT ARGUMENTS...`

The libraries are imported first, so that GB (10^9 bytes) are what the script has for its model and its training. On a
GPU it is torch's own cap on its allocator, elsewhere Linux's limit on a process's address space.
"""

from __future__ import annotations

import runpy
import sys

from qlora_lab.errors import UserError


def limit_memory(gigabytes: float) -> None:
    """Let this process have so much more memory than it has now.

    Raises:
        UserError: neither a GPU nor Linux is here.
    """
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        return
    if not sys.platform.startswith("linux"):
        raise UserError("only Linux, or a GPU, lets a process be limited")
    import resource

    import psutil

    torch.ones(64, 64) @ torch.ones(64, 64)  # starts the threads, whose stacks are address space too
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gigabytes * 1e9), resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    limit_memory(float(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
