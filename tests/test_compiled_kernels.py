"""Triton's kernels, compiled for each generation of GPUs: the compiler refuses what the interpreter lets pass."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

ROOT = pathlib.Path(__file__).resolve().parent.parent
ONE_BY_ONE = {"cross_entropy_kernel", "quantize_scales_kernel"}  # the target's logit; a program's absmax


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: its tests run the kernels themselves")
def test_each_kernel_compiles_from_a_t4_to_an_h100_and_fits(tmp_path):
    """Nothing goes number by number, nothing is spilled, and a program has no more than a T4's multiprocessor.

    (That is 64 KiB of shared memory and 65,536 registers, by the tables of compute capabilities in NVIDIA's CUDA C++
    programming guide; the others have more.) What is compiled for a T4 in fp16 has no bf16 in it, neither in Triton's
    code nor in PTX. A model's bf16 weight is read there without bf16 arithmetic.
    """
    surroundings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    surroundings["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, ROOT / "tests" / "compile_kernels.py", tmp_path]
    run = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen, read_as_bf16 = set(), []
    for line in run.stdout.splitlines():
        used = json.loads(line)
        seen.add((used["kernel"], used["generation"]))
        assert used["single"] == (used["kernel"] in ONE_BY_ONE), line
        assert used["spilled"] == 0, line
        assert used["shared"] <= 64 * 1024 and used["registers"] * used["threads"] <= 65536, line
        if used["generation"] == 75 and used["bf16"]:
            read_as_bf16.append(used)
    assert [(used["kernel"], used["bf16"]) for used in read_as_bf16] == [
        ("rms_norm_kernel", ["ttir"]),
        ("rms_norm_backward_kernel", ["ttir"]),
    ]
    written = [path.read_text(encoding="utf-8") for path in (ROOT / "qlora_lab").rglob("*.py")]
    names = {name for text in written for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", text)}
    assert seen == {(name, generation) for name in names for generation in (75, 80, 86, 89, 90)}
