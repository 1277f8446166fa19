"""Machinery of dive_f_why_is_it_slow: recorded steps, who waits for whom, traffic counted, corrections rounded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_lab.memory import SHAPES
from qlora_lab.places import RECORDS

RATE = "matrix product, operations per second"
LENGTH = 512  # tokens of a recorded sample
GROUPS = {  # what the profiler tells apart, as the lesson shows it
    "matrix products": ("matrix product",),
    "dequantize": ("dequantize",),
    "attention, AdamW": ("attention", "AdamW"),
    "elementwise, copies": ("elementwise and sums", "copies, fills", "norm, rotary, SwiGLU, loss"),
}
LANES = {"matrix product": "matrix products", "dequantize": "dequantize", "attention": "attention"}
WAYS = {  # to train, and their names in the record
    "standard": "standard",
    "bf16 adapters": "bf16",
    "one graph": "graph",
    "fused kernels": "unrecorded",
    "both (fast)": "fast",
}
STEPS = {  # by name: whose kernels Python launches, if any; whose kernels run; which runs were measured
    "standard": ("standard", "standard", "standard"),
    "standard, in one graph": (None, "standard", "graph"),
    "fused, launched by Python": ("fast", "fast", "unrecorded"),
    "fused, in one graph": (None, "fast", "fast"),
}


# --- Records ----------------------------------------------------------------------------------------------------------


def read_record(name: str, gpu: str = "nvidia-h100-80gb-hbm3") -> dict:
    """`data/records/NAME-GPU.json`."""
    return json.loads((RECORDS / f"{name}-{gpu}.json").read_text(encoding="utf-8"))


def find(rows: list[dict], who: str, samples: int, checkpointing: bool = True) -> dict:
    """The recorded run, or profile, of this way to train with so many samples of 512 tokens a step."""
    wanted = {"who": who, "batch_size": samples, "gradient_checkpointing": checkpointing}
    return next(row for row in rows if wanted.items() <= row.items())


def hosts_of(record: dict) -> dict[str, list[dict]]:
    """The runs on the three hosts, "A" to "C", that were given all ways to train."""
    others = [host["runs"] for host in record["other_hosts"] if any(run["who"] == "fast" for run in host["runs"])]
    return dict(zip("ABC", [record["runs"], *others], strict=True))


def parts_of(record: dict, who: str, samples: int, checkpointing: bool = True) -> dict[str, float]:
    """Milliseconds of a step by group of kernels; what the step takes beyond its kernels is "waiting"."""
    kinds = find(record["profiles"], who, samples, checkpointing)["kinds"]
    parts = {name: sum((kinds[k]["milliseconds"] for k in of if k in kinds), 0.0) for name, of in GROUPS.items()}
    whole = find(record["runs"], who, samples, checkpointing)["milliseconds"]
    return parts | {"waiting": whole - sum(parts.values())}


def timeline(record: dict, who: str) -> list[tuple[float, float, str]]:
    """Start, end (microseconds) and lane of the first 150 kernels profiled with one sample."""
    kernels = find(record["profiles"], who, 1)["timeline_microseconds"]
    return [(start, end, LANES.get(kind, "everything else")) for start, end, kind in kernels]


# --- The floor --------------------------------------------------------------------------------------------------------


def layer_weights() -> tuple[int, int]:
    """Weights of all linear layers in one layer of LLaMA-7B, and of the last of them."""
    shape = SHAPES["llama-7b"]
    down = shape.hidden_size * shape.intermediate_size
    return 4 * shape.hidden_size**2 + 3 * down, down


def multiplied_weights() -> int:
    """Weights of LLaMA-7B that each token is multiplied with; the embedding is a look-up."""
    shape = SHAPES["llama-7b"]
    return shape.num_hidden_layers * layer_weights()[0] + shape.vocab_size * shape.hidden_size


def floor_of(samples: int, checkpointing: bool, rate: float) -> float:
    """Milliseconds of a step's arithmetic, at `rate` operations a second."""
    return 1e3 * (6 if checkpointing else 4) * multiplied_weights() * LENGTH * samples / rate


def fast_floor_of(samples: int, rate: float) -> float:
    """The same of what `--fast` computes, which repeats neither a layer's last product nor the last layer."""
    layer, down = layer_weights()
    again = (SHAPES["llama-7b"].num_hidden_layers - 1) * (layer - down)
    return 1e3 * (4 * multiplied_weights() + 2 * again) * LENGTH * samples / rate


# --- Who waits for whom -----------------------------------------------------------------------------------------------


def busy_ms(record: dict, who: str, tokens: float) -> float:
    """Milliseconds that a step's kernels run: a line through the recorded steps of 512 and of 8,192 tokens."""
    few, many = (find(record["profiles"], who, samples)["busy_milliseconds"] for samples in (1, 16))
    return few + (many - few) * (tokens - LENGTH) / (15 * LENGTH)


def predict_ms(record: dict, how: str, tokens: float, microseconds: float) -> tuple[float, float]:
    """Milliseconds of launching a step's kernels, at so many microseconds each, and of running them.

    how: a key of STEPS. A graph's launches are left out.
    """
    launched, runs, _ = STEPS[how]
    launches = find(record["profiles"], launched, 1)["kernels"] if launched else 0
    return launches * microseconds / 1e3, busy_ms(record, runs, tokens)


def measured_points(record: dict, how: str) -> list[tuple[int, float]]:
    """Tokens and milliseconds of the recorded steps with checkpointing. how: a key of STEPS."""
    who = STEPS[how][2]
    rows = [run for run in record["runs"] if run["who"] == who and run["gradient_checkpointing"]]
    return [(LENGTH * run["batch_size"], run["milliseconds"]) for run in rows]


def launch_us(record: dict, rows: list[dict], how: str) -> float:
    """Microseconds a launch on a host, from its step of one sample, in which the GPU waits. how: a key of STEPS."""
    launched, _, who = STEPS[how]
    return 1e3 * find(rows, who, 1)["milliseconds"] / find(record["profiles"], launched or who, 1)["kernels"]


def crossing(record: dict, microseconds: float) -> float:
    """Tokens a step at which the standard step's kernels run as long as Python takes to launch them."""
    launching, running = predict_ms(record, "standard", LENGTH, microseconds)
    per_token = busy_ms(record, "standard", LENGTH + 1) - running
    return LENGTH + (launching - running) / per_token


# --- Memory traffic ---------------------------------------------------------------------------------------------------


class _Traffic(TorchDispatchMode):
    """Sees every operator, and adds up the bytes of its tensors."""

    def __init__(self):
        super().__init__()
        self.kernels = self.moved = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
            self.kernels += 1
        return result


@torch.no_grad()
def count_traffic(function: Callable, *inputs: torch.Tensor) -> tuple[int, int]:
    """Operators that `function(*inputs)` runs, and the bytes that they read and write."""
    with _Traffic() as traffic:
        function(*inputs)
    return traffic.kernels, traffic.moved


# --- Rounding ---------------------------------------------------------------------------------------------------------

ORDERS = ("added, then rounded", "rounded, then added")


def bf16(values: torch.Tensor) -> torch.Tensor:
    """The values, rounded to bf16, in float32."""
    return values.bfloat16().float()


def arriving(y: torch.Tensor, correction: torch.Tensor) -> dict[str, float]:
    """By ORDERS, the share of a correction that is left in bf16, on average. Both tensors are float32, of one shape."""
    ways = dict(zip(ORDERS, (bf16(y + correction), bf16(bf16(y) + correction)), strict=True))
    size = correction.square().sum().item()
    return {name: ((came - bf16(y)) * correction).sum().item() / size for name, came in ways.items()}


def arriving_by_size(sizes: list[float]) -> dict[str, list[float]]:
    """`arriving` of random corrections of these sizes, relative to the outputs: two lists, as long as `sizes`."""
    draw = torch.Generator().manual_seed(0)
    y, noise = (torch.randn(2_000_000, generator=draw) for _ in range(2))
    shares = [arriving(y, size * noise) for size in sizes]
    return {name: [share[name] for share in shares] for name in ORDERS}


def first_correction() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a layer of LLaMA-7B's width and LoRA's correction after one step of AdamW at 1e-4, [128, 1024] each.

    B begins at zero, and the first step moves each of its numbers by the learning rate, up or down.
    """
    draw = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(1024, 4096, generator=draw)
    A = (torch.rand(64, 4096, generator=draw) * 2 - 1) / 4096**0.5  # as PEFT begins
    B = 1e-4 * (torch.randint(0, 2, (1024, 64), generator=draw) * 2.0 - 1)
    x = torch.randn(128, 4096, generator=draw)
    return x @ W.T, x @ A.T @ B.T


# --- The reader's GPU -------------------------------------------------------------------------------------------------


def time_bundled(fast: bool) -> float:
    """Median milliseconds of the later of 40 steps of the bundled model on this GPU: 16 orders a step, rank 16."""
    from qlora_lab.finetuning import Batches, add_adapter, load_model, load_samples, tokenize, train_steps

    model, tokenizer = load_model(quantization="nf4", device="cuda")
    orders, _ = tokenize(load_samples("orders"), tokenizer, 512)
    settings = {"steps": 40, "learning_rate": 1e-3, "compute_dtype": torch.bfloat16, "fast": fast}
    model = add_adapter(model, rank=16, alpha=32)
    steps = list(train_steps(model, Batches(orders, 16), pad_token_id=tokenizer.pad_token_id, **settings))
    return 1e3 * statistics.median(step.seconds for step in steps[20:])
