"""Is QLoRA still what one should use? Sixteen ways to fine-tune the bundled model, two tasks, eight seeds.

Needs a GPU, or `--small`; writes `methods-<gpu>.json`, anew after each group of runs, and goes on with what is there.

    rates, runs    each method learns each task at three learning rates with each seed; the rate with the lowest mean
                   loss on validation samples is judged. No test answer has a say in it.
    grid           what "LoRA Without Regret" (Schulman et al. 2025) says of ranks, amounts of data and batch sizes:
                   losses at several rates
    alone          what each method costs: a short run of the usual training step, with the GPU to itself

Runs of one method are trained as a stack (`stacked.py`), so that all of it takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable

import torch

from qlora_lab.arguments import Parser
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import empty_cache, require_gpu
from qlora_lab.experiments.methods_grid import GRID, grid_point
from qlora_lab.experiments.methods_known import METHODS, Method, compute_dtype, forget_loaded, prepare
from qlora_lab.experiments.methods_runs import BATCH_SIZE, JUDGED, TASKS, compare
from qlora_lab.experiments.orders import Ready
from qlora_lab.experiments.record import Record

LAST = ("MLP only", "scales in 32 bits", "rank 4")  # if there is time
ALONE = [name for name in METHODS if name not in ("LoftQ", "PiSSA", "AF4", "BOF4", "INT4", "MLP only")]


def prepare_alone(name: str, seed: int, device: torch.device) -> Ready:
    """For `orders.trained`: the usual training step."""
    method = METHODS[name]
    model, tokenizer = prepare(method, seed, device)
    forget_loaded()  # what is kept for the next method would count
    settings = {"compute_dtype": compute_dtype(device), "lora_plus": method.lora_plus, "learning_rate": 1e-4}
    settings["merge_aware"] = "nf4" if method.merge_aware else None
    return Ready(model, tokenizer, settings, {"batch_size": BATCH_SIZE, "seed": seed})


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=8)
    parser.add_argument("--parts", default="methods,grid,alone", help="which of them (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which nothing more begins")
    parser.add_argument("--small", action="store_true", help="a few steps of a few methods, on a CPU too")


def run(arguments: argparse.Namespace) -> None:
    deadline = time.time() + arguments.budget
    if arguments.small:
        for who in SMALL:
            print(summary(small(who)["runs"]), flush=True)
        return
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of(
        "methods",
        arguments.output,
        steps=TASKS,
        judged=JUDGED,
        rank="each method's",
        learning_rate="the best of each method's",
    )
    for name, method in METHODS.items():
        if name not in record.named("methods"):
            record.put("methods", name, described(method))
    parts = arguments.parts.split(",")
    wanted = [(functools.partial(_in_time, deadline, make), *one) for make, *one in _wanted(record, parts, arguments)]
    for found in orders.many_runs(wanted, arguments.jobs):
        for section, rows in found.items():
            for row in rows:
                record.add(section, row)
        print(
            summary(found["runs"]) if "runs" in found else found.get("grid", [{}])[0].get("point", "nothing was begun"),
            flush=True,
        )
    if "alone" in parts and time.time() < deadline:
        orders.time_alone(record, ALONE, prepare_alone)
    print(record.path)


def _wanted(record: Record, parts: list[str], arguments: argparse.Namespace) -> list[tuple]:
    """What the record lacks: (function, name, seeds or task), the most wanted first."""
    missing = [
        (compare, f"{who}, {task}", arguments.seeds)
        for who in METHODS
        for task in TASKS
        if "methods" in parts and not record.rows("runs", method=who, task=task)
    ]
    points = [(grid_point, name, "diary") for name in GRID if "grid" in parts and not record.rows("grid", point=name)]
    first = [one for one in missing if not one[1].startswith(LAST)]
    return [*first, *points, *(one for one in missing if one not in first)]


def _in_time(deadline: float, make: Callable[..., dict], name: str, argument, device: torch.device) -> dict:
    """What is made, unless it is too late to begin, or other runs have the GPU's memory: then nothing."""
    if time.time() > deadline:
        return {}
    try:
        return make(name, argument, device)
    except torch.OutOfMemoryError:
        print(f"{name}: out of memory; start again with fewer --jobs", flush=True)
        return {}
    finally:
        empty_cache()  # for the others


def described(method: Method) -> dict:
    """A method's settings, as JSON has them."""
    return {**vars(method), "kind": method.kind.__name__.removesuffix("Linear")}


def summary(runs: list[dict]) -> str:
    """A line about a method's runs on a task."""
    losses = [run["after"]["validation"] for run in runs if run["after"]["validation"] is not None]
    told = f"validation {statistics.fmean(losses):.4f}" if losses else "diverged"
    for split in runs[0]["exact"]:
        shares = [run["exact"][split].count("1") / len(run["exact"][split]) for run in runs]
        told += f", {split} {statistics.fmean(shares):.1%} ({min(shares):.0%} to {max(shares):.0%})"
    first = runs[0]
    return f"{first['method']:<18} {first['task']:<7} rate {first['rate']:g}, {len(runs)} seeds: {told}"


# ---------------------------------------------------------------------------------------------------------------- small

SMALL = ("QLoRA", "LoRA, 16-bit base", "rsLoRA", "LoRA+")


def small(who: str, seeds: int = 2, steps: int = 3, rate: float = 1e-3) -> dict:
    """A method in a few steps of the diary, at one rate: `compare` for two cores and three minutes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(f"{who}, diary", seeds, device, steps=steps, rates=(rate,), judged=0, batch_size=4, texts=4)
