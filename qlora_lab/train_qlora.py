"""Fine-tune a language model with QLoRA: `python -m qlora_lab.train_qlora --help`.

Without arguments it trains the bundled 135M model on the orders data, on whatever hardware there is, judges it before
and after, and leaves in the output folder

    run.json       the settings          before.json   the judgement before training
    checkpoints/   to --resume from      adapter/      for peft.PeftModel.from_pretrained
    report.json    what --json prints

`accelerate launch -m qlora_lab.train_qlora ...` spreads the same run over several GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator

import numpy
import torch
from safetensors import SafetensorError

from qlora_lab.errors import UserError
from qlora_lab.finetuning import PRESETS, Preset, data, evaluate, models
from qlora_lab.finetuning.lora import find_targets
from qlora_lab.finetuning.preflight import build_on_meta, read_config
from qlora_lab.finetuning.settings import OPTIMIZERS, SCHEDULES, TrainSettings
from qlora_lab.finetuning.train import StepRecord, make_accelerator, newest_checkpoint, train
from qlora_lab.memory.estimate import estimate, from_config
from qlora_lab.memory.measure import peak_memory_bytes, reset_peak

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JUDGED = ("test", "shifted")
NOT_JUDGED = {"exact_match": {}, "perplexity": {}}
CANNOT_WRITE = {
    getattr(errno, name) for name in "ENOSPC EACCES EPERM EROFS EDQUOT ENOTDIR EEXIST ENAMETOOLONG ELOOP".split()
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parser() -> Parser:
    p = Parser(prog="train_qlora", description="Fine-tune a language model with QLoRA and say what it brought.")
    p.add_argument(
        "--model", default=models.DEFAULT_MODEL, help="bundled name, folder or hub id (default: %(default)s)"
    )
    p.add_argument("--data", default="orders", help="a data set of the course, a folder of .jsonl, or a .jsonl file")
    p.add_argument("--method", choices=["qlora", "lora"], default="qlora", help="4-bit NF4 base, or 16/32-bit base")
    p.add_argument("--rank", type=_count, default=16)
    p.add_argument("--alpha", type=_positive, help="default: 2 x rank")
    p.add_argument(
        "--targets", type=_names, default="all-linear", help="all-linear, or names with commas: q_proj,v_proj"
    )
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=_count, help="optimizer steps (default: 30)")
    length.add_argument("--epochs", type=_positive)
    p.add_argument("--batch-size", type=_count, default=8, help="samples a forward pass, over all processes")
    p.add_argument("--accumulation", type=_count, default=1, help="forward passes an optimizer step")
    p.add_argument("--packing", action="store_true", help="fill rows of --max-length with several samples")
    p.add_argument("--max-length", type=_count, default=256, help="longer samples are left out, and counted")
    p.add_argument("--lr", type=_positive, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    p.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    p.add_argument(
        "--preset", choices=PRESETS, help="a recipe that trades something for GPU memory: see finetuning/presets.py"
    )
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="default: paged_adamw_32bit on a GPU, adamw_torch on a CPU")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory for one more forward pass")
    p.add_argument("--fast", action="store_true", help="on a GPU with bf16: fused kernels in one CUDA graph")
    p.add_argument("--compute-dtype", choices=DTYPES, help="default: bfloat16 where the hardware has it")
    p.add_argument("--seed", type=_seed, default=0)
    p.add_argument(
        "--eval-samples", type=_count_or_none, default=50, help="judged of each split, and of prose; 0: none"
    )
    p.add_argument("--checkpoint-every", type=_count, default=10, metavar="STEPS")
    p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/latest"))
    p.add_argument("--resume", action="store_true", help="go on with the run in --output")
    p.add_argument("--beside", type=pathlib.Path, metavar="RUN", help="an earlier run's folder to show beside this one")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.add_argument("--json", action="store_true", help="the report as JSON on standard output, and nothing else there")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a user's error, 130 after Ctrl-C."""
    args = None
    try:
        args = parser().parse_args(arguments)
        beside = read_report(args.beside) if args.beside else None
        report = run(args)
    except UserError as error:
        return _fail(str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _fail(out_of_memory(args, error))
    except RuntimeError as error:
        if "alloc" not in str(error).lower():  # torch's CPU allocator says "can't allocate memory" in a RuntimeError
            raise
        return _fail(out_of_memory(args, error))
    except SafetensorError as error:  # damaged files are told where they are read, so this is a failed write
        return _fail(f"cannot write to {args.output}: {error}; what was saved before is untouched")
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        return _fail(f"cannot write to {args.output}: {os.strerror(error.errno)}; what was saved before is untouched")
    if report is None:  # another process than the first
        return 0
    print(json.dumps(report) if args.json else describe(report))
    if beside and not args.json:
        print("\n" + side_by_side(beside, report))
    return 130 if report["interrupted"] else 0


def run(args: argparse.Namespace) -> dict | None:
    """Load, judge, train, judge, save. Returns the report, in the main process.

    Long because the order is the point. What can be refused is refused by what it costs to find out: the settings, the
    folder and the data at once, the targets after a few seconds, the rest when the model is there. Only then is the
    folder claimed, and only then do the minutes begin.
    """
    from accelerate import PartialState

    machine = PartialState(cpu=not torch.cuda.is_available())
    device = machine.device
    dtype = DTYPES.get(args.compute_dtype) or models.pick_compute_dtype(device)
    preset, settings = recipe(args, device, dtype, machine.num_processes)
    accelerator = make_accelerator(settings.compute_dtype, device)
    say = _speaker(args.quiet or not accelerator.is_main_process)
    before, resumed_at = look_at_output(args)
    train_chats, judged = load_data(args, say)
    require_targets(args)

    quantization = "nf4" if args.method == "qlora" else None
    say(f"loading {args.model} ({'4-bit NF4, double quantization' if quantization else dtype}, on {device}) ...")
    base, tokenizer = models.load_model(args.model, quantization, device=device, compute_dtype=dtype)
    samples, left_out = data.tokenize({"messages": train_chats}, tokenizer, args.max_length)
    if left_out:
        _warn(f"note: {left_out}", accelerator)
    batches = data.Batches(samples, args.batch_size, args.accumulation, args.packing, args.max_length, args.seed)
    if args.epochs:
        settings = for_steps(settings, math.ceil(args.epochs * batches.steps_per_epoch()))
    judge = _Judge(judged, data.load_prose()[: args.eval_samples], tokenizer, accelerator, dtype)
    claim_output(args, accelerator)

    if before is None:
        say("judging the model as it is ...")
        before = judge(base)
        if accelerator.is_main_process:
            _write_json(args.output / "before.json", before)
    model = preset.adapt(
        base, rank=args.rank, alpha=args.alpha or 2 * args.rank, targets=target_names(args), seed=args.seed
    )
    trainable, steps = models.trainable_parameters(model), settings.steps
    say(f"training {trainable:,} parameters for {steps} steps of {args.batch_size * args.accumulation} samples ...")
    torch.manual_seed(args.seed)  # for the dropout that a model may have of its own
    reset_peak(device)
    start = time.perf_counter()
    records = train(
        model,
        batches,
        settings,
        progress=not args.quiet and accelerator.is_main_process,
        pad_token_id=tokenizer.pad_token_id,
        checkpoints=args.output / "checkpoints",
        resume=args.resume,
        accelerator=accelerator,
    )
    say(f"trained for {time.perf_counter() - start:.0f} s")
    peak = peak_memory_bytes(device)
    if accelerator.is_main_process:
        save_adapter(model, args.output / "adapter")
    interrupted = len(records) < steps
    if interrupted:
        after = NOT_JUDGED
    else:
        say("judging the model as it is now ...")
        after = judge(model)
    if not accelerator.is_main_process:
        return None
    report = {
        "model": str(args.model),
        "method": args.method,
        "steps": len(records),
        "losses": [record.loss for record in records],
        "before": before,
        "after": after,
        "tokens_per_second": _tokens_per_second(records),
        "train_seconds": sum(record.seconds for record in records),
        "peak_memory_bytes": peak,
        "trainable_parameters": trainable,
        "adapter": str(args.output / "adapter"),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": str(dtype).removeprefix("torch."),
        "samples_left_out": len(train_chats) - len(samples),
        "resumed_at": resumed_at,
        "interrupted": interrupted,
    }
    _write_json(args.output / "report.json", report)
    return report


# ------------------------------------------------------------------------------------------------------------- settings


def recipe(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, processes: int
) -> tuple[Preset, TrainSettings]:
    """How to adapt the model and how to train it: as --preset says where memory is concerned, or as the flags say.

    An --optimizer of the user's comes before the preset's. With --epochs the number of steps waits for the samples.

    Raises:
        UserError: settings that are impossible, or impossible on this device and with so many processes.
    """
    if args.preset is None:
        optimizer = "paged_adamw_32bit" if device.type == "cuda" else "adamw_torch"
        preset = Preset("as the flags say", "float32", optimizer, args.gradient_checkpointing)
    else:
        preset = PRESETS[args.preset]
    if preset.adapter_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise UserError(
            f"--preset {args.preset} keeps its adapters in bfloat16 and this run computes in "
            f"{str(dtype).removeprefix('torch.')}: choose in-backward, or --compute-dtype bfloat16"
        )
    memory = preset.settings(dtype)
    memory["optimizer"] = args.optimizer or memory["optimizer"]
    settings = TrainSettings(
        steps=args.steps or 30,
        learning_rate=args.lr,
        schedule=args.schedule,
        fast=args.fast,
        checkpoint_every=args.checkpoint_every,
        **memory,
    )
    settings.require_possible(device, args.batch_size, args.accumulation, processes)
    return preset, for_steps(settings, settings.steps)


def for_steps(settings: TrainSettings, steps: int) -> TrainSettings:
    """The same settings for so many steps, the first tenth of them to warm up."""
    return dataclasses.replace(settings, steps=steps, warmup_steps=max(1, steps // 10))


def target_names(args: argparse.Namespace) -> str | list[str]:
    """--targets, as `add_adapter` takes it."""
    return args.targets if args.targets == "all-linear" else args.targets.split(",")


def require_targets(args: argparse.Namespace) -> None:
    """Raise UserError unless the model has the layers that --targets names, and --rank makes sense for them.

    They are looked for in the model's skeleton, made from its config alone: modules and shapes, no numbers.
    """
    with _collector_off(), models.quiet_transformers():
        skeleton = build_on_meta(read_config(args.model), torch.float32)
    layers = [skeleton.get_submodule(name) for name in find_targets(skeleton, target_names(args))]
    useful = max((min(layer.in_features, layer.out_features) for layer in layers), default=args.rank)
    if args.rank > useful:
        raise UserError(f"--rank {args.rank} is more than any change of these layers has: choose at most {useful}")


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """For imports, which make many objects and drop few: the answer to a typo comes 0.6 of 4.4 seconds sooner."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ----------------------------------------------------------------------------------------------------------------- data


def load_data(args: argparse.Namespace, say) -> tuple[list, dict[str, list]]:
    """The chats to train on, and those to judge by split. A single file gives a tenth of its lines to be judged on."""
    chats = data.read_chats(args.data, "train")
    if os.path.isfile(args.data):
        held_out = min(args.eval_samples, len(chats) // 10)
        if not held_out:
            return chats, {}
        order = numpy.random.default_rng(args.seed).permutation(len(chats))
        judged = [chats[i] for i in order[:held_out]]
        say(f"{held_out} of {len(chats)} samples are held out to judge the model on")
        return [chats[i] for i in order[held_out:]], {"test": judged, "validation": judged}
    splits = [split for split in ("validation", *JUDGED) if args.eval_samples and data.has_split(args.data, split)]
    return chats, {split: data.read_chats(args.data, split)[: args.eval_samples] for split in splits}


class _Judge:
    """Exact match and perplexity of a model, the samples shared among the processes."""

    def __init__(self, judged: dict[str, list], prose: list[str], tokenizer, accelerator, dtype: torch.dtype):
        self.tokenizer, self.accelerator, self.dtype = tokenizer, accelerator, dtype
        self.splits = {split: judged[split] for split in JUDGED if split in judged}
        self.texts = {}
        if judged:
            self.texts["prose"] = [data.tokenize_text(text, tokenizer) for text in prose]
        if "validation" in judged:
            self.texts["validation"] = [data.tokenize_chat(chat, tokenizer) for chat in judged["validation"]]

    def __call__(self, model) -> dict:
        return {
            "exact_match": self.exact_match(model),
            "perplexity": {name: self.perplexity(model, samples) for name, samples in self.texts.items()},
        }

    def exact_match(self, model) -> dict[str, float]:
        """Share of exact answers by split; all splits are answered together, in few large batches."""
        mine = [(split, chat) for split, chats in self.splits.items() for chat in chats]
        mine = mine[self.accelerator.process_index :: self.accelerator.num_processes]
        references = [chat[-1]["content"] for _, chat in mine]
        longest = max((len(self.tokenizer(text)["input_ids"]) for text in references), default=0)
        answers = evaluate.generate(
            model, self.tokenizer, [chat[:-1] for _, chat in mine], max_new_tokens=longest + 8, dtype=self.dtype
        )
        exact = dict.fromkeys(self.splits, 0)
        for (split, _), answer, reference in zip(mine, answers, references, strict=True):
            exact[split] += evaluate.is_exact(answer, reference)
        totals = self._sum(*exact.values())
        return {split: total / len(self.splits[split]) for split, total in zip(self.splits, totals, strict=True)}

    def perplexity(self, model, samples: list[data.TokenizedSample]) -> float:
        mine = samples[self.accelerator.process_index :: self.accelerator.num_processes]
        loss = evaluate.text_loss(model, mine, pad_token_id=self.tokenizer.pad_token_id, dtype=self.dtype)
        return evaluate.Loss(*self._sum(loss.total, loss.tokens)).perplexity

    def _sum(self, *numbers: float) -> list[float]:
        if self.accelerator.num_processes == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()


# ------------------------------------------------------------------------------------------------------- output folder


def look_at_output(args: argparse.Namespace) -> tuple[dict | None, int]:
    """Is the output folder free, or, with --resume, does it hold this run? Nothing is changed there.

    Returns:
        the judgement before training (None: still to be made), and the steps done: what the run to resume came to

    Raises:
        UserError: the folder cannot be written, or holds another run, none to resume, one with other settings, or
            damaged checkpoints only.
    """
    nearest = next(folder for folder in (args.output, *args.output.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {args.output}: {nearest} is no folder, or not yours to write in")
    if not args.resume:
        require_free(args.output)
        return None, 0
    if not (args.output / "run.json").is_file():
        raise UserError(f"nothing to resume: {args.output} holds no run")
    then, now = _read_json(args.output / "run.json"), _settings(args)
    for key in now:
        if then.get(key) != now[key]:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"cannot resume {args.output}: {flag} was {then.get(key)}, now it is {now[key]}")
    before, newest = args.output / "before.json", newest_checkpoint(args.output / "checkpoints")
    return _read_json(before) if before.is_file() else None, len(newest.records) if newest else 0


def require_free(output: pathlib.Path) -> None:
    """Raise UserError if there is anything in the folder."""
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} holds another run: give another --output, or --resume to go on with it")


def claim_output(args: argparse.Namespace, accelerator) -> None:
    """Make the output folder this run's."""
    if not args.resume:
        require_free(args.output)  # still: loading took a while
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        _write_json(args.output / "run.json", _settings(args))


def _settings(args: argparse.Namespace) -> dict[str, str]:
    """What a resumed run must have in common with the one that was interrupted."""
    per_call = ("output", "resume", "beside", "quiet", "json")
    return {key: str(value) for key, value in vars(args).items() if key not in per_call}


def save_adapter(model, folder: pathlib.Path) -> None:
    """Save the adapter in PEFT's format, whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def read_report(run: pathlib.Path) -> dict:
    """The report of an earlier run, one that `side_by_side` can show.

    Raises:
        UserError: there is none.
    """
    try:
        report = json.loads((run / "report.json").read_text())
        side_by_side(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run} holds no finished run to show beside this one: report.json cannot be read") from error
    return report


def _read_json(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: delete {path.parent} and start anew, or give another --output")
    return value


def _write_json(path: pathlib.Path, value: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


# ------------------------------------------------------------------------------------------------------------ speaking


def describe(report: dict) -> str:
    """The report in a few lines."""
    lines = [f"{report['model']}, {report['method']}: {report['steps']} steps on {report['device']}"]
    if report["interrupted"]:
        lines.append("stopped early; the adapter holds what was learned so far")
    rows = [(f"exact match, {s}", "exact_match", s, "{:.0%}") for s in JUDGED]
    rows += [(f"perplexity, {s}", "perplexity", s, "{:.3f}") for s in ("validation", "prose")]
    if report["before"]["perplexity"]:
        lines.append(f"{'':<24}{'before':>10}{'after':>10}")
    for label, kind, split, form in rows:
        if split in report["before"][kind]:
            after = report["after"][kind].get(split)
            shown = form.format(after) if after is not None else "-"
            lines.append(f"{label:<24}{form.format(report['before'][kind][split]):>10}{shown:>10}")
    losses = report["losses"]
    lines += [f"{'loss':<24}{losses[0]:>10.4f}{losses[-1]:>10.4f}"] if losses else []
    lines += [
        f"{'tokens per second':<24}{report['tokens_per_second']:>20.0f}",
        f"{'training time':<24}{report['train_seconds']:>18.0f} s",
        f"{'peak memory':<24}{report['peak_memory_bytes'] / 1e9:>17.2f} GB",
        f"{'trainable parameters':<24}{report['trainable_parameters']:>20,}",
        f"adapter: {report['adapter']}",
    ]
    return "\n".join(lines)


def side_by_side(*reports: dict) -> str:
    """One line a run, after training."""
    columns = ("test", "shifted", "validation", "prose", "tokens/s", "peak GB")
    lines = [f"{'':<8}" + "".join(f"{column:>12}" for column in columns)]
    for report in reports:
        exact, perplexity = report["after"]["exact_match"], report["after"]["perplexity"]
        cells = [f"{exact[s]:.0%}" if s in exact else "-" for s in JUDGED]
        cells += [f"{perplexity[s]:.3f}" if s in perplexity else "-" for s in ("validation", "prose")]
        cells += [f"{report['tokens_per_second']:.0f}", f"{report['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append(f"{report['method']:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def out_of_memory(args: argparse.Namespace, error: BaseException) -> str:
    """What the step was predicted to need, and the knob to turn first."""
    knobs = [
        ("--gradient-checkpointing", not args.gradient_checkpointing and args.preset is None),
        ("--method qlora", args.method == "lora"),
        ("--preset lean", args.preset != "lean" and torch.cuda.is_available()),
        (f"--batch-size {args.batch_size // 2} --accumulation {args.accumulation * 2}", args.batch_size > 1),
        ("a shorter --max-length", True),
    ]
    advice = " or ".join([knob for knob, useful in knobs if useful][:2])
    text = f"out of memory: try {advice}"
    with contextlib.suppress(Exception):  # the advice must come out even where the config cannot be read
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(models._locate(args.model), trust_remote_code=False)
        targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
        predicted = estimate(
            from_config(config),
            args.method,
            rank=args.rank,
            targets=targets,
            batch_size=args.batch_size,
            sequence_length=args.max_length,
            gradient_checkpointing=args.gradient_checkpointing or args.preset is not None,
            optimizer=args.optimizer or ("paged_adamw_32bit" if args.preset else "adamw_torch"),
            preset=args.preset,
        )
        text += f"; predicted for samples of {args.max_length} tokens on a GPU:\n{predicted.table()}"
    return text


def _tokens_per_second(records: list[StepRecord]) -> float:
    """0 where no step was taken."""
    timed = records[1:] or records  # the first step also warms up
    return sum(r.tokens for r in timed) / sum(r.seconds for r in timed) if timed else 0.0


def _speaker(silent: bool):
    return (lambda text: None) if silent else (lambda text: print(text, file=sys.stderr, flush=True))


def _warn(text: str, accelerator) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _count(text: str, least: int = 1, most: int = 1_000_000) -> int:
    with contextlib.suppress(ValueError):
        if least <= int(text) <= most:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most:,}")


def _count_or_none(text: str) -> int:
    return _count(text, least=0)


def _seed(text: str) -> int:
    return _count(text, least=0, most=2**63 - 1)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, 1,000,000 at most")


def _names(text: str) -> str:
    return ",".join(name.strip() for name in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
