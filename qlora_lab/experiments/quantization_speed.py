"""How fast is quantization? One table: ours beside bitsandbytes beside a plain copy of the same bytes.

A row is measured in turns (ours, theirs, copy, plain, ours, ...), so that whatever else the machine does hits all of
them, and gives medians. The copy is of the unquantized tensor, into new memory like the others' results: the price of
moving the data alone. `plain` is our readable version. On a GPU, times are those of CUDA events.

Below the table: how many codes differ from bitsandbytes', and whether both decode equal codes to equal values.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import bitsandbytes
import bitsandbytes.functional as bnb
import torch

from qlora_lab.arguments import Parser, count
from qlora_lab.experiments.record import Record
from qlora_lab.quantization import dequantize, dequantize_plain, double_quantize, quantize, quantize_plain, unpack


def in_turns(functions: dict[str, Callable], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call: after a warm-up, `repeats` rounds in which each function runs once."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(-1, repeats):
        for name, function in functions.items():
            if device == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                stop.record()
                torch.cuda.synchronize()
                elapsed = start.elapsed_time(stop)
            else:
                began = time.perf_counter()
                function()
                elapsed = 1e3 * (time.perf_counter() - began)
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def tasks(x: torch.Tensor) -> dict[str, dict[str, Callable]]:
    """What is compared: by task, the functions to run."""
    q = quantize(x)
    double = double_quantize(q)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    packed_double, state_double = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    return {
        "quantize": {
            "ours": lambda: quantize(x),
            "bitsandbytes": lambda: bnb.quantize_4bit(x, quant_type="nf4"),
            "copy": lambda: x.clone(),
            "plain": lambda: quantize_plain(x),
        },
        "dequantize": {
            "ours": lambda: dequantize(q),
            "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
            "copy": lambda: x.clone(),
            "plain": lambda: dequantize_plain(q),
        },
        "dequantize, double": {
            "ours": lambda: dequantize(double),
            "bitsandbytes": lambda: bnb.dequantize_4bit(packed_double, state_double),
            "copy": lambda: x.clone(),
            "plain": lambda: dequantize_plain(double),
        },
    }


def differences(x: torch.Tensor) -> tuple[int, bool]:
    """How many NF4 codes of x differ from bitsandbytes', and whether equal codes decode to equal bits."""
    q = quantize(x)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    differ = int((unpack(q.codes, x.numel()) != unpack(packed, x.numel())).sum())
    state.absmax = q.absmax
    theirs = bnb.dequantize_4bit(q.codes[:, None], state)
    return differ, torch.equal(dequantize(q), theirs)


def report(rows: int, columns: int, device: str, repeats: int) -> dict[str, dict]:
    """Print the table of one device; return its medians in ms (by task, then contestant) and the codes that differ."""
    medians, differing = {}, {}
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"\n{name}{threads}: NF4, block size 64, {rows} x {columns}; medians of {repeats} in ms")
    print(f"{'':28}{'ours':>9}{'bitsandbytes':>14}{'copy':>9}{'plain':>9}   theirs/ours   ours/copy")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, columns, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
        for task, functions in tasks(x).items():
            ms = {key: statistics.median(times) for key, times in in_turns(functions, device, repeats).items()}
            label = f"{task}, {str(dtype).removeprefix('torch.')}"
            print(
                f"{label:28}{ms['ours']:9.2f}{ms['bitsandbytes']:14.2f}{ms['copy']:9.2f}{ms['plain']:9.2f}"
                f"{ms['bitsandbytes'] / ms['ours']:12.2f} x{ms['ours'] / ms['copy']:10.2f} x",
                flush=True,
            )
            medians[label] = ms
        differ, equal = differences(x)
        print(f"  {differ} of {x.numel():,} codes differ; equal codes decode to {'equal' if equal else 'OTHER'} values")
        differing[str(dtype).removeprefix("torch.")] = differ
    return {"milliseconds": medians, "codes that differ": differing}


def add_flags(parser: Parser) -> None:
    parser.add_argument("--rows", type=count, default=4096)
    parser.add_argument("--columns", type=count, default=4096)
    parser.add_argument("--repeats", type=count, default=9)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, quantization-<gpu>.json")


def run(arguments: argparse.Namespace) -> None:
    record = Record.begin(
        "quantization",
        arguments.output,
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        packages=("torch", "bitsandbytes"),
        elements=[arguments.rows, arguments.columns],
    )
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        record.put("results", device, report(arguments.rows, arguments.columns, device, arguments.repeats))
