"""Machinery of 08_your_data: commands as in a terminal, a short training, tables of scores, two records."""

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from qlora_lab.evaluation.scores import Score
from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, is_exact, load_model, train_steps
from qlora_lab.models.hardware import pick_compute_dtype, pick_device


class Terminal:
    """Does what `python -m MODULE ARGUMENTS` does in a folder, in this process, which has everything loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, command: str, only: str = "") -> None:
        """Print the command and do it. only: of its output, show the part that has these words."""
        print("$", command)
        _, _, module, *arguments = shlex.split(command)
        before, said = os.getcwd(), io.StringIO()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stderr(sys.stdout), contextlib.redirect_stdout(said if only else sys.stdout):
                importlib.import_module(module).main(arguments)
        finally:
            os.chdir(before)
        print(*(part for part in said.getvalue().split("\n\n") if only and only in part))

    def path(self, path: os.PathLike | str) -> str:
        """A path from where Python is, as this terminal's command line names it."""
        absolute = Path(path).resolve()
        try:
            return shlex.quote(os.path.relpath(absolute, self.folder))
        except ValueError:  # Windows: on another drive
            return shlex.quote(str(absolute))


def short_training(samples: list[TokenizedSample], steps: int = 10):
    """The bundled model in NF4 with a fresh adapter of rank 16, trained with four samples a step."""
    dtype = pick_compute_dtype(pick_device())
    base, tokenizer = load_model(quantization="nf4", compute_dtype=dtype)
    model = add_adapter(base, rank=16, alpha=32)
    for _ in train_steps(
        model,
        Batches(samples, batch_size=4),
        steps=steps,
        learning_rate=2e-3,
        compute_dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
    ):
        pass
    return model


def show_scores(answers: Iterable[str], reference: str, scores: Iterable[Score]) -> None:
    """Print a line for each answer: exact match, then each of the scores, from 0 to 1."""
    names = {score.name.removesuffix("_match"): score for score in scores}
    widths = {name: max(12, len(name) + 2) for name in names}
    print(f"{'exact':<8}" + "".join(f"{name:<{widths[name]}}" for name in names) + "answer")
    for answer in answers:
        values = "".join(f"{score.of(answer, reference):<{widths[name]}.2g}" for name, score in names.items())
        print(f"{is_exact(answer, reference):<8}{values}{answer}")


def without_days(days: Iterable[str]) -> Callable[[str], str]:
    """A function that makes "a day" of each of these words in a text."""
    pattern = re.compile("|".join(days))
    return lambda text: pattern.sub("a day", text)


def shares_of(record: dict) -> dict[str, dict[int, list[float]]]:
    """From the record of `experiments amounts`: by split and number of orders, the share exactly right at each seed."""
    shares = {"test": {}, "shifted": {}}
    for run in record["runs"]:
        if run["amount"].isdigit():  # without replay
            for split, by_amount in shares.items():
                bits = run["exact"][split]
                by_amount.setdefault(int(run["amount"]), []).append(bits.count("1") / len(bits))
    return shares


def shares_by_split(record: dict) -> dict[str, tuple[float, int]]:
    """From the record of `experiments splits`: by kind of tickets, the share exactly right, and of how many."""
    kinds = {
        "held out at random": ("at random", "held out"),
        "held out by customer": ("by customer", "held out"),
        "later customers": ("", "later"),
    }
    shares = {}
    for name, (way, kind) in kinds.items():
        bits = "".join(run["exact"][kind] for run in record["runs"] if way in (run["way"], ""))
        shares[name] = bits.count("1") / len(bits), len(bits)
    return shares
