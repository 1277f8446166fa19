"""Answers to the exercises of dive_k_to_the_last_bit: right ones, found by another way, and likely mistakes."""

import torch

from qlora_lab.classroom.checks import check_by_table, check_ill_layers, check_missed

STEPS = 65_535
HEALED = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W", "E": "healthy"}


def nearest(numbers, levels):
    return (numbers[:, None] - levels).abs().argmin(1)


def by_a_real_table(numbers, levels):
    grid = (torch.arange(STEPS + 1, dtype=torch.float64) * 2 / STEPS - 1).float()
    table = torch.cat([nearest(part, levels) for part in grid.split(4096)])
    return table[((numbers + 1) / 2 * STEPS).round().long()].to(torch.uint8)


def by_rounding(numbers, levels):
    return nearest(((numbers + 1) / 2 * STEPS + 0.5).floor() * 2 / STEPS - 1, levels)


def moved(move):
    return lambda numbers, levels: nearest(move(numbers), levels)


def crowded(spread):
    draw = torch.Generator().manual_seed(0)
    scales = 1 + spread * torch.randn(256, generator=draw)
    scales[0], scales[1] = 1.5, 0.5
    return scales


RIGHT = [
    (check_by_table, (by_a_real_table,)),
    (check_by_table, (by_rounding,)),
    (check_missed, (crowded(1e-5),)),
    (check_missed, (torch.cat([torch.linspace(1 - 1e-5, 1 + 1e-5, 254), torch.tensor([1.9, 0.1])]),)),
    (check_ill_layers, (HEALED,)),
    (check_ill_layers, (HEALED | {"note": "done"},)),
]

WRONG = [  # and what the learner must be told
    (check_by_table, nearest, "move it to its grid point first"),
    (check_by_table, moved(lambda n: ((n + 1) / 2 * STEPS).floor() * 2 / STEPS - 1), "*below* each number"),
    (check_by_table, moved(lambda n: (n * STEPS).round() / STEPS), "half as wide"),
    (check_by_table, lambda n, levels: levels[by_rounding(n, levels)], "the *index* of the level"),
    (check_by_table, lambda n, levels: 7, "an index for each"),
    (check_by_table, lambda n, levels: by_rounding(-n, levels), "of the codes differ"),
    (check_missed, [1.0] * 256, "a tensor of 256 scales"),
    (check_missed, torch.ones(255), "a tensor of 256 scales"),
    (check_missed, torch.ones(256), "nothing is left"),
    (check_missed, torch.linspace(-1, 1, 256), "above 0"),
    (check_missed, torch.linspace(1, 2, 256), "closer together than grid points"),
    (check_ill_layers, HEALED | {"A": "keeps W", "D": "keeps x"}, "grows with the number of tokens"),
    (check_ill_layers, HEALED | {"A": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"B": "healthy"}, "error in float32"),
    (check_ill_layers, HEALED | {"B": "no scales"}, "more than a few thousandths"),
    (check_ill_layers, HEALED | {"B": "transposed"}, "more than its own size"),
    (check_ill_layers, HEALED | {"C": "coarse"}, "error in float32"),
    (check_ill_layers, HEALED | {"C": "keeps x"}, "It keeps 0 bytes"),
    (check_ill_layers, HEALED | {"E": "coarse"}, "error in float32"),
    (check_ill_layers, HEALED | {"E": "keeps x"}, "It keeps 0 bytes"),
    (check_ill_layers, HEALED | {"D": "keeps x"}, "the same for 2 tokens"),
    (check_ill_layers, HEALED | {"D": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"C": "dense"}, "expected one of 'keeps W'"),
    (check_ill_layers, {"A": "keeps x"}, "a diagnosis for A, B, C, D and E"),
]
