"""QLoRA, from numbers to a trained model: the package behind the course's notebooks."""

import logging

__version__ = "0.1.0"

# On a CPU with AVX512-BF16, bitsandbytes looks for the package `kernels` when it is imported, and warns on standard
# error that it is missing: a red box in a notebook, a line beside `--json`. What it would download is a kernel that
# `models.faults.use_differentiable_kernels` avoids. This one line is dropped; all else that it logs stays.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)
