"""The numbers that 4 bits can name.

Four bits name 16 things. A *codebook* says which: 16 float32 levels in [-1, 1], in ascending order. Each block of a
tensor is divided by its largest absolute value (`absmax`), so that it lies in [-1, 1] too, and each element is replaced
by the index of the nearest level. Everything about a 4-bit format is in its codebook:

    NF4     quantiles of the normal distribution, since weights are roughly normal (QLoRA, arXiv 2305.14314, section 3)
    FP4     a tiny floating-point number: 1 sign, 2 exponent, 1 mantissa bit, with bitsandbytes' own smallest level
    E2M1    the same with the smallest level that IEEE's rules for subnormals give (OCP's MXFP4 uses it)
    INT4    equal steps, symmetric about zero: -7/7 ... 7/7

How NF4 is made (`bitsandbytes.functional.create_normal_map`; equation 4 of the paper, taken literally, would start at
the 0-quantile, which is minus infinity):

    1. choose an `offset` a little below 1: the outermost quantile. 0.9677083 is the mean of 1 - 1/30 and 1 - 1/32
    2. positive half: normal quantiles of 9 equally spaced probabilities from the offset to 0.5, without the last (0.5)
    3. negative half: minus the quantiles of 8 such probabilities, without the last
    4. add 0 and divide by the largest: 7 negative levels, 0, 8 positive ones

To match bitsandbytes' float32 values to the last bit, the probabilities must be float32 (they come from
`torch.linspace`), the quantiles float64 (they come from SciPy there, from Python's `statistics` here) and the division
float32 again. Computing everything in float64 reproduces only 6 of the 16.

The 8-bit code for the scales of double quantization, `dynamic_map`, is derived here too.
"""

from __future__ import annotations

import itertools
from statistics import NormalDist

import torch

# ----------------------------------------------------------------------------------------------------------- the levels


def normal_float(bits: int = 4, offset: float | None = None) -> torch.Tensor:
    """NormalFloat levels; for 4 bits equal, bit for bit, to bitsandbytes' NF4.

    Args:
        bits: 2 to 8.
        offset: the outermost probability, in (0.5, 1). The default is the mean of 1 - 1/(2k - 2) and 1 - 1/(2k) for
            k = 2**bits, to seven decimals: 0.9677083 for 4 bits. (bitsandbytes has seven; more would change last bits.)

    Returns:
        Tensor[2**bits], float32, ascending, from -1 to 1 with an exact 0.

    Raises:
        ValueError: bits or offset out of range.

    >>> normal_float(bits=2)
    tensor([-1.0000,  0.0000,  0.4358,  1.0000])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: NormalFloat needs 2 to 8")
    count = 2**bits
    if offset is None:
        offset = round(1 - (1 / (2 * count - 2) + 1 / (2 * count)) / 2, 7)
    if not 0.5 < offset < 1:
        raise ValueError(f"offset={offset}: a probability between 0.5 and 1 is needed, such as 0.9677083")
    positive = normal_quantiles(torch.linspace(offset, 0.5, count // 2 + 1)[:-1])
    negative = [-q for q in normal_quantiles(torch.linspace(offset, 0.5, count // 2)[:-1])]
    levels = torch.tensor(negative + [0.0] + positive[::-1], dtype=torch.float32)
    return levels / levels.max()


def normal_quantiles(probabilities: torch.Tensor) -> list[float]:
    """Quantiles of the standard normal distribution: a float64 for each probability between 0 and 1."""
    return [NormalDist().inv_cdf(p) for p in probabilities.tolist()]


def integer_levels(bits: int = 4) -> torch.Tensor:
    """Levels of symmetric integer quantization: -q/q, ..., 0, ..., q/q for q = 2**(bits - 1) - 1.

    These are 2**bits - 1 levels. The last code repeats the level 1 and is never chosen.

    Args:
        bits: 2 to 8.

    Returns:
        Tensor[2**bits], float32.

    Raises:
        ValueError: bits out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: integer levels need 2 to 8")
    largest = 2 ** (bits - 1) - 1
    return torch.tensor([*range(-largest, largest + 1), largest], dtype=torch.float32) / largest


def _signed(magnitudes: list[float]) -> torch.Tensor:
    """Levels of a sign-and-magnitude format: each magnitude with both signs, zero twice, over the largest."""
    levels = [-m for m in reversed(magnitudes[1:])] + [0.0, 0.0] + magnitudes[1:]
    return torch.tensor(levels, dtype=torch.float32) / magnitudes[-1]


def dynamic_map(bits: int = 8) -> torch.Tensor:
    """The signed dynamic code, in which a number chooses how many of its bits are exponent (arXiv 1511.04561).

    After the sign, e zero bits stand for the decade 10**-e and a one bit ends them. The remaining f = bits - 2 - e bits
    divide [0.1, 1) into 2**f equal parts and select the middle of one. So there are 64 levels of either sign between
    0.1 and 1, 32 between 0.01 and 0.1, and so on down to a single one near 5.5e-7; then 0, and 1 itself.

    Args:
        bits: 2 to 8.

    Returns:
        Tensor[2**bits], float32, ascending; for 8 bits from -0.9930 to 1, and equal to the result of bitsandbytes'
        `create_dynamic_map()`.

    Raises:
        ValueError: bits out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: the dynamic code needs 2 to 8")
    levels = [0.0, 1.0]
    for fraction_bits in range(bits - 1):
        decade = 10 ** -(bits - 2 - fraction_bits)
        edges = torch.linspace(0.1, 1, 2**fraction_bits + 1)
        middles = (decade * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += middles + [-m for m in middles]
    return torch.tensor(sorted(levels), dtype=torch.float32)


NF4 = normal_float()
INT4 = integer_levels(4)
FP4 = _signed([0, 0.0625, 2, 3, 4, 6, 8, 12])
E2M1 = _signed([0, 1, 2, 3, 4, 6, 8, 12])

DYNAMIC8 = dynamic_map()
INT8 = integer_levels(8)

# ---------------------------------------------------------------------------------- what bitsandbytes ships, to compare

# `bitsandbytes.functional.get_4bit_type("nf4")`: a literal there, repeated here so that a lesson can do without
# bitsandbytes.
BITSANDBYTES_NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)

# bitsandbytes stores FP4 as its bit pattern, we store the index of a sorted level: FP4_BIT_PATTERNS[ours] is theirs.
# Of the two zeros, its CPU code assigns pattern 0 to zero and numbers just below, 8 (minus zero) to numbers just above.
FP4_BIT_PATTERNS = torch.tensor([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8)

# ---------------------------------------------------------------------------------------------------- nearest neighbour


def check_codebook(codebook: torch.Tensor, size: int = 16) -> None:
    """Raise TypeError or ValueError unless these are `size` float32 levels in [-1, 1], none below the one before."""
    if not isinstance(codebook, torch.Tensor) or codebook.dtype != torch.float32:
        came = codebook.dtype if isinstance(codebook, torch.Tensor) else type(codebook).__name__
        raise TypeError(f"codebook is {came}: give a float32 tensor, as torch.tensor([...]) makes it")
    if codebook.shape != (size,):
        raise ValueError(f"codebook has shape {tuple(codebook.shape)}: {size} levels are needed, so shape ({size},)")
    levels = codebook.tolist()  # a dozen tensor operators would take longer than quantizing a large matrix
    for level in levels:
        if not -1 <= level <= 1:
            raise ValueError(f"codebook has the level {level:g}: levels lie in [-1, 1]; divide by the largest")
    for i, (low, high) in enumerate(itertools.pairwise(levels)):
        if high < low:
            raise ValueError(
                f"codebook is not sorted: {low:g} at index {i} comes before {high:g}: pass codebook.sort().values"
            )


def thresholds(codebook: torch.Tensor) -> torch.Tensor:
    """Midpoints of neighbouring levels, in float32: Tensor[levels - 1]. They are where the nearest level changes."""
    return (codebook[:-1] + codebook[1:]) / 2


def nearest_level(scaled: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to each number: int32, shape of `scaled`.

    It is the count of thresholds that the number exceeds, so a number exactly on a threshold goes to the lower level.
    Numbers beyond the first or last level get that level.
    """
    return torch.bucketize(scaled, thresholds(codebook), out_int32=True)


# -------------------------------------------------------------------------------------------------- the best 16 numbers


@torch.no_grad()
def best_codebook(
    x: torch.Tensor,
    block_size: int = 64,
    levels: int = 16,
    keep: tuple[float, ...] = (),
    iterations: int = 1000,
) -> torch.Tensor:
    """Levels with the least squared error on x, found by Lloyd's algorithm from NF4's.

    Two steps, repeated: give each element its nearest level; move each level to the mean of its elements. A squared
    error in a scaled block counts absmax**2 times in the tensor, so that is each element's weight in the mean. No step
    increases the error. The result is a local optimum; for bell-shaped data there is only one.

    Args:
        x: floating point, any shape; a partial last block is left out. A million elements give three good digits.
        block_size: elements that share a scale.
        levels: how many: 4, 8, 16, ... 256.
        keep: levels that must not move, such as (-1, 0, 1), NF4's fixed points.
        iterations: at most; it stops when no level moves by more than 1e-6.

    Returns:
        Tensor[levels], float32, ascending, in [-1, 1].

    Raises:
        ValueError: no block that is not zero, another number of levels, or a level in `keep` that NormalFloat lacks.
    """
    full = x.numel() // block_size * block_size  # elements in full blocks
    blocks = x.reshape(-1)[:full].view(-1, block_size).double()
    blocks = blocks[blocks.abs().amax(1) > 0] if full else blocks
    if not blocks.numel():
        raise ValueError(f"x has {x.numel()} elements and no block of {block_size} that is not zero: give it more data")
    absmax = blocks.abs().amax(1, keepdim=True)
    values, order = (blocks / absmax).flatten().sort()
    weights = (absmax**2).expand_as(blocks).flatten()[order]
    # With the values sorted, a level's elements are a slice, and sums over slices are differences of running sums.
    mass = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    moment = torch.cat([weights.new_zeros(1), (weights * values).cumsum(0)])

    code = normal_float(levels.bit_length() - 1).double()
    if len(code) != levels:
        raise ValueError(f"levels={levels}: choose a power of two from 4 to 256")
    fixed = torch.isin(code, torch.tensor(keep, dtype=code.dtype))
    if fixed.sum() != len(keep):
        raise ValueError(f"keep={keep}: only levels that NormalFloat has can stay: -1, 0 and 1 among them")
    for _ in range(iterations):
        edges = torch.searchsorted(values, thresholds(code))
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(values))])
        weight = mass[edges].diff()
        moved = torch.where(fixed | (weight == 0), code, moment[edges].diff() / weight.clamp(min=1e-300))
        done = (moved - code).abs().max() < 1e-6
        code = moved
        if done:
            break
    return code.float()
