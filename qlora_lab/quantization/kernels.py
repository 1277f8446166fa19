"""Quantizing on a GPU, as fast as its memory allows: three Triton kernels.

Quantizing is little arithmetic on many bytes. A bf16 weight is 2 bytes and its code half a byte: an H100, which moves
3 TB/s, could quantize 10^12 weights per second. PyTorch's operators do not come near: each reads its input
from memory and writes its result back, and `quantize_plain` is a dozen of them. A kernel that takes all steps while
the numbers are in registers moves each byte once:

    dequantize_kernel         bytes -> two codes each -> their levels -> times absmax (decoded here if 8-bit) -> out
    quantize_kernel           numbers -> absmax of each block -> scaled -> nearest level -> two codes to a byte
    quantize_scales_kernel    the second level of double quantization

A kernel is the code of one *program*, which handles one tile of `TILE` elements: one or more whole blocks. Thousands of
programs run at a time. `tl.arange` and arithmetic act on a whole tile, in registers; only `tl.load` and `tl.store`
touch memory, and their mask keeps the last program within the tensor. The function below a kernel launches it.

What it takes to equal the plain version bit for bit:

    - `tl.div_rn` rounds as IEEE 754 requires. Triton's `/` may be off in the last bit
    - `enable_fp_fusion=False`: level * absmax + offset in one instruction rounds once, PyTorch's two operators twice
    - a partial last block is divided by its absmax, not multiplied by the reciprocal (see `blockwise`)

Measured on H100s (`make bench-gpu`), 88064 x 4096 in bf16, NF4: `dequantize` reaches 96 % of the copy bandwidth, with
8-bit scales too, and `quantize_kernel` 93 %. The function around it must wait for the flag that says whether all
numbers are finite: 84 % in the same run, 55 to 87 % on other hosts.

Triton comes with PyTorch for CUDA on Linux. With `TRITON_INTERPRET=1` it runs kernels on the CPU, operator by operator.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# Triton's stubs describe neither `kernel[grid](...)`, with its num_warps, nor that `triton.cdiv` of integers is one.

import functools

import torch
import triton
import triton.language as tl

from .codebooks import thresholds
from .scales import SMALLEST_ABSMAX, QuantizedAbsmax

EACH = 16  # elements per thread
WARPS = 2  # per program, 32 threads each; more where a block needs them
SMALLEST = tl.constexpr(SMALLEST_ABSMAX)
POINT = tl.constexpr(2)  # fraction bits of a float32 as large as MAGIC, see `search_tables`
MAGIC = tl.constexpr(2.0 ** (23 - POINT.value) + 16)
CELLS = 64  # a power of two above the 33 that occur


def program_size(block_size: int) -> tuple[int, int]:
    """The elements that a program handles, and the number of its warps."""
    tile = max(WARPS * 32 * EACH, block_size)
    return tile, tile // EACH // 32


# ---------------------------------------------------------------------------------------------------- 4 bits to numbers


@triton.jit
def dequantize_kernel(
    codes,  # uint8, [n_bytes]
    absmax,  # float32, [blocks]; uint8 if there is a second level
    codebook,  # float32, [16]
    scale_absmax,  # of the second level, or None: float32, [blocks / SCALE_BLOCK_SIZE]
    scale_codebook,  # float32, [256]
    scale_offset,  # float32, [1]
    out,  # [n]; or rows of COLUMNS numbers, with a gap after each row
    n,
    n_bytes,
    gap,  # numbers between two rows; 0 unless COLUMNS
    BLOCK_SIZE: tl.constexpr,
    SCALE_BLOCK_SIZE: tl.constexpr,  # 0: no second level
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,  # 0: no gaps; a multiple of BLOCK_SIZE
    GAP_UNIT: tl.constexpr,  # a divisor of the gap
):
    program = tl.program_id(0).to(tl.int64)  # element numbers may not fit 32 bits
    if COLUMNS:  # a tile ends with its row, so that each thread still stores its numbers in one go
        tiles: tl.constexpr = (COLUMNS + TILE - 1) // TILE
        row = program // tiles
        start = row * COLUMNS + program % tiles * TILE
        end, end_byte = (row + 1) * COLUMNS, (row + 1) * (COLUMNS // 2)
        out += tl.multiple_of(row * gap, GAP_UNIT)
    else:  # n_bytes is passed too: only if it is known to be a multiple of 8 does a thread load 8 bytes in one go
        start = program * TILE
        end, end_byte = n, n_bytes
    byte = start // 2 + tl.arange(0, TILE // 2)
    packed = tl.load(codes + byte, mask=byte < end_byte, other=0)
    code = tl.interleave(packed >> 4, packed & 15)  # [TILE]
    level = tl.load(codebook + code)

    block = start // BLOCK_SIZE + tl.arange(0, TILE // BLOCK_SIZE)
    inside = block * BLOCK_SIZE < end
    scale = tl.load(absmax + block, mask=inside, other=0)
    if SCALE_BLOCK_SIZE:
        second = tl.load(scale_absmax + block // SCALE_BLOCK_SIZE, mask=inside, other=0)
        scale = tl.load(scale_codebook + scale) * second + tl.load(scale_offset)

    value = tl.reshape(level, [TILE // BLOCK_SIZE, BLOCK_SIZE]) * scale[:, None]
    element = start + tl.arange(0, TILE)
    tl.store(out + element, tl.reshape(value, [TILE]).to(out.dtype.element_ty), mask=element < end)


def dequantize(q, out: torch.Tensor | None = None) -> torch.Tensor:
    """`blockwise.dequantize` for a QuantizedTensor on a GPU.

    Args:
        out: the tensor to write to: q's shape, float32, bfloat16 or float16; a matrix may be part of a wider one. None:
            a new tensor in q's dtype.

    Returns:
        out
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape[-1] % q.block_size and not out.is_contiguous():  # blocks that cross rows
        return out.copy_(dequantize(q))
    n, (tile, warps) = out.numel(), program_size(q.block_size)
    columns = 0 if out.is_contiguous() else out.shape[-1]
    gap = out.stride(0) - columns if columns else 0
    programs = len(out) * triton.cdiv(columns, tile) if columns else triton.cdiv(n, tile)
    if isinstance(q.absmax, QuantizedAbsmax):
        parts = [q.codes, q.absmax.codes, q.codebook, q.absmax.absmax, q.absmax.codebook, q.absmax.offset]
        scale_block_size = q.absmax.block_size
    else:
        parts, scale_block_size = [q.codes, q.absmax, q.codebook, None, None, None], 0
    if n:
        with torch.cuda.device_of(out):
            dequantize_kernel[(programs,)](
                *(part if part is None else part.contiguous() for part in parts), out, n, (n + 1) // 2, gap,
                q.block_size, scale_block_size, tile, columns, 1 if gap % 8 else 8,
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------- numbers to 4 bits


@triton.jit
def largest_magnitude(value, axis: tl.constexpr):
    """max |value|, or NaN if there is one. Read as integers, positive floats keep their order, and NaN comes last."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def at_least_smallest(absmax):
    return tl.maximum(absmax, tl.full(absmax.shape, SMALLEST, tl.float32), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_kernel(
    x,  # [n]
    below,  # int32, [CELLS]
    edges,  # float32, [COMPARISONS, CELLS]
    codes,  # uint8, [n_bytes]
    absmax,  # float32, [blocks]
    wrong,  # uint8, [1]: becomes 1 if x holds NaN or infinity
    n,
    n_bytes,
    BLOCK_SIZE: tl.constexpr,
    COMPARISONS: tl.constexpr,
    PARTIAL: tl.constexpr,  # there is one block only, and it is not full
    CELLS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    element = program * TILE + tl.arange(0, TILE)
    value = tl.load(x + element, mask=element < n, other=0).to(tl.float32)
    value = tl.reshape(value, [TILE // BLOCK_SIZE, BLOCK_SIZE])
    largest = largest_magnitude(value, 1)
    scale = at_least_smallest(largest)
    if PARTIAL:
        largest = scale
        scaled = tl.div_rn(value, scale[:, None])
    else:
        scaled = value * tl.div_rn(1.0, scale)[:, None]
    scaled = tl.reshape(scaled, [TILE])

    # The code of the nearest level is the count of thresholds below the number. A table counts those in lower cells;
    # comparisons, one for NF4, count those in the number's own cell. See `search_tables`.
    cell = (scaled * 16 + MAGIC).to(tl.int32, bitcast=True) >> POINT & (CELLS - 1)
    entry = tl.arange(0, CELLS)
    code = tl.gather(tl.load(below + entry), cell, 0)
    for i in tl.static_range(COMPARISONS):
        code += (scaled > tl.gather(tl.load(edges + i * CELLS + entry), cell, 0)).to(tl.int32)

    high, low = tl.split(tl.reshape(code, [TILE // 2, 2]))
    byte = program * (TILE // 2) + tl.arange(0, TILE // 2)
    tl.store(codes + byte, (high * 16 + low).to(tl.uint8), mask=byte < n_bytes)
    block = program * (TILE // BLOCK_SIZE) + tl.arange(0, TILE // BLOCK_SIZE)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < n)
    tl.store(wrong + block * 0, 1, mask=(largest < float("inf")) == 0)


@functools.lru_cache(maxsize=64)
def search_tables(
    levels: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The tables of `quantize_kernel`, `below` and `edges`; the comparisons per number; and the levels on the device.

    Cells are 1/16 wide: x in [-1, 1] lies in cell floor(16 * x + 16), 0 to 32. Converting to an integer is slow on a
    GPU. But a float32 near 2**21 has two fraction bits: the bits of 2**21 + 16 * x + 16, without the last two, end in
    the cell's number. All of this is monotonic. So thresholds in lower cells are below x, those in higher cells are
    above it, and only those in x's own cell must be compared. NF4's are at least 0.08 apart.
    """
    edges = thresholds(torch.tensor(levels, device="cpu"))
    cell = (edges * 16 + MAGIC.value).view(torch.int32) >> POINT.value & (CELLS - 1)
    below = torch.searchsorted(cell, torch.arange(CELLS, dtype=torch.int32, device="cpu"), out_int32=True)
    comparisons = int(cell.bincount().max())
    none = torch.full((comparisons,), float("inf"), device="cpu")  # no number exceeds it
    edges = torch.cat([edges, none])[below + torch.arange(comparisons, device="cpu")[:, None]]
    return below.to(device), edges.to(device), comparisons, torch.tensor(levels, device=device)


def quantize(
    flat: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, absmax and codebook of a QuantizedTensor, and a flag, to be read once the GPU is done.

    The flag is a uint8 in pinned memory of the host: the kernel itself sets it to 1 if `flat` holds NaN or infinity,
    which are then in absmax too. So no copy has to follow the kernel.
    """
    flat, n, (tile, warps) = flat.contiguous(), len(flat), program_size(block_size)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(triton.cdiv(n, block_size), dtype=torch.float32, device=flat.device)
    wrong = torch.zeros(1, dtype=torch.uint8, device="cpu", pin_memory=flat.is_cuda)
    below, edges, comparisons, codebook = search_tables(tuple(codebook.tolist()), flat.device)

    def launch(first: int, last: int, partial: bool, tile: int) -> None:
        if first < last:
            quantize_kernel[(triton.cdiv(last - first, tile),)](
                flat[first:], below, edges, codes[first // 2 :], absmax[first // block_size :], wrong,
                last - first, (last - first + 1) // 2, block_size, comparisons, partial, CELLS, tile, num_warps=warps,
            )  # fmt: skip

    full = n // block_size * block_size  # elements in full blocks
    with torch.cuda.device_of(flat):
        launch(0, full, False, tile)
        launch(full, n, True, block_size)
    return codes, absmax, codebook, wrong


# ---------------------------------------------------------------------------------------------------- scales to 8 bits


@triton.jit
def quantize_scales_kernel(
    scales,  # float32, [n]
    offset,  # float32, [1]
    edges,  # float32, [255]
    codes,  # uint8, [n]
    absmax,  # float32, [blocks]
    n,
    BLOCK_SIZE: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    centred = tl.where(i < n, tl.load(scales + i, mask=i < n, other=0) - tl.load(offset), 0)
    largest = largest_magnitude(centred, 0)
    scaled = centred * tl.div_rn(1.0, at_least_smallest(largest))
    code = tl.zeros([BLOCK_SIZE], tl.int32)
    for step in tl.static_range(8):  # binary search: is it above the middle of what remains?
        half = 128 >> step
        code += tl.where(scaled > tl.load(edges + code + half - 1), half, 0)
    tl.store(codes + i, code.to(tl.uint8), mask=i < n)
    tl.store(absmax + tl.program_id(0), largest)


def quantize_scales(
    scales: torch.Tensor, offset: torch.Tensor, codebook: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and absmax, float32, of a QuantizedAbsmax."""
    blocks = triton.cdiv(len(scales), block_size)
    codes = torch.empty(len(scales), dtype=torch.uint8, device=scales.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=scales.device)
    if blocks:
        with torch.cuda.device_of(scales):
            quantize_scales_kernel[(blocks,)](
                scales.contiguous(), offset, thresholds(codebook), codes, absmax, len(scales), block_size
            )
    return codes, absmax
