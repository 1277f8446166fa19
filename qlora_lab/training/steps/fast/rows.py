"""What all Triton kernels of the fast step share: where a row begins, how many threads and numbers a program has."""

import triton
import triton.language as tl

TILE = 1024  # elements per program, where any number would do


@triton.jit
def begin(row, stride):
    """Where a row begins. Strides are multiples of 8, so a thread reads and writes 8 bf16 numbers at once."""
    return tl.multiple_of(row * stride, 8)


def warps(width: int) -> int:
    """Warps of 32 threads for a program that holds `width` numbers: 16 numbers per thread, 16 warps at most."""
    return min(16, max(1, width // 512))
