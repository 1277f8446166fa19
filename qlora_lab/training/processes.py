"""🤗 Accelerate: who we are among several processes, and sums over all of them."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from qlora_lab.training.settings import PRECISIONS


def sum_over_processes(accelerator, tensors: list[torch.Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes: one exchange of one flat vector."""
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="sum")
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def make_accelerator(compute_dtype: torch.dtype, device: torch.device):
    """🤗 Accelerate for this compute dtype, on the device where the model lies."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Accelerate keeps one precision for the whole process; a notebook may train twice, in two
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != PRECISIONS[compute_dtype]:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=PRECISIONS[compute_dtype], cpu=device.type == "cpu")
