"""What do training steps need? They are measured on a GPU, at LLaMA's shapes, beside what was predicted.

    python -m qlora_lab.experiments memory --grid       steps at LLaMA's shapes: 7B to 65B, LoRA and QLoRA
    python -m qlora_lab.experiments memory --caps       which shape trains on a card of 5, 6, ... 48 GB, by preset
    python -m qlora_lab.experiments memory --explain    what was alive at the peak, by the line that asked for it
    python -m qlora_lab.experiments memory --list       what --grid would do, and what it should need; needs no GPU
    python -m qlora_lab.experiments memory --compare    every recorded run: measured, predicted, the difference; no GPU

Everything goes to `memory-<gpu>.json`, written anew after each run. One that is there already is gone on with.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from dataclasses import asdict, dataclass, field

import torch

from qlora_lab.arguments import Parser
from qlora_lab.errors import UserError
from qlora_lab.experiments.allocator_history import live_at_peak
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.memory_comparison import print_comparisons, run_name
from qlora_lab.experiments.memory_settings import EXPLAINED, GRID, HELD_OUT, Setting, print_list
from qlora_lab.experiments.memory_steps import card_of, expandable_segments, measure
from qlora_lab.experiments.paged_memory import SPARE
from qlora_lab.experiments.record import Record, file_of
from qlora_lab.memory.prediction import CUDA_CONTEXT, MemoryBreakdown
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.training.presets import PRESETS

CAPS = (5, 6, 8, 10, 12, 16, 20, 24, 40, 48)  # cards, in GB


class OutOfTime(Exception):
    """`--limit-seconds` are over."""


@dataclass(frozen=True)
class Wanted:
    """Which runs are still to be made.

    only: names of shapes, or None for all. limit_seconds: no run begins later than this.
    """

    only: tuple[str, ...] | None = None
    limit_seconds: float = 1e9
    began: float = field(default_factory=time.monotonic)

    def __call__(self, record: Record, section: str, key: dict, shape: str) -> bool:
        if (self.only and shape not in self.only) or record.rows(section, **key):
            return False
        if time.monotonic() - self.began > self.limit_seconds:
            raise OutOfTime
        return True


ALL = Wanted()


def add(record: Record, section: str, run: dict) -> None:
    record.add(section, run)
    print(line_of(run), flush=True)


def run_grid(record: Record, device: torch.device, wanted: Wanted = ALL) -> None:
    """Each setting that fits: what was predicted, what was measured."""
    for held_out, settings in ((False, GRID), (True, HELD_OUT)):
        for setting in settings:
            key = {**setting.as_row(), "held_out": held_out}
            predicted = setting.predicted()
            if not wanted(record, "runs", key, setting.shape):
                continue
            need = predicted.peak_allocated + predicted.outside["paged optimizer states"]
            if need + SPARE > torch.cuda.mem_get_info(device)[0]:
                add(record, "runs", {**key, "skipped": f"needs {need / 1e9:.1f} GB"})
                continue
            run = {**key, "predicted": as_row(predicted), **measure(setting, device)}
            add(record, "runs", run)


def run_caps(record: Record, device: torch.device, wanted: Wanted = ALL) -> None:
    """For each LLaMA and preset the smallest card that it trains on, 1 x 512 tokens, rank 64 on all linears."""
    record.note(allocator_in_caps=expandable_segments(device))
    for shape in ("llama-7b", "llama-13b", "llama-33b", "llama-65b"):
        for name, preset in PRESETS.items():
            setting = Setting(shape, adapter_dtype=preset.adapter_dtype, optimizer=preset.optimizer)
            parts = setting.predicted().parts
            held = sum(parts[part] for part in ("base weights", "quantization constants", "norms", "adapters"))
            held += parts["embeddings and head"] // (2 if preset.embeddings_on_cpu else 1)
            for cap in CAPS:
                if cap * 1e9 - CUDA_CONTEXT < held:
                    continue
                key = {"shape": shape, "preset": name, "card_gb": cap}
                if wanted(record, "caps", key, shape):
                    with card_of(cap, device):
                        run = {**key, "recipe": asdict(preset), **setting.as_row(), **measure(setting, device, preset)}
                    add(record, "caps", run)
                if any("measured" in run for run in record.rows("caps", **key)):
                    break  # it trains on any larger card as well


def run_explain(record: Record, device: torch.device, wanted: Wanted = ALL) -> None:
    """Peaks taken apart: which lines of Python had asked for the blocks that were alive then.

    Not of "lean": with torch 2.11, computing a chunk of the loss again fails while history is recorded ("SystemError:
    cross_entropy_loss returned NULL without setting an exception"), and only then.
    """
    recipes: list[tuple[Setting, str | None]] = [(setting, None) for setting in EXPLAINED]
    recipes.append((Setting("llama-7b"), "in-backward"))
    for setting, name in recipes:
        key = {**setting.as_row(), "preset": name}
        if not wanted(record, "explained", key, setting.shape):
            continue
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=3_000_000)
        try:
            run = measure(setting, device, PRESETS[name] if name else None, steps=2)
            trace = torch.cuda.memory._snapshot().get("device_traces", [])[device.index or 0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        peak, blocks = live_at_peak(trace)
        largest = sorted(blocks.items(), key=lambda item: -item[0][1] * item[1])[:60]
        rows = [{"bytes": size * n, "blocks": n, "block": size, "place": place} for (place, size), n in largest]
        add(record, "explained", {**key, **run, "replayed_peak": peak, "alive": rows})


def as_row(prediction: MemoryBreakdown) -> dict:
    """As a record has it."""
    return {"parts": prediction.parts, "peak_allocated": prediction.peak_allocated, "moment": prediction.moment}


def line_of(run: dict) -> str:
    """A run, as it is told when it is done."""
    name = run_name(run)
    if "skipped" in run:
        return f"{name}: skipped, {run['skipped']}"
    if "out_of_memory" in run:
        return f"{name}: out of memory after {run['out_of_memory']['after']}: {run['out_of_memory']['message']}"
    got = run["measured"]
    line = f"{name}: {got['peak_allocated'] / 1e9:.3f} GB allocated, {got['peak_reserved'] / 1e9:.3f} reserved"
    if run.get("predicted"):
        line += f", predicted {run['predicted']['peak_allocated'] / got['peak_allocated'] - 1:+.1%}"
    return f"{line}, {got['managed_bytes'] / 1e9:.2f} managed, {got['step_seconds']:.2f} s a step"


def record_of(output: pathlib.Path, device: torch.device, continue_from: pathlib.Path | None) -> Record:
    """The record that goes on with `continue_from`, or with the one that is there, or a new one."""
    name = torch.cuda.get_device_name(device)
    path = file_of("memory", output, name)
    free, total = torch.cuda.mem_get_info(device)
    return Record.begin(
        "memory",
        output,
        name,
        packages=("torch", "transformers", "peft", "bitsandbytes", "accelerate"),
        continue_from=continue_from or (path if path.exists() else None),
        total_memory=total,
        outside_allocator_at_start=total - free - torch.cuda.memory_reserved(device),
    )


def add_flags(parser: Parser) -> None:
    for name, what in (
        ("grid", "steps at the shapes of GRID and HELD_OUT"),
        ("caps", "the smallest card that each LLaMA trains on"),
        ("explain", "what is alive at some peaks"),
        ("list", "what --grid would do"),
        ("compare", "recorded runs beside predictions"),
    ):
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), metavar="SHAPE", help="only these shapes")
    parser.add_argument("--limit-seconds", type=float, default=1e9, help="begin no run later than this")
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept and not made again")


def run(arguments: argparse.Namespace) -> None:
    if arguments.list:
        return print_list()
    if arguments.compare:
        return print_comparisons(arguments.output)
    if not (arguments.grid or arguments.caps or arguments.explain):
        raise UserError("nothing is asked for: choose from --grid, --caps, --explain, --list, --compare")
    device = require_gpu("this records training steps on one")
    torch.zeros(1, device=device)
    record = record_of(arguments.output, device, arguments.continue_from)
    about = {name: value for name, value in record.content.items() if not isinstance(value, list)}
    print(f"{record.path}: {about}", flush=True)
    wanted = Wanted(arguments.only and tuple(arguments.only), arguments.limit_seconds)
    start = time.monotonic()
    measure(Setting("tiny"), device, shape=Shape(256, 512, 2, 4, 4, 1000))  # loads libraries and kernels
    print(f"warm after {time.monotonic() - start:.0f} s", flush=True)
    try:
        for asked, work in ((arguments.grid, run_grid), (arguments.explain, run_explain), (arguments.caps, run_caps)):
            if asked:
                work(record, device, wanted)
                print(f"{work.__name__}: done after {time.monotonic() - start:.0f} s", flush=True)
    except OutOfTime:
        print(f"stopped after {time.monotonic() - start:.0f} s: go on with --continue-from {record.path}", flush=True)
