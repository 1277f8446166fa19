"""Unsloth's training step, for `bench_step`: in a process of its own, since Unsloth rewrites what others import.

    python bench_unsloth.py MODEL STEPS

MODEL is a folder, a model in 4 bits. A line of output that begins with a brace is a run, as in `bench_step`'s record.
"""

import gc
import json
import os
import sys

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # no calls home

# isort: off
import unsloth  # before transformers, PEFT and TRL
import torch
from bench_step import LENGTH, RANK, SETTINGS, trl_result, trl_steps
# isort: on

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODES = (("unsloth", "unsloth"), ("unsloth, on the GPU", True))


def run(folder: str, batch: int, checkpointing: bool | str, steps: int) -> dict:
    """checkpointing: "unsloth", its default, moves layers' inputs to the host's memory; True keeps them."""
    gc.collect()
    torch.cuda.empty_cache()
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        folder, max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=True, use_gradient_checkpointing=checkpointing
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing=checkpointing,
    )
    return trl_result(batch, *trl_steps(model, tokenizer, batch, bool(checkpointing), steps))


def main() -> None:
    folder, steps = sys.argv[1], int(sys.argv[2])
    for batch, checkpointing in SETTINGS:
        for who, mode in MODES if checkpointing else [("unsloth", False)]:
            setting = {"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}
            print(json.dumps(setting | run(folder, batch, mode, steps)), flush=True)


if __name__ == "__main__":
    main()
