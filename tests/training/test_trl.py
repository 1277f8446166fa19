"""The training loop held against TRL's SFTTrainer: the same samples, the same losses."""

import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from qlora_lab.finetuning import Batches, add_adapter, load_samples, tokenize, train
from qlora_lab.training.schedules import rate
from tests.conftest import tiny_config

STEPS, WARMUP, RATE = 8, 3, 1e-2


def tiny():
    torch.manual_seed(0)
    return add_adapter(LlamaForCausalLM(tiny_config()), rank=4, alpha=8)


def test_losses_are_those_of_sft_trainer(tokenizer, tmp_path):
    """Masked prompts, token-weighted losses, clipping, AdamW.

    The schedule is handed over: transformers' own warm-up begins at a learning rate of 0, a first step for nothing.
    """
    from trl import SFTConfig, SFTTrainer

    samples, _ = tokenize(load_samples("orders", "train").select(range(60)), tokenizer, 256)
    batches = Batches(samples, batch_size=4, seed=0)
    settings = {"steps": STEPS, "learning_rate": RATE, "warmup_steps": WARMUP, "pad_token_id": tokenizer.pad_token_id}
    ours = [record.loss for record in train(tiny(), batches, progress=False, **settings)]

    ordered = [row[0] for micro_batches in itertools.islice(batches, STEPS) for rows in micro_batches for row in rows]
    masks = [[0] * sample.prompt_length + [1] * (len(sample.ids) - sample.prompt_length) for sample in ordered]
    data = Dataset.from_dict({"input_ids": [list(sample.ids) for sample in ordered], "completion_mask": masks})
    model = tiny()
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: rate(step + 1, STEPS, WARMUP, "cosine"))
    config = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        max_length=None,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, optimizers=(adamw, schedule))
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert theirs == pytest.approx(ours, rel=1e-5)
    assert ours[-1] < ours[0]


def test_defaults_that_dive_d_names():
    """`SFTTrainer` turns these knobs by itself."""
    from trl import SFTConfig

    default = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert default["max_length"] == 1024 and default["train_sampling_strategy"] == "random"
    assert default["gradient_checkpointing"] is True
