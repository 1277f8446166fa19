"""How near do the kernels come to the GPU's copy bandwidth? Beside bitsandbytes and plain PyTorch.

A call's bytes are what it must move: the tensor, its codes and its scales, each once. Divided by its time, and by the
bandwidth of a copy of the same tensor (read once, written once) in the same run, they give its share. A time is the
median over calls of the public function, with a cold cache, from event to event on the GPU's clock; so whatever a call
waits for on the CPU counts. `plain` is our readable version in PyTorch's operators.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from qlora_lab.arguments import Parser, count
from qlora_lab.experiments.gpu import milliseconds, require_gpu
from qlora_lab.experiments.record import Record
from qlora_lab.quantization import (
    FP4,
    NF4,
    QuantizedAbsmax,
    QuantizedTensor,
    dequantize,
    dequantize_plain,
    double_quantize,
    quantize,
    quantize_plain,
    quantize_scales_plain,
)

CODEBOOKS = {"nf4": NF4, "fp4": FP4}


def tasks(x: torch.Tensor, name: str) -> dict[str, tuple[int, dict[str, Callable]]]:
    """By task: the bytes that it must move, and who does it."""
    from qlora_lab.quantization import kernels

    codebook = CODEBOOKS[name]
    q = quantize(x, codebook)
    double = double_quantize(q)
    absmax, scales = float_scales(q), held_in_8_bits(double)
    packed, state = bnb.quantize_4bit(x, quant_type=name)
    packed_double, state_double = bnb.quantize_4bit(x, quant_type=name, compress_statistics=True)
    scale_bytes = scales.codes.nbytes + scales.absmax.nbytes
    return {
        "quantize": (
            x.nbytes + q.codes.nbytes + q.absmax.nbytes,
            {
                "ours": lambda: quantize(x, codebook),
                "bitsandbytes": lambda: bnb.quantize_4bit(x, quant_type=name),
                "plain": lambda: quantize_plain(x, codebook),
            },
        ),
        "quantize, its kernel alone": (
            x.nbytes + q.codes.nbytes + q.absmax.nbytes,
            {"ours": lambda: kernels.quantize(x.flatten(), codebook, 64)},
        ),
        "dequantize": (
            x.nbytes + q.codes.nbytes + q.absmax.nbytes,
            {
                "ours": lambda: dequantize(q),
                "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
                "plain": lambda: dequantize_plain(q),
            },
        ),
        "dequantize, double": (
            x.nbytes + q.codes.nbytes + scale_bytes,
            {
                "ours": lambda: dequantize(double),
                "bitsandbytes": lambda: bnb.dequantize_4bit(packed_double, state_double),
                "plain": lambda: dequantize_plain(double),
            },
        ),
        "double_quantize": (
            absmax.nbytes + scale_bytes,
            {"ours": lambda: double_quantize(q), "plain": lambda: quantize_scales_plain(absmax)},
        ),
    }


def float_scales(q: QuantizedTensor) -> torch.Tensor:
    """The scales as `quantize` makes them."""
    assert isinstance(q.absmax, torch.Tensor)
    return q.absmax


def held_in_8_bits(q: QuantizedTensor) -> QuantizedAbsmax:
    """The scales as `double_quantize` makes them."""
    assert isinstance(q.absmax, QuantizedAbsmax)
    return q.absmax


def microseconds(function: Callable) -> float:
    return 1e3 * milliseconds(function, warmup=10, rep=60)


def equal(x: torch.Tensor, codebook: torch.Tensor) -> bool:
    """Whether the kernels give the plain version's codes, scales and values."""
    q, plain = quantize(x, codebook), quantize_plain(x, codebook)
    double = double_quantize(q)
    return (
        torch.equal(q.codes, plain.codes)
        and torch.equal(float_scales(q), float_scales(plain))
        and torch.equal(held_in_8_bits(double).codes, quantize_scales_plain(float_scales(q)).codes)
        and torch.equal(dequantize(q), dequantize_plain(q))
        and torch.equal(dequantize(double), dequantize_plain(double))
    )


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--rows", type=count, default=88064, help="of the matrix; the default is 8 times LLaMA-7B's mlp"
    )
    parser.add_argument("--columns", type=count, default=4096)
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, kernels-<gpu>.json")


def run(arguments: argparse.Namespace) -> None:
    require_gpu("kernels are timed on one")
    elements = arguments.rows, arguments.columns
    record = Record.begin(
        "kernels",
        arguments.output,
        torch.cuda.get_device_name(),
        packages=("torch", "triton", "bitsandbytes"),
        elements=list(elements),
    )
    versions = record.content["versions"].items()
    print(f"{record.content['device']}; {', '.join(f'{name} {version}' for name, version in versions)}")
    for dtype, name in ((torch.bfloat16, "nf4"), (torch.bfloat16, "fp4"), (torch.float32, "nf4")):
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        record.put("results", label, report(label, *elements, dtype, name))


def report(label: str, rows: int, columns: int, dtype: torch.dtype, name: str) -> dict:
    """Print the table of one number format; return it."""
    x = torch.randn(rows, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    target = torch.empty_like(x)
    copy = microseconds(lambda target=target: target.copy_(x))
    bandwidth = 2 * x.nbytes / copy  # bytes a microsecond
    del target
    print(f"\n{label}, block size 64, {rows} x {columns}; copy {bandwidth / 1e6:.2f} TB/s")
    print(f"{'us (share of the copy bandwidth)':34}{'ours':>16}{'bitsandbytes':>16}{'plain':>16}")
    table = {}
    for task, (size, functions) in tasks(x, name).items():
        times = {who: microseconds(function) for who, function in functions.items()}
        shares = {who: size / time / bandwidth for who, time in times.items()}
        cells = [f"{times[w]:.0f} ({shares[w]:.0%})" if w in times else "" for w in ("ours", "bitsandbytes", "plain")]
        print(f"{task:34}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
        table[task] = {"bytes": size, "microseconds": times, "share of copy bandwidth": shares}
    same = equal(x, CODEBOOKS[name])
    print(f"codes, scales and values {'equal' if same else 'DIFFER FROM'} the plain version's")
    return {"copy bytes per second": 1e6 * bandwidth, "equal to the plain version": same, **table}
