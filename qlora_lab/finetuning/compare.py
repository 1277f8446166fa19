"""Train one model on the same data in several ways, at several seeds, and write down how each of them learned.

    python -m qlora_lab.finetuning.compare presets [--seeds 3] [--output data/records]

`presets` holds the recipes of `presets.py` against one another on the bundled model: does one buy memory with broken
training? Everything but the recipe is `train_qlora`'s default. Needs a GPU; writes `presets-<gpu>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import sys

import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning.data import Batches, load_samples, tokenize
from qlora_lab.finetuning.evaluate import exact_match, generate, text_loss
from qlora_lab.finetuning.models import load_model
from qlora_lab.finetuning.presets import PRESETS
from qlora_lab.finetuning.train import train_steps

STEPS, BATCH_SIZE, RANK, LEARNING_RATE, JUDGED = 30, 8, 16, 1.5e-3, 100


def train_preset(name: str, seed: int, device: torch.device, steps: int = STEPS) -> dict:
    """Train the bundled model with a preset; the seed is that of the adapter and of the samples' order.

    Returns:
        losses (nats per token, one a step), validation_loss (the same on held-out orders), exact_match on `test`
        (share), peak_allocated (bytes, over the training), seconds.
    """
    preset, compute_dtype = PRESETS[name], torch.bfloat16
    base, tokenizer = load_model(quantization="nf4", device=device, compute_dtype=compute_dtype)
    splits = {split: load_samples("orders", split) for split in ("train", "validation", "test")}
    train, validation = (tokenize(splits[split], tokenizer, 256)[0] for split in ("train", "validation"))
    model = preset.adapt(base, rank=RANK, alpha=2 * RANK, seed=seed)
    settings = preset.settings(compute_dtype)
    torch.cuda.reset_peak_memory_stats(device)
    records = list(
        train_steps(
            model,
            Batches(train, BATCH_SIZE, seed=seed),
            steps=steps,
            learning_rate=LEARNING_RATE,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )
    peak = torch.cuda.max_memory_allocated(device)
    dtype = settings["compute_dtype"]
    loss = text_loss(model, validation, pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    chats = splits["test"].select(range(JUDGED))["messages"]
    answers = generate(model, tokenizer, [chat[:-1] for chat in chats], 56, dtype=dtype)
    return {
        "preset": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "validation_loss": loss.total / loss.tokens,
        "exact_match": exact_match(answers, [chat[-1]["content"] for chat in chats]),
        "peak_allocated": peak,
        "seconds": sum(record.seconds for record in records),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.finetuning.compare", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["presets"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    args = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise UserError("no GPU here: paged optimizers and bf16 adapters are compared on one")
        if args.seeds < 1:
            raise UserError(f"--seeds {args.seeds}: at least 1 is needed")
        record = compare_presets(args.seeds, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(record)
    return 0


def compare_presets(seeds: int, output: pathlib.Path) -> pathlib.Path:
    """Run every preset at every seed; the record is written anew after each run."""
    gpu = torch.cuda.get_device_name()
    record = {
        "command": "python -m qlora_lab.finetuning.compare presets",
        "device": gpu,
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
        "settings": {
            "model": "smollm2-135m-instruct, NF4, double quantization",
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "judged": JUDGED,
        },
        "runs": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"presets-{gpu.lower().replace(' ', '-')}.json"
    for seed in range(seeds):
        for name in PRESETS:
            run = train_preset(name, seed, torch.device("cuda"))
            record["runs"].append(run)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(
                f"{name:<14} seed {seed}: training {run['losses'][-1]:.4f}, validation {run['validation_loss']:.4f}, "
                f"exact {run['exact_match']:.0%}, {run['peak_allocated'] / 1e9:.2f} GB, {run['seconds']:.0f} s",
                flush=True,
            )
    return path


if __name__ == "__main__":
    sys.exit(main())
