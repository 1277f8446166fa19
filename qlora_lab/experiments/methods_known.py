"""The methods that `methods` compares: QLoRA's, each changed in one place; and the models that they train."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.initialization import initialize_loftq, initialize_pissa
from qlora_lab.adapters.lora import LoraLinear, add_lora
from qlora_lab.adapters.merging import unload
from qlora_lab.adapters.quantized_linear import Quantizer, nf4_double, quantize_linears
from qlora_lab.experiments.stacked import stack, starts_of
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import INT4, af4, bof4, double_quantize, quantize

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BASES: dict[str, Callable[[], Quantizer | None]] = {  # how the frozen weights are held, blocks of 64
    "16 bits": lambda: None,
    "NF4": lambda: nf4_double,
    "NF4, scales in 32 bits": lambda: quantize,
    "AF4": lambda: _with_levels(af4(64)),
    "BOF4": lambda: _with_levels(bof4(64)),
    "INT4": lambda: _with_levels(INT4),
}


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: QLoRA's, changed in one place.

    full: all weights are trained, in 32 bits, and there is no adapter.
    rates: three neighbours of one grid (1 and 3 times powers of ten), to choose from for each task.
    """

    base: str = "NF4"
    rank: int = 16
    alpha: float = 32
    targets: str | tuple[str, ...] = "all-linear"
    kind: type[LoraLinear] = LoraLinear
    rank_stabilized: bool = False
    lora_plus: float = 1.0
    init: str = "zero"
    merge_aware: bool = False
    full: bool = False
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)


METHODS = {  # the most wanted first. A rank is such that about as many numbers are trained, where it does not say so
    "QLoRA": Method(),
    "LoRA, 16-bit base": Method(base="16 bits"),
    "full fine-tuning": Method(base="16 bits", full=True, rates=(1e-4, 3e-4, 1e-3)),
    "rsLoRA": Method(rank_stabilized=True, rates=(3e-4, 1e-3, 3e-3)),
    "LoRA+": Method(lora_plus=16, rates=(1e-4, 3e-4, 1e-3)),
    "LoftQ": Method(init="loftq"),
    "PiSSA": Method(init="pissa", rates=(1e-4, 3e-4, 1e-3)),
    "attention only": Method(targets=ATTENTION, rank=42),
    "DoRA": Method(kind=DoraLinear),
    "merge-aware": Method(merge_aware=True),
    "rank 64": Method(rank=64),
    "AF4": Method(base="AF4"),
    "BOF4": Method(base="BOF4"),
    "INT4": Method(base="INT4"),
    "MLP only": Method(targets=MLP, rank=26),
    "scales in 32 bits": Method(base="NF4, scales in 32 bits"),
    "rank 4": Method(rank=4),
}


def _with_levels(levels: torch.Tensor) -> Quantizer:
    return lambda weight: double_quantize(quantize(weight, levels.to(weight.device)))


@functools.cache
def _loaded(device: torch.device, dtype: torch.dtype):
    return load_model(device=device, compute_dtype=dtype)


def forget_loaded() -> None:
    """Let go of the loaded models that `prepare` copies."""
    _loaded.cache_clear()


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def prepare(method: Method, seed: int, device: torch.device) -> tuple[Any, Any]:
    """The bundled model, ready to be trained by a method, and its tokenizer. seed: of the adapter."""
    dense, tokenizer = _loaded(device, torch.float32 if method.full else compute_dtype(device))
    model = copy.deepcopy(dense)
    if method.full:
        return model.requires_grad_(True), tokenizer
    quantizer = BASES[method.base]()
    if quantizer and method.init == "zero":
        quantize_linears(model, quantizer=quantizer)
    _adapt(model, method, seed)
    if method.init != "zero":
        assert quantizer is not None
        (initialize_pissa if method.init == "pissa" else initialize_loftq)(model, quantizer)
    return model, tokenizer


def _adapt(model, method: Method, seed: int):
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    return add_lora(
        model,
        method.rank,
        method.alpha,
        targets,
        seed=seed,
        rank_stabilized=method.rank_stabilized,
        kind=method.kind,
    )


def stacked(method: Method, seeds: Sequence[int], device: torch.device) -> tuple[Any, Any]:
    """A stack with a run for each seed. From the singular values, or without an adapter, all begin alike."""
    model, tokenizer = prepare(method, seeds[0], device)
    starts = {seeds[0]: starts_of(model)}
    for seed in seeds:
        if seed not in starts and (method.full or method.init != "zero"):
            starts[seed] = starts[seeds[0]]
        elif seed not in starts:
            starts[seed] = starts_of(_adapt(unload(model), method, seed))
    return stack(model, [starts[seed] for seed in seeds], method.merge_aware), tokenizer
