"""`python -m qlora_lab.finetuning fetch`, the earlier name of `python -m qlora_lab.models fetch`."""

import sys

from qlora_lab.models.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
