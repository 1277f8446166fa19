"""What the folded cells and one-line helpers of 04_nf4 do."""

import torch


def levels_in_float64(offset: float) -> torch.Tensor:
    """NF4's recipe in float64 throughout, rounded once at the end: float32, Tensor[16], ascending, the largest is 1.

    Equal to bitsandbytes' table in six of sixteen levels, and near it in all: that table comes from float32
    probabilities (`qlora_lab.quantization.normal_float`).
    """
    up = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([down, torch.zeros(1, dtype=torch.float64), up.flip(0)])
    return (levels / levels.max()).float()
