"""Command lines: a parser that raises `UserError`, argument types that say what they accept, output for any console."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import re
import sys

from qlora_lab.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def count(text: str, least: int = 1, most: int = 1_000_000) -> int:
    """Parse a whole number from `least` to `most`."""
    with contextlib.suppress(ValueError):
        if least <= int(text) <= most:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most:,}")


def count_or_none(text: str) -> int:
    return count(text, least=0)


def seed(text: str) -> int:
    return count(text, least=0, most=2**63 - 1)


def positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, 1,000,000 at most")


def share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a share between 0 and 1, such as 0.1")


UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size(text: str) -> float:
    """Parse bytes: a number and a unit, such as 5GB (10^9 bytes) or 4.5GiB (2^30)."""
    parts = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmg]?i?b|)", text.strip().lower())
    if parts:
        with contextlib.suppress(ValueError, KeyError):
            if (nbytes := float(parts[1]) * UNITS[parts[2]]) > 0:
                return nbytes
    raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB, 500MB or 4GiB")


# for consoles whose encoding lacks them, such as cp1252, Windows' own in much of the world
IN_ASCII = {"✓": "+", "✗": "x", "·": ".", "–": "-", "—": "-", "×": "x", "±": "+-", "→": "->", "…": "...", "≈": "~"}


def print_anywhere() -> None:
    """Let standard output and error take any text: what the console's encoding lacks becomes ASCII that looks like it.

    What has no such likeness becomes a question mark.
    """
    codecs.register_error("qlora_lab.in_ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="qlora_lab.in_ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(character, "?") for character in lacking), error.end


def names(text: str) -> str:
    """Strip the spaces around comma-separated names."""
    return ",".join(name.strip() for name in text.split(","))
