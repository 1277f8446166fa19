"""Unsloth's training step: in a process of its own, since Unsloth rewrites what others import.

    python -m qlora_lab.experiments.unsloth_speed MODEL STEPS RANK ROWS

MODEL is a folder, a model in 4 bits; RANK is that of the adapters on all linear layers; ROWS is JSON, a list of
[who, samples a step, checkpointing]. A line of output that begins with a brace is a run, as the step record has it. Two
loops on the same model:

    unsloth                the way it is documented: through SFTTrainer
    unsloth, plain loop    the same model in the least that a training needs (`step_ways.plain_loop`): what its kernels
                           can do without a Trainer around them

Checkpointing is Unsloth's default, which moves layers' inputs to the host's memory; "..., on the GPU" keeps them.
"""

from __future__ import annotations

import json
import sys
import traceback

# isort: off
import unsloth  # before transformers, PEFT and TRL
import torch
from qlora_lab.experiments.gpu import empty_cache
from qlora_lab.experiments.sft_trainer import sft_steps
from qlora_lab.experiments.step_ways import LENGTH, plain_loop, result, samples_of_steps
from qlora_lab.experiments.unsloth_process import ON_THE_GPU, PLAIN
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.step_records import StepRecord
# isort: on


def model_with_adapters(folder: str, rank: int, checkpointing: bool | str):
    """checkpointing: "unsloth", its default, moves layers' inputs to the host's memory; True keeps them."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        folder, max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=True, use_gradient_checkpointing=checkpointing
    )
    decoder = model.get_decoder()
    linears = {name.rpartition(".")[-1] for name, module in decoder.named_modules() if hasattr(module, "in_features")}
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0,
        bias="none",
        target_modules=sorted(linears),
        use_gradient_checkpointing=checkpointing,
    )
    return model, tokenizer


def plain_steps(model, data: list[TokenizedSample], batch: int, steps: int) -> list[StepRecord]:
    """Forward pass and loss as Unsloth computes them, under bf16 autocast as in a Trainer."""
    unsloth.FastLanguageModel.for_training(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device

    def forward_backward(rows: torch.Tensor) -> torch.Tensor:
        for p in parameters:
            p.grad = None
        ids = rows.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    torch.cuda.reset_peak_memory_stats()
    return list(plain_loop(forward_backward, parameters, data, batch, steps))


def run(folder: str, rank: int, who: str, batch: int, checkpointing: bool, steps: int) -> dict:
    empty_cache()
    mode = checkpointing and (True if who.endswith(ON_THE_GPU) else "unsloth")
    model, tokenizer = model_with_adapters(folder, rank, mode)
    data = samples_of_steps(batch, model.config.vocab_size)
    if PLAIN in who:
        return result(plain_steps(model, data, batch, steps))
    return result(sft_steps(model, tokenizer, data, batch, checkpointing, steps))


def main() -> int:
    """Print each run; one that fails is told on standard error, and the others are made all the same."""
    folder, steps, rank, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    failed = 0
    for who, batch, checkpointing in rows:
        row = {"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}
        try:
            print(json.dumps(row | run(folder, rank, who, batch, checkpointing, steps)), flush=True)
        except Exception:
            print(f"{who}, batch {batch}:\n{traceback.format_exc()}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
