"""Look at data before training on it: `python -m qlora_lab.data FILE`.

What was understood, how much there is, what occurs twice, what is left out, and the first sample token by token.
"""

from __future__ import annotations

import functools
import os
import sys

from tqdm import tqdm

from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.errors import UserError
from qlora_lab.models.loading import load_tokenizer
from qlora_lab.train_flags import DATA_HELP, add_data_flags
from qlora_lab.training.data_report import describe, report_on
from qlora_lab.training.formats import parse_columns


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a user's error."""
    print_anywhere()
    parser = Parser(prog="python -m qlora_lab.data", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("data", metavar="FILE", help=DATA_HELP)
    add_data_flags(parser)
    try:
        args = parser.parse_args(arguments)
        columns = parse_columns(args.columns) if args.columns else None
        tokenizer = load_tokenizer(args.model)
        watched = functools.partial(tqdm, unit=" samples", leave=False, delay=2, disable=None)
        report = report_on(args.data, tokenizer, args.model, columns, args.format, args.learn, args.max_length, watched)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        print(describe(report, tokenizer), flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python itself would complain when it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
