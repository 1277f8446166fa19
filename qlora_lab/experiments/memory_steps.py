"""Measure training steps on a GPU and write them down beside what was predicted.

    python -m qlora_lab.memory.record --grid       steps at LLaMA's shapes: 7B to 65B, LoRA and QLoRA
    python -m qlora_lab.memory.record --caps       which shape trains on a card of 5, 6, ... 48 GB, with which preset
    python -m qlora_lab.memory.record --explain    what was alive at the peak, by the line that asked for it
    python -m qlora_lab.memory.record --list       what --grid would do, and what it should need; needs no GPU
    python -m qlora_lab.memory.record --compare    every recorded run: measured, predicted, the difference; no GPU

The models have random weights (`finetuning.build_random`), so nothing is downloaded: memory and time do not depend on
what the weights say. Everything goes to `memory-<gpu>.json`, written anew after each run.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import pathlib
import sys
import time
from dataclasses import asdict, dataclass

import torch

from qlora_lab.experiments.allocator_history import live_at_peak
from qlora_lab.memory.measuring import forget_accelerate, random_batches
from qlora_lab.memory.meter import Meter
from qlora_lab.memory.prediction import CUDA_CONTEXT, MemoryBreakdown, estimate
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.loop import train_steps
from qlora_lab.training.presets import PRESETS, Preset
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.step_records import tokens_per_second

STEPS = 3
SPARE = 4_000_000_000  # bytes of the card that no run is planned to use
CAPS = (5, 6, 8, 10, 12, 16, 20, 24, 40, 48)  # cards, in GB


@dataclass(frozen=True)
class Setting:
    """What `estimate` is asked and a run does."""

    shape: str
    method: str = "qlora"
    batch_size: int = 1
    sequence_length: int = 512
    gradient_checkpointing: bool = True
    rank: int = 64
    targets: str | tuple[str, ...] = "all-linear"
    optimizer: str = "paged_adamw_32bit"
    adapter_dtype: str = "float32"
    full_precision: str = "float32"

    def predicted(self, preset: str | None = None) -> MemoryBreakdown:
        """preset: one of `PRESETS`, as in `estimate`."""
        knobs = asdict(self)
        return estimate(SHAPES[knobs.pop("shape")], knobs.pop("method"), **knobs, preset=preset)


def _rows(shape: str, method: str, rank: int, rows: list[tuple[int, int, bool]]) -> list[Setting]:
    return [Setting(shape, method, batch, length, checkpointing, rank) for batch, length, checkpointing in rows]


GRID = [
    *_rows("llama-7b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (1, 2048, True)]),
    *_rows("llama-7b", "qlora", 64, [(4, 512, False), (16, 512, True), (4, 2048, True), (16, 512, False)]),
    *_rows("llama-7b", "qlora", 64, [(16, 2048, True)]),
    *_rows("llama-7b", "qlora", 16, [(1, 512, True), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-7b", "lora", 64, [(1, 512, True), (1, 512, False), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-7b", "lora", 16, [(1, 512, True), (16, 512, True)]),
    *_rows("llama-13b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (4, 512, False)]),
    *_rows("llama-13b", "qlora", 64, [(16, 512, True), (4, 2048, True)]),
    *_rows("llama-13b", "qlora", 16, [(1, 512, True), (1, 2048, False)]),
    *_rows("llama-13b", "lora", 64, [(1, 512, True), (4, 512, False), (4, 2048, True)]),
    *_rows("llama-13b", "lora", 16, [(1, 512, True)]),
    *_rows("llama-33b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (16, 512, True)]),
    *_rows("llama-33b", "qlora", 64, [(1, 2048, False)]),
    *_rows("llama-33b", "qlora", 16, [(1, 512, True), (4, 2048, True)]),
    *_rows("llama-65b", "qlora", 64, [(1, 512, True), (1, 512, False), (4, 512, True), (1, 2048, True)]),
    *_rows("llama-65b", "qlora", 64, [(4, 2048, True)]),
    *_rows("llama-65b", "qlora", 16, [(1, 512, True)]),
]

# Kept aside: no formula in `estimate` was developed on these.
HELD_OUT = [
    Setting("smollm2-135m", "full", 4, 512, False, optimizer="adamw_torch"),
    Setting("smollm2-1.7b", "full", 1, 1024, True, optimizer="adamw_torch"),
    Setting("llama-3-8b", "qlora", 1, 512, True),
    Setting("llama-3-8b", "lora", 2, 1024, False, 16),
    Setting("mistral-7b", "qlora", 1, 1024, True, 16),
    Setting("llama-7b", "qlora", 4, 512, False, targets=("q_proj", "v_proj")),
    Setting("llama-7b", "qlora", 1, 512, True, 16, optimizer="adamw_torch"),
    Setting("llama-7b", "qlora", 2, 1024, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "lora", 2, 1024, False),
    Setting("llama-13b", "qlora", 2, 1024, False, 16),
    Setting("smollm2-360m", "full", 4, 512, False, optimizer="adamw_torch", full_precision="mixed"),
    Setting("smollm2-1.7b", "full", 1, 512, True, full_precision="mixed"),
    Setting("smollm2-1.7b", "full", 2, 1024, False, optimizer="adamw_torch", full_precision="mixed"),
    Setting("llama-7b", "lora", 1, 512, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "lora", 2, 1024, False, adapter_dtype="bfloat16"),
    Setting("llama-13b", "lora", 1, 512, True, 16, adapter_dtype="bfloat16"),
]

EXPLAINED = [
    Setting("llama-7b", "qlora", 1, 512, True),
    Setting("llama-7b", "qlora", 4, 512, False),
    Setting("llama-7b", "qlora", 4, 2048, True),
    Setting("llama-7b", "qlora", 1, 512, True, optimizer="adamw_torch"),
    Setting("llama-7b", "qlora", 1, 512, True, adapter_dtype="bfloat16"),
    Setting("llama-7b", "qlora", 4, 512, False, adapter_dtype="bfloat16"),
    Setting("llama-7b", "qlora", 1, 512, True, optimizer="adamw_8bit"),
    Setting("llama-7b", "lora", 1, 512, True),
    Setting("llama-7b", "lora", 4, 512, False),
    Setting("smollm2-360m", "full", 2, 512, True, optimizer="adamw_torch"),
    Setting("smollm2-360m", "full", 4, 512, False, optimizer="adamw_torch"),
    Setting("smollm2-360m", "full", 1, 64, True, optimizer="adamw_torch"),
]


# ------------------------------------------------------------------------------------------------------------- one run


def measure(
    setting: Setting,
    device: torch.device,
    preset: Preset | None = None,
    shape: Shape | None = None,
    steps: int = STEPS,
) -> dict:
    """Build the model, train a few steps on random tokens, and let go of everything.

    Args:
        preset: how to train, instead of the setting's adapter dtype, optimizer and checkpointing.
        shape: instead of `SHAPES[setting.shape]`.

    Returns:
        `phases`: bytes and seconds of "load", "adapter" and of the moments "first step: forward", "steady step: update"
        and so on (`measure.Phase`). `measured`: peaks over all steps, bytes of optimizer states in managed memory,
        seconds of the last step, losses. Or `out_of_memory`: in which phase, and what torch said.
    """
    meter = Meter(device)
    result = {}
    lender = _Lender.installed(device)
    try:
        result["measured"] = _train(setting, device, preset, shape or SHAPES[setting.shape], steps, meter)
        result["measured"]["managed_bytes"] = lender.lent_bytes
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            result["measured"]["outside_allocator"] = total - free - torch.cuda.memory_reserved(device)
    except torch.OutOfMemoryError as error:
        done = list(meter.phases)
        result["out_of_memory"] = {"after": done[-1] if done else None, "message": str(error).splitlines()[0][:300]}
    finally:
        _clean_up(device)
        lender.take_back()
    result["phases"] = meter.as_dict()
    return result


def _train(setting: Setting, device, preset: Preset | None, shape: Shape, steps: int, meter: Meter) -> dict:
    bf16, full = torch.bfloat16, setting.method == "full"
    mixed = full and setting.full_precision == "mixed"
    trained_dtype = "bfloat16" if mixed else setting.adapter_dtype
    preset = preset or Preset("", trained_dtype, setting.optimizer, setting.gradient_checkpointing)
    model = build_random(
        shape,
        "nf4" if setting.method == "qlora" else None,
        device=device,
        compute_dtype=torch.float32 if full and not mixed else bf16,  # fp32 weights, under bf16 autocast
    )
    meter.mark("load")
    with torch.device(device):  # A is drawn there: on the CPU, 65B's adapters take a while
        if full:
            model.requires_grad_(True)
        else:
            targets = setting.targets if setting.targets == "all-linear" else list(setting.targets)
            model = preset.adapt(model, rank=setting.rank, alpha=2 * setting.rank, targets=targets)
    meter.mark("adapter")

    forget_accelerate()
    settings = preset.settings(bf16)
    moments = MomentsOfAStep(make_accelerator(settings["compute_dtype"], device), meter)
    moments.step = "first step"
    if mixed:
        moments.prepare = MasterWeights
    batches = random_batches(shape.vocab_size, setting.batch_size, setting.sequence_length)
    records = []
    for record in train_steps(model, batches, steps=steps, learning_rate=1e-4, accelerator=moments, **settings):
        meter.mark(f"{moments.step}: update")
        moments.step = "steady step"
        records.append(record)
    of_steps = [phase for name, phase in meter.phases.items() if "step" in name]
    return {
        "peak_allocated": max(phase.peak_allocated for phase in of_steps),
        "peak_reserved": max(phase.peak_reserved for phase in of_steps),
        "step_seconds": records[-1].seconds,
        "tokens_per_second": tokens_per_second(records),
        "losses": [record.loss for record in records],
    }


class MomentsOfAStep:
    """Stands in for 🤗 Accelerate in `train_steps`, and marks where the forward and the backward pass end.

    What follows them (clipping, the optimizer) is the update: mark it when the step's record comes.
    """

    def __init__(self, accelerator, meter: Meter):
        self._accelerator, self._meter = accelerator, meter
        self.step = "step"

    def __getattr__(self, name: str):
        return getattr(self._accelerator, name)

    def backward(self, loss: torch.Tensor) -> None:
        self._meter.mark(f"{self.step}: forward", wait=False)
        self._accelerator.backward(loss)
        self._meter.mark(f"{self.step}: backward", wait=False)


class MasterWeights:
    """Mixed precision: an optimizer's 16-bit parameters get fp32 copies, which it updates in their place.

    One tensor after the other, so that only one gradient at a time is there in fp32, too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        [group] = self.param_groups = optimizer.param_groups
        self._pairs = [(p, torch.nn.Parameter(p.detach().float())) for p in group["params"]]

    def zero_grad(self) -> None:
        for parameter, _ in self._pairs:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        for parameter, master in self._pairs:
            master.grad = parameter.grad.float()
            self._optimizer.param_groups = [{**group, "params": [master]}]
            self._optimizer.step()
            master.grad = None
            parameter.copy_(master)


def _clean_up(device: torch.device) -> None:
    """Leave the GPU as an idle process does, cuBLAS' workspaces included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


class _Lender:
    """Keeps count of managed memory, and lends it to one run after another.

    bitsandbytes never frees the states of its paged optimizers. And a GPU should never be asked for more managed
    memory than it has free: then it pages for ever.
    """

    _one: _Lender | None = None

    def __init__(self, device: torch.device, get_paged):
        self._device, self._get_paged = device, get_paged
        self._lent: list[torch.Tensor] = []
        self._idle: list[torch.Tensor] = []

    @classmethod
    def installed(cls, device: torch.device) -> _Lender:
        """The process's only one, put in the place of `bitsandbytes.functional.get_paged`."""
        import bitsandbytes.functional as functional

        if cls._one is None:
            cls._one = cls(device, functional.get_paged)
            functional.get_paged = cls._one.lend
        return cls._one

    @property
    def lent_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._lent)

    def lend(self, *shape: int, dtype=torch.float32, device=None) -> torch.Tensor:
        """`get_paged`, from what an earlier run has left if that fits."""
        for index, buffer in enumerate(self._idle):
            if tuple(buffer.shape) == shape and buffer.dtype == dtype:
                self._lent.append(self._idle.pop(index))
                return self._lent[-1]
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._device.type == "cuda" and torch.cuda.mem_get_info(self._device)[0] < size + SPARE // 2:
            raise torch.OutOfMemoryError("no room for more managed memory on this GPU")
        self._lent.append(self._get_paged(*shape, dtype=dtype, device=device or self._device))
        return self._lent[-1]

    def take_back(self) -> None:
        import bitsandbytes.functional as functional

        self._idle += self._lent
        self._lent = []
        functional.GlobalPageManager.get_instance().paged_tensors.clear()


@contextlib.contextmanager
def card_of(gigabytes: float, device: torch.device):
    """Let torch's allocator have no more than a card of so many GB (10^9 bytes) has left beside the CUDA context."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((gigabytes * 1e9 - CUDA_CONTEXT) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


# ------------------------------------------------------------------------------------------------------------ the lists


def run_grid(record: Record, device: torch.device) -> None:
    """Each setting that fits: what was predicted, what was measured."""
    for held_out, settings in ((False, GRID), (True, HELD_OUT)):
        for setting in settings:
            key = {**_plain(setting), "held_out": held_out}
            predicted = setting.predicted()
            if not record.wants("runs", key, setting.shape):
                continue
            need = predicted.peak_allocated + predicted.outside["paged optimizer states"]
            if need + SPARE > torch.cuda.mem_get_info(device)[0]:
                record.add("runs", {**key, "skipped": f"needs {need / 1e9:.1f} GB"})
                continue
            run = {**key, "predicted": _prediction(predicted), **measure(setting, device)}
            record.add("runs", run)


def run_caps(record: Record, device: torch.device) -> None:
    """For each LLaMA and preset the smallest card that it trains on, 1 x 512 tokens, rank 64 on all linears."""
    record.about["allocator_in_caps"] = _expandable_segments(device)
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
                if record.wants("caps", key, shape):
                    with card_of(cap, device):
                        run = {**key, "recipe": asdict(preset), **_plain(setting), **measure(setting, device, preset)}
                    record.add("caps", run)
                if record.has("caps", key, "measured"):
                    break  # it trains on any larger card as well


def run_explain(record: Record, device: torch.device) -> None:
    """Peaks taken apart: which lines of Python had asked for the blocks that were alive then.

    Not of "lean": with torch 2.11, computing a chunk of the loss again fails while history is recorded ("SystemError:
    cross_entropy_loss returned NULL without setting an exception"), and only then.
    """
    recipes = [(setting, None) for setting in EXPLAINED]
    recipes.append((Setting("llama-7b"), "in-backward"))
    for setting, name in recipes:
        key = {**_plain(setting), "preset": name}
        if not record.wants("explained", key, setting.shape):
            continue
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=3_000_000)
        try:
            run = measure(setting, device, PRESETS[name] if name else None, steps=2)
            trace = torch.cuda.memory._snapshot()["device_traces"][device.index]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        peak, blocks = live_at_peak(trace)
        largest = sorted(blocks.items(), key=lambda item: -item[0][1] * item[1])[:60]
        rows = [{"bytes": size * n, "blocks": n, "block": size, "place": place} for (place, size), n in largest]
        record.add("explained", {**key, **run, "replayed_peak": peak, "alive": rows})


def _plain(setting: Setting) -> dict:
    return {**asdict(setting), "targets": setting.targets if isinstance(setting.targets, str) else [*setting.targets]}


def _prediction(breakdown: MemoryBreakdown) -> dict:
    return {"parts": breakdown.parts, "peak_allocated": breakdown.peak_allocated, "moment": breakdown.moment}


def _expandable_segments(device: torch.device) -> str:
    """Ask the allocator for segments that grow, which leave fewer gaps; say what it does."""
    tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    try:
        tell("expandable_segments:True")
        probe = torch.empty(2**21, device=device)
        grows = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
        del probe
    except (RuntimeError, ValueError):
        grows = False
    if not grows:
        tell("expandable_segments:False")
    torch.cuda.empty_cache()
    return f"expandable_segments:{grows}"


# ----------------------------------------------------------------------------------------------------------- the record


class OutOfTime(Exception):
    """`--limit-seconds` are over."""


class Record:
    """The JSON file: read if it is there, written anew after each run.

    only: names of shapes, or None for all. limit_seconds: no run begins later than this.
    """

    def __init__(self, path: pathlib.Path, about: dict, only: list[str] | None = None, limit_seconds: float = 1e9):
        self.path, self.about = path, about
        self.sections: dict[str, list[dict]] = {"runs": [], "caps": [], "explained": []}
        self._only, self._end = only, time.monotonic() + limit_seconds

    def read(self, path: pathlib.Path) -> None:
        """Take over the runs of an earlier record, and its dates."""
        earlier = json.loads(path.read_text())
        dates = [date for about in (earlier, self.about) for date in about["date"].split(", ")]
        self.about["date"] = ", ".join(dict.fromkeys(dates))
        self.sections.update({name: earlier.get(name, []) for name in self.sections})

    def wants(self, section: str, key: dict, shape: str) -> bool:
        """Whether this run is still to be made."""
        if (self._only and shape not in self._only) or self._find(section, key):
            return False
        if time.monotonic() > self._end:
            raise OutOfTime
        return True

    def has(self, section: str, key: dict, field: str) -> bool:
        return any(field in run for run in self._find(section, key))

    def add(self, section: str, run: dict) -> None:
        self.sections[section].append(run)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({**self.about, **self.sections}, indent=1) + "\n")
        part.rename(self.path)
        print(_line(run), flush=True)

    def _find(self, section: str, key: dict) -> list[dict]:
        return [run for run in self.sections[section] if all(run.get(name) == value for name, value in key.items())]


def _run_name(run: dict) -> str:
    name = " ".join(str(run.get(k)) for k in ("shape", "method", "preset", "batch_size", "sequence_length", "rank"))
    name += " checkpointing" * run["gradient_checkpointing"] if "gradient_checkpointing" in run else ""
    name += f" {run['optimizer']} {run['adapter_dtype']}" if "optimizer" in run else ""
    name += " mixed" if run.get("full_precision") == "mixed" else ""
    return name + (f" on {run['card_gb']} GB" if "card_gb" in run else "")


def _line(run: dict) -> str:
    name = _run_name(run)
    if "skipped" in run:
        return f"{name}: skipped, {run['skipped']}"
    if "out_of_memory" in run:
        return f"{name}: out of memory after {run['out_of_memory']['after']}: {run['out_of_memory']['message']}"
    got = run["measured"]
    line = f"{name}: {got['peak_allocated'] / 1e9:.3f} GB allocated, {got['peak_reserved'] / 1e9:.3f} reserved"
    if run.get("predicted"):
        line += f", predicted {run['predicted']['peak_allocated'] / got['peak_allocated'] - 1:+.1%}"
    return f"{line}, {got['managed_bytes'] / 1e9:.2f} managed, {got['step_seconds']:.2f} s a step"


def _about(device: torch.device) -> dict:
    free, total = torch.cuda.mem_get_info(device)
    return {
        "command": "python -m qlora_lab.memory.record",
        "device": torch.cuda.get_device_name(device),
        "total_memory": total,
        "outside_allocator_at_start": total - free - torch.cuda.memory_reserved(device),
        "date": datetime.date.today().isoformat(),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
        },
    }


def _list() -> None:
    for held_out, settings in ((False, GRID), (True, HELD_OUT)):
        for setting in settings:
            predicted = setting.predicted()
            need = f"{predicted.peak_allocated / 1e9:6.2f} GB ({predicted.moment})"
            knobs = " ".join(str(value) for value in asdict(setting).values())
            print(f"{knobs}{' held out' if held_out else ''}: {need}")


@dataclass(frozen=True)
class Comparison:
    """A recorded run and what `estimate` says of it now, in bytes of peak allocated.

    kind: "development", "held out" or "preset" (made under a cap). explained: the sum of the tensors that were alive
    at the peak, where the run's history was replayed; what is measured beyond is the allocator's rounding.
    """

    name: str
    kind: str
    measured: int
    predicted: int
    explained: int | None = None

    @property
    def deviation(self) -> float:
        """As a share of what was measured; negative when too little was predicted."""
        return self.predicted / self.measured - 1


def comparisons(path: pathlib.Path) -> list[Comparison]:
    """Every run in a record that was measured, beside what is predicted for it."""
    sections = json.loads(path.read_text())
    fields = Setting.__dataclass_fields__
    explained = {}
    rows = []
    for section in ("explained", "runs", "caps"):
        for run in sections.get(section, []):
            if "measured" not in run:
                continue
            targets = run["targets"] if isinstance(run["targets"], str) else tuple(run["targets"])
            setting = Setting(**{**{name: run[name] for name in fields}, "targets": targets})
            preset = run.get("preset")
            if section == "explained":
                explained[setting, preset] = run["replayed_peak"]
            kind = "preset" if preset else "held out" if run.get("held_out") else "development"
            predicted = setting.predicted(preset).peak_allocated
            of_tensors = explained.get((setting, preset)) if "card_gb" not in run else None
            rows.append(Comparison(_run_name(run), kind, run["measured"]["peak_allocated"], predicted, of_tensors))
    return rows


def _compare(folder: pathlib.Path) -> None:
    for path in sorted(folder.glob("memory-*.json")):
        rows = comparisons(path)
        print(f"{path.name}: peak allocated in GB; what is unexplained in MB")
        print(f"{'kind':<12}{'measured':>9}{'predicted':>10}{'':>8}{'unexplained':>12}  run")
        for row in sorted(rows, key=lambda row: row.kind):
            line = f"{row.kind:<12}{row.measured / 1e9:9.3f}{row.predicted / 1e9:10.3f}{row.deviation:+8.2%}"
            line += f"{(row.measured - row.predicted) / 1e6:12.1f}  {row.name}"
            if row.explained:
                line += f" (tensors alive: {row.explained / 1e9:.3f})"
            print(line)
        for kind in sorted({row.kind for row in rows}):
            of_kind = [row.deviation for row in rows if row.kind == kind]
            print(f"{kind}: {len(of_kind)} runs, {min(of_kind):+.2%} to {max(of_kind):+.2%}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.memory.record", description=__doc__.splitlines()[0])
    for name in ("grid", "caps", "explain", "list", "compare"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), metavar="SHAPE", help="only these shapes")
    parser.add_argument("--limit-seconds", type=float, default=1e9, help="begin no run later than this")
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept and not made again")
    args = parser.parse_args(arguments)
    if args.list:
        _list()
        return 0
    if args.compare:
        _compare(args.output)
        return 0
    if not torch.cuda.is_available():
        print("error: no GPU: this records training steps on one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    about = _about(device)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"memory-{about['device'].lower().replace(' ', '-')}.json"
    record = Record(path, about, args.only, args.limit_seconds)
    if earlier := args.continue_from or (path if path.exists() else None):
        record.read(earlier)
    print(f"{path}: {about}", flush=True)
    start = time.monotonic()
    measure(Setting("tiny"), device, shape=Shape(256, 512, 2, 4, 4, 1000))  # loads libraries and kernels
    print(f"warm after {time.monotonic() - start:.0f} s", flush=True)
    try:
        for wanted, run in ((args.grid, run_grid), (args.explain, run_explain), (args.caps, run_caps)):
            if wanted:
                run(record, device)
                print(f"{run.__name__}: done after {time.monotonic() - start:.0f} s", flush=True)
    except OutOfTime:
        print(f"stopped after {time.monotonic() - start:.0f} s: go on with --continue-from {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
