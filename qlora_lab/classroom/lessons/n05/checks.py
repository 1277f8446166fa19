"""Exercises of 05_double_quantization."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, exercise, expect_diagnosis, expect_number, right, written

DISEASES = {
    "no mean": "the mean is not added back",
    "no sign": "the levels have no sign: what is below the mean has no code",
    "one scale": "all blocks of scales share one second-level scale",
    "wrong block": "a block of scales is restored with its neighbour's second-level scale",
    "healthy": "nothing is wrong",
}
PATIENTS = {"A": "wrong block", "B": "no sign", "C": "healthy", "D": "one scale"}


def ill_restorations(absmax) -> dict:
    """The scales, Tensor[n], as four programs restore them, by the patient's name. Do not read on before you decide."""
    from torch import linspace

    from qlora_lab.quantization import DYNAMIC8, nearest_level

    offset = absmax.mean()
    blocks = (absmax - offset).view(-1, 256)
    scale = blocks.abs().amax(1, keepdim=True)

    def restore(levels, scale, later_scale):
        return (levels[nearest_level(blocks / scale, levels)] * later_scale + offset).flatten()

    restored = {
        "no mean": restore(DYNAMIC8, scale, scale) - offset,
        "no sign": restore(linspace(0, 1, 256), scale, scale),
        "one scale": restore(DYNAMIC8, scale.max(), scale.max()),
        "wrong block": restore(DYNAMIC8, scale, scale.roll(1, 0)),
        "healthy": restore(DYNAMIC8, scale, scale),
    }
    return {patient: restored[disease] for patient, disease in PATIENTS.items()}


@exercise("5.1", "four patients", item="quantization", points=2, todo="name what is wrong with each of the four")
def check_diagnosis(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the patients A to D, a key of DISEASES."""
    clues = {
        ("A", "healthy"): "Do its dots lie on the line?",
        ("A", "one scale"): "One scale for all gives coarse steps, the same everywhere. Here the error grows with the "
        "distance from the mean.",
        (
            "B",
            "no mean",
        ): "Then every scale would come back too small by the mean, 2.6. Those above the mean are right.",
        ("B", "one scale"): "The upper half is as fine as it should be.",
        ("D", "healthy"): "Compare it with C: its steps are far coarser.",
        ("D", "wrong block"): "Then the errors would fan out from the mean. These are saw teeth of the same height.",
        ("C", "one scale"): "Only the scales in the large one's block suffer: most of the dots lie on the line.",
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


@exercise("5.3", "what a second constant would cost", item="quantization", points=2, todo="compute `extra_gigabytes`")
def check_zero_point_cost(extra_gigabytes: Callable[[int], float]) -> Verdict:
    """extra_gigabytes(parameters): GB more if each block of 64 had a second constant, in 8 bits as the scales are."""
    for parameters in (64_760_053_760, 6_476_005_376):
        constant = 8 / 64 + 32 / (64 * 256)
        expected = parameters * constant / 8 / 1e9
        mistakes = [
            (8 * expected, "These are gigabits: eight bits make a byte."),
            (expected * 1e9, "These are bytes: GB are asked for."),
            (expected * 1e9 / 2**30, "These are GiB: 1 GB is 10^9 bytes."),
            (parameters * 8 / 64 / 8 / 1e9, "The constants' own float32 scales, one in 256, are missing."),
            (parameters * 32 / 64 / 8 / 1e9, "This is a float32 constant. Double quantization leaves 8 bits of it."),
            (2 * expected, "This is scale and second constant. Only what the second one adds is asked for."),
            (parameters * (4 + constant) / 8 / 1e9, "This is the whole model: what does the second constant add?"),
            (parameters * (4 + 2 * constant) / 8 / 1e9, "This is the whole model: what does the second constant add?"),
            (constant, "These are bits per parameter: how many bytes is that for all parameters?"),
        ]
        source = written(extra_gigabytes, (parameters,))
        expect_number(source, call(extra_gigabytes, parameters), expected, mistakes, 1e-6)
    return right("Over 1 GB at 65B, for a number that NF4 does not need: its blocks are only scaled, not shifted.")
