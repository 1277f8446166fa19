"""What test_sharding.py starts in four processes, with torch.distributed.run.

Shards a tiny model, trains it, and writes down in the folder given what this process holds and what it saw.
"""

import json
import pathlib
import sys

import torch
from accelerate import PartialState

from qlora_lab.finetuning import Batches, add_adapter, train
from qlora_lab.models.sharded import RandomWeights, empty_model, fill_and_shard
from qlora_lab.training.processes import make_accelerator
from tests.conftest import tiny_config
from tests.training.test_loop import random_samples

CPU = torch.device("cpu")
CONFIG = {"vocab_size": 100, "tie_word_embeddings": False, "num_hidden_layers": 3}
RUNS = {  # by name: is the base quantized, micro-batches a step, and what else differs from SETTINGS
    "lora": (False, 1, {}),
    "qlora": (True, 2, {"gradient_checkpointing": True, "loss_chunk": 16}),
}
SETTINGS = {"steps": 6, "learning_rate": 1e-2, "max_grad_norm": 0.5}


def batches(accumulation: int) -> Batches:
    return Batches(random_samples(40), 4, accumulation=accumulation, seed=5)


def empty(quantize: bool):
    """A model without weights, with adapters that have some; and what is to be filled in."""
    model, unfilled = empty_model(tiny_config(**CONFIG), quantize, CPU, torch.float32)
    return add_adapter(model, rank=8, alpha=8), unfilled


def in_memory(model) -> int:
    """Bytes of the memory that the parameters take, each block counted once."""
    blocks = {}
    for parameter in model.parameters():
        local = parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter
        storage = local.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes()
    return sum(blocks.values())


def received(accelerator) -> dict:
    """Bytes that this process receives in a step with two micro-batches: of gathered weights, of summed gradients."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    count = {"weights": 0, "gradients": 0}

    class Gather(DefaultAllGather):
        def __call__(self, output_tensor, input_tensor, *args, **named):
            count["weights"] += output_tensor.nbytes - input_tensor.nbytes
            return super().__call__(output_tensor, input_tensor, *args, **named)

    class Reduce(DefaultReduceScatter):
        def __call__(self, output_tensor, input_tensor, *args, **named):
            count["gradients"] += input_tensor.nbytes - output_tensor.nbytes
            return super().__call__(output_tensor, input_tensor, *args, **named)

    model, unfilled = empty_model(tiny_config(**CONFIG), True, CPU, torch.bfloat16)
    model = add_adapter(model, rank=8, alpha=8)
    fill_and_shard(model, unfilled, RandomWeights(CPU), CPU)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(Gather())
            module.set_custom_reduce_scatter(Reduce())
    own = {"accelerator": accelerator, "progress": False, "gradient_checkpointing": True}
    train(model, batches(accumulation=2), steps=1, **own)
    return count


def seen() -> dict:
    accelerator = make_accelerator(torch.float32, CPU)
    results: dict = {"processes": accelerator.num_processes}
    for name, (quantize, accumulation, named) in RUNS.items():
        model, unfilled = empty(quantize)
        results[f"{name}, empty"] = in_memory(model)
        fill_and_shard(model, unfilled, RandomWeights(CPU, std=0.2), CPU)
        results[f"{name}, share"] = in_memory(model)
        own = {"accelerator": accelerator, "progress": False, **SETTINGS, **named}
        results[name] = [[r.loss, r.gradient_norm] for r in train(model, batches(accumulation), **own)]
        results[f"{name}, after"] = in_memory(model)
    results["received"] = received(accelerator)
    return results


if __name__ == "__main__":
    PartialState(cpu=True)
    found = seen()
    path = pathlib.Path(sys.argv[1]) / f"process-{PartialState().process_index}.json"
    path.write_text(json.dumps(found))
