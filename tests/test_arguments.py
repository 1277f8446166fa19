"""What all command lines share."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.arguments import size

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "encoding, shown",
    [("utf-8", "✓ ✗ · 5 × 3 → 日"), ("cp1252", "+ x · 5 × 3 -> ?"), ("ascii", "+ x . 5 x 3 -> ?")],
)
def test_any_console_takes_what_is_printed(encoding, shown):
    code = "from qlora_lab.arguments import print_anywhere\nprint_anywhere()\nprint('✓ ✗ · 5 × 3 → 日')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == shown


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5e9), ("4.5 GiB", 4.5 * 2**30), ("500mb", 5e8), ("3e9", 3e9), ("7", 7), ("5 apples", None), ("0GB", None)],
)
def test_a_size_has_a_unit(text, nbytes):
    if nbytes is None:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 5GB"):
            size(text)
    else:
        assert size(text) == nbytes
