"""Measure something and write it down: everything that writes data/records/.

python -m qlora_lab.experiments NAME [flags]     NAME --help shows an experiment's flags
"""

from __future__ import annotations

import difflib
import importlib
import sys

from qlora_lab.arguments import Parser
from qlora_lab.errors import UserError

# By name: the module, with what it is about in its first line. It has `add_flags(parser)` and `run(arguments)`.
EXPERIMENTS = {
    "accuracy": "accuracy",
    "knobs": "knobs",
    "presets": "presets_compared",
    "memory": "memory_runs",
    "kept": "kept_activations",
    "mixtures": "mixtures",
    "step": "step_speed",
    "families": "families",
    "kernels": "kernel_speed",
    "quantization": "quantization_speed",
    "side-by-side": "side_by_side",
    "amounts": "amounts",
    "splits": "splits",
    "merge-aware": "merge_aware",
    "methods": "methods",
    "cards": "several_cards",
    "codebooks": "codebooks",
    "sensitivity": "sensitivity",
    "rounded-twice": "rounded_twice",
    "roofline": "card_roofline",
}


def main(arguments: list[str] | None = None) -> int:
    """Run an experiment; return the exit code: 0, or 2 for a user's error."""
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\nNAME: {', '.join(EXPERIMENTS)}")
        return 0
    try:
        experiment = named(name)
        parser = Parser(
            prog=f"python -m qlora_lab.experiments {name}", description=(experiment.__doc__ or "").partition("\n")[0]
        )
        experiment.add_flags(parser)
        experiment.run(parser.parse_args(flags))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def named(name: str):
    """The module of an experiment. Raises UserError, with near matches, when there is none."""
    choice = f"choose from {', '.join(EXPERIMENTS)}"
    if not name or name.startswith("-"):
        raise UserError(f"no experiment is named: {choice}")
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"unknown experiment {name!r}: {hint}{choice}")
    return importlib.import_module(f"qlora_lab.experiments.{EXPERIMENTS[name]}")


if __name__ == "__main__":
    sys.exit(main())
