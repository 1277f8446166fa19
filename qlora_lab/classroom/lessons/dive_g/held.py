"""What each of several processes holds of the bundled model, in 4 bits and with adapters, when they share it.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m qlora_lab.classroom.lessons.dive_g.held

The first process prints JSON: for each kind of tensor the bytes of the whole, and those on each process.
"""

import json

import torch
import torch.distributed
from accelerate import PartialState

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.models.bundled import DEFAULT_MODEL
from qlora_lab.models.compatibility import read_config
from qlora_lab.models.loading import locate
from qlora_lab.models.sharded import CheckpointWeights, empty_model, fill_and_shard
from qlora_lab.training.sharding import part_of

KINDS = ("4-bit weights", "adapters", "norms", "embeddings (also the head)", "scales")


def held(model) -> dict[str, tuple[int, int]]:
    """Bytes by kind of tensor of a LLaMA-like model in 4 bits: of the whole, and on this process."""
    sizes: dict[str, tuple[int, int]] = {}

    def add(kind: str, whole: torch.Tensor, here: torch.Tensor) -> None:
        bytes_whole, bytes_here = sizes.get(kind, (0, 0))
        sizes[kind] = bytes_whole + whole.numel() * whole.element_size(), bytes_here + here.nbytes

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "adapters"
        elif "embed" in name:
            kind = "embeddings (also the head)"
        else:
            kind = "norms" if "norm" in name else "4-bit weights"
        add(kind, parameter, part_of(parameter))
    for module in model.modules():
        if state := getattr(module, "quant_state", None):
            for scales in (state.absmax, state.state2.absmax):
                add("scales", scales, scales)
    return sizes


def main() -> None:
    device = torch.device("cpu")
    machine = PartialState(cpu=True)
    model, unfilled = empty_model(read_config(DEFAULT_MODEL), True, device, torch.float32)
    model = add_adapter(model, rank=8)
    fill_and_shard(model, unfilled, CheckpointWeights(locate(DEFAULT_MODEL)), device)
    mine = held(model)
    of_all: list = [None] * machine.num_processes
    torch.distributed.all_gather_object(of_all, mine)
    if machine.is_main_process:
        print(json.dumps({kind: [mine[kind][0], *(sizes[kind][1] for sizes in of_all)] for kind in KINDS}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
