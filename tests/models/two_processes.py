"""What test_sweep.py starts twice: python -m torch.distributed.run --nproc_per_node 2 -m tests.models.two_processes

Trains a few models, by name and folder in folders.json; each process writes down the losses that it saw.
"""

import json
import pathlib
import sys

import torch
from accelerate import PartialState

from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, load_model, train
from qlora_lab.training.processes import make_accelerator

# A rounding of float32 sends a token to another expert: so does accumulation in one process. In float64 all are equal.
ROUTED_BY_ROUNDING = ("dbrx",)


def losses_of(folder, accelerator=None) -> list[float]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (8,), generator=draw).tolist()
    samples = [TokenizedSample(tuple(torch.randint(3, 90, (n,), generator=draw).tolist()), 2) for n in lengths]
    model, _ = load_model(folder, device="cpu", compute_dtype=torch.float32)
    adapted = add_adapter(model, rank=2)
    if model.config.model_type in ROUTED_BY_ROUNDING:
        adapted = adapted.double()
    records = train(
        adapted,
        Batches(samples, 4),
        steps=3,
        learning_rate=0.01,
        progress=False,
        accelerator=accelerator,
    )
    return [record.loss for record in records]


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    accelerator = make_accelerator(torch.float32, torch.device("cpu"))
    assert accelerator.num_processes == 2
    folders = json.loads((folder / "folders.json").read_text())
    losses = {name: losses_of(path, accelerator) for name, path in folders.items()}
    (folder / f"process-{PartialState().process_index}.json").write_text(json.dumps(losses))
