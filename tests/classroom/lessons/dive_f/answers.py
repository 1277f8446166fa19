"""Answers to the exercises of dive_f_why_is_it_slow: right ones, found by another way, and likely mistakes."""

from types import SimpleNamespace

from qlora_lab.classroom.checks import check_dequantize_kernel, check_floor, check_norm_bytes, check_slowdown

try:
    import triton
    import triton.language as tl

    TRITON, jit = True, triton.jit
except ImportError:  # then the tests of F.4 are skipped
    TRITON, tl, jit = False, SimpleNamespace(constexpr=int), lambda function: function


def in_milliseconds(tokens, n_in, n_out, rate, bandwidth):
    """The layer's times one by one, without the lesson's helper."""
    operations, weights = 2 * tokens * n_in * n_out / rate, n_in * n_out
    traffic = (2 * weights + 2 * tokens * (n_in + n_out)) / bandwidth
    product = 1e3 * (operations if operations > traffic else traffic)
    return (product + 1e3 * weights * 41 / 16 / bandwidth) / product


def extra(tokens, n_in, n_out, rate, bandwidth, *, bytes_a_weight):
    """The layer in NF4, in which dequantizing moves so many bytes a weight."""
    ratio = in_milliseconds(tokens, n_in, n_out, rate, bandwidth) - 1
    return 1 + ratio * bytes_a_weight * 16 / 41


def summed(tokens, n_in, n_out, rate, bandwidth):
    weights = n_in * n_out
    product = 2 * tokens * weights / rate + 2 * (weights + tokens * (n_in + n_out)) / bandwidth
    return 1 + weights * 41 / 16 / bandwidth / product


def side_by_side(tokens, n_in, n_out, rate, bandwidth):
    weights = n_in * n_out
    computing, moving = 2 * tokens * weights / rate, 2 * (weights + tokens * (n_in + n_out)) / bandwidth
    return max(computing, moving + weights * 41 / 16 / bandwidth) / max(computing, moving)


def from_the_codes(tokens, n_in, n_out, rate, bandwidth):
    weights = n_in * n_out
    computing, moving = 2 * tokens * weights / rate, 2 * (weights + tokens * (n_in + n_out)) / bandwidth
    reading = moving - 23 / 16 * weights / bandwidth
    return (max(computing, reading) + weights * 41 / 16 / bandwidth) / max(computing, moving)


def one_time_alone(tokens, n_in, n_out, rate, bandwidth, *, computing):
    weights = n_in * n_out
    traffic = 2 * (weights + tokens * (n_in + n_out)) / bandwidth
    return 1 + weights * 41 / 16 / bandwidth / (2 * tokens * weights / rate if computing else traffic)


T4 = {"tokens": 2048, "rate": 65e12, "bandwidth": 320e9}


def floor(weights, tokens, checkpointing, rate):
    return (weights * tokens / rate) * (6000 if checkpointing else 4000)


@jit
def by_bytes(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Reads each byte once, and lets the two halves find their places."""
    byte = tl.program_id(0) * (TILE // 2) + tl.arange(0, TILE // 2)
    packed = tl.load(codes + byte, mask=2 * byte < n, other=0)
    scale = tl.load(absmax + 2 * byte // BLOCK_SIZE, mask=2 * byte < n, other=0)
    tl.store(out + 2 * byte, tl.load(codebook + (packed >> 4)) * scale, mask=2 * byte < n)
    tl.store(out + 2 * byte + 1, tl.load(codebook + (packed & 15)) * scale, mask=2 * byte + 1 < n)


@jit
def swapped_nibbles(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 1, byte >> 4, byte & 15)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=i < n, other=0)
    tl.store(out + i, tl.load(codebook + code) * scale, mask=i < n)


@jit
def scale_of_the_tensor(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    tl.store(out + i, tl.load(codebook + code) * tl.load(absmax), mask=i < n)


@jit
def scale_of_the_program(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    tl.store(out + i, tl.load(codebook + code) * tl.load(absmax + tl.program_id(0)), mask=i < n)


@jit
def scale_counted_from_the_tile(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax + tl.arange(0, TILE) // BLOCK_SIZE)
    tl.store(out + i, tl.load(codebook + code) * scale, mask=i < n)


@jit
def scale_counted_in_bytes(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax + i // 2 // BLOCK_SIZE)
    tl.store(out + i, tl.load(codebook + code) * scale, mask=i < n)


@jit
def no_scale(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    tl.store(out + i, tl.load(codebook + code), mask=i < n)


@jit
def codes_for_levels(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=i < n, other=0)
    tl.store(out + i, code * scale, mask=i < n)


@jit
def high_nibble_twice(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=i < n, other=0)
    tl.store(out + i, tl.load(codebook + (byte >> 4)) * scale, mask=i < n)


@jit
def no_mask(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    tl.store(out + i, tl.load(codebook + code) * tl.load(absmax + i // BLOCK_SIZE))


@jit
def first_tile_alone(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    code = tl.where(i % 2 == 0, byte >> 4, byte & 15)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=i < n, other=0)
    tl.store(out + i, tl.load(codebook + code) * scale, mask=i < n)


@jit
def even_numbers_alone(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    byte = tl.load(codes + i // 2, mask=i < n, other=0)
    scale = tl.load(absmax + i // BLOCK_SIZE, mask=i < n, other=0)
    tl.store(out + i, tl.load(codebook + (byte >> 4)) * scale, mask=(i < n) & (i % 2 == 0))


@jit
def something_else(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + i, i * 0.5, mask=i < n)


@jit
def misspelled(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + i, tl.load(codebok + i), mask=i < n)  # noqa: F821


@jit
def other_arguments(codes, out):
    tl.store(out, tl.load(codes))


@jit
def stub(codes, codebook, absmax, out, n, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr): ...


KERNEL_STUB = (check_dequantize_kernel, stub)

RIGHT = [
    (check_slowdown, (in_milliseconds, T4)),
    (check_floor, (floor,)),
    (check_norm_bytes, ({"operators": 36, "fused": 4},)),
    (check_norm_bytes, ({"operators": 36.0, "fused": 4.0},)),
    (check_dequantize_kernel, (by_bytes,)),
]

WRONG = [  # and what the learner must be told
    (check_slowdown, (lambda *layer: in_milliseconds(*layer) - 1, T4), "what dequantizing adds"),
    (check_slowdown, (lambda *layer: 1 / in_milliseconds(*layer), T4), "The other way round"),
    (check_slowdown, (lambda *layer: extra(*layer, bytes_a_weight=9 / 16), T4), "the reading alone"),
    (check_slowdown, (lambda *layer: extra(*layer, bytes_a_weight=2), T4), "the writing alone"),
    (check_slowdown, (lambda *layer: extra(*layer, bytes_a_weight=6.5), T4), "a byte has eight of them"),
    (check_slowdown, (lambda *layer: extra(*layer, bytes_a_weight=2.5), T4), "4.5 bits a weight, not 4"),
    (check_slowdown, (from_the_codes, T4), "reads the *dequantized* weight"),
    (check_slowdown, (side_by_side, T4), "a kernel of its own"),
    (check_slowdown, (summed, T4), "not their sum"),
    (check_slowdown, (lambda *layer: one_time_alone(*layer, computing=True), T4), "not always the computing"),
    (check_slowdown, (lambda *layer: one_time_alone(*layer, computing=False), T4), "not always the moving"),
    (check_slowdown, (in_milliseconds, "a T4"), "a dict of three numbers"),
    (check_slowdown, (in_milliseconds, T4 | {"tokens": 0}), "those of one step"),
    (check_slowdown, (in_milliseconds, T4 | {"rate": 65}), "are 65e12"),
    (check_slowdown, (in_milliseconds, T4 | {"bandwidth": 320}), "are 320e9"),
    (check_floor, lambda w, t, c, r: floor(w, t, c, r) / 1e3, "These are seconds"),
    (check_floor, lambda w, t, c, r: floor(w, t, not c, r), "Checkpointing computes the forward pass *twice*"),
    (check_floor, lambda w, t, c, r: 2e3 * w * t / r, "the forward pass alone"),
    (check_floor, lambda w, t, c, r: floor(w, t, True, r), "the forward pass runs once"),
    (check_floor, lambda w, t, c, r: (8 if c else 6) * 1e3 * w * t / r, "full fine-tuning"),
    (check_floor, lambda w, t, c, r: floor(w, t, c, r) / 2, "are two operations"),
    (check_floor, lambda w, t, c, r: floor(w, 1, c, r), "for a single token"),
    (check_norm_bytes, 36, "a dict with 'operators' and 'fused'"),
    (check_norm_bytes, {"operators": 20, "fused": 4}, "go through the six lines"),
    (check_norm_bytes, {"operators": 40, "fused": 4}, "next to nothing an element"),
    (check_norm_bytes, {"operators": 32, "fused": 4}, "`mean` reads 4"),
    (check_norm_bytes, {"operators": 36, "fused": 2}, "It reads a number *and* writes one"),
    (check_norm_bytes, {"operators": 36, "fused": 8}, "2 bytes each"),
    (check_dequantize_kernel, swapped_nibbles, "nibbles are swapped"),
    (check_dequantize_kernel, scale_of_the_tensor, "the scale of the first block"),
    (check_dequantize_kernel, scale_of_the_program, "a tile holds several blocks"),
    (check_dequantize_kernel, scale_counted_from_the_tile, "counted from the tile's start"),
    (check_dequantize_kernel, scale_counted_in_bytes, "count numbers, not bytes"),
    (check_dequantize_kernel, no_scale, "the scale is missing"),
    (check_dequantize_kernel, codes_for_levels, "look the codes up in the codebook"),
    (check_dequantize_kernel, high_nibble_twice, "got the high nibble"),
    (check_dequantize_kernel, no_mask, "you write past the end"),
    (check_dequantize_kernel, first_tile_alone, "only the first tile is written"),
    (check_dequantize_kernel, even_numbers_alone, "nothing is written at number 1"),
    (check_dequantize_kernel, something_else, "of the numbers differ"),
    (check_dequantize_kernel, misspelled, "name 'codebok' is not defined"),
    (check_dequantize_kernel, other_arguments, "your kernel raised"),
    (check_dequantize_kernel, lambda *arguments: None, "is there an @jit above its `def`?"),
]
