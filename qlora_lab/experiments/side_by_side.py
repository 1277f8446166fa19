"""Two trainings on the same cores: how much do they take from each other, and which setting of OpenMP keeps the peace?

PyTorch splits an operation among OpenMP's threads, one a core. A thread that has finished its share spins while it
waits for the others: quickest when it has the core to itself, ruinous when the thread it waits for needs that core.
Each way is tried alone and beside a second training of its kind, all in turn and several times over, since machines
are noisy. Printed are medians of tokens a second; of two side by side, for each.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

from qlora_lab.arguments import Parser, count
from qlora_lab.errors import UserError
from qlora_lab.experiments.record import Record


def start(folder: pathlib.Path, environment: dict[str, str], steps: int, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_lab.train_qlora", "--output", str(folder), "--steps", str(steps), *flags]
    command += ["--eval-samples", "0", "--quiet", "--json"]
    return subprocess.Popen(
        command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def reported_speeds(running: list[subprocess.Popen]) -> list[float]:
    """Wait for trainings; their tokens a second, from their reports. Raises UserError if one did not end well."""
    speeds = []
    for process, (report, errors) in [(process, process.communicate()) for process in running]:
        if process.returncode:
            last = (errors.splitlines() or ["nothing"])[-1]
            raise UserError(f"a training ended with exit status {process.returncode}, and said last: {last}")
        speeds.append(json.loads(report)["tokens_per_second"])
    return speeds


def ways(spins: list[int]) -> dict[str, dict[str, str]]:
    """What is set in the environment, by the name of the way."""
    found = {"as it comes": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
    found |= {f"GOMP_SPINCOUNT={spin}": {"GOMP_SPINCOUNT": str(spin)} for spin in spins}
    return found | {"OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}}


def add_flags(parser: Parser) -> None:
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=8)
    parser.add_argument("--spin", type=int, nargs="*", default=[1000, 10000, 100000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, side-by-side-<cores>.json")
    parser.add_argument("flags", nargs="*", help="more flags for train_qlora, behind --")


def run(arguments: argparse.Namespace) -> None:
    record = Record.begin(
        "side-by-side",
        arguments.output,
        f"{os.cpu_count()} CPU cores {platform.machine()}",
        packages=("torch", "transformers", "peft", "bitsandbytes"),
        settings={"rounds": arguments.rounds, "steps": arguments.steps, "flags": arguments.flags},
    )
    tried = ways(arguments.spin)
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(arguments.rounds):
            for name, environment in tried.items():
                for together in (1, 2):
                    folders = [pathlib.Path(temporary) / f"{turn}-{name}-{together}-{i}" for i in range(together)]
                    running = [start(folder, environment, arguments.steps, arguments.flags) for folder in folders]
                    speeds = reported_speeds(running)
                    found.setdefault((name, together), []).extend(speeds)
                    record.add("runs", {"way": name, "together": together, "tokens_per_second": speeds})
                    print(f"{name}: {' + '.join(f'{speed:.0f}' for speed in speeds)}", file=sys.stderr, flush=True)
    print(f"{'tokens a second':<26}{'alone':>8}{'of two, each':>14}{'two, lone one = 1':>20}")
    for name in tried:
        alone, beside = (statistics.median(found[name, together]) for together in (1, 2))
        print(f"{name:<26}{alone:>8.0f}{beside:>14.0f}{2 * beside / alone:>20.2f}")
