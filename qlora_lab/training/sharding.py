"""Trained parameters of which each process has a part: how the optimizer sees them, and how they are saved whole.

FSDP2 makes a parameter a `DTensor`, which knows the whole's shape and holds this process's rows. AdamW works element by
element, so it is given the rows alone, as plain parameters on the same memory: any AdamW will do. A parameter that is
not sharded is its own part and its own whole.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeGuard

import torch

from qlora_lab.errors import UserError
from qlora_lab.training.settings import TrainSettings

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_wanted() -> bool:
    """Whether this process was started to shard: `accelerate launch` says so for a configuration with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_sharded(parameter: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of it only."""
    return hasattr(parameter, "device_mesh")


def part_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """This process's part of a trained parameter, as a parameter on the same memory."""
    if not is_sharded(parameter):
        return parameter
    local: torch.Tensor = parameter.to_local()
    return torch.nn.Parameter(local.detach())


def whole(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Gather a parameter's values, or an optimizer's states of them, from the parts of all processes.

    All processes must call this.

    Args:
        values: of this process's part, with its shape; anything else is returned as it is.
    """
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import DTensor

    values = values.to_local() if is_sharded(values) else values
    if values.shape != parameter.to_local().shape:
        return values
    mesh, places = parameter.device_mesh, parameter.placements
    gathered = DTensor.from_local(values, mesh, places, shape=parameter.shape, stride=parameter.stride())
    return gathered.full_tensor()


def own_part(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that belongs to this process: the opposite of `whole`."""
    if not is_sharded(parameter) or values.shape != parameter.shape:
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(parameter.device)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def require_shardable(settings: TrainSettings, rank: int, processes: int) -> None:
    """Raise UserError for settings that do not go with sharded parameters. rank: of the adapters."""
    if settings.compute_dtype == torch.float16:
        raise UserError("sharding and float16 do not go together here: compute in bfloat16, or in float32 on a CPU")
    if settings.merge_aware:
        raise UserError("merge_aware merges whole matrices: leave it out, or do not shard")
    if settings.fast or settings.update_in_backward:
        what = "--fast" if settings.fast else "update_in_backward (the presets in-backward and lean)"
        raise UserError(f"{what} reads and updates whole parameters: leave it out, or do not shard")
    if settings.optimizer.endswith("8bit"):
        raise UserError(
            f"{settings.optimizer} quantizes its states in blocks that would end where a process's part ends: use "
            f"{settings.optimizer.replace('8bit', '32bit') if 'paged' in settings.optimizer else 'adamw_torch'}"
        )
    if rank % processes:
        raise UserError(
            f"--rank {rank} cannot be shared evenly by {processes} processes: choose a multiple of {processes}"
        )
