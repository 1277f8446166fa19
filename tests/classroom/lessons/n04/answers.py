"""Answers to the exercises of 04_nf4: right ones, found by another way than the check's, and likely mistakes."""

import torch

from qlora_lab.classroom.checks import check_fingerprints, check_level_usage, check_normal_levels
from qlora_lab.quantization import NF4, normal_float, normal_quantiles


def levels_like_scipy(offset):
    """As bitsandbytes' create_normal_map: float64 ndtri of float32 probabilities, float32 in the end."""
    ppf = torch.special.ndtri
    positive = ppf(torch.linspace(offset, 0.5, 9)[:-1].double()).tolist()
    negative = (-ppf(torch.linspace(offset, 0.5, 8)[:-1].double())).tolist()
    values = torch.tensor(positive + [0.0] + negative).sort().values
    return values / values.max()


def halves(offset, positive=9, negative=8, dtype=torch.float32):
    up = normal_quantiles(torch.linspace(offset, 0.5, positive, dtype=dtype)[:-1])
    down = [-q for q in normal_quantiles(torch.linspace(offset, 0.5, negative, dtype=dtype)[:-1])]
    return down, up


def double_throughout(offset):
    down, up = halves(offset, dtype=torch.float64)
    levels = torch.tensor(down + [0.0] + up[::-1], dtype=torch.float64)
    return levels / levels.max()


def not_divided(offset):
    down, up = halves(offset)
    return torch.tensor(down + [0.0] + up[::-1])


def not_sorted(offset):
    down, up = halves(offset)
    return torch.tensor(up + [0.0] + down) / up[0]


def both_of(size):
    def levels(offset):
        down, up = halves(offset, size, size)
        return torch.tensor(down + [0.0] + up[::-1]) / up[0]

    return levels


def without_zero(offset):
    down, up = halves(offset, 9, 9)
    return torch.tensor(down + up[::-1]) / up[0]


def digits(codes):
    """Hex digits are the codes, high nibble first."""
    text = bytes(codes.tolist()).hex()
    return [text.count(f"{level:x}") / len(text) for level in range(16)]


def counted(codes, *nibbles):
    return torch.bincount(torch.cat([{"high": codes >> 4, "low": codes & 15}[n] for n in nibbles]), minlength=16)


def one_bit_off(offset):
    levels = normal_float(4, offset)
    levels[12] = levels[12].nextafter(torch.tensor(2.0))
    return levels


PAST = {"linear": ("affine", 4, 32), "embedding": ("absmax", 8, 32)}

RIGHT = [
    (check_normal_levels, (levels_like_scipy,)),
    (check_normal_levels, (lambda offset: normal_float(4, offset).numpy(),)),
    (check_level_usage, (digits,)),
    (check_level_usage, (lambda codes: counted(codes, "high", "low") / (2 * len(codes)),)),
    (check_fingerprints, (PAST,)),
]

WRONG = [  # and what the learner must be told
    (check_normal_levels, both_of(8), "15 levels, as in the tutorials"),
    (check_normal_levels, both_of(9), "gives 17 levels"),
    (check_normal_levels, not_sorted, "ascending"),
    (check_normal_levels, not_divided, "divide all by the largest"),
    (check_normal_levels, without_zero, "exactly 0"),
    (check_normal_levels, double_throughout, "6 of 16 levels are equal to the last bit"),
    (check_normal_levels, one_bit_off, "15 of 16 levels are equal to the last bit"),
    (check_normal_levels, lambda offset: -normal_float(4, offset).flip(0), "NF4 mirrored"),
    (check_normal_levels, lambda offset: NF4, "is it used?"),
    (check_normal_levels, lambda offset: torch.arange(-7, 9) / 8, "Level 13 is 0.7500, expected 0.5626"),
    (check_normal_levels, lambda offset: "levels", "expected a list or 1-D tensor"),
    (check_level_usage, lambda codes: counted(codes, "high") / (2 * len(codes)), "sum to 0.5. You counted one"),
    (check_level_usage, lambda codes: counted(codes, "low") / len(codes), "the high nibble is missing"),
    (check_level_usage, lambda codes: counted(codes, "low", "high"), "These are counts"),
    (check_level_usage, lambda codes: counted(codes, "low", "high") / len(codes), "Your shares sum to 2"),
    (check_level_usage, lambda codes: torch.bincount(codes >> 5) / len(codes), "bincount takes minlength=16"),
    (check_level_usage, lambda codes: torch.bincount(codes, minlength=256) / len(codes), "are bytes counted"),
    (check_level_usage, lambda codes: torch.bincount(codes / 16), "raised NotImplementedError: "),
    (check_level_usage, lambda codes: torch.full((16,), 1 / 16), "The share of level"),
    (check_level_usage, lambda codes: counted(codes, "low", "high") / 4, "The share of level"),  # right for four codes
    (check_fingerprints, {"linear": ("affine", 4, 32)}, 'keys "linear" and "embedding"'),
    (check_fingerprints, PAST | {"linear": "Q4_1"}, "expected three things"),
    (check_fingerprints, PAST | {"linear": ("nf4", 4, 32)}, "the scheme is"),
    (check_fingerprints, PAST | {"linear": ("affine", 8, 32)}, "Which scheme of *four* bits"),
    (check_fingerprints, PAST | {"linear": ("absmax", 4, 32)}, "compare absmax with the other scheme"),
    (check_fingerprints, PAST | {"linear": ("affine", 4, 64)}, "nothing special"),
    (check_fingerprints, PAST | {"embedding": ("affine", 4, 32)}, "Look at 8 bits"),
    (check_fingerprints, PAST | {"embedding": ("absmax", 16, 32)}, "which single cell"),
]
