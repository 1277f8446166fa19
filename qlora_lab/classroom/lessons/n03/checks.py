"""Exercises of 03_number_formats."""

import math
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, written, wrong


@exercise("3.1", "affine INT4 with a zero point", item="quantization", points=2, todo="complete `zero_point_quantize`")
def check_zero_point(zero_point_quantize: Callable) -> Verdict:
    """zero_point_quantize(x, bits) -> codes, scale, zero_point; x is near (codes - zero_point) * scale.

    x: float32 tensor with values on both sides of 0. codes: a tensor of its shape, 0 to 2**bits - 1. scale and
    zero_point: one number each, zero_point a whole one.
    """
    import torch

    # In the third, both ends lie half-way between two codes, and two roundings push the code of 7.5 to 16.
    for values, bits in [([0.5234, -1.2341, 0.8923, 0.27], 4), ([-0.31, 0.02, 2.43, 1.31], 3), ([-7.5, 2.3, 7.5], 4)]:
        x = torch.tensor(values)
        came = call(zero_point_quantize, x.clone(), bits)
        if not isinstance(came, (tuple, list)) or len(came) != 3:
            return wrong(f"zero_point_quantize gives {described(came)}, expected codes, scale, zero_point.")
        codes, scale, zero_point = came
        of = f"zero_point_quantize(tensor({values}), {bits})"
        low, high, largest = min(values), max(values), 2**bits - 1
        step = (high - low) / largest
        zero = round(-low / step)
        scales = [
            ((high - low) / 2**bits, f"You divided by 2**bits: {2**bits} levels have {largest} steps between them."),
            (max(abs(low), high) / (2 ** (bits - 1) - 1), "This is the scale of the absmax scheme."),
            (high / largest, "You forgot the minimum: the levels go from the minimum to the maximum."),
            (1 / step, "This is the reciprocal: the scale is the length of a step."),
        ]
        expect_number(f"The scale of {of}", scale, step, scales, 1e-5)
        zeros = [
            (-low / step, "That is not rounded yet: codes are whole numbers, and the zero point is one of them."),
            (math.floor(-low / step), "You cut off the decimals: round."),
            (-zero, "The sign is wrong: 0 lies above the minimum, so the zero point is positive."),
            (low, "This is the minimum, not the code that stands for 0."),
        ]
        expect_number(f"The zero point of {of}", zero_point, zero, zeros, 1e-5)
        if not isinstance(codes, torch.Tensor):
            return wrong(f"The codes are {described(codes)}, expected a tensor.")
        if codes.shape != x.shape:
            return wrong(f"The codes of {of} have the shape {tuple(codes.shape)}, expected {tuple(x.shape)}.")
        got = [float(code) for code in codes]
        plain = [round(value / step) for value in values]
        expected = [min(max(code + zero, 0), largest) for code in plain]
        if got != expected:
            shown = [int(code) if code.is_integer() else round(code, 2) for code in got]
            why = mistake_in_codes(got, values, step, plain, zero, largest)
            return wrong(f"The codes of {of} are {shown}, expected {expected}. {why}")
    return right(
        "0.5234 gets code 13 now, not 12, and the ends no longer come back exactly: that is the price of an exact 0. "
        "The largest value has code 15 all the same."
    )


def mistake_in_codes(got: list, values: list, step: float, plain: list, zero: int, largest: int) -> str:
    """How the codes may have come out wrong; empty if nothing comes to mind."""
    if not all(math.isfinite(code) for code in got):
        return "They are not all finite."
    if got == plain:
        return "You forgot the zero point: the smallest value must get a code that is not negative."
    if any(not code.is_integer() for code in got):
        return "They are not rounded: a code is a whole number."
    if got == [code + zero for code in plain]:
        return f"One is out of range: {largest} is the last code. Clamp after adding the zero point."
    if got == [min(max(code, 0), largest) + zero for code in plain]:
        return "You clamped too early: add the zero point first."
    if got == [min(max(math.trunc(value / step) + zero, 0), largest) for value in values]:
        return "You cut off the decimals: round to the nearest code, or the error gets twice as large."
    if got == [min(max(math.floor(value / step) + zero, 0), largest) for value in values]:
        return "You rounded down: round to the nearest code, or the error gets twice as large."
    if got == [round((value - min(values)) / step) for value in values]:
        return "These are the codes of the scheme with a minimum. Round value / scale, then add the zero point."
    if got == [min(max(code - zero, 0), largest) for code in plain]:
        return "You subtracted the zero point. Restoring subtracts it, so quantizing adds it."
    return ""


@exercise("3.2", "two bugs in row-wise INT8", item="quantization", points=2, todo="complete `quantize_rows`")
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


@exercise("3.3", "the block size that a budget allows", item="quantization", points=2, todo="complete `smallest_block`")
def check_smallest_block(smallest_block: Callable[[float, int, int], int]) -> Verdict:
    """smallest_block(budget, bits, constant_bits): smallest of 32, 64, ... 4096 within so many bits per parameter."""
    sizes = [2**n for n in range(5, 13)]
    for budget, bits, constant_bits in [
        (4.5, 4, 32),
        (4.5, 4, 16),
        (4.5, 4, 64),
        (4.3, 4, 32),
        (8.01, 8, 32),
        (6, 4, 32),
    ]:
        arguments = (budget, bits, constant_bits)
        fits = [size for size in sizes if bits + constant_bits / size <= budget]
        inside = [size for size in sizes if bits + constant_bits / size < budget]
        exact = constant_bits / (budget - bits)
        too_small = "A block of {:g} would do, but 32 is the smallest on offer."
        between = "That is just on budget, but no power of two from 32 to 4096: the next larger one fits."
        why_exact = too_small.format(exact) if exact < 32 else between
        mistakes = [
            (fits[-1], "That is the largest. It fits, but smaller blocks have a smaller error."),
            (inside[0], "A budget may be spent to the last bit: `<=`."),
            (exact, why_exact),
            (math.ceil(exact), why_exact),
            (fits[0] / 2, f"With it, a parameter takes {bits + 2 * constant_bits / fits[0]:g} bits: over the budget."),
            (bits + constant_bits / fits[0], "These are its bits per parameter. Return the block size."),
        ]
        source = written(smallest_block, arguments)
        expect_number(source, call(smallest_block, *arguments), fits[0], mistakes)
    return right("Half a bit buys blocks of 64 with a float32 scale, of 32 with a float16 one.")
