"""Two trainings on the same cores: how much do they take from each other, and which setting of OpenMP keeps the peace?

    python tests/finetuning/bench_side_by_side.py [--rounds 3] [--steps 8] [--spin 1000 30000]

PyTorch splits an operation among OpenMP's threads, one a core. A thread that has finished its share spins while it
waits for the others: quickest when it has the core to itself, ruinous when the thread it waits for needs that core.
Each way is tried alone and beside a second training of its kind, all in turn and several times over, since machines
are noisy. Printed are medians of tokens a second; of two side by side, for each.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile


def start(folder: pathlib.Path, environment: dict[str, str], steps: int, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_lab.train_qlora", "--output", folder, "--steps", str(steps), *flags]
    command += ["--eval-samples", "0", "--quiet", "--json"]
    return subprocess.Popen(
        list(map(str, command)), env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def tokens_per_second(process: subprocess.Popen) -> float:
    output, _ = process.communicate()
    return json.loads(output)["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--spin", type=int, nargs="*", default=[1000, 10000, 100000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("flags", nargs="*", help="more flags for train_qlora, behind --")
    args = parser.parse_args()

    ways = {"as it comes": {}, "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}}
    ways |= {f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in args.spin}
    ways |= {"OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"}}
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for turn in range(args.rounds):
            for name, environment in ways.items():
                for together in (1, 2):
                    folders = [pathlib.Path(temporary) / f"{turn}-{name}-{together}-{i}" for i in range(together)]
                    running = [start(folder, environment, args.steps, args.flags) for folder in folders]
                    speeds = list(map(tokens_per_second, running))
                    found.setdefault((name, together), []).extend(speeds)
                    print(f"{name}: {' + '.join(f'{speed:.0f}' for speed in speeds)}", file=sys.stderr, flush=True)
    print(f"{'tokens a second':<26}{'alone':>8}{'of two, each':>14}{'two, lone one = 1':>20}")
    for name in ways:
        alone, beside = (statistics.median(found[name, together]) for together in (1, 2))
        print(f"{name:<26}{alone:>8.0f}{beside:>14.0f}{2 * beside / alone:>20.2f}")


if __name__ == "__main__":
    main()
