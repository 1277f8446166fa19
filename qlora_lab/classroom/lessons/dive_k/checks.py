"""Exercises of dive_k_to_the_last_bit."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, right, wrong

POINTS = 65_536  # of the table, from -1 to 1


def by_search(numbers, levels):
    """Codes of the nearest levels, the lower one of two that are equally near. numbers, levels: float32 tensors."""
    import torch

    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, numbers.contiguous())


def on_grid(numbers):
    """The nearest of the table's points, Tensor[n]."""
    return ((numbers + 1) / 2 * (POINTS - 1)).round() * 2 / (POINTS - 1) - 1


def steps_below(numbers):
    """The table's points below, Tensor[n]."""
    return ((numbers + 1) / 2 * (POINTS - 1)).floor() * 2 / (POINTS - 1) - 1


@exercise("K.1", "a search by table", item="quantization", points=3, todo="complete `by_table`")
def check_by_table(by_table: Callable) -> Verdict:
    """by_table(numbers, levels): of each number, the index of the level that is nearest to its *grid point*."""
    import torch

    from qlora_lab.quantization import DYNAMIC8

    draw = torch.Generator().manual_seed(5)
    for spread in (1.0, 1e-2, 1e-4):
        near = (DYNAMIC8[1:] + DYNAMIC8[:-1]) / 2
        numbers = torch.cat([near + 2e-5 * torch.randn(255, generator=draw), torch.rand(500, generator=draw) * 2 - 1])
        numbers = (numbers * spread).clamp(-1, 1)
        steps = (numbers + 1) / 2 * (POINTS - 1)
        numbers = numbers[((steps - steps.floor()) - 0.5).abs() > 0.02]  # none half-way between two points
        expected = by_search(on_grid(numbers), DYNAMIC8)
        came = call(by_table, numbers.clone(), DYNAMIC8.clone())
        if not isinstance(came, torch.Tensor) or came.shape != numbers.shape:
            return wrong(f"by_table gives {described(came)}, expected an index for each of {len(numbers)} numbers.")
        if came.is_floating_point():
            return wrong("by_table gives numbers with a point: the *index* of the level is asked for.")
        came = came.long()
        share = (came != expected).float().mean().item()
        if share == 0:
            continue
        mistakes = [
            (numbers, "That is the nearest level to the number itself: move it to its grid point first."),
            (steps_below(numbers), "You took the grid point *below* each number: take the nearest one."),
            (
                (numbers * (POINTS - 1)).round() / (POINTS - 1),
                "Your grid steps are half as wide: 65,535 steps reach from -1 to 1, not from 0 to 1.",
            ),
        ]
        for moved, why in mistakes:
            if (came != by_search(moved, DYNAMIC8)).float().mean() < 0.003:
                return wrong(why)
        return wrong(f"{share:.1%} of the codes differ from those of the table.")
    return right("Bit for bit what bitsandbytes' C++ code does on a CPU, and no line of it was read.")


LEAST = 0.1


@exercise("K.2", "scales that the table misses", item="quantization", points=3, todo="make 256 scales")
def check_missed(my_scales) -> Verdict:
    """my_scales: Tensor[256], positive, for which search and table find different levels for a tenth or more."""
    import torch

    from qlora_lab.quantization import DYNAMIC8

    if not isinstance(my_scales, torch.Tensor) or my_scales.shape != (256,):
        return wrong(f"expected a tensor of 256 scales, got {described(my_scales)}.")
    scales = my_scales.float()
    if not torch.isfinite(scales).all() or (scales <= 0).any():
        return wrong("Scales are largest absolute values: all must be finite and above 0.")
    centred = scales - scales.mean()
    if not centred.any():
        return wrong("All scales are equal: minus their mean, nothing is left to look up.")
    numbers = centred / centred.abs().max()
    share = (by_search(on_grid(numbers), DYNAMIC8) != by_search(numbers, DYNAMIC8)).float().mean().item()
    if share < LEAST:
        inside = (numbers.abs() < 1e-3).float().mean().item()
        return wrong(
            f"{share:.0%} of them are missed, expected {LEAST:.0%} or more. Where are levels closer together than grid "
            f"points? {inside:.0%} of your numbers lie there, below 0.001, once the mean is taken off."
        )
    return right(f"{share:.0%} of the scales get another level than the nearest. In a trained model it was one in 500.")
