"""Train one model on the same data in several ways, at several seeds, and write down how each of them learned.

    python -m qlora_lab.finetuning.compare accuracy [--seeds 8] [--jobs 4]   what do few bits cost?
    python -m qlora_lab.finetuning.compare knobs    [--seeds 3] [--jobs 4]   what does each setting buy, alone?
    python -m qlora_lab.finetuning.compare presets  [--seeds 3]              does a recipe buy memory with bad training?

`accuracy` compares the bases of `METHODS`, `knobs` the changes in `KNOBS`, `presets` the recipes of `presets.py`. All
else is the same: the bundled model, `train_qlora`'s settings, and for each seed the same adapter to begin with and the
same order of the samples, so that ways can be compared seed by seed. Needs a GPU; writes `<what>-<gpu>.json`, anew
after each run.

With `--jobs` several runs share the GPU: a model this small keeps it waiting for the next kernel most of the time.
Seconds and tokens/s would mean nothing then. So they are measured apart, in a short run of each way with the GPU to
itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import multiprocessing
import pathlib
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_adapter import add_adapter, trainable_parameters
from qlora_lab.adapters.quantized_linear import quantize_linears
from qlora_lab.errors import UserError
from qlora_lab.evaluation.judge import Judge
from qlora_lab.evaluation.losses import Loss
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import INT4, quantize
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize, tokenize_chat, tokenize_text
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.loop import TrainingDiverged, train_steps
from qlora_lab.training.presets import PRESETS
from qlora_lab.training.step_records import StepRecord, seconds_per_step, tokens_per_second

STEPS, BATCH_SIZE, RANK, LEARNING_RATE, MAX_LENGTH = 30, 8, 16, 1.5e-3, 256
TIMED_STEPS = 12
SPEED = ("tokens_per_second", "seconds_per_step")


@dataclass(frozen=True)
class Method:
    """How the frozen base is held, and in what its products are computed.

    quantization: None, bitsandbytes' "nf4" or "fp4", or "int4": our symmetric one, levels -7 to 7. All in blocks of 64.
    bits: a linear's bits per parameter.
    """

    what: str
    bits: float
    quantization: str | None = None
    double_quant: bool = False
    dtype: torch.dtype = torch.bfloat16


METHODS = {
    "lora-fp32": Method("LoRA, fp32 base", 32, dtype=torch.float32),
    "lora-bf16": Method("LoRA, bf16 base", 16),
    "nf4": Method("QLoRA, NF4", 4.5, "nf4"),
    "nf4-double": Method("QLoRA, NF4 + double quantization", 4.127, "nf4", double_quant=True),
    "fp4": Method("QLoRA, FP4", 4.5, "fp4"),
    "int4": Method("QLoRA, INT4", 4.5, "int4"),
}


@dataclass(frozen=True)
class Settings:
    """QLoRA's (NF4, double quantization), as `train_qlora` has them on a GPU with room; a knob changes some."""

    rank: int = RANK
    targets: str | tuple[str, ...] = "all-linear"
    learning_rate: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    accumulation: int = 1
    packing: bool = False
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    compute_dtype: torch.dtype = torch.bfloat16


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KNOBS = {
    "as it is": {},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "paged_adamw_32bit": {"optimizer": "paged_adamw_32bit"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "batch 4 x 2": {"batch_size": 4, "accumulation": 2},
    "batch 1 x 8": {"batch_size": 1, "accumulation": 8},
    "batch 32": {"batch_size": 32},
    "packing": {"batch_size": 3, "packing": True},  # rows of MAX_LENGTH tokens: about as many as 8 orders have
    "float16": {"compute_dtype": torch.float16},
    "float32": {"compute_dtype": torch.float32},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "q, v": {"targets": ("q_proj", "v_proj")},
    "q, k, v, o": {"targets": ATTENTION},
    "lr 1.5e-4": {"learning_rate": 1.5e-4},
    "lr 5e-4": {"learning_rate": 5e-4},
    "lr 5e-3": {"learning_rate": 5e-3},
    "lr 1.5e-2": {"learning_rate": 1.5e-2},
}


# ------------------------------------------------------------------------------------------------------------- one run


def load_base(method: Method, device: torch.device, compute_dtype: torch.dtype | None = None):
    """The bundled model as `method` holds it, and its tokenizer. compute_dtype: in place of the method's."""
    dtype = compute_dtype or method.dtype
    if method.quantization == "int4":
        model, tokenizer = load_model(device=device, compute_dtype=dtype)
        return quantize_linears(model, quantizer=lambda weight: quantize(weight, INT4)), tokenizer
    return load_model(
        quantization=method.quantization, double_quant=method.double_quant, device=device, compute_dtype=dtype
    )


@dataclass(frozen=True)
class Ready:
    """A model with its adapter, what `train_steps` is told, and what `Batches` is."""

    model: torch.nn.Module
    tokenizer: object
    settings: dict
    batches: dict


def prepare_method(
    name: str,
    seed: int,
    device: torch.device,
    *,
    batch_size: int = BATCH_SIZE,
    compute_dtype: torch.dtype | None = None,
) -> Ready:
    """See `train_method`."""
    base, tokenizer = load_base(METHODS[name], device, compute_dtype)
    model = add_lora(base, rank=RANK, alpha=2 * RANK, seed=seed)
    settings = {"compute_dtype": compute_dtype or METHODS[name].dtype, "optimizer": "adamw_torch"}
    return Ready(model, tokenizer, settings, {"batch_size": batch_size, "seed": seed})


def train_method(
    name: str,
    seed: int,
    device: torch.device,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    judged: int = 200,
    compute_dtype: torch.dtype | None = None,
) -> dict:
    """Train the bundled model by a method of METHODS, and judge it before and after.

    Args:
        seed: of the adapter and of the samples' order.
        judged: samples of `validation`, `test` and `shifted` each; 0 judges no answers.
        compute_dtype: in place of the method's (a CPU is quick in fp32 only).

    Returns:
        method, seed; losses (nats per token, one a step); before, after: {validation, prose: nats per token};
        exact: {test, shifted: a string of 0 and 1, one for each sample}; peak_allocated (bytes while training, None on
        a CPU); tokens_per_second, seconds_per_step (medians).
    """
    ready = prepare_method(name, seed, device, batch_size=batch_size, compute_dtype=compute_dtype)
    model, tokenizer, dtype = ready.model, ready.tokenizer, ready.settings["compute_dtype"]
    chats = {split: load_samples("orders", split).select(range(judged))["messages"] for split in ("test", "shifted")}
    judge = Judge(chats if judged else {}, held_out(tokenizer, judged), tokenizer, dtype)
    before = judge.losses(model)
    records, peak = trained(ready, steps)
    after = judge(model)
    return {
        "method": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "before": per_token(before),
        "after": per_token(after.losses),
        "exact": after.exact,
        "peak_allocated": peak,
        **speed(records),
    }


def train_preset(name: str, seed: int, device: torch.device, steps: int = STEPS, judged: int = 100) -> dict:
    """Train the bundled 4-bit model with a preset; the seed is that of the adapter and of the samples' order.

    Returns:
        preset, seed, losses (nats per token, one a step), validation_loss (the same on held-out orders), exact_match on
        `test` (share), peak_allocated (bytes, over the training), seconds.
    """
    preset = PRESETS[name]
    base, tokenizer = load_model(quantization="nf4", device=device, compute_dtype=torch.bfloat16)
    model = preset.adapt(base, rank=RANK, alpha=2 * RANK, seed=seed)
    settings = preset.settings(torch.bfloat16)
    records, peak = trained(Ready(model, tokenizer, settings, {"batch_size": BATCH_SIZE, "seed": seed}), steps)
    chats = {"test": load_samples("orders", "test").select(range(judged))["messages"]}
    after = Judge(chats, held_out(tokenizer), tokenizer, settings["compute_dtype"])(model)
    return {
        "preset": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "validation_loss": after.losses["validation"].per_token,
        "exact_match": after.as_dict()["exact_match"]["test"],
        "peak_allocated": peak,
        "seconds": sum(record.seconds for record in records),
    }


def prepare_knob(name: str, seed: int, device: torch.device, **overrides) -> Ready:
    """The bundled 4-bit model with one knob of KNOBS turned; overrides are other `Settings`, for a CPU's sake."""
    knobs = Settings(**{**overrides, **KNOBS[name]})
    base, tokenizer = load_model(quantization="nf4", device=device, compute_dtype=knobs.compute_dtype)
    targets = knobs.targets if isinstance(knobs.targets, str) else list(knobs.targets)
    model = add_adapter(base, rank=knobs.rank, alpha=2 * knobs.rank, targets=targets, seed=seed)
    names = ("learning_rate", "optimizer", "gradient_checkpointing", "compute_dtype")
    settings = {name: getattr(knobs, name) for name in names}
    batches = {"batch_size": knobs.batch_size, "accumulation": knobs.accumulation, "packing": knobs.packing}
    return Ready(model, tokenizer, settings, {**batches, "max_length": MAX_LENGTH, "seed": seed})


def train_knob(name: str, seed: int, device: torch.device, steps: int = STEPS, **overrides) -> dict:
    """Train the bundled 4-bit model with one knob turned, see `prepare_knob`, and judge it.

    A run that ends in non-finite numbers is a result too: its losses end before.

    Returns:
        knob, seed, losses (nats per token, one a step), after: {validation, prose: nats per token} (None if the
        training diverged), trainable (numbers), tokens (a step, median), peak_allocated (bytes while training, None on
        a CPU), tokens_per_second, seconds_per_step (medians).
    """
    ready = prepare_knob(name, seed, device, **overrides)
    records, peak = trained(ready, steps)
    model, tokenizer, dtype = ready.model, ready.tokenizer, ready.settings["compute_dtype"]
    finished = len(records) == steps
    return {
        "knob": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "after": per_token(Judge({}, held_out(tokenizer), tokenizer, dtype).losses(model)) if finished else None,
        "trainable": trainable_parameters(model),
        "tokens": statistics.median(record.tokens for record in records) if records else None,
        "peak_allocated": peak,
        **speed(records),
    }


def trained(ready: Ready, steps: int) -> tuple[list[StepRecord], int | None]:
    """Train on the orders, to the end or until it diverges; the records, and the peak of allocated bytes on a GPU."""
    model, tokenizer = ready.model, ready.tokenizer
    device = model.get_output_embeddings().weight.device
    samples, _ = tokenize(load_samples("orders", "train"), tokenizer, MAX_LENGTH)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settings = {"learning_rate": LEARNING_RATE, "pad_token_id": tokenizer.pad_token_id, **ready.settings}
    records = []
    with contextlib.suppress(TrainingDiverged):
        for record in train_steps(model, Batches(samples, **ready.batches), steps=steps, **settings):
            records.append(record)
    return records, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def held_out(tokenizer, judged: int = 200) -> dict:
    """Tokenized samples that nobody trains on: orders like those in training, and plain English."""
    orders = load_samples("orders", "validation")
    chats = orders.select(range(min(judged, len(orders)) or len(orders)))["messages"]
    return {
        "validation": [tokenize_chat(chat, tokenizer) for chat in chats],
        "prose": [tokenize_text(text, tokenizer) for text in load_prose()],
    }


def per_token(losses: dict[str, Loss]) -> dict[str, float]:
    return {name: loss.per_token for name, loss in losses.items()}


def speed(records: list[StepRecord]) -> dict[str, float | None]:
    return {"tokens_per_second": tokens_per_second(records), "seconds_per_step": seconds_per_step(records)}


# ---------------------------------------------------------------------------------------------------------------- many


def compare(what: str, seeds: int, output: pathlib.Path, jobs: int = 1) -> pathlib.Path:
    """Time every way of `what` ("accuracy" or "knobs") alone, then run each at every seed; the record's path."""
    ways, prepare, train = {
        "accuracy": (METHODS, prepare_method, train_method),
        "knobs": (KNOBS, prepare_knob, train_knob),
    }[what]
    path, record = new_record(what, output)
    if what == "accuracy":
        record["methods"] = {name: {"what": method.what, "bits": method.bits} for name, method in METHODS.items()}
    record["alone"] = {}
    for name in ways:
        records, peak = trained(prepare(name, 0, torch.device("cuda")), TIMED_STEPS)
        record["alone"][name] = {**speed(records), "peak_allocated": peak}
        write(path, record)
        print(f"{name:<18} {speed(records)['tokens_per_second'] or 0:6.0f} tokens/s, {peak / 1e9:.2f} GB", flush=True)
    wanted = [(train, name, seed) for seed in range(seeds) for name in ways]
    order = {(name, seed): position for position, (_, name, seed) in enumerate(wanted)}
    for run in many_runs(wanted, jobs):
        record["runs"].append({key: value for key, value in run.items() if key not in SPEED})
        record["runs"].sort(key=lambda run: order[run.get("method") or run["knob"], run["seed"]])
        write(path, record)
        print(summary(run), flush=True)
    return path


def many_runs(wanted: list[tuple], jobs: int) -> Iterable[dict]:
    """The result of each (function, name, seed) on the GPU, as they finish, in so many processes."""
    if jobs == 1:
        yield from map(_run, wanted)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_run, wanted)


def _run(wanted: tuple) -> dict:
    train, name, seed = wanted
    return train(name, seed, torch.device("cuda"))


def summary(run: dict) -> str:
    loss = "diverged" if run["after"] is None else f"{run['after']['validation']:.4f}"
    exact = "".join(f", {split} {bits.count('1')}/{len(bits)}" for split, bits in run.get("exact", {}).items())
    return f"{run.get('method') or run['knob']:<18} seed {run['seed']}: validation {loss}{exact}"


def compare_presets(seeds: int, output: pathlib.Path) -> pathlib.Path:
    """Run every preset at every seed."""
    path, record = new_record("presets", output)
    for seed in range(seeds):
        for name in PRESETS:
            run = train_preset(name, seed, torch.device("cuda"))
            record["runs"].append(run)
            write(path, record)
            print(
                f"{name:<14} seed {seed}: training {run['losses'][-1]:.4f}, validation {run['validation_loss']:.4f}, "
                f"exact {run['exact_match']:.0%}, {run['peak_allocated'] / 1e9:.2f} GB, {run['seconds']:.0f} s",
                flush=True,
            )
    return path


def new_record(what: str, output: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """Where a record goes, and all of it but the runs."""
    gpu = torch.cuda.get_device_name()
    record = {
        "command": f"python -m qlora_lab.finetuning.compare {what}",
        "device": gpu,
        "date": datetime.date.today().isoformat(),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")},
        "settings": {
            "model": "smollm2-135m-instruct",
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
        },
        "runs": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    return output / f"{what}-{gpu.lower().replace(' ', '-')}.json", record


def write(path: pathlib.Path, record: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.finetuning.compare", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["accuracy", "knobs", "presets"])
    parser.add_argument("--seeds", type=int, help="default: 8 for accuracy, else 3")
    parser.add_argument("--jobs", type=int, default=1, help="not for presets: runs that share the GPU")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    args = parser.parse_args(arguments)
    seeds = {"accuracy": 8, "knobs": 3, "presets": 3}[args.what] if args.seeds is None else args.seeds
    try:
        if not torch.cuda.is_available():
            raise UserError("no GPU here: bf16, 4-bit kernels and paged optimizers are compared on one")
        for flag, value in (("--seeds", seeds), ("--jobs", args.jobs)):
            if value < 1:
                raise UserError(f"{flag} {value}: at least 1 is needed")
        if args.what == "presets":
            path = compare_presets(seeds, args.output)
        else:
            path = compare(args.what, seeds, args.output, args.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
