"""The training loop.

One optimizer step, as `train_steps` does it:

    1. take the next micro-batches; this process takes its share of their rows
    2. forward, backward on each: the *sum* of the token losses over the number of target tokens in the whole step
    3. add up the gradients over the processes, clip their norm
    4. optimizer step under a learning rate that warms up and then falls (or stays)

Dividing by the target tokens of the whole step (all micro-batches, all processes) makes 4 micro-batches of 4 samples,
16 samples at once and 2 processes with 8 samples each the same step. The mean of the micro-batches' means is a
different number, since samples differ in length: a mistake that many training scripts made for years.

Only the adapters' gradients are exchanged between processes, and that is all that "distributed data parallel" means
here: no wrapper around the model is needed. 🤗 Accelerate numbers the processes, scales fp16 losses and sums tensors;
`accelerate launch` starts the same code on several GPUs.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

from qlora_lab.errors import UserError
from qlora_lab.models.trying import require_isolation
from qlora_lab.training.batches import Batches
from qlora_lab.training.checkpoints import (
    Checkpoint,
    checkpoints_in,
    newest_checkpoint,
    restore,
    run_of,
    save_checkpoint,
    what_resuming_means,
)
from qlora_lab.training.interrupts import first_interrupt_noted
from qlora_lab.training.optimizers import make_optimizer, parameter_groups
from qlora_lab.training.processes import make_accelerator, prepare
from qlora_lab.training.schedules import rate
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.sharding import part_of
from qlora_lab.training.step_records import StepRecord, TrainingDiverged
from qlora_lab.training.steps.choice import make_step
from qlora_lab.training.steps.contract import Step, StepResult
from qlora_lab.training.validation import Validation

T = TypeVar("T")


def train(
    model,
    batches: Batches,
    settings: TrainSettings | None = None,
    *,
    progress: bool = True,
    each_step: Callable[[StepRecord], None] = lambda record: None,
    **named,
) -> list[StepRecord]:
    """Run `train_steps` to its end with a progress bar; `named` are its other arguments.

    Each record is given to `each_step` as soon as it is there, those before a resume included.

    Ctrl-C ends the training after the current step (a second one at once). The adapters then hold what was learned so
    far.

    Returns:
        a record of each step, those before a resume included

    Raises:
        UserError, TrainingDiverged: see `train_steps`.
    """
    from tqdm.auto import tqdm

    records: list[StepRecord] = []
    steps = settings.steps if settings else named.get("steps")
    running = train_steps(model, batches, settings, **named)
    try:
        with first_interrupt_noted() as interrupts, tqdm(total=steps, unit="step", disable=not progress) as bar:
            validated = ""
            for record in running:
                records.append(record)
                bar.update(record.step - bar.n)
                if record.validation_loss is not None:
                    validated = f", validation {record.validation_loss:.4f}"
                bar.set_postfix_str(f"loss {record.loss:.4f}{validated}")
                each_step(record)
                if interrupts:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        running.close()
        done = f"stopped after {len(records)} of {steps} steps; the adapter holds what was learned so far"
        print(done, file=sys.stderr)
    return records


def train_steps(
    model,
    batches: Batches,
    settings: TrainSettings | None = None,
    *,
    pad_token_id: int = 0,
    checkpoints: str | os.PathLike | None = None,
    resume: bool = False,
    accelerator=None,
    make_step: Callable[..., Step] = make_step,
    validation: Validation | None = None,
    **named,
) -> Generator[StepRecord, None, None]:
    """Train the parameters that require gradients; yield a record after each optimizer step.

    Args:
        model: a causal LM of transformers, with adapters.
        batches: the samples of each step.
        settings: how to train. Or name its fields here: `train_steps(model, batches, steps=30, learning_rate=1e-3)`.
        pad_token_id: fills up short rows; any token will do.
        checkpoints: a folder for resumable checkpoints, written atomically every `checkpoint_every` steps; the last
            two are kept. A folder that already holds checkpoints is refused without `resume`.
        resume: continue from the newest checkpoint, or from the one before if that is damaged; the records of the
            steps already taken are yielded first. The steps that follow are those of an uninterrupted run, bit for bit
            on a CPU. Without a checkpoint, training starts at step 1. `steps` may differ from the checkpoint's;
            nothing else that the numbers depend on (see `run_of`) may.
        accelerator: 🤗 Accelerate's; None: made for the settings.
        make_step: makes the `Step` to take, from the arguments of the default, `choice.make_step`.
        validation: validates after every so many steps, and may end the training early.
        named: fields of `TrainSettings`, instead of `settings`.

    Raises:
        UserError: at once, for impossible settings, another run's checkpoints, or packed samples that would see one
            another in this model; while training, for a step without a token to learn.
        TrainingDiverged: while training, if the loss or the gradient norm is not finite. The parameters stay as they
            were before the step (with `update_in_backward`, only if it is the loss).
    """
    if settings is not None and named:
        raise TypeError(f"train_steps got settings and also {', '.join(named)}: replace(settings, ...) changes some")
    settings = settings or TrainSettings(**named)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError("the model has nothing to train: give it adapters first, with add_adapter(model)")
    device = next(iter(trained.values())).device
    settings.require_possible(device, batches.batch_size, batches.accumulation)
    accelerator = accelerator or make_accelerator(settings.compute_dtype, device)
    settings.require_possible(device, batches.batch_size, batches.accumulation, accelerator.num_processes)
    if batches.packing:
        require_isolation(model)
    make_this_step = functools.partial(make_step, pad_token_id=pad_token_id)
    if checkpoints is None:
        if resume:
            raise UserError("resume=True continues from a checkpoint: give its folder as checkpoints=...")
        return _steps(model, batches, settings, trained, accelerator, make_this_step, validation)
    folder = pathlib.Path(checkpoints)
    run = run_of(settings, batches)
    begun = newest_checkpoint(folder) if resume else None
    if begun:
        notes = what_resuming_means(begun, run, trained, accelerator.num_processes)
        for note in notes if accelerator.is_main_process else []:
            print(f"note: {note}", file=sys.stderr)
        if validation:
            validation.take_up(begun)
    elif not resume and (there := checkpoints_in(folder)):
        raise UserError(
            f"{folder} holds {there[-1].name} of another run: resume=True continues it, another folder starts a new one"
        )
    save = functools.partial(save_checkpoint, folder, trained, run=run, accelerator=accelerator)
    return _steps(model, batches, settings, trained, accelerator, make_this_step, validation, save, begun)


def _steps(
    model,
    batches: Batches,
    settings: TrainSettings,
    trained: dict[str, torch.nn.Parameter],
    accelerator,
    make_step: Callable[..., Step],
    validation: Validation | None,
    save: Callable[..., None] | None = None,
    begun: Checkpoint | None = None,
) -> Generator[StepRecord, None, None]:
    """The part of `train_steps` that trains, after all checks.

    trained: the trained parameters by name. save: writes a checkpoint, from the optimizer, the records so far and the
    best adapter, if it is kept. begun: the checkpoint to resume from.
    """
    parts = {name: part_of(parameter) for name, parameter in trained.items()}
    groups = parameter_groups(parts, settings.lora_plus)
    optimizer = make_optimizer(settings.optimizer, groups, settings.learning_rate, settings.weight_decay)
    optimizer = prepare(accelerator, optimizer)
    records: list[StepRecord] = []
    if begun:
        restore(begun, trained, optimizer, accelerator)
        records = list(begun.records)
        yield from begun.records

    one_step = make_step(model, optimizer, accelerator, settings, batches.accumulation)
    model.train()
    over = validation is not None and validation.over(records)
    try:
        coming = with_next(islice(batches, len(records), len(records) if over else settings.steps))
        for step, (micro_batches, following) in enumerate(coming, len(records) + 1):
            start = time.perf_counter()
            samples = [sample for rows in micro_batches for row in rows for sample in row]
            targets = sum(sample.target_count for sample in samples)
            if not targets:
                raise UserError(f"step {step} has no token to learn: its {len(samples)} samples are prompts only")
            share = rate(step, settings.steps, settings.warmup_steps, settings.schedule)
            result = one_step.run(micro_batches, targets, settings.learning_rate * share, following)
            if not result.skipped and not (math.isfinite(result.loss) and math.isfinite(result.norm)):
                raise TrainingDiverged(diverged(result, step, settings.learning_rate))
            record = StepRecord(
                step=step,
                loss=result.loss.item(),
                learning_rate=settings.learning_rate * share,
                gradient_norm=result.norm.item(),
                tokens=sum(len(sample.ids) for sample in samples),
                seconds=time.perf_counter() - start,
            )
            if validation:
                record = validation.after(record, model, trained, settings.steps)
            records.append(record)
            yield record  # before saving, so that Ctrl-C during a save does not lose the record
            over = validation is not None and validation.over(records)
            if save and (step % settings.checkpoint_every == 0 or step == settings.steps or over):
                one_step.write_state()
                save(optimizer, records, best=validation.best if validation else None)
                accelerator.wait_for_everyone()
            if over:
                break
    finally:
        one_step.close()
        model.eval()


def with_next(iterable: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Pair each value, none of them None, with the one after it, and the last with None."""
    values = iter(iterable)
    value = next(values, None)
    while value is not None:
        following = next(values, None)
        yield value, following
        value = following


def diverged(result: StepResult, step: int, learning_rate: float) -> str:
    """The message of a `TrainingDiverged`."""
    if step == 1 and not math.isfinite(result.loss):
        return (
            f"the loss is {float(result.loss)} at the first step, before any update: it is the base model that gives "
            "it, with these samples in this compute dtype"
        )
    return (
        f"the loss is {float(result.loss)} and the gradient norm {float(result.norm)} at step {step}: training stopped "
        f"{'after' if result.updated else 'before'} this update. Lower the learning rate (now {learning_rate:g}) "
        "or warm up for longer"
    )
