"""What several rooms must agree on: names and sizes, as plain numbers."""

from __future__ import annotations

# transformers' names of the optimizers that `make_optimizer` makes and `memory.estimate` knows
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")

# the linear layers of a LLaMA's decoder layer, by transformers' names: what "all-linear" means there
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# the 4-bit numbers that a merged adapter may be rounded to while it is trained: QLoRA's, and llama.cpp's
MERGE_TARGETS = ("nf4", "q4_0")

BLOCK, SCALE_BLOCK = 64, 256  # elements that share a scale; scales that share a scale of their own


def bits_per_parameter(
    block_size: int = BLOCK,
    double: bool = True,
    scale_block_size: int = SCALE_BLOCK,
    *,
    bits: int = 4,
    scale_bits: int = 32,
    zero_point_bits: int = 0,
) -> float:
    """Bits that a parameter takes in a large tensor: its code and its share of the block's constants.

    Args:
        block_size: elements that share a scale.
        double: the scale is held in 8 bits, with one of `scale_bits` for each `scale_block_size` scales.
        bits: width of a code.
        scale_bits: width of a scale; 32 for float32.
        zero_point_bits: width of a zero point or minimum, which affine schemes hold for each block.

    >>> bits_per_parameter(), bits_per_parameter(double=False)  # NF4 with and without double quantization
    (4.126953125, 4.5)
    >>> bits_per_parameter(32, double=False, scale_bits=16, zero_point_bits=16)  # GGUF's Q4_1
    5.0
    """
    scale = 8 + scale_bits / scale_block_size if double else scale_bits
    return bits + (scale + zero_point_bits) / block_size


def four_bit_bytes(elements: int, double: bool = True, matrices: int = 1) -> tuple[int, int]:
    """(codes, constants): bytes of the tensors that bitsandbytes keeps for one weight, its `QuantState` included.

    Each weight has copies of the tables for itself, hence some more than `bits_per_parameter` says.

    Args:
        matrices: of that size, that share their tables, as a layer's experts do (`FourBitExperts`).

    >>> four_bit_bytes(4096 * 4096)
    (8388608, 267332)
    """
    blocks = -(-elements // BLOCK)
    codes, levels = matrices * -(-elements // 2), 16 * 4  # two codes in a byte; the 16 values of NF4 in float32
    if not double:
        return codes, matrices * 4 * blocks + levels  # a float32 scale for each block
    # a scale in 8 bits, a float32 scale for 256 of those, the scales' mean; and the 256 values of the 8-bit code
    return codes, matrices * (blocks + 4 * -(-blocks // SCALE_BLOCK) + 4) + levels + 256 * 4
