"""Train a few steps on a GPU, at the shapes of real models, and see what they needed.

The models have random weights (`build_random`), so nothing is downloaded: memory and time do not depend on what the
weights say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from qlora_lab.experiments.gpu import leave_idle
from qlora_lab.experiments.memory_settings import Setting
from qlora_lab.experiments.paged_memory import PagedMemory
from qlora_lab.memory.measuring import forget_accelerate, random_batches
from qlora_lab.memory.meter import Meter
from qlora_lab.memory.prediction import CUDA_CONTEXT
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.loop import train_steps
from qlora_lab.training.presets import Preset
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.step_records import tokens_per_second

STEPS = 3


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
        and so on (`meter.Phase`). `measured`: peaks over all steps, bytes of optimizer states in managed memory,
        seconds of the last step, losses. Or `out_of_memory`: in which phase, and what torch said.
    """
    meter = Meter(device)
    result = {}
    paged = PagedMemory.installed(device)
    try:
        result["measured"] = train(setting, device, preset, shape or SHAPES[setting.shape], steps, meter)
        result["measured"]["managed_bytes"] = paged.used_bytes
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            result["measured"]["outside_allocator"] = total - free - torch.cuda.memory_reserved(device)
    except torch.OutOfMemoryError as error:
        done = list(meter.phases)
        result["out_of_memory"] = {"after": done[-1] if done else None, "message": str(error).splitlines()[0][:300]}
    finally:
        leave_idle(device)
        paged.take_back()
    result["phases"] = meter.as_dict()
    return result


def train(setting: Setting, device, preset: Preset | None, shape: Shape, steps: int, meter: Meter) -> dict:
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
    accelerator = make_accelerator(settings["compute_dtype"], device)
    moments = MomentsOfAStep(accelerator, meter, MasterWeights if mixed else accelerator.prepare)
    moments.step = "first step"
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

    What follows them (clipping, the optimizer) is the update: mark it when the step's record comes. prepare: wraps the
    optimizer.
    """

    def __init__(self, accelerator, meter: Meter, prepare: Callable):
        self._accelerator, self._meter, self.prepare = accelerator, meter, prepare
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


@contextlib.contextmanager
def card_of(gigabytes: float, device: torch.device):
    """Let torch's allocator have no more than a card of so many GB (10^9 bytes) has left beside the CUDA context."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((gigabytes * 1e9 - CUDA_CONTEXT) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def expandable_segments(device: torch.device) -> str:
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
