# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# Triton's stubs do not describe launches, `kernel[grid](...)`: num_warps and constexpr arguments look wrong to them.
"""Triton kernels of the fast step for adapters. See `kernels.py`.

border       the adapters' part of a layer's matrix
dropout      of what an adapter reads; and, added up, of its gradient
"""

import triton
import triton.language as tl

from qlora_lab.training.steps.fast.rows import TILE


@triton.jit
def border_kernel(
    lora_A,  # float32, [RANKS, K]
    lora_B,  # float32, [rows of the adapted layers, RANK]
    matrix,  # [N + RANKS, K + RANKS], rows STRIDE apart; writes the last RANKS rows and columns, except their corner
    scaling,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    ALL: tl.constexpr,  # the sum of the ranks
    RANKS: tl.constexpr,  # the same, rounded up: what is beyond is set to zero
    END0: tl.constexpr,  # where the first and the second of up to three layers end
    END1: tl.constexpr,
    BLOCK0: tl.constexpr,  # index of each layer's block of columns; -1: no adapter
    BLOCK1: tl.constexpr,
    BLOCK2: tl.constexpr,
    RANKS_WIDTH: tl.constexpr,  # a power of two, at least RANKS
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    right: tl.constexpr = (N + ROWS - 1) // ROWS  # programs that write the columns at the right
    if program < right:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, RANKS_WIDTH)[None, :]
        block = tl.where(row < END0, BLOCK0, tl.where(row < END1, BLOCK1, BLOCK2))
        missing = tl.where((row >= END0) & (BLOCK0 < 0), END0, 0) + tl.where(
            (row >= END1) & (BLOCK1 < 0), END1 - END0, 0
        )
        inside = (row < N) & (column < RANKS)
        mine = inside & (column // RANK == block)
        b = tl.load(lora_B + (row - missing) * RANK + column % RANK, mask=mine, other=0)
        place = matrix + row.to(tl.int64) * STRIDE + K + column
        tl.store(place, (b * scaling).to(matrix.dtype.element_ty), mask=inside)
    else:
        tiles: tl.constexpr = (K + TILE - 1) // TILE
        below = (program - right) // tiles
        k = (program - right) % tiles * TILE + tl.arange(0, TILE)
        a = tl.load(lora_A + below * K + k, mask=k < K if ALL == RANKS else (k < K) & (below < ALL), other=0)
        tl.store(matrix + (N + below).to(tl.int64) * STRIDE + k, a.to(matrix.dtype.element_ty), mask=k < K)


def border(lora_A, lora_B, matrix, scaling: float, sizes: list[int], adapted: list[bool]) -> None:
    """Write the border of the matrix of `linear.BorderedLinear`.

    lora_A: (ranks, in), lora_B: (rows, rank), float32: the matrices of all adapters, stacked. matrix: (out + width,
    in + width), where width is the sum of the ranks or more; the rest of the border is zero. sizes: rows of each layer,
    three layers at most. adapted: which of them have an adapter.
    """
    inputs = lora_A.shape[1]
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    ranks = len(matrix) - ends[2]
    blocks = [sum(adapted[:i]) if i < len(adapted) and adapted[i] else -1 for i in range(3)]
    width, rows = triton.next_power_of_2(ranks), 32
    border_kernel[(triton.cdiv(ends[2], rows) + ranks * triton.cdiv(inputs, TILE),)](
        lora_A, lora_B, matrix, scaling, matrix.stride(0), ends[2], inputs, lora_B.shape[1], len(lora_A), ranks,
        *ends[:2], *blocks, width, rows, TILE, num_warps=4,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- dropout


@triton.jit
def dropout_kernel(
    source,  # [T, SIZE] of row stride source_stride
    target,  # likewise, of row stride target_stride; added to if ADD
    seed,  # int64, [1]
    stream,  # which adapter's mask
    probability,
    source_stride,
    target_stride,
    T,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # a program has ROWS rows of 4 * QUARTER numbers
    QUARTER: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, QUARTER)[None, :]
    nothing = tl.zeros([ROWS, QUARTER], tl.int32)
    # four random numbers at a time, for columns QUARTER apart
    first, second, third, fourth = tl.philox(
        tl.load(seed), nothing + row, nothing + tl.program_id(1) * QUARTER + lane, nothing + stream, nothing
    )
    source += tl.multiple_of(row.to(tl.int64) * source_stride, [8, 8])  # see `rows.begin`
    target += tl.multiple_of(row.to(tl.int64) * target_stride, [8, 8])
    column = tl.program_id(1) * (4 * QUARTER) + lane
    drop_columns(source, target, row < T, column, first, probability, ADD, SIZE)
    drop_columns(source, target, row < T, column + QUARTER, second, probability, ADD, SIZE)
    drop_columns(source, target, row < T, column + 2 * QUARTER, third, probability, ADD, SIZE)
    drop_columns(source, target, row < T, column + 3 * QUARTER, fourth, probability, ADD, SIZE)


@triton.jit
def drop_columns(source, target, in_row, column, random, probability, ADD: tl.constexpr, SIZE: tl.constexpr):
    there = in_row & (column < SIZE)
    x = tl.load(source + column, mask=there, other=0).to(tl.float32)
    y = tl.where(tl.uint_to_uniform_float(random) < probability, 0.0, x / (1 - probability))
    if ADD:
        y += tl.load(target + column, mask=there, other=0).to(tl.float32)
    tl.store(target + column, y.to(target.dtype.element_ty), mask=there)


def dropout(source, target, probability: float, seed, stream: int, add: bool = False) -> None:
    """Set a random share of `source` to zero and divide the rest by 1 - probability; write it, or add it, to `target`.

    source, target: (T, n), which may be part of something wider. seed: int64, (1,). stream: an int of 32 bits. The same
    place, seed and stream always give the same choice (Philox, a generator of random numbers by counter).
    """
    tokens, columns = source.shape
    rows, quarter = 16, 64
    dropout_kernel[(triton.cdiv(tokens, rows), triton.cdiv(columns, 4 * quarter))](
        source, target, seed, stream, probability, source.stride(0), target.stride(0), tokens, add, columns, rows,
        quarter, num_warps=4,
    )  # fmt: skip
