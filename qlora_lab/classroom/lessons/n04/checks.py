"""Exercises of 04_nf4."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, written, wrong


def as_floats(source: str, came) -> list[float]:
    """The numbers in a tensor or list, flat. Raises Mistake for anything else."""
    try:
        values = came.tolist() if hasattr(came, "tolist") else list(came)
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise Mistake(f"{source} gives {described(came)}, expected a list or 1-D tensor of numbers.") from None


@exercise("4.1", "the levels of NF4", item="nf4", points=2, todo="complete `normal_levels`")
def check_normal_levels(normal_levels: Callable) -> Verdict:
    """normal_levels(offset) -> the 16 NormalFloat levels: float32, ascending, equal to the last bit."""
    import torch

    from qlora_lab.quantization import normal_float

    for offset in (0.9677083, 0.95):
        expected, source = normal_float(4, offset), written(normal_levels, (offset,))
        came = call(normal_levels, offset)
        levels = torch.tensor(as_floats(source, came), dtype=torch.float64)
        if len(levels) == 15:
            return wrong("These are 15 levels, as in the tutorials. The halves are not alike: 8 positive, 7 negative.")
        if len(levels) != 16:
            return wrong(
                f"{source} gives {len(levels)} levels, expected 7 negative ones, 0 and 8 positive ones. "
                "Is the last of each half, the quantile of 0.5, dropped?"
            )
        if (levels.diff() < 0).any():
            return wrong("The levels are not in ascending order: the quantiles come from the outside in.")
        if not (levels == 0).any():
            return wrong("None of the levels is exactly 0: add it between the halves.")
        if levels.max() != 1:
            return wrong(f"The largest level is {levels.max().item():.4f}, expected 1: divide all by the largest.")
        if torch.allclose(levels, -levels.flip(0)):
            return wrong("The levels are symmetric. The negative half takes one probability fewer than the other.")
        if not torch.allclose(levels, expected.double(), atol=1e-6):
            if torch.allclose(levels, -expected.double().flip(0), atol=1e-6):
                return wrong("This is NF4 mirrored: eight levels are positive, seven negative.")
            if offset != 0.9677083:
                return wrong(f"With another offset, {offset}, the levels differ from what they should be: is it used?")
            i = int((levels - expected.double()).abs().argmax())
            return wrong(f"Level {i} is {levels[i].item():.4f}, expected {expected[i].item():.4f}.")
        equal = (levels.float() == expected).sum().item()
        if equal < 16:
            return wrong(
                f"Right to six digits, but {equal} of 16 levels are equal to the last bit. The probabilities must be "
                "float32, the quantiles float64, and the division float32 again."
            )
    return right("16 of 16, to the last bit, at any offset.")


@exercise("4.2", "how often each level is used", item="nf4", points=2, todo="complete `usage`")
def check_level_usage(usage: Callable) -> Verdict:
    """usage(codes): packed codes, uint8 -> 16 shares that sum to 1, lowest level first."""
    import torch

    from qlora_lab.quantization import pack, unpack

    draw = torch.Generator().manual_seed(3)
    for packed in (pack(torch.tensor([3, 3, 3, 9])), torch.randint(0, 200, (500,), generator=draw, dtype=torch.uint8)):
        indices = unpack(packed).long()
        expected = torch.bincount(indices, minlength=16).double() / len(indices)
        came = call(usage, packed.clone())
        shares = torch.tensor(as_floats("usage", came), dtype=torch.float64)
        if len(shares) > 16:
            return wrong(f"usage gives {len(shares)} shares, expected 16: are bytes counted instead of codes?")
        if len(shares) != 16:
            return wrong(f"usage gives {len(shares)} shares, expected 16: bincount takes minlength=16.")
        if torch.allclose(shares, expected, atol=1e-6):
            continue
        high = torch.bincount(packed.long() >> 4, minlength=16).double()
        low = torch.bincount(packed.long() & 15, minlength=16).double()
        halves = {"low": high, "high": low}
        for missing, counted in halves.items():
            if torch.allclose(shares / shares.sum(), counted / counted.sum(), atol=1e-6):
                total = f"Your shares sum to {shares.sum().item():.2g}. " if abs(shares.sum() - 1) > 1e-6 else ""
                return wrong(f"{total}You counted one of the two codes in each byte: the {missing} nibble is missing.")
        if torch.allclose(shares, expected * len(indices), atol=1e-6):
            return wrong("These are counts: divide by their sum.")
        if torch.allclose(shares, 2 * expected, atol=1e-6):
            return wrong("Your shares sum to 2: divide by the number of codes, two for each byte.")
        return wrong(
            f"The share of level {(shares - expected).abs().argmax().item()} is wrong; the sum is {shares.sum():.3g}."
        )
    return right("Two codes a byte, all counted.")


FINGERPRINTS = {"linear": ("affine", 4, 32), "embedding": ("absmax", 8, 32)}


@exercise("4.3", "the checkpoint's past", item="quantization", points=2, todo="fill in scheme, bits and block size")
def check_fingerprints(verdict) -> Verdict:
    """verdict: {"linear": (scheme, bits, block_size), "embedding": (...)}; scheme is "affine" or "absmax"."""
    if not isinstance(verdict, dict) or set(verdict) != set(FINGERPRINTS):
        return wrong(f'expected a dict with the keys "linear" and "embedding", got {described(verdict)}.')
    for name, expected in FINGERPRINTS.items():
        came = verdict[name]
        if not isinstance(came, (tuple, list)) or len(came) != 3:
            return wrong(f"{name}: expected three things, (scheme, bits, block size), got {described(came)}.")
        scheme, bits, block_size = came
        if scheme not in ("affine", "absmax"):
            return wrong(f'{name}: the scheme is {described(scheme)}, expected "affine" or "absmax".')
        if bits == 8 and expected[1] == 4:
            return wrong(
                f"{name}: with 8 bits any tensor has a small error. Which scheme of *four* bits has almost none?"
            )
        if bits == 4 and expected[1] == 8:
            return wrong(f"{name}: no 4-bit scheme stands out. Look at 8 bits: one error is far below the others.")
        if block_size != expected[2]:
            return wrong(f"{name}: at block size {block_size} the error is nothing special. Where does it collapse?")
        if scheme != expected[0]:
            return wrong(f"{name}: compare {scheme} with the other scheme at the same bits and block size.")
        if (scheme, bits, block_size) != expected:
            return wrong(f"{name}: {came} is not it: which single cell of the table is far too good?")
    return right("GGUF calls them Q4_1 and Q8_0. The file says bf16; its values had been quantized before.")
