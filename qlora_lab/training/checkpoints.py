"""Checkpoints from which a run resumes bit for bit. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
from dataclasses import asdict, dataclass, replace

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_lab.errors import UserError
from qlora_lab.training.batches import Batches
from qlora_lab.training.optimizers import parameters_by_name, without_accelerate
from qlora_lab.training.schedules import rate
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.sharding import own_part, whole
from qlora_lab.training.step_records import StepRecord

FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint's folder.

    trained: parameters by name. optimizer: its state, tensors and numbers, by "parameter name|key". generators: random
    states by device type ("cpu", "cuda"), uint8 of shape (processes, bytes per state). scaler: the state of fp16's,
    else None. run: see `run_of`; None in format 1. best: the parameters that did best in validation, by name; None if
    they are not kept. passed_over: what is wrong with newer checkpoints.
    """

    path: pathlib.Path
    records: tuple[StepRecord, ...]
    trained: dict[str, torch.Tensor]
    optimizer: dict
    generators: dict[str, torch.Tensor]
    scaler: dict | None
    run: dict | None
    best: dict[str, torch.Tensor] | None = None
    passed_over: tuple[str, ...] = ()


def checkpoints_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's checkpoints, oldest first, without those of an interrupted write, which end in `.part`."""
    by_step = {
        path: int(match[1])
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return sorted(by_step, key=by_step.__getitem__)


def newest_checkpoint(folder: pathlib.Path) -> Checkpoint | None:
    """Read the newest checkpoint that is not damaged; None if there is no checkpoint at all.

    Raises:
        UserError: all are damaged, or one was written by a later version.
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
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
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
        best=load_file(path / "best.safetensors") if progress.get("keeps_best") else None,
    )


def run_of(settings: TrainSettings, batches: Batches) -> dict:
    """What a run's numbers depend on besides the model and its adapters, without what affects only memory or speed."""
    digest = hashlib.sha256()
    for sample in batches.samples:
        digest.update(repr((sample.prompt_length, *sample.ids, *sample.between)).encode())
    return {
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "schedule": settings.schedule,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": settings.weight_decay,
        "optimizer": settings.optimizer,
        "lora_plus": settings.lora_plus,
        "compute_dtype": str(settings.compute_dtype).removeprefix("torch."),
        "rows a step": batches.batch_size * batches.accumulation,
        "packing": f"to {batches.max_length} tokens" if batches.packing else "off",
        "seed": batches.seed,
        "samples": f"{len(batches.samples)} (sha256 {digest.hexdigest()[:12]})",
    }


def what_resuming_means(
    begun: Checkpoint, run: dict, trained: dict[str, torch.nn.Parameter], processes: int
) -> list[str]:
    """What a user should know before resuming from a checkpoint, one line per fact.

    Args:
        begun: the checkpoint.
        run: `run_of` the run that resumes.
        trained: the model's trained parameters by name.
        processes: how many this run has.

    Raises:
        UserError: the checkpoint belongs to a run with other adapters, settings or samples, or has more steps behind
            it than this run has in all.
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
    may_change = ("steps", "warmup_steps") if other_length else ()
    then = {"lora_plus": 1.0, **then}  # older checkpoints do not say so
    changed = [key for key in run if then.get(key) != run[key] and key not in may_change]
    if changed:
        changes = ", ".join(f"{key} was {then.get(key)} and is now {run[key]}" for key in changed)
        raise UserError(
            f"{begun.path} belongs to another run: {changes}; resume with the old values, or train into another folder"
        )
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
    """Load a checkpoint into the parameters, the optimizer, the scaler and this process's random generators."""
    parts = parameters_by_name(optimizer)
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(own_part(begun.trained[name], trained[name]))
    for key, value in begun.optimizer.items():
        name, _, field = key.rpartition("|")
        value = own_part(value, trained[name]) if isinstance(value, torch.Tensor) else value
        optimizer.state[parts[name]][field] = _place(value, field, parts[name], optimizer)
    if begun.scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(begun.scaler)
    own = accelerator.process_index
    if own < len(begun.generators["cpu"]):  # otherwise this run has more processes than the checkpoint's
        # clone: torch 2.13 reads the state from the beginning of the storage, not of this row
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
    best: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint; once it is safely on disk, remove all others but the one before it.

    All processes must call this, since each contributes its random states; the main one writes. best: see `Checkpoint`.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tensors, numbers = {}, {}
    for kind, state in states.items():
        gathered = accelerator.gather(state.to(accelerator.device))  # the processes' states end to end
        tensors[f"rng|{kind}"] = gathered.cpu().view(accelerator.num_processes, -1)
    adapter = {name: whole(parameter.detach(), parameter) for name, parameter in trained.items()}
    for name, part in parameters_by_name(optimizer).items():
        parameter = trained[name]
        for key, value in optimizer.state[part].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}|{key}"] = whole(value.detach(), parameter)
            else:
                numbers[f"{name}|{key}"] = value
    if not accelerator.is_main_process:
        return
    path = folder / f"checkpoint-{records[-1].step:06d}"
    for leftover in folder.glob("checkpoint-*.part"):  # of an interrupted write
        shutil.rmtree(leftover)
    part = path.with_suffix(".part")
    part.mkdir(parents=True)
    save_file({name: values.contiguous() for name, values in adapter.items()}, part / "adapter.safetensors")
    if best is not None:
        save_file(best, part / "best.safetensors")
    tensors = {name: values.clone().contiguous() for name, values in tensors.items()}  # clone: some share one table
    save_file(tensors, part / "optimizer.safetensors")
    progress = {
        "format": FORMAT,
        "run": run,
        "records": [asdict(record) for record in records],
        "optimizer": numbers,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "keeps_best": best is not None,
    }
    (part / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    for file in part.iterdir():
        with open(file, "r+b") as handle:  # Windows flushes only files opened for writing
            os.fsync(handle.fileno())
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)
    existing = checkpoints_in(folder)
    for other in {*existing} - {*existing[: existing.index(path) + 1][-2:]}:  # later ones are damaged: passed over
        shutil.rmtree(other)


def _place(value, field: str, parameter: torch.Tensor, optimizer):
    """Put a loaded entry of the optimizer's state where the optimizer expects it: paged, on the device, or as it is."""
    if not isinstance(value, torch.Tensor) or field == "step":  # torch keeps its step on the CPU
        return value
    inner = without_accelerate(optimizer)
    if getattr(inner, "is_paged", False) and field in ("state1", "state2"):
        return inner.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
