"""The flags of `train_qlora`, and what they ask for: how to adapt the model and how to train it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import pathlib
from collections.abc import Iterator
from typing import Any

import torch

from qlora_lab.adapters.as_one import dense_bytes, room_for_dense
from qlora_lab.adapters.peft_adapter import KINDS
from qlora_lab.adapters.targets import find_targets, widths
from qlora_lab.arguments import Parser, count, count_or_none, names, positive, seed, share
from qlora_lab.errors import UserError
from qlora_lab.evaluation.scores import NAMES, Score, parse_score
from qlora_lab.facts import MERGE_TARGETS, OPTIMIZERS
from qlora_lab.models.bundled import DEFAULT_MODEL
from qlora_lab.models.compatibility import build_on_meta, read_config
from qlora_lab.models.experts import split_targets
from qlora_lab.models.hardware import DTYPES
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.training.data import has_splits
from qlora_lab.training.formats import FORMATS
from qlora_lab.training.holding_out import RULE
from qlora_lab.training.presets import PRESETS, Preset
from qlora_lab.training.settings import SCHEDULES, TrainSettings
from qlora_lab.training.templates import LEARN
from qlora_lab.training.tracking import TRACKERS, require_tracker

KEEP = ("last", "best")
INITS = ("zero", "loftq", "pissa")
JUDGED_HELP = (
    "judged per split and of prose, by their last answer; 0: none. Of data without splits a fifth is held out to judge "
    "on, and with --validate-every a tenth to validate on, at most so many each (default: %(default)s)"
)
DENSE_HELP = (
    "on a CPU: hold the weights that are in 4 bits dense, too, while training (default: where they take at most a "
    "quarter of the free memory)"
)
DATA_HELP = "a data set of the course, a file, a folder with train.jsonl ..., or owner/name on the hub"


def add_data_flags(p: Parser) -> None:
    """How data is to be read, and what of it learned: the same for a training and for a look at the data."""
    p.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, folder or hub id (default: %(default)s)")
    p.add_argument("--columns", help="which columns hold what, if not recognized: prompt=question,response=answer")
    p.add_argument("--format", choices=FORMATS, help="the data's format, if not recognized")
    p.add_argument("--learn", choices=LEARN, default="all", help="all turns of the assistant, the last, or everything")
    p.add_argument("--max-length", type=count, default=256, help="longer samples are left out, and counted")
    p.add_argument("--eval-samples", type=count_or_none, default=50, help=JUDGED_HELP)
    p.add_argument("--split-by", metavar="COLUMN", help="hold out all samples with the same value there, or none")
    p.add_argument("--seed", type=seed, default=0, help="of the adapter, the samples' order, and which are held out")


def parser() -> Parser:
    p = Parser(prog="train_qlora", description="Fine-tune a language model with QLoRA and measure what it learned.")
    p.add_argument("--data", default="orders", help=DATA_HELP)
    add_data_flags(p)
    p.add_argument("--method", choices=["qlora", "lora"], default="qlora", help="4-bit NF4 base, or 16/32-bit base")
    p.add_argument("--rank", type=count, default=16)
    p.add_argument("--alpha", type=positive, help="default: 2 x rank")
    p.add_argument("--adapter", choices=KINDS, default="lora", help="rsLoRA scales by alpha/sqrt(rank); DoRA: dora.py")
    p.add_argument("--init", choices=INITS, default="zero", help="B is 0, or LoftQ or PiSSA: initialization.py")
    p.add_argument("--lora-plus", type=positive, default=1.0, metavar="RATIO", help="B's learning rate over A's")
    p.add_argument("--targets", type=names, default="all-linear", help="all-linear, or comma-separated: q_proj,v_proj")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="optimizer steps (default: 30)")
    length.add_argument("--epochs", type=positive)
    p.add_argument("--batch-size", type=count, default=8, help="samples per forward pass, over all processes")
    p.add_argument("--accumulation", type=count, default=1, help="forward passes per optimizer step")
    p.add_argument("--packing", action="store_true", help="fill rows of --max-length with several samples")
    p.add_argument("--lr", type=positive, default=1.5e-3, help="peak learning rate (default: %(default)s)")
    p.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    p.add_argument(
        "--preset", choices=PRESETS, help="a recipe that saves GPU memory at some other cost: see training/presets.py"
    )
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="default: paged_adamw_32bit on a GPU, adamw_torch on a CPU")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory for one more forward pass")
    p.add_argument("--dense-base", action=argparse.BooleanOptionalAction, help=DENSE_HELP)
    p.add_argument("--fast", action="store_true", help="on a GPU: fused kernels in one CUDA graph")
    p.add_argument("--merge-aware", choices=MERGE_TARGETS, help="learn under the rounding of a merge into these 4 bits")
    p.add_argument("--compute-dtype", choices=DTYPES, help="default: bfloat16 where the hardware has it")
    p.add_argument("--replay", metavar="FILE", help="mix in samples of this data, so that what they teach is kept")
    p.add_argument("--replay-share", type=share, metavar="SHARE", help="theirs of what is trained on (default: 0.1)")
    p.add_argument(
        "--judge",
        action="append",
        type=_score,
        metavar="SCORE",
        help=f"a score beside exact match, as often as you like: {', '.join(NAMES)} (its group, or its match)",
    )
    p.add_argument("--checkpoint-every", type=count, default=10, metavar="STEPS")
    p.add_argument("--validate-every", type=count, metavar="STEPS", help="also measure the loss on held-out samples")
    p.add_argument("--keep", choices=KEEP, default="last", help="the adapter to save: the last, or the best validated")
    p.add_argument("--patience", type=count, metavar="N", help="stop after N validations without a better loss")
    p.add_argument("--track", choices=TRACKERS, help="tell this program of each step, too (default: none)")
    p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/latest"))
    p.add_argument("--resume", action="store_true", help="continue the run in --output")
    p.add_argument("--beside", type=pathlib.Path, metavar="RUN", help="an earlier run to compare with this one")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.add_argument("--json", action="store_true", help="the report as JSON on standard output, and nothing else there")
    return p


def recipe(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, processes: int
) -> tuple[Preset, TrainSettings]:
    """How to adapt the model and how to train it: whatever affects memory is up to --preset, if given, or to the flags.

    --optimizer takes precedence over the preset's. With --epochs the steps are set later, by the number of samples.

    Raises:
        UserError: settings that are impossible, or impossible on this device or with this many processes.
    """
    _require_validation(args)
    if args.init == "loftq" and args.method != "qlora":
        raise UserError("--init loftq corrects what 4 bits lose, and --method lora loses nothing: leave it out")
    if args.merge_aware and (args.adapter == "dora" or args.init != "zero"):
        raise UserError("--merge-aware trains LoRA or rsLoRA from B = 0: leave out --adapter dora and --init")
    scores_of(args)
    if args.replay_share and not args.replay:
        raise UserError(
            f"--replay-share {args.replay_share:g} is a share of other samples: name them with --replay FILE"
        )
    if args.track:
        require_tracker(args.track)
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
        lora_plus=args.lora_plus,
        fast=args.fast,
        merge_aware=args.merge_aware,
        dense_base=args.dense_base,
        checkpoint_every=args.checkpoint_every,
        **memory,
    )
    settings.require_possible(device, args.batch_size, args.accumulation, processes)
    return preset, for_steps(settings, settings.steps)


def require_shardable_adapter(args: argparse.Namespace) -> None:
    """Raise UserError if the adapter needs whole weights, of which each process has only a part."""
    if args.adapter == "dora" or args.init != "zero":
        flag = "--adapter dora" if args.adapter == "dora" else f"--init {args.init}"
        raise UserError(f"{flag} needs whole weights, and here each process has a part of them: leave it out")


def _require_validation(args: argparse.Namespace) -> None:
    """Raise UserError if flags need validation, and --validate-every or its samples are missing."""
    if not args.validate_every:
        flag = "--keep best" if args.keep == "best" else f"--patience {args.patience}" if args.patience else ""
        if flag:
            raise UserError(f"{flag} goes by the validation loss: give --validate-every STEPS, too")
    elif not args.eval_samples:
        raise UserError("--validate-every needs held-out samples, and --eval-samples is 0: give at least 1")


def scores_of(args: argparse.Namespace) -> list[Score]:
    """What --judge asks for. Raises UserError if there is nothing to judge, or twice the same."""
    scores = [parse_score(text) for text in args.judge or []]
    if scores and not args.eval_samples:
        raise UserError("--judge scores answers, and --eval-samples is 0: give at least 1")
    names = [score.name for score in scores]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--judge {twice[0]} was given twice: give it once")
    return scores


def _score(text: str) -> str:
    try:
        parse_score(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def for_steps(settings: TrainSettings, steps: int) -> TrainSettings:
    """The same settings for this many steps, the first tenth of which (at least one) warm up."""
    return dataclasses.replace(settings, steps=steps, warmup_steps=max(1, steps // 10))


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings, as text, that a resumed run must share with the interrupted one."""
    per_call = ("output", "resume", "beside", "quiet", "json", "dense_base")
    settings = {key: str(value) for key, value in vars(args).items() if key not in per_call}
    return settings if has_splits(args.data) else {**settings, "held_out": RULE}


def settings_of_before() -> dict[str, str]:
    """What a setting was, for a run that is older than the flag for it."""
    return {**settings_of(parser().parse_args([])), "held_out": "a tenth"}


def adapter_of(args: argparse.Namespace) -> dict:
    """The flags about the adapter, as arguments of `add_adapter`."""
    return {
        "rank": args.rank,
        "alpha": args.alpha or 2 * args.rank,
        "targets": target_names(args),
        "seed": args.seed,
        "kind": args.adapter,
    }


def target_names(args: argparse.Namespace) -> str | list[str]:
    """--targets in the form that `add_adapter` takes."""
    return args.targets if args.targets == "all-linear" else args.targets.split(",")


def require_targets(args: argparse.Namespace) -> None:
    """Raise UserError unless the model has the layers that --targets names, and --rank makes sense for them.

    The layers are looked up in a skeleton made from the model's config alone: modules and shapes, no weights.
    """
    with _collector_off(), quiet_transformers():
        skeleton = build_on_meta(read_config(args.model), torch.float32)
    modules: dict[str, Any] = dict(skeleton.named_modules())
    targets, of_experts = target_names(args), []
    if isinstance(targets, list):
        targets, of_experts = split_targets(skeleton, targets)
    names = find_targets(skeleton, targets, language_only=True) if targets or not of_experts else []
    layers = [modules[name] for name in names]
    useful = max((min(widths(layer)) for layer in layers), default=args.rank)
    if args.rank > useful:
        raise UserError(f"--rank {args.rank} is more than these layers can use: choose at most {useful}")


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection: imports create many objects and free few. A typo is reported in 3.8 s instead of 4.4 s."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def settle_dense_base(settings: TrainSettings, model) -> tuple[TrainSettings, int]:
    """Decide by the free memory where `dense_base` is None. The settings, and the bytes of what is held dense, too."""
    if settings.dense_base is None:
        settings = dataclasses.replace(settings, dense_base=not settings.merge_aware and room_for_dense(model))
    return settings, dense_bytes(model) if settings.dense_base else 0
