"""The grid of `methods`: what "LoRA Without Regret" says of ranks, amounts of data and batch sizes."""

from __future__ import annotations

import torch

from qlora_lab.experiments.methods_known import METHODS, Method
from qlora_lab.experiments.methods_runs import Run, train_runs

RANKS, AMOUNTS, BATCHES, SEEDS = (1, 4, 16, 64), (50, 200, 2000), (4, 16, 64), (0, 1)
STEPS, SEEN, AT_ONCE = 100, 512, 16  # steps for amounts of data; samples that each batch size sees; of them at a time
WHO = {f"rank {rank}": Method(base="16 bits", rank=rank) for rank in RANKS}
WHO["full"] = METHODS["full fine-tuning"]
GRID = {  # name -> who, amounts of data, batch size, steps
    **{f"{who}, amounts": (who, AMOUNTS, 8, STEPS) for who in WHO},
    **{
        f"{who}, batch {batch}": (who, (2000,), batch, SEEN // batch)
        for batch in BATCHES
        for who in ("rank 16", "full")
    },
}


def grid_point(name: str, task: str, device: torch.device) -> dict:
    """A point of GRID at its learning rates and two seeds.

    Returns:
        grid: [{point, who, task, samples, batch_size, steps, rate, seed, trained, validation}], as in `compare`
    """
    who, amounts, batch_size, steps = GRID[name]
    method, micro = WHO[who], min(batch_size, AT_ONCE)
    about = {"point": name, "who": who, "task": task, "batch_size": batch_size, "steps": steps}
    found = []
    for at_once in [[rate] for rate in method.rates] if method.full else [method.rates]:
        runs = [Run(rate, seed, amount) for rate in at_once for seed in SEEDS for amount in amounts]
        _, _, rows = train_runs(method, task, steps, runs, device, micro, accumulation=batch_size // micro)
        found += [{**about, "samples": run.samples, **row} for run, row in zip(runs, rows, strict=True)]
    return {"grid": found}
