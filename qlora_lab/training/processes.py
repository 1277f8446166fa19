"""Several processes, by way of 🤗 Accelerate: making its accelerator, and sums over all processes."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from qlora_lab.training.settings import PRECISIONS


def sum_over_processes(accelerator, tensors: list[torch.Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes. They are exchanged as one flat vector."""
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="sum")
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def of_main_process(accelerator, number: float) -> float:
    """The main process's number, in all of them, so that what they decide by it is the same. All must call this."""
    if accelerator.num_processes == 1:
        return number
    from accelerate.utils import broadcast

    return broadcast(torch.tensor(number, dtype=torch.float64, device=accelerator.device)).item()


def prepare(accelerator, optimizer):
    """🤗 Accelerate's wrapper around the optimizer, which skips a step if fp16 gradients overflow.

    Where Accelerate is told to shard (FSDP), it would only prepare an optimizer together with a model that it shards
    itself, all at once. Ours is sharded while it is loaded, in bf16 or fp32, so there is nothing to wrap.
    """
    return optimizer if accelerator.scaler is None else accelerator.prepare(optimizer)


def another_has_ended(error: RuntimeError) -> bool:
    """Whether this is what a process hears of when another one of its run is no longer there."""
    import torch.distributed

    lost = getattr(torch.distributed, "DistError", ())  # NCCL's; gloo raises bare RuntimeErrors
    return isinstance(error, lost) or "gloo/transport" in str(error)


def on_cpu() -> bool:
    """Whether this process trains on the CPU: there is no NVIDIA GPU, or `accelerate launch --cpu` asks for it."""
    from accelerate.utils import parse_flag_from_env

    return not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def make_accelerator(compute_dtype: torch.dtype, device: torch.device):
    """Make 🤗 Accelerate's accelerator for this compute dtype and the model's device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Accelerate keeps one precision per process, but a notebook may train in one and then in another
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != PRECISIONS[compute_dtype]:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=PRECISIONS[compute_dtype], cpu=device.type == "cpu")
