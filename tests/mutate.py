"""How many small faults, planted one at a time, do the tests notice? `make mutate`

    python tests/mutate.py --sample 200 --seed 0     plant a random sample of them; without --sample all (most of a day)
    python tests/mutate.py --sample 200 --room quantization

mutmut plants them: a constant changed, an argument dropped, a comparison turned round. pyproject.toml says where (the
rooms that compute: `[tool.mutmut]`) and which tests look for them. The score is the share of faults that made at least
one test fail or run for ever. Every survivor is printed as a diff: kill it with a test, or say in docs/mutation.md why
no test could see it. Messages of errors are left alone.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import subprocess
import sys

MUTMUT = [sys.executable, "-m", "mutmut"]
FIRST = "qlora_lab.quantization.packing.x_pack__mutmut_1"  # one quick fault: makes mutmut plant all, and time the tests
CAUGHT = ("killed", "timeout", "segfault")


def results() -> dict[str, str]:
    """What became of each fault, by its name: "killed", "survived", "timeout", "no tests", "not checked" ..."""
    done = subprocess.run([*MUTMUT, "results", "--all", "true"], capture_output=True, text=True, check=True)
    return dict(line.strip().rsplit(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def plant(names: list[str], jobs: int) -> None:
    """Run the tests that reach each of these faults."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*MUTMUT, "run", "--max-children", str(jobs), *names]
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        sys.exit("mutmut stopped: the tests must pass before faults are planted")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="so many faults, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--room", default="", help="only faults whose name contains this: quantization, lora, estimate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    args = parser.parse_args()

    plant([FIRST], args.jobs)
    names = sorted(name for name in results() if args.room in name)
    if not names:
        sys.exit(f"no fault's name contains {args.room!r}")
    chosen = random.Random(args.seed).sample(names, args.sample) if args.sample else names
    plant(chosen, args.jobs)

    became = {name: status for name, status in results().items() if name in set(chosen)}
    for name, status in became.items():
        if status not in CAUGHT:
            subprocess.run([*MUTMUT, "show", name], check=True)
    counts = collections.Counter(became.values())
    caught = sum(counts[status] for status in CAUGHT)
    print(f"{caught} of {len(chosen)} faults were noticed ({caught / len(chosen):.1%}): {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
