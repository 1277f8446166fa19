"""Look at data before training on it: `python -m qlora_lab.data FILE`.

What was understood, how much there is, what occurs twice, what is left out, what a run would be judged on, and the
first sample token by token. With `--clean OUT`, the data without what should not be trained on, as a file or as splits.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys

from tqdm import tqdm

from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.errors import CANNOT_WRITE, UserError
from qlora_lab.models.loading import load_tokenizer
from qlora_lab.train_flags import DATA_HELP, add_data_flags
from qlora_lab.training.cleaning import clean
from qlora_lab.training.data_report import describe, report_on
from qlora_lab.training.formats import parse_columns

CLEAN_HELP = (
    "report nothing, but write the samples to this new file (.jsonl), with all columns, without repeats and without "
    "those that have no question or no answer; to a new folder, without an ending: train, validation and test apart"
)
DROP_HELP = (
    "with --clean FOLDER: no samples to train on that are nearly among those held out; what is alike only with its "
    "numbers aside stays"
)


def run(args: argparse.Namespace) -> str:
    """Do what the command line asks for; return what there is to say. Raises UserError."""
    columns = parse_columns(args.columns) if args.columns else None
    how = {
        "columns": columns,
        "format": args.format,
        "most": args.eval_samples,
        "seed": args.seed,
        "split_by": args.split_by,
    }
    if args.clean:
        return clean(args.data, args.clean, drop_near=args.drop_near, **how).describe(args.split_by)
    if args.drop_near:
        raise UserError("--drop-near leaves samples out of what --clean FOLDER writes: give that, too")
    tokenizer = load_tokenizer(args.model)
    watched = functools.partial(tqdm, unit=" samples", leave=False, delay=2, disable=None)
    report = report_on(
        args.data, tokenizer, args.model, learn=args.learn, max_length=args.max_length, watched=watched, **how
    )
    return describe(report, tokenizer)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a user's error."""
    print_anywhere()
    parser = Parser(prog="python -m qlora_lab.data", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("data", metavar="FILE", help=DATA_HELP)
    add_data_flags(parser)
    parser.add_argument("--clean", type=pathlib.Path, metavar="OUT", help=CLEAN_HELP)
    parser.add_argument("--drop-near", action="store_true", help=DROP_HELP)
    try:
        text = run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None or error.errno not in CANNOT_WRITE:
            raise
        print(f"error: cannot write: {os.strerror(error.errno)}; nothing is left of it", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; Python itself would complain when it closes standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
