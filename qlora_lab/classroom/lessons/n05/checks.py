"""Exercises of 05_double_quantization."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, exercise, expect_diagnosis, expect_number, right, written

DISEASES = {
    "no mean": "the mean is not added back",
    "no sign": "the levels have no sign: what is below the mean has no code",
    "one scale": "all blocks of scales share one second-level scale",
    "healthy": "nothing is wrong",
}
PATIENTS = {"A": "no sign", "B": "healthy", "C": "one scale"}


def ill_restorations(absmax) -> dict:
    """The scales, Tensor[n], as three programs restore them, by program. Do not read on before you decide."""
    from torch import linspace

    from qlora_lab.quantization import DYNAMIC8, nearest_level

    offset = absmax.mean()
    blocks = (absmax - offset).view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)

    def restore(levels, scale):
        return (levels[nearest_level(blocks / scale, levels)] * scale + offset).flatten()

    restored = {
        "no mean": restore(DYNAMIC8, scale) - offset,
        "no sign": restore(linspace(0, 1, 256), scale),
        "one scale": restore(DYNAMIC8, scale.max()),
        "healthy": restore(DYNAMIC8, scale),
    }
    return {patient: restored[disease] for patient, disease in PATIENTS.items()}


@exercise("5.1", "three programs", item="quantization", points=2, todo="name what is wrong with each of the three")
def check_diagnosis(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the programs A to C, a key of DISEASES."""
    too_small = "Then every scale would come back too small by the mean, 2.6."
    clues = {
        ("A", "healthy"): "Do the dots of small scales lie on the line?",
        ("A", "no mean"): f"{too_small} Those above the mean are right.",
        ("A", "one scale"): "The upper half is as fine as it should be.",
        ("B", "one scale"): "Only the scales in the large one's block suffer: most of the dots lie on the line.",
        ("C", "healthy"): "Compare it with B: its steps are far coarser.",
        ("C", "no mean"): too_small,
        ("C", "no sign"): "Then all scales above the mean would come back right.",
    }
    expect_diagnosis(diagnosis, PATIENTS, DISEASES, clues)
    return right("Error says that something is wrong; a plot of restored over original says what.")


@exercise("5.2", "bits per parameter", item="quantization", points=1, todo="complete `bits`")
def check_bits_per_parameter(bits: Callable[[int, int], float]) -> Verdict:
    """bits(block_size, scale_block_size): bits that a parameter takes in 4 bits with double quantization."""
    for block, scales in [(64, 256), (32, 512), (128, 64)]:
        expected = 4 + 8 / block + 32 / (block * scales)
        mistakes = [
            (4 + 8 / block, f"The scales have scales: a float32 for every {scales} of them is missing."),
            (expected - 4, "These are the scales alone: the code itself takes 4 bits."),
            (expected / 8, "These are bytes: bits are asked for."),
            (4 + 32 / block, "This is without double quantization: a scale takes 8 bits now."),
            (4 + 8 / block + 32 / scales, f"{scales} scales share a float32, and each of them serves {block} weights."),
            (4 + 8 / block + 8 / (block * scales), "The scales of the scales are float32: 32 bits."),
            (4 + 1 / block + 4 / (block * scales), "Your scales are counted in bytes, the codes in bits."),
            (4 + 8 / block + 4 / (block * scales), "float32 is 4 bytes: here that is 32 bits."),
            (4 + 32 / block + 8 / (block * scales), "Swapped: scales take 8 bits, the scales of the scales 32."),
            (4 + 32 / block + 32 / (block * scales), "The scales take 8 bits now, no longer 32."),
            (4 + 16 / block + 64 / (block * scales), "NF4 has no zero point: there is one constant a block, not two."),
            (4.126953125, "That is the result for 64 and 256: are the arguments used?"),
            (round(expected, 6), "Do not round inside the function."),
        ]
        expect_number(written(bits, (block, scales)), call(bits, block, scales), expected, mistakes)
    return right("4.126953 for blocks of 64 and 256: the scales went from a half bit to an eighth.")


@exercise("5.3", "what smaller blocks would cost", item="quantization", points=2, todo="compute `extra_gigabytes`")
def check_smaller_blocks(extra_gigabytes: Callable[[float], float]) -> Verdict:
    """extra_gigabytes(parameters): GB more in blocks of 32 than of 64, with double quantization in blocks of 256."""
    for parameters in (64_760_053_760, 6_476_005_376):
        scales = 8 / 64 + 32 / (64 * 256)  # of blocks of 64; those of 32 have twice as many
        expected = parameters * scales / 8 / 1e9
        mistakes = [
            (8 * expected, "These are gigabits: eight bits make a byte."),
            (expected * 1e9, "These are bytes: GB are asked for."),
            (expected * 1e9 / 2**30, "These are GiB: 1 GB is 10^9 bytes."),
            (-expected, "Blocks of 32 take more, not less: subtract the other way round."),
            (parameters * 8 / 64 / 8 / 1e9, "The second-level scales, one for 256 scales, are missing."),
            (parameters * 32 / 64 / 8 / 1e9, "This is for float32 scales. Double quantization leaves 8 bits of each."),
            (2 * expected, "These are all scales of blocks of 32. What do they add to those of 64?"),
            (parameters * (4 + scales) / 8 / 1e9, "This is the whole model in blocks of 64: what do smaller ones add?"),
            (parameters * (4 + 2 * scales) / 8 / 1e9, "This is the whole model in blocks of 32: what do they add?"),
            (scales, "These are bits per parameter: how many bytes is that for all parameters?"),
        ]
        source = written(extra_gigabytes, (parameters,))
        expect_number(source, call(extra_gigabytes, parameters), expected, mistakes, 1e-6)
    return right("About 1 GB more at 65B. The slider at the end shows what that buys.")
