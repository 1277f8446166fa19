"""Measure training steps on a GPU and write them down beside what was predicted.

    python -m qlora_lab.memory.record [--output data/records/]

The models have LLaMA's shapes and random weights (`finetuning.build_random`), so nothing is downloaded: memory and
time do not depend on what the weights say. Writes `training-steps-<gpu>.json`.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import torch

from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, build_random, train_steps
from qlora_lab.memory.estimate import SHAPES, estimate

# shape, method, batch size, tokens a sample, gradient checkpointing
RUNS = [
    ("llama-7b", "qlora", 1, 512, True),
    ("llama-7b", "qlora", 4, 512, True),
    ("llama-7b", "qlora", 4, 512, False),
    ("llama-7b", "lora", 1, 512, True),
    ("llama-65b", "qlora", 1, 512, True),
]
STEPS, RANK, OPTIMIZER = 6, 64, "paged_adamw_32bit"


def measure_steps(shape_name: str, method: str, batch_size: int, length: int, checkpointing: bool) -> dict:
    """Train a few steps on random tokens; return settings, the prediction, and what was measured (bytes, seconds)."""
    shape = SHAPES[shape_name]
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = build_random(shape, "nf4" if method == "qlora" else None, device=device, compute_dtype=torch.bfloat16)
    torch.cuda.synchronize()
    built = {"seconds": time.perf_counter() - start, "allocated": torch.cuda.memory_allocated()}
    built["peak_allocated"] = torch.cuda.max_memory_allocated()

    model = add_adapter(model, rank=RANK, alpha=2 * RANK)
    draw = torch.Generator().manual_seed(0)
    samples = [
        TokenizedSample(tuple(torch.randint(3, shape.vocab_size, (length,), generator=draw).tolist()), 1)
        for _ in range(batch_size)
    ]
    torch.cuda.reset_peak_memory_stats()
    records = list(
        train_steps(
            model,
            Batches(samples, batch_size),
            steps=STEPS,
            learning_rate=1e-4,
            optimizer=OPTIMIZER,
            compute_dtype=torch.bfloat16,
            gradient_checkpointing=checkpointing,
        )
    )
    seconds = statistics.median(record.seconds for record in records[2:])
    predicted = estimate(
        shape,
        method,
        rank=RANK,
        batch_size=batch_size,
        sequence_length=length,
        gradient_checkpointing=checkpointing,
        optimizer=OPTIMIZER,
    )
    return {
        "shape": shape_name,
        "method": method,
        "batch_size": batch_size,
        "sequence_length": length,
        "gradient_checkpointing": checkpointing,
        "rank": RANK,
        "optimizer": OPTIMIZER,
        "built": built,
        "predicted": {"parts": predicted.parts, "peak_allocated": predicted.peak_allocated},
        "measured": {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
            "step_seconds": seconds,
            "tokens_per_second": batch_size * length / seconds,
            "losses": [record.loss for record in records],
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.memory.record", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU: this records training steps on one", file=sys.stderr)
        return 2
    runs = []
    for settings in RUNS:
        runs.append(measure_steps(*settings))
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peak, guess = runs[-1]["measured"]["peak_allocated"], runs[-1]["predicted"]["peak_allocated"]
        print(
            f"{settings}: {peak / 1e9:.2f} GB allocated, predicted {guess / 1e9:.2f} ({guess / peak - 1:+.1%}), "
            f"{runs[-1]['measured']['tokens_per_second']:.0f} tokens/s",
            flush=True,
        )
    gpu = torch.cuda.get_device_name()
    record = {
        "command": "python -m qlora_lab.memory.record",
        "device": gpu,
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
        "runs": runs,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"training-steps-{gpu.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
