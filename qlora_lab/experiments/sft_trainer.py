"""Training steps through TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
import time

import torch

from qlora_lab.experiments.step_ways import COMMON, LENGTH, make, samples_of_steps
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.step_records import StepRecord


def trl_steps(batch: int, checkpointing: bool, steps: int) -> list[StepRecord]:
    """The standard model, with PEFT's adapters, through SFTTrainer."""
    model, _ = make("standard")
    return standard_sft_steps(model, samples_of_steps(batch), batch, checkpointing, steps)


def standard_sft_steps(
    model, data: list[TokenizedSample], batch: int, checkpointing: bool, steps: int
) -> list[StepRecord]:
    """`sft_steps` on a model of `build_random` with PEFT's adapters. SFTTrainer makes these adapters bf16 ones."""
    model.gradient_checkpointing_disable()  # SFTTrainer turns it on, and never off
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return sft_steps(model, wordless_tokenizer(), data, batch, checkpointing, steps, **settings)


def wordless_tokenizer():
    """A tokenizer that knows no words, for samples that are made of numbers: SFTTrainer and Unsloth want one."""
    import tokenizers
    import transformers

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = tokenizers.models.WordLevel({token: i for i, token in enumerate(special.values())}, "<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **special)


def sft_steps(
    model, tokenizer, data: list[TokenizedSample], batch: int, checkpointing: bool, steps: int, **settings
) -> list[StepRecord]:
    """SFTTrainer on a model with adapters. A step's seconds go from the end of the one before to its own end."""
    import datasets
    import transformers
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    ends, logged = [], []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *arguments, **others):
            ends.append(time.perf_counter())

        def on_step_end(self, *arguments, **others):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, arguments, state, control, logs=None, **others):
            if logs and "loss" in logs:
                logged.append(logs)

    ids = [list(sample.ids) for sample in data]
    with tempfile.TemporaryDirectory() as folder:
        configured = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=COMMON["learning_rate"],
            optim=COMMON["optimizer"],
            bf16=True,
            gradient_checkpointing=checkpointing,
            max_length=LENGTH,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            dataset_kwargs={"skip_prepare_dataset": True},
            **settings,
        )
        dataset = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = SFTTrainer(
            model, args=configured, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return [
        StepRecord(
            step=n,
            loss=log["loss"],
            learning_rate=log.get("learning_rate", float("nan")),
            gradient_norm=log.get("grad_norm", float("nan")),
            tokens=batch * LENGTH,
            seconds=end - start,
        )
        for n, (start, end, log) in enumerate(zip(ends, ends[1:], logged, strict=False), 1)
    ]
