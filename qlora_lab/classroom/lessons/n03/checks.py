"""Exercises of 03_number_formats."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Verdict, call, described, exercise, right, wrong

if TYPE_CHECKING:
    import torch


@exercise("3.1", "two bugs in row-wise INT8", item="quantization", points=2, todo="complete `quantize_rows`")
def check_fixed_rows(quantize_rows: Callable) -> Verdict:
    """quantize_rows(x) -> codes (int8, shape of x) and scale (rows, 1): absmax INT8 with a scale for each row."""
    import torch

    rows = [[0.3, -1.27, 0.847, 0.55], [12.7, 2.58, -7.16, 0.07], [0.02, 0.0136, -0.0254, 0.0091]]
    for x in (torch.tensor(rows), -torch.tensor(rows)[:2, :3]):
        came = call(quantize_rows, x.clone())
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"quantize_rows gives {described(came)}, expected the pair codes, scale.")
        codes, scale = came
        if not isinstance(codes, torch.Tensor) or not isinstance(scale, torch.Tensor):
            return wrong(f"quantize_rows gives {described(came)}, expected two tensors.")
        if codes.shape != x.shape or codes.dtype != torch.int8:
            return wrong(f"codes are {codes.dtype}, {tuple(codes.shape)}, expected torch.int8, {tuple(x.shape)}.")
        n, absmax = len(x), x.abs().amax(1, keepdim=True)
        if scale.shape == (1, x.shape[1]):
            return wrong(f"scale has the shape {tuple(scale.shape)}, one for each column, expected rows: ({n}, 1).")
        if scale.numel() == 1 or (scale.shape == (n, 1) and (scale == scale[0]).all()):
            return wrong(
                "All rows have the same scale: `amax(dim=1, keepdim=True)` takes the largest of each row, `max()` that "
                "of the whole tensor."
            )
        if scale.shape != (n, 1):
            return wrong(f"scale has the shape {tuple(scale.shape)}, expected ({n}, 1), so that codes * scale works.")
        if (codes == -128).any():
            return wrong(
                "A code is -128, which no symmetric scheme uses: int8 ends at 127, and 128 wraps around, so that the "
                "largest value of a row may change its sign."
            )
        if torch.allclose(scale, absmax / 128):
            return wrong(
                "The scale is still absmax / 128: you clamped 128 away, and the largest value comes back wrong."
            )
        if torch.allclose(scale, absmax / 255):
            return wrong("You divided by 255. Codes from -127 to 127 have 127 steps on each side of 0.")
        if not torch.allclose(scale, absmax / 127):
            return wrong(f"The scales are {[round(s, 5) for s in scale.flatten().tolist()]}, expected absmax / 127.")
        expected = (x / (absmax / 127)).round()
        if not torch.equal(codes.float(), expected):
            cut = torch.equal(codes.float(), (x / (absmax / 127)).trunc())
            why = "You cut off the decimals: round before you convert." if cut else ""
            return wrong(f"The codes are {codes.tolist()}, expected {expected.int().tolist()}. {why}")
    return right("The largest value of each row comes back with its own sign, and quiet rows keep their precision.")


CHOICES = [(bits, size) for bits in range(2, 9) for size in (32, 64, 128, 256, 512, 1024, 2048, 4096)]


def price(choice: tuple[int, int]) -> float:
    """Bits per parameter of a pair (bits, block size), with float32 scales."""
    bits, size = choice
    return bits + 32 / size


@exercise("3.2", "bits and blocks within a budget", item="quantization", points=2, todo="complete `best_in_budget`")
def check_best_in_budget(best_in_budget: Callable[["torch.Tensor", float], tuple[int, int]]) -> Verdict:
    """best_in_budget(weights, budget) -> (bits, block size): of the absmax choices within so many bits per parameter,
    codes of 2 to 8 bits in blocks of 32, 64, ... 4096, the one with the smallest relative error on these weights.
    """
    import torch

    from qlora_lab.quantization import quantize_absmax, relative_rms

    tame = torch.randn(8192, generator=torch.Generator().manual_seed(3))
    wild = tame.clone()
    wild[::256] *= 20
    for kind, weights, budgets in [
        ("Gaussian numbers", tame, (4.5, 5.01, 3.3, 6.5)),
        ("numbers with outliers", wild, (4.5, 5.01, 5.5)),
    ]:
        error = {
            choice: relative_rms(weights, quantize_absmax(weights, *choice).dequantize())
            for choice in CHOICES
            if price(choice) <= max(budgets)
        }
        for budget in budgets:
            came = call(best_in_budget, weights.clone(), budget)
            of = f"best_in_budget({kind}, {budget})"
            if not isinstance(came, (tuple, list)) or len(came) != 2:
                return wrong(f"{of} gives {described(came)}, expected the pair bits, block size.")
            choice = (came[0], came[1])
            fits = [each for each in error if price(each) <= budget]
            best = min(fits, key=error.__getitem__)
            if choice != best:
                why = mistake_in_choice(choice, best, fits, error, budget)
                return wrong(f"{of} gives {choice}, expected {best}. {why}")
    return right(
        "At 5.01 bits Gaussian numbers want longer codes, and numbers with outliers smaller blocks: measuring tells."
    )


def mistake_in_choice(choice: tuple, best: tuple[int, int], fits: list, error: dict, budget: float) -> str:
    """How a choice may have come out wrong; `fits`: what the budget allows."""
    if (choice[1], choice[0]) in CHOICES:
        return "Bits first, then the block size."
    if choice not in CHOICES:
        return "That is not on offer: codes of 2 to 8 bits, blocks of 32, 64, ... 4096."
    if choice not in fits:
        return f"It takes {price(choice):.5g} bits per parameter, over the budget: each block has a scale, too."
    if price(best) == budget and choice == min((c for c in fits if price(c) < budget), key=error.__getitem__):
        return "A budget may be spent to the last bit: `<=`."
    if choice == max(fits, key=error.__getitem__):
        return "This is the largest error that the budget can buy."
    if choice == max(fits, key=lambda c: (c[0], -c[1])):
        return "You took the longest code first. Here smaller blocks have the smaller error: measure both."
    if choice == max(fits, key=lambda c: (-c[1], c[0])):
        return "You took the smallest block first. Larger blocks would leave room for a longer code: measure both."
    return f"Its error is {error[choice]:.4f}, and the other's {error[best]:.4f}."
