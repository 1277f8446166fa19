"""Grade one hand-in inside of a container: `containers.py`, outside, starts it and talks with it.

It takes JSON on standard input, with the hand-in's content, and writes the report as the last line of standard output:
so the container needs nothing of the machine that it runs on.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path

from qlora_lab.classroom.grading.hand_in import grade
from qlora_lab.classroom.grading.kernel import MARK, Crowd, Limits, adopt_orphans


def main() -> int:
    order = json.load(sys.stdin)
    adopt_orphans()
    os.environ[MARK] = order["mark"]
    crowd = Crowd(order["mark"])
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "hand_in.ipynb"
            path.write_bytes(base64.b64decode(order["content"]))
            report = grade(path, Limits(**order["limits"]), order["course"])
    finally:
        crowd.end()
    print(f"\n{json.dumps(report.as_dict())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
