"""The training loop.

One optimizer step, as `train_steps` does it:

    1. take the next micro-batches; this process takes its share of their rows
    2. forward, backward on each: the *sum* of the token losses over the number of target tokens in the whole step
    3. add up the gradients over the processes, clip their norm
    4. optimizer step under a learning rate that warms up and then falls (or stays)

Dividing by the tokens of the whole step (all micro-batches, all processes) makes 4 x 4 samples, 16 samples at once
and 2 processes x 8 samples the same step. The mean of the micro-batches' means is another number, since samples
differ in length: a mistake that many training scripts made for years.

Only the adapter's gradients are exchanged, so nothing needs to wrap the model: that is all that "distributed data
parallel" means here. 🤗 Accelerate tells who we are, scales fp16 losses and adds up tensors; `accelerate launch`
starts the same code on several GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_lab.errors import UserError
from qlora_lab.finetuning import fast_step
from qlora_lab.finetuning.data import IGNORED, Batches, collate
from qlora_lab.finetuning.settings import PRECISIONS, TrainSettings


class TrainingDiverged(UserError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step.

    loss: mean over the step's target tokens, before the update. seconds: wall time, without writing checkpoints.
    tokens: all tokens that the step's samples have, prompts included, padding not.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


def train(
    model, batches: Batches, settings: TrainSettings | None = None, *, progress: bool = True, **named
) -> list[StepRecord]:
    """Run `train_steps` to its end behind a progress bar; `named` are its other arguments.

    Ctrl-C ends the training after its step (a second one at once) and returns what was reached: the model holds a
    usable adapter.
    """
    from tqdm.auto import tqdm

    records: list[StepRecord] = []
    steps = settings.steps if settings else named.get("steps")
    running = train_steps(model, batches, settings, **named)
    try:
        with first_interrupt_noted() as interrupts, tqdm(total=steps, unit="step", disable=not progress) as bar:
            for record in running:
                records.append(record)
                bar.update(record.step - bar.n)
                bar.set_postfix_str(f"loss {record.loss:.4f}")
                if interrupts:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        running.close()
        done = f"stopped after {len(records)} of {steps} steps; the adapter holds what was learned so far"
        print(done, file=sys.stderr)
    return records


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[list]:
    """Ctrl-C adds to the list that this gives; a second one raises KeyboardInterrupt, as it does elsewhere.

    Raised at once it could come up in a destructor or a callback, where Python ignores exceptions, and be lost.
    """
    interrupts: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield interrupts
        return

    def note(number: int, _frame) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)


def train_steps(
    model,
    batches: Batches,
    settings: TrainSettings | None = None,
    *,
    pad_token_id: int = 0,
    checkpoints: str | os.PathLike | None = None,
    resume: bool = False,
    accelerator=None,
    **named,
) -> Iterator[StepRecord]:
    """Train the parameters that require gradients; yield a record after each optimizer step.

    Args:
        model: a causal LM of transformers, with adapters.
        settings: how to train. Or name its fields here: `train_steps(model, batches, steps=30, learning_rate=1e-3)`.
        checkpoints: a folder for resumable checkpoints, written every `checkpoint_every` steps and atomically; the
            last two are kept. One that holds checkpoints already is refused without `resume`.
        resume: continue from the newest checkpoint, or the one before where that is damaged; the steps that were done
            are yielded first. Those that follow are, bit for bit on a CPU, those of a run that was never interrupted.
            Without a checkpoint the training begins. `steps` may differ from the checkpoint's; what else decides the
            numbers (see `run_of`) may not.
        named: the fields of `TrainSettings`, in the place of `settings`.

    Raises:
        UserError: impossible settings, or checkpoints of another run, here and now; a step without a token to learn,
            while training. TrainingDiverged, while training: loss or gradient is not finite; the parameters are left
            as they were before the step (with `update_in_backward`, only when it is the loss).
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
    if checkpoints is None:
        if resume:
            raise UserError("resume=True goes on from a checkpoint: say in which folder, with checkpoints=...")
        return _steps(model, batches, settings, trained, accelerator, pad_token_id)
    folder = pathlib.Path(checkpoints)
    run = run_of(settings, batches)
    begun = newest_checkpoint(folder) if resume else None
    if begun:
        notes = what_resuming_means(begun, run, trained, accelerator.num_processes)
        for note in notes if accelerator.is_main_process else []:
            print(f"note: {note}", file=sys.stderr)
    elif not resume and (there := checkpoints_in(folder)):
        raise UserError(
            f"{folder} holds {there[-1].name} of another run: resume=True goes on with it, another folder starts anew"
        )
    return _steps(model, batches, settings, trained, accelerator, pad_token_id, folder, run, begun)


def _steps(
    model,
    batches: Batches,
    settings: TrainSettings,
    trained: dict[str, torch.nn.Parameter],
    accelerator,
    pad_token_id: int,
    checkpoints: pathlib.Path | None = None,
    run: dict | None = None,
    begun: Checkpoint | None = None,
) -> Iterator[StepRecord]:
    """What `train_steps` does, once all is known to be possible.

    trained: the parameters by name. run: what `checkpoints` shall say about it. begun: where to go on.
    """
    parameters = list(trained.values())
    processes, steps, max_grad_norm = accelerator.num_processes, settings.steps, settings.max_grad_norm
    adamw = accelerator.prepare(
        make_optimizer(settings.optimizer, parameters, settings.learning_rate, settings.weight_decay)
    )

    records: list[StepRecord] = []
    if begun:
        restore(begun, trained, adamw, accelerator)
        records = list(begun.records)
        yield from begun.records

    whole = None
    if settings.fast:
        try:
            whole = fast_step.prepare(
                model,
                adamw,
                accelerator,
                compute_dtype=settings.compute_dtype,
                accumulation=batches.accumulation,
                gradient_checkpointing=settings.gradient_checkpointing,
                activation_offloading=settings.activation_offloading,
                update_in_backward=settings.update_in_backward,
                pad_token_id=pad_token_id,
            )
        except fast_step.NoFastStep as reason:
            print(f"no fast step, the plain one takes over: {reason}", file=sys.stderr)
    gradient_checkpointing = settings.gradient_checkpointing and not whole  # which does it itself
    if gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    offloaded = contextlib.nullcontext
    if settings.activation_offloading:
        offloaded = functools.partial(offloaded_hidden_states, model.config.hidden_size)
    early = UpdateInBackward(adamw, parameters) if settings.update_in_backward else None
    try:
        coming = with_next(islice(batches, len(records), steps))
        for step, (micro_batches, following) in enumerate(coming, len(records) + 1):
            start = time.perf_counter()
            adamw.zero_grad()
            for group in adamw.param_groups:
                group["lr"] = settings.learning_rate * rate(step, steps, settings.warmup_steps, settings.schedule)
            samples = [sample for rows in micro_batches for row in rows for sample in row]
            targets = sum(sample.target_count for sample in samples)
            if not targets:
                raise UserError(f"step {step} has no token to learn: its {len(samples)} samples are prompts only")
            loss = torch.zeros((), device=accelerator.device)
            for rows in micro_batches if not whole else []:
                batch = collate(rows[accelerator.process_index :: processes], pad_token_id)
                with accelerator.autocast(), offloaded():
                    share = token_loss_sum(model, batch, settings.loss_chunk) / targets
                loss += share.detach()
                if early and not math.isfinite(loss):
                    raise TrainingDiverged(diverged(loss, math.nan, step, settings.learning_rate))
                accelerator.backward(share)
            if whole:
                loss, norm = whole.step(micro_batches, targets, adamw.param_groups[0]["lr"], max_grad_norm, following)
            elif early:  # the parameters are updated and their gradients gone
                norm = early.norm()
            else:
                sum_over_processes(accelerator, [loss, *(p.grad for p in parameters)])
                norm = accelerator.clip_grad_norm_(parameters, math.inf if max_grad_norm is None else max_grad_norm)
            if not math.isfinite(loss) or not (math.isfinite(norm) or accelerator.scaler):  # a scaler skips such a step
                raise TrainingDiverged(diverged(loss, norm, step, settings.learning_rate, updated=bool(early)))
            if not early and not whole:
                adamw.step()

            record = StepRecord(
                step=step,
                loss=loss.item(),
                learning_rate=adamw.param_groups[0]["lr"],
                gradient_norm=norm.item(),
                tokens=sum(len(sample.ids) for sample in samples),
                seconds=time.perf_counter() - start,
            )
            records.append(record)
            yield record  # first, so that Ctrl-C while a checkpoint is written does not lose count of a step
            if checkpoints is not None and (step % settings.checkpoint_every == 0 or step == steps):
                if whole:
                    whole.adapters.write_down_steps()
                save_checkpoint(checkpoints, trained, adamw, records, run, accelerator)
                accelerator.wait_for_everyone()
    finally:
        adamw.zero_grad()
        if early:
            early.remove()
        model.eval()
        if gradient_checkpointing:
            checkpoint_activations(model, on=False)


# ---------------------------------------------------------------------------------------------------------------- steps


def with_next(values):
    """Each value with the one that follows it, the last with None."""
    values = iter(values)
    value = next(values, None)
    while value is not None:
        following = next(values, None)
        yield value, following
        value = following


def token_loss_sum(model, batch: dict[str, torch.Tensor], chunk: int | None = None) -> torch.Tensor:
    """Sum of the cross entropies of a batch's target tokens, in fp32: a scalar.

    The output head turns hidden states into `vocab_size` logits a token, a fifth of SmolLM2's arithmetic and most of
    its activations. It runs only at positions where some row has a target; with `chunk`, at so many of them at a time.
    """
    device = model.get_output_embeddings().weight.device  # the embeddings may lie on the CPU
    batch = {name: values.to(device) for name, values in batch.items()}
    targets = batch["labels"][:, 1:]  # position i predicts token i + 1
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    if chunk is not None:
        return _chunked_loss_sum(model, batch, targets[:, columns].flatten(), columns, chunk)
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=columns,
    ).logits  # (rows, len(columns), vocab_size)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _chunked_loss_sum(model, batch, targets: torch.Tensor, columns: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same sum with the logits of `chunk` positions at a time; the backward pass computes them again."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # what PEFT has wrapped
    if tuning := [name for name in _AFTER_THE_HEAD if getattr(causal_lm.config, name, None) not in (None, 1, 1.0)]:
        raise UserError(f"this model changes its logits after the head ({tuning[0]}): use loss_chunk=None")
    head = causal_lm.get_output_embeddings()
    hidden = causal_lm.get_decoder()(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state[:, columns]  # (rows, len(columns), hidden_size)

    def loss_sum(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")

    pieces = zip(hidden.flatten(0, 1).split(chunk), targets.split(chunk), strict=True)
    return sum(torch.utils.checkpoint.checkpoint(loss_sum, *piece, use_reentrant=False) for piece in pieces)


_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")  # in configs


class UpdateInBackward:
    """Updates each parameter the moment the backward pass has its gradient, and drops the gradient.

    So a gradient lives for a moment only, instead of all of them living until the end of the step.
    """

    def __init__(self, optimizer, parameters: list[torch.Tensor]):
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # without 🤗 Accelerate's wrapping
        self._norms: list[torch.Tensor] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in parameters]

    def _update(self, parameter: torch.Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**groups[0], "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> torch.Tensor:
        """Of all the gradients since the last call."""
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack(norms))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def diverged(loss, norm, step: int, learning_rate: float, updated: bool = False) -> str:
    return (
        f"the loss is {float(loss)} and the gradient norm {float(norm)} at step {step}: training stopped "
        f"{'after' if updated else 'before'} this update. Lower the learning rate (now {learning_rate:g}) "
        "or warm up for longer"
    )


def checkpoint_activations(model, on: bool = True) -> None:
    """Switch gradient checkpointing, without reentrant autograd, which would need inputs that require gradients."""
    # transformers 5.23 calls it activation checkpointing; 5.17 knows only the old name
    new = hasattr(model, "activation_checkpointing_enable")
    name = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
    getattr(model, name)(*[{"use_reentrant": False}] * on)


def offloaded_hidden_states(hidden_size: int):
    """A context in which hidden states that autograd keeps for the backward pass lie in the host's memory.

    The CPU waits for each copy. `fast_step.HostMemory` does not.
    """

    def pack(kept: torch.Tensor):
        if kept.dim() != 3 or kept.shape[-1] != hidden_size:
            return kept, None
        there = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return there.copy_(kept), kept.device

    def unpack(packed) -> torch.Tensor:
        kept, device = packed
        return kept if device is None else kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def rate(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """Share of the peak learning rate at a step counted from 1. The last cosine step is small but not zero."""
    warmup_steps = min(warmup_steps, steps - 1)
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup_steps) / (steps - warmup_steps)))


def sum_over_processes(accelerator, tensors: list[torch.Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes: one exchange of one flat vector."""
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([tensor.flatten() for tensor in tensors]), reduction="sum")
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def make_accelerator(compute_dtype: torch.dtype, device: torch.device):
    """🤗 Accelerate for this compute dtype, on the device where the model lies."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # Accelerate keeps one precision for the whole process; a notebook may train twice, in two
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != PRECISIONS[compute_dtype]:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=PRECISIONS[compute_dtype], cpu=device.type == "cpu")


def make_optimizer(name: str, parameters, learning_rate: float, weight_decay: float):
    """AdamW by transformers' name for it. Paged states lie in managed memory, which only a GPU has.

    adamw_torch         fp32 states
    adamw_8bit          states in 8 bits, block-wise (for parameters of 4,096 elements and more)
    paged_adamw_32bit   fp32 states that the driver may move to the host (100,000 elements and more)
    paged_adamw_8bit    both
    """
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    import bitsandbytes as bnb

    kinds = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.AdamW32bit,
    }
    return kinds[name](parameters, lr=learning_rate, weight_decay=weight_decay, is_paged=name.startswith("paged"))


# ---------------------------------------------------------------------------------------------------------- checkpoints
#
# checkpoint-000020/
#     adapter.safetensors     the trained parameters, by name
#     optimizer.safetensors   "name|key": the tensors of the optimizer's state; "rng|cpu" and "rng|cuda": the states of
#                             the generators, uint8 of shape (processes, bytes of one)
#     progress.json           the format, what the run was told, the records so far, the numbers of the optimizer's
#                             state, and the fp16 scaler's
#
# No pickle anywhere. A checkpoint is written under another name and renamed when it is whole; then older ones go, but
# for the one before. Format 1 (no "format" in it) has one process's generators, and neither run nor scaler.

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's folder holds.

    trained: parameters by name. optimizer: pieces of its state, tensors and numbers, by "name|key". generators: states
    by device type ("cpu", "cuda"), uint8 of shape (processes, bytes of one). scaler: of fp16, else None. run: see
    `run_of`; None in format 1. passed_over: what is wrong with newer checkpoints.
    """

    path: pathlib.Path
    records: tuple[StepRecord, ...]
    trained: dict[str, torch.Tensor]
    optimizer: dict
    generators: dict[str, torch.Tensor]
    scaler: dict | None
    run: dict | None
    passed_over: tuple[str, ...] = ()


def checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's checkpoints, oldest first. What an interrupted write leaves ends in `.part` and does not count."""
    names = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return sorted((path for path, name in names.items() if name), key=lambda path: int(names[path][1]))


def newest_checkpoint(folder: pathlib.Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; None where there is no checkpoint at all.

    Raises:
        UserError: all are damaged, or the newest was written by a later version.
    """
    damaged = []
    for path in reversed(checkpoints_in(folder)):
        try:
            return replace(_read(path), passed_over=tuple(damaged))
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            damaged.append(f"{path.name} is damaged ({error})")
    if damaged:
        raise UserError(f"{' and '.join(damaged)}: {folder} has no other checkpoint, so start anew in another folder")
    return None


def _read(path: pathlib.Path) -> Checkpoint:
    progress = json.loads((path / "progress.json").read_text())
    if progress.get("format", 1) > FORMAT:
        raise UserError(f"{path} has format {progress['format']}, and this version reads up to {FORMAT}: update it")
    tensors = load_file(path / "optimizer.safetensors")
    states = {"cpu": tensors.pop("rng|cpu"), "cuda": tensors.pop("rng|cuda", None)}
    return Checkpoint(
        path=path,
        records=tuple(StepRecord(**record) for record in progress["records"]),
        trained=load_file(path / "adapter.safetensors"),
        optimizer={**tensors, **progress["optimizer"]},
        # format 1 holds one state, not a row for each process
        generators={kind: state.view(-1, state.shape[-1]) for kind, state in states.items() if state is not None},
        scaler=progress.get("scaler"),
        run=progress.get("run"),
    )


def run_of(settings: TrainSettings, batches: Batches) -> dict:
    """What decides a run's numbers, beside model and adapters; what changes only memory or speed is left out."""
    digest = hashlib.sha256()
    for sample in batches.samples:
        digest.update(repr((sample.prompt_length, *sample.ids)).encode())
    return {
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "schedule": settings.schedule,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": settings.weight_decay,
        "optimizer": settings.optimizer,
        "compute_dtype": str(settings.compute_dtype).removeprefix("torch."),
        "rows a step": batches.batch_size * batches.accumulation,
        "packing": f"to {batches.max_length} tokens" if batches.packing else "off",
        "seed": batches.seed,
        "samples": f"{len(batches.samples)} (sha256 {digest.hexdigest()[:12]})",
    }


def what_resuming_means(
    begun: Checkpoint, run: dict, trained: dict[str, torch.nn.Parameter], processes: int
) -> list[str]:
    """What a user should know before going on from a checkpoint, a line each.

    Raises:
        UserError: it is of a run with other adapters, settings or samples, or of more steps than this run has.
    """
    if set(begun.trained) != set(trained):
        raise UserError(f"{begun.path} holds other adapters than this model has: resume with the same rank and targets")
    for name, parameter in trained.items():
        if parameter.shape != begun.trained[name].shape:
            raise UserError(
                f"{begun.path} has {name} of shape {tuple(begun.trained[name].shape)}, the model "
                f"{tuple(parameter.shape)}: resume with the same --rank"
            )
    done, steps, notes = len(begun.records), run["steps"], []
    if steps < done:
        raise UserError(f"{begun.path} has {done} steps behind it and steps={steps}: give at least {done}")
    if begun.passed_over:
        notes.append(f"{' and '.join(begun.passed_over)}: going on from {begun.path.name}")
    then = begun.run or run
    other_length = then["steps"] != steps
    free = ("steps", "warmup_steps") if other_length else ()
    others = [key for key in run if then.get(key) != run[key] and key not in free]
    if others:
        changes = ", ".join(f"{key} was {then.get(key)} and is now {run[key]}" for key in others)
        raise UserError(f"{begun.path} is of another run: {changes}; resume as it was, or train into another folder")
    if other_length and steps > done:
        peak, last = run["learning_rate"], begun.records[-1].learning_rate
        following = peak * rate(done + 1, steps, run["warmup_steps"], run["schedule"])
        notes.append(
            f"{begun.path.name} is of a run of {then['steps']} steps, and this one has {steps}: after {last:.3g} the "
            f"learning rate goes on with {following:.3g}, as in a run of {steps} steps"
        )
    states = len(begun.generators["cpu"])
    if states != processes:
        notes.append(
            f"{begun.path.name} holds the random generators of {states} process{'es' * (states > 1)}, and this run "
            f"has {processes}: the steps are the same, but for what dropout draws"
        )
    return notes


def restore(begun: Checkpoint, trained: dict[str, torch.nn.Parameter], optimizer, accelerator) -> None:
    """Put a checkpoint into parameters, optimizer, scaler and this process's generators."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(begun.trained[name])
    for key, value in begun.optimizer.items():
        name, _, field = key.rpartition("|")
        optimizer.state[trained[name]][field] = _place(value, field, trained[name], optimizer)
    if begun.scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(begun.scaler)
    own = accelerator.process_index
    if own < len(begun.generators["cpu"]):  # else more processes go on than there were
        # clone: torch 2.13 sets a generator from where the storage begins, not from where this row does
        torch.set_rng_state(begun.generators["cpu"][own].clone())
        if "cuda" in begun.generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(begun.generators["cuda"][own].clone())


def save_checkpoint(
    folder: pathlib.Path,
    trained: dict[str, torch.nn.Parameter],
    optimizer,
    records: list[StepRecord],
    run: dict,
    accelerator,
) -> None:
    """Write a checkpoint; when it is safely there, remove all others but the one before.

    All processes call it, for their generators; the main one writes.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tensors, numbers = {}, {}
    for kind, state in states.items():
        every = accelerator.gather(state.to(accelerator.device))  # one after the other
        tensors[f"rng|{kind}"] = every.cpu().view(accelerator.num_processes, -1)
    if not accelerator.is_main_process:
        return
    path = folder / f"checkpoint-{records[-1].step:06d}"
    for left in folder.glob("checkpoint-*.part"):  # by an interrupted write
        shutil.rmtree(left)
    part = path.with_suffix(".part")
    part.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in trained.items()}, part / "adapter.safetensors")
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}|{key}"] = value.detach().clone().contiguous()  # some share one table
            else:
                numbers[f"{name}|{key}"] = value
    save_file(tensors, part / "optimizer.safetensors")
    progress = {
        "format": FORMAT,
        "run": run,
        "records": [asdict(record) for record in records],
        "optimizer": numbers,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    (part / "progress.json").write_text(json.dumps(progress))
    for file in part.iterdir():
        with open(file, "r+b") as handle:  # Windows flushes only what may be written
            os.fsync(handle.fileno())
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    there = checkpoints_in(folder)
    for other in {*there} - {*there[: there.index(path) + 1][-2:]}:  # later ones were passed over, as damaged
        shutil.rmtree(other)


def _place(value, field: str, parameter: torch.Tensor, optimizer):
    """A loaded piece of optimizer state, where the optimizer expects it: paged, on the device, or as it is."""
    if not isinstance(value, torch.Tensor) or field == "step":  # torch keeps its step on the CPU
        return value
    inner = getattr(optimizer, "optimizer", optimizer)
    if getattr(inner, "is_paged", False) and field in ("state1", "state2"):
        return inner.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
