"""Compiles every Triton kernel of the project for each generation of GPUs, none of which is needed.

    python tests/compile_kernels.py FOLDER        writes there, and prints a JSON line for each kernel and generation

Run by `tests/test_compiled_kernels.py`, in a process where Triton compiles instead of interpreting.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget

from qlora_lab.quantization import kernels as quantization_kernels
from qlora_lab.training.steps.fast import adapter_kernels, head_kernels
from qlora_lab.training.steps.fast import kernels as step_kernels

GENERATIONS = (75, 80, 86, 89, 90)  # T4, A100, A10 and RTX 30, L4 and RTX 40, H100
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
COUNTS = ("V", "n", "n_bytes")  # numbers of elements; of strides it is not known what divides them: rank 8
BF16, FP32, U8 = "*bf16", "*fp32", "*u8"


def compiled(kernel, constants, warps=4, generations=GENERATIONS, stored=(), **types):
    """Compile a kernel for each generation and print what it takes.

    types: of the arguments that are no constants. stored: those which are bf16 on a T4, too, since the model is.
    """
    types_of = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [name for name, type in types_of.items() if type[0] == "*" or name in COUNTS]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    for generation in generations:
        if generation == 75:  # a T4 has no bf16
            halves = {name for name, type in types_of.items() if type == BF16} - set(stored)
            signature = types_of | dict.fromkeys(halves, "*fp16")
        else:
            signature = types_of
        source = triton.compiler.ASTSource(kernel, signature, places, hints)
        made = triton.compile(source, target=GPUTarget("cuda", generation, 32), options={"num_warps": warps})
        registers, stack, local = resources(made.asm["cubin"])
        ptx = made.asm["ptx"]
        usage = {
            "kernel": kernel.__name__,
            "generation": generation,
            "threads": 32 * warps,
            "shared": made.metadata.shared,
            "registers": registers,
            "spilled": stack + local,
            "single": len(re.findall("(?:ld|st).global.b16", ptx)),  # numbers of 16 bits that go one by one
            "bf16": [stage for stage in ("ttir", "ptx") if "bf16" in made.asm[stage]],
        }
        print(json.dumps(usage))


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, and its bytes on the stack and in local memory."""
    file = pathlib.Path(sys.argv[1]) / "kernel.cubin"
    file.write_bytes(cubin)
    told = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall("REG:([0-9]+) STACK:([0-9]+) SHARED:[0-9]+ LOCAL:([0-9]+)", told)
    registers, stack, local = map(int, found)
    return registers, stack, local


def between_products():
    """Norms, SwiGLU, the loss and AdamW, with LLaMA-13B's and SmolLM2's sizes."""
    hidden, strides = {"H": 5120, "WIDTH": 8192}, {"X_STRIDE": 5120, "DY_STRIDE": 5120, "ADD": True}
    types = {"weight": BF16, "epsilon": "fp32"}
    of_sum = {"residual": BF16, "delta": BF16, "total": BF16, "out": BF16, "out_stride": "i32"}
    sum_strides = {"RESIDUAL_STRIDE": 5120, "DELTA_STRIDE": 5120}
    compiled(step_kernels.rms_norm_kernel, {**hidden, **sum_strides}, 16, **of_sum, **types)
    compiled(step_kernels.rms_norm_kernel, {**hidden, **sum_strides}, 16, (75,), ("weight",), **of_sum, **types)
    of_gradient = {"x": BF16, "dy": BF16, "dx": BF16, "dx_stride": "i32"}
    kernel = step_kernels.rms_norm_backward_kernel
    compiled(kernel, {**hidden, **strides}, 16, **of_gradient, **types)
    compiled(kernel, {**hidden, **strides}, 16, (75,), ("weight",), **of_gradient, **types)
    for gelu in (False, True):
        mlp = {"SIZE": 1536, "TILE": 1024, "GELU": gelu}
        types = {"gate_up": BF16, "gate_up_stride": "i32"}
        compiled(step_kernels.swiglu_kernel, mlp, out=BF16, out_stride="i32", **types)
        compiled(step_kernels.swiglu_backward_kernel, mlp, dy=BF16, dy_stride="i32", **types)
    for cap in (30.0, None):
        types = {"logits": BF16, "targets": "*i64", "losses": FP32, "scale": FP32, "V": "i32"}
        compiled(step_kernels.cross_entropy_kernel, {"CAP": cap, "TILE": 4096}, 8, **types)
    numbers = ("factor", "largest_norm", "rate", "decay", "correction1", "correction2")
    types = dict.fromkeys(("parameter", "first", "second", "norm"), FP32) | dict.fromkeys(numbers, "fp32")
    constants = {"BETA1": 0.9, "BETA2": 0.999, "EPSILON": 1e-8, "TILE": 1024}
    compiled(step_kernels.adamw_kernel, constants, gradient=BF16, n="i32", **types)


def heads():
    """Rotation and norms of 9 heads of 64."""
    types = {
        "source": BF16,
        "target": BF16,
        "cosine": BF16,
        "sine": BF16,
        "source_stride": "i32",
        "target_stride": "i32",
    }
    sizes = {"HEADS": 9, "HEADS_WIDTH": 16, "HALF": 32, "HALF_WIDTH": 32}
    for sign in (1, -1, 0):
        compiled(head_kernels.rotate_kernel, {**sizes, "SIGN": sign}, **types)
    back = {"gradient": BF16, "x": BF16, "cosine": BF16, "sine": BF16, "gradient_stride": "i32", "x_stride": "i32"}
    for across in (False, True):
        norm, more = {**sizes, "SIGN": 1, "ACROSS": across}, {"weight": BF16, "epsilon": "fp32"}
        compiled(head_kernels.head_norm_kernel, norm, **types, **more)
        compiled(head_kernels.head_norm_backward_kernel, norm, **back, **more)


def adapters():
    """The border of three layers of 64 outputs, the second without an adapter; dropout."""
    ends = {"END0": 64, "END1": 128, "BLOCK0": 0, "BLOCK1": -1, "BLOCK2": 1}
    sizes = {"STRIDE": 88, "N": 192, "K": 64, "RANK": 8, "ALL": 16, "RANKS": 16, "RANKS_WIDTH": 16}
    types = {"lora_A": FP32, "lora_B": FP32, "matrix": BF16, "scaling": "fp32"}
    compiled(adapter_kernels.border_kernel, {**ends, **sizes, "ROWS": 32, "TILE": 1024}, **types)
    types = {"source": BF16, "target": BF16, "seed": "*i64", "probability": "fp32"}
    numbers = dict.fromkeys(("stream", "source_stride", "target_stride", "T"), "i32")
    for add in (False, True):
        constants = {"ADD": add, "SIZE": 576, "ROWS": 16, "QUARTER": 64}
        compiled(adapter_kernels.dropout_kernel, constants, **types, **numbers)


def quantization():
    """Blocks of 64, with scales in 32 bits or in 8."""
    tile, warps = quantization_kernels.program_size(64)
    types = {"codes": U8, "codebook": FP32, "out": BF16, "n": "i32", "n_bytes": "i32", "gap": "i32"}
    second = {"scale_absmax": FP32, "scale_codebook": FP32, "scale_offset": FP32}
    for double in (False, True):
        for columns in (0, 4096):
            sizes = {"BLOCK_SIZE": 64, "SCALE_BLOCK_SIZE": 256 * double, "TILE": tile, "COLUMNS": columns}
            missing = {} if double else dict.fromkeys(second)
            of_scales = {"absmax": U8, **second} if double else {"absmax": FP32}
            kernel = quantization_kernels.dequantize_kernel
            compiled(kernel, {**sizes, **missing, "GAP_UNIT": 8}, warps, **types, **of_scales)
    types = {"x": BF16, "below": "*i32", "edges": FP32, "codes": U8, "absmax": FP32, "wrong": U8, "n": "i32"}
    sizes = {"BLOCK_SIZE": 64, "COMPARISONS": 1, "PARTIAL": False, "CELLS": quantization_kernels.CELLS, "TILE": tile}
    compiled(quantization_kernels.quantize_kernel, sizes, warps, n_bytes="i32", **types)
    types = {"scales": FP32, "offset": FP32, "edges": FP32, "codes": U8, "absmax": FP32, "n": "i32"}
    compiled(quantization_kernels.quantize_scales_kernel, {"BLOCK_SIZE": 256}, **types)


if __name__ == "__main__":
    between_products()
    heads()
    adapters()
    quantization()
