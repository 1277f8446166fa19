"""Fine-tune a language model with QLoRA: `python -m qlora_lab.train_qlora --help`.

Without arguments it trains the bundled 135M model on the orders data, on whatever hardware there is, evaluates it
before and after, and leaves in the output folder

    run.json       the settings          before.json   the judgement before training
    checkpoints/   to --resume from      adapter/      for peft.PeftModel.from_pretrained and qlora_lab.export
    log.jsonl      a line for each step  answers.jsonl the judged answers, before and after
    report.json    what --json prints    report.html   all of it, for a browser

and with --init pissa initial.safetensors: what the adapters began as, and what the frozen weights are without.

`accelerate launch -m qlora_lab.train_qlora ...` spreads the same run over several GPUs. Each has the whole model, and
its share of the data; with `--config_file data/accelerate/fsdp.yaml` it has a share of the model, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from typing import cast

import torch
from safetensors import SafetensorError

from qlora_lab.adapters.files import INITIAL, read_initial, save_initial
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.peft_adapter import begin_with_loftq, begin_with_pissa, leave_out, trainable_parameters
from qlora_lab.arguments import print_anywhere
from qlora_lab.errors import CANNOT_WRITE, UserError
from qlora_lab.evaluation.kept_answers import before_only, joined, rows_of
from qlora_lab.evaluation.page import page
from qlora_lab.evaluation.reports import describe, read_report, side_by_side
from qlora_lab.evaluation.soundness import require_finite, require_sound
from qlora_lab.export.papers import adapter_card
from qlora_lab.memory.meter import peak_memory_bytes, reset_peak
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import from_config
from qlora_lab.models.compatibility import read_config
from qlora_lab.models.hardware import DTYPES, pick_compute_dtype
from qlora_lab.models.loading import load_model, load_tokenizer, locate, quantized_by
from qlora_lab.models.sharded import CheckpointWeights, empty_model, fill_and_shard
from qlora_lab.models.tokens import prepare_tokenizer
from qlora_lab.models.trying import require_trainable
from qlora_lab.train_data import (
    fitting_of,
    held_out_in_words,
    judge_of,
    load_data,
    replayed_of,
    share_of,
    validation_of,
)
from qlora_lab.train_flags import (
    adapter_of,
    for_steps,
    parser,
    recipe,
    require_shardable_adapter,
    require_targets,
    settings_of,
    settings_of_before,
    settle_dense_base,
    target_names,
)
from qlora_lab.training.batches import Batches, with_replay
from qlora_lab.training.chat import tokenize
from qlora_lab.training.data import has_splits
from qlora_lab.training.loop import train
from qlora_lab.training.picture import in_short
from qlora_lab.training.presets import Preset
from qlora_lab.training.processes import another_has_ended, make_accelerator, on_cpu
from qlora_lab.training.run_folder import RunFolder, save_adapter
from qlora_lab.training.sharding import is_wanted, require_shardable
from qlora_lab.training.step_log import StepLog
from qlora_lab.training.step_records import StepRecord, tokens_per_second
from qlora_lab.training.templates import keep_template, remarks
from qlora_lab.training.tracking import Tracking
from qlora_lab.training.validation import validated

NOT_ANSWERED = {"exact_match": {}, "perplexity": {}}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (another process died), 2 (a user's error), 130 (Ctrl-C)."""
    print_anywhere()
    try:
        args = parser().parse_args(arguments)
    except UserError as error:
        return _fail(str(error))
    try:
        beside = read_report(args.beside) if args.beside else None
        report = run(args)
    except UserError as error:
        return _fail(str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _fail(out_of_memory(args, error))
    except RuntimeError as error:
        if another_has_ended(error):
            _fail(f"another process of this run has ended, and so does this one: --resume continues {args.output}")
            return 1
        if "alloc" not in str(error).lower():  # torch's CPU allocator says "can't allocate memory" in a RuntimeError
            raise
        return _fail(out_of_memory(args, error))
    except SafetensorError as error:  # damaged files are reported where they are read, so this is a failed write
        return _fail(f"cannot write to {args.output}: {error}; what was saved before is untouched")
    except OSError as error:
        if error.errno is None or error.errno not in CANNOT_WRITE:
            raise
        return _fail(f"cannot write to {args.output}: {os.strerror(error.errno)}; what was saved before is untouched")
    if report is None:  # in all processes but the main one
        return 0
    print(json.dumps(report) if args.json else describe(report))
    if beside and not args.json:
        print("\n" + side_by_side(beside, report))
    return 130 if report["interrupted"] else 0


def run(args: argparse.Namespace) -> dict | None:
    """Load, evaluate, train, evaluate and save. Returns the report in the main process, None in the others.

    Long because the order is the point: mistakes are reported in the order of what it costs to find them. Settings,
    folder and data are checked at once, the targets after a few seconds, the rest when the model is loaded. Only then
    is the folder claimed, and only then does the work that takes minutes begin.

    Raises:
        UserError: any of these mistakes.
    """
    from accelerate import PartialState

    machine = PartialState(cpu=on_cpu())
    device = cast(torch.device, machine.device)  # optional in Accelerate's types, never in a state that has been made
    dtype = DTYPES.get(args.compute_dtype) or pick_compute_dtype(device)
    preset, settings = recipe(args, device, dtype, machine.num_processes)
    if sharded := is_wanted():
        require_shardable(settings, args.rank, machine.num_processes)
        require_shardable_adapter(args)
    accelerator = make_accelerator(settings.compute_dtype, device)
    say = _speaker(args.quiet or not accelerator.is_main_process)
    folder = RunFolder(args.output, settings_of(args), args.resume, settings_of_before())
    before, resumed_at = folder.look()
    answers = before_only(folder.answers()) if args.resume else []
    train_chats, judged, understood = load_data(args)
    replayed = replayed_of(args, len(train_chats))
    require_targets(args)
    say(understood.summary())
    if understood.remarks():
        _warn(understood.remarks(), accelerator)
    if args.eval_samples and not has_splits(args.data):
        say(held_out_in_words(judged, args, understood.samples))
    if any(message["role"] == "assistant" for chats in judged.values() for chat in chats for message in chat[:-1]):
        say("of a conversation with several answers the last is judged, after the others as they are in the data")
    for note in require_trainable(
        args.model,
        quantize=args.method == "qlora",
        targets=target_names(args),
        packing=args.packing,
        chunks=settings.loss_chunk is not None,
        checkpoints=settings.gradient_checkpointing,
        max_length=args.max_length,
        sharded=sharded,
    ):
        _warn(f"note: {note}", accelerator)

    quantization = "nf4" if args.method == "qlora" else None
    say(f"loading {args.model} ({'4-bit NF4, double quantization' if quantization else dtype}, on {device}) ...")
    if sharded:
        base, tokenizer = load_sharded(args, preset, device, dtype)
    else:
        base, tokenizer = load_model(args.model, quantization, device=device, compute_dtype=dtype)
    weights = dense_weights(args) if args.init != "zero" else None
    initial = read_initial(folder.path) if args.init == "pissa" and resumed_at else {}
    if args.init == "pissa" and resumed_at and not initial:
        raise UserError(f"cannot resume {args.output}: without its {INITIAL} nobody knows what the base was trained as")
    for remark in remarks(tokenizer, train_chats):
        _warn(f"note: {remark}", accelerator)
    samples, left_out = tokenize({"messages": train_chats}, tokenizer, args.max_length, args.learn)
    if left_out:
        _warn(f"note: {left_out}", accelerator)
    say(in_short(samples[0], tokenizer, args.learn))
    own = len(samples)
    if replayed:
        others, left_out = tokenize({"messages": replayed}, tokenizer, args.max_length, args.learn)
        if left_out:
            _warn(f"note: of those to replay, {left_out}", accelerator)
        samples = with_replay(samples, others, share_of(args))
        mixed = len(samples) - own
        say(f"{mixed} of {len(samples)} samples an epoch ({mixed / len(samples):.0%}) are replayed from {args.replay}")
    batches = Batches(samples, args.batch_size, args.accumulation, args.packing, args.max_length, args.seed)
    if args.epochs:
        settings = for_steps(settings, math.ceil(args.epochs * batches.steps_per_epoch()))
    if resumed_at > settings.steps:
        raise UserError(f"{args.output} has {resumed_at} steps behind it: give --steps {resumed_at} or more")
    fitting = fitting_of(judged, args, tokenizer, lambda text: _warn(text, accelerator))
    judge = judge_of(fitting, args, tokenizer, dtype, None if sharded else accelerator, replayed)
    validation = validation_of(judge, args, accelerator)
    require_sound(base, tokenizer, [*samples, *(sample for pairs in fitting.values() for _, sample in pairs)], dtype)
    folder.claim(accelerator)
    log, tracking = StepLog(folder.log), None
    if args.track and accelerator.is_main_process:
        tracking = Tracking(args.track, folder.path, folder.tracked_as(), folder.settings, log.told())

    def tell(record: StepRecord) -> None:
        for listener in (tracking, log) if accelerator.is_main_process else ():
            if listener:
                listener.write(record)

    if before is None:
        say("judging the model as it is ...")
        judgement = judge(base)
        before, answers = judgement.as_dict(), rows_of(judge, judgement, "before")
        require_finite(before)
        if accelerator.is_main_process:
            folder.write("answers.jsonl", answers)
            folder.write("before.json", before)
    model = base if sharded else add_adapters(base, args, preset)
    if weights and args.init == "loftq" and not resumed_at:
        say("fitting the adapters to what 4 bits lost ...")
        begin_with_loftq(model, weights)
    if weights and args.init == "pissa":
        if initial:
            leave_out(model, weights, initial)
        else:
            say("making the adapters of the most important part of the weights ...")
            initial = begin_with_pissa(model, weights)
            if accelerator.is_main_process:
                save_initial(folder.path, initial)
        nbytes = sum(matrix.nbytes for matrix in initial.values())
        say(f"what they began as is kept in {nbytes / 1e6:.1f} MB: the frozen weights are without it")
    settings, held = (settings, 0) if sharded else settle_dense_base(settings, model)
    if held:
        say(f"holding the 4-bit weights in {held / 1e9:.2f} GB of dense ones, too, while training (--no-dense-base)")
    trainable, steps = trainable_parameters(model), settings.steps
    say(f"training {trainable:,} parameters for {steps} steps of {args.batch_size * args.accumulation} samples ...")
    torch.manual_seed(args.seed)  # for the model's own dropout, if it has any
    reset_peak(device)
    start = time.perf_counter()
    records = train(
        model,
        batches,
        settings,
        progress=not args.quiet and accelerator.is_main_process,
        each_step=tell,
        pad_token_id=tokenizer.pad_token_id,
        checkpoints=folder.checkpoints,
        resume=args.resume,
        accelerator=accelerator,
        validation=validation,
    )
    out_of_patience = validation is not None and validation.over(records)
    adapter_step = (validation and validation.restore_best(model)) or len(records)
    say(f"trained for {time.perf_counter() - start:.0f} s")
    peak = peak_memory_bytes(device)
    save_adapter(model, folder.adapter, keep_template(tokenizer), accelerator.is_main_process, initial)
    interrupted = len(records) < steps and not out_of_patience
    if args.merge_aware:
        merge_requantized(model, args.merge_aware)  # it is judged as it will be used
    if interrupted:
        after = NOT_ANSWERED
    else:
        say("judging the model as it is now ...")
        judgement = judge(model)
        after, answers = judgement.as_dict(), joined(answers, rows_of(judge, judgement, "after"))
    if not accelerator.is_main_process:
        return None
    report = {
        "model": str(args.model),
        "method": args.method,
        "steps": len(records),
        "losses": [record.loss for record in records],
        "validation_losses": [(record.step, record.validation_loss) for record in validated(records)],
        "adapter_step": adapter_step,
        "out_of_patience": out_of_patience,
        "before": before,
        "after": after,
        "dullest_guess": judge.dullest() if judge.conversations else {},
        "judged": {split: len(chats) for split, chats in judge.conversations.items()},
        "tokens_per_second": tokens_per_second(records) or 0.0,
        "train_seconds": sum(record.seconds for record in records),
        "peak_memory_bytes": peak,
        "dense_base_bytes": held,
        "trainable_parameters": trainable,
        "adapter": str(folder.adapter),
        "processes": accelerator.num_processes,
        "sharded": sharded,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": str(dtype).removeprefix("torch."),
        "samples_left_out": len(train_chats) - own,
        "resumed_at": resumed_at,
        "interrupted": interrupted,
    }
    if tracking:
        tracking.finish(after, len(records))
    folder.write("answers.jsonl", answers)
    folder.write("report.json", report)
    folder.write("report.html", page(report, folder.settings, answers))
    own_tokenizer = (folder.adapter / "tokenizer_config.json").is_file()
    folder.write("adapter/README.md", adapter_card(folder.settings, report, own_tokenizer))
    return report


def add_adapters(base, args: argparse.Namespace, preset: Preset):
    """The model with its adapters: PEFT's, or ours for --merge-aware, which PEFT does not have."""
    if not args.merge_aware:
        return preset.adapt(base, **adapter_of(args))
    adapter = {name: value for name, value in adapter_of(args).items() if name != "kind"}
    dtype = getattr(torch, preset.adapter_dtype)
    return add_lora(base, dtype=dtype, rank_stabilized=args.adapter == "rslora", **adapter)


def load_sharded(args: argparse.Namespace, preset: Preset, device: torch.device, dtype: torch.dtype):
    """The model with its adapters, of which this process holds a part, and the tokenizer.

    The adapters are in it before it is judged for the first time. They change nothing: as yet, they add zero.
    """
    weights = dense_weights(args)
    model, unfilled = empty_model(read_config(args.model), args.method == "qlora", device, dtype)
    tokenizer = load_tokenizer(args.model)
    prepare_tokenizer(tokenizer, model)
    model = preset.adapt(model, **adapter_of(args))
    fill_and_shard(model, unfilled, weights, device)
    return model, tokenizer


def dense_weights(args: argparse.Namespace) -> CheckpointWeights:
    """The checkpoint's weights, to be read one by one. Raises UserError if they are quantized."""
    if quantized_by(read_config(args.model)):
        raise UserError(f"{args.model} is quantized already, and its 16-bit weights are needed: name that checkpoint")
    return CheckpointWeights(locate(args.model))


# ------------------------------------------------------------------------------------------------------------ speaking


def out_of_memory(args: argparse.Namespace, error: BaseException) -> str:
    """The message for a failed allocation: which flags to change first, and the memory that a step should need."""
    knobs = [
        ("--gradient-checkpointing", not args.gradient_checkpointing and args.preset is None),
        ("--method qlora", args.method == "lora"),
        ("--preset lean", args.preset != "lean" and torch.cuda.is_available()),
        (f"--batch-size {args.batch_size // 2} --accumulation {args.accumulation * 2}", args.batch_size > 1),
        ("a shorter --max-length", True),
    ]
    advice = " or ".join([knob for knob, useful in knobs if useful][:2])
    text = f"out of memory: try {advice}"
    with contextlib.suppress(Exception):  # the advice is worth giving even if the config cannot be read
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(locate(args.model), trust_remote_code=False)
        predicted = estimate(
            from_config(config),
            args.method,
            rank=args.rank,
            targets=target_names(args),
            batch_size=args.batch_size,
            sequence_length=args.max_length,
            gradient_checkpointing=args.gradient_checkpointing or args.preset is not None,
            optimizer=args.optimizer or ("paged_adamw_32bit" if args.preset else "adamw_torch"),
            preset=args.preset,
        )
        less = ", without what DoRA needs more than LoRA" if args.adapter == "dora" else ""
        text += f"; predicted for samples of {args.max_length} tokens on a GPU{less}:\n{predicted.table()}"
    return text


def _speaker(silent: bool):
    return (lambda text: None) if silent else (lambda text: print(text, file=sys.stderr, flush=True))


def _warn(text: str, accelerator) -> None:
    if accelerator.is_main_process:
        print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
