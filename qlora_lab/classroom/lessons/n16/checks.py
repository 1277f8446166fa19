"""Exercises of 16_ship_it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, expect_number, right, wrong

if TYPE_CHECKING:
    import torch

    from qlora_lab.training.chat import TokenizedSample

BITS = {  # of a weight in the linear layers, and of one in the vocabulary's tables
    "f16": (16.0, 16.0),
    "q8_0": (8.5, 8.5),
    "q4_0": (4.5, 8.5),
}


def size(linear: int, vocabulary: int, bits: tuple[float, float]) -> float:
    return (linear * bits[0] + vocabulary * bits[1]) / 8


@exercise("16.1", "how large the file will be", item="memory", points=1, todo="complete `file_bytes`")
def check_file_bytes(file_bytes: Callable[[int, int, str], float]) -> Verdict:
    """file_bytes(linear, vocabulary, kind): bytes of the weights in a GGUF file."""
    for linear, vocabulary in [(106_168_320, 28_311_552), (6_476_005_376, 262_144_000)]:
        for kind, bits in BITS.items():
            whole = {"f16": 16.0, "q8_0": 8.0, "q4_0": 4.0}[kind]
            mistakes = [
                (8 * size(linear, vocabulary, bits), "Those are bits: eight make a byte."),
                (size(linear, vocabulary, (bits[0], bits[0])), "Q4_0 holds the vocabulary in Q8_0."),
                (size(linear, vocabulary, (whole, max(whole, 8.0))), "Each block has a scale, too."),
                (size(linear, vocabulary, (whole + 1, 9.0)), "The scale has 16 bits, not 32."),
                (size(linear, 0, bits), "You left the vocabulary out."),
            ]
            came = call(file_bytes, linear, vocabulary, kind)
            expect_number(
                f"file_bytes({linear}, {vocabulary}, {kind!r})", came, size(linear, vocabulary, bits), mistakes
            )
    return right("Half a bit a weight goes to the scales.")


END, BREAK = 2, 198
SAMPLES = [  # ids, and how many of them are not learned
    [
        *[((5, 6, 7, END), 2), ((5, 6, 8, 9, END), 2), ((7, 6, 3), 1)],  # 3 is another end token
        ((5, 6, END), 3),  # learns nothing
        *[((5, END, 6), 1), ((5, 6, END, BREAK), 1), ((5, 6, 7), 1), ((5, 8), 1), ((9, 8, 5), 2)],
    ],
    [((5, 6, END), 1), ((5, 6, 7), 1)],
]


@exercise("16.2", "is the end taught", item="train", points=2, todo="complete `ends_taught`")
def check_ends_taught(ends_taught: Callable[[Sequence[TokenizedSample], Sequence[int]], float]) -> Verdict:
    """ends_taught(samples, end_ids): share of samples whose last learned token is one of end_ids."""
    from qlora_lab.training.chat import TokenizedSample

    for given in SAMPLES:
        samples = [TokenizedSample(ids, length) for ids, length in given]
        ends = [END, 3]
        learned = [[label for label in sample.labels if label != -100] for sample in samples]
        taught = sum(bool(labels) and labels[-1] in ends for labels in learned)
        anywhere = sum(any(end in labels for end in ends) for labels in learned)
        by_ids = sum(sample.ids[-1] in ends for sample in samples)
        first = sum(bool(labels) and labels[-1] == END for labels in learned)
        some = max(1, sum(map(bool, learned)))
        mistakes = [
            (taught, "That is a number of samples: divide by how many there are."),
            (100 * taught / len(samples), "That is in per cent: return a share between 0 and 1."),
            (1 - taught / len(samples), "That is the share that does not teach it."),
            (first / len(samples), "There may be several end tokens: look at all of `end_ids`."),
            (by_ids / len(samples), "An end token that is read but not learned teaches nothing: look at `labels`."),
            (anywhere / len(samples), "An end token in the middle does not count: look at the last learned one."),
            (taught / some, "A sample in which nothing is learned counts as one that does not teach the end."),
        ]
        expect_number(
            f"ends_taught({given}, {ends})", call(ends_taught, samples, ends), taught / len(samples), mistakes
        )
    return right("Anything below 1 is worth a look before you train.")


def in_blocks(x: torch.Tensor, size: int = 32, steps: int = 127) -> torch.Tensor:
    blocks = x.reshape(-1, size)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / steps
    return ((blocks / scale).round() * scale).reshape(x.shape)


@exercise("16.3", "the rounding of Q8_0", item="quantization", points=3, todo="complete `in_8_bits`")
def check_in_8_bits(in_8_bits: Callable[[torch.Tensor], torch.Tensor]) -> Verdict:
    """in_8_bits(x): x rounded in blocks of 32 to 8 bits."""
    import torch

    generator = torch.Generator().manual_seed(16)
    for shape in [(2, 64), (1, 3, 96)]:
        x = torch.randn(shape, generator=generator)
        x[..., 5] *= 20  # so that a block's scale matters
        came = call(in_8_bits, x.clone())
        if not isinstance(came, torch.Tensor):
            raise Mistake(f"in_8_bits gives {described(came)}, expected a tensor.")
        if came.shape != x.shape:
            raise Mistake(f"in_8_bits of shape {shape} gives shape {tuple(came.shape)}: reshape it back.")
        x_scale = x.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        mistakes = [
            (in_blocks(x, steps=128), "Divide the largest value by 127, not by 128."),
            (in_blocks(x, steps=255), "The multiples go from -127 to 127: divide by 127."),
            (in_blocks(x, size=x.shape[-1]), "That is one scale a row: each 32 numbers have their own."),
            (in_blocks(x, size=x.numel()), "That is one scale for all: each 32 numbers have their own."),
            (
                (x.reshape(-1, 32) / x_scale).round().reshape(shape),
                "Those are the multiples: multiply by the scale again.",
            ),
            ((x.reshape(-1, 32) / x_scale).trunc().mul(x_scale).reshape(shape), "Round to the nearest multiple."),
            (x, "Nothing is rounded."),
        ]
        if not torch.allclose(came.float(), in_blocks(x), atol=1e-5):
            likely = (why for other, why in mistakes if torch.allclose(came.float(), other, atol=1e-5))
            return wrong(f"in_8_bits rounds to other numbers. {next(likely, 'Try it on one block of 32 by hand.')}")
    return right("Now round one thing and leave the other alone.")


SUSPECTS = {
    "template": "Both files gave the same text: look at the cell that compares them.",
    "tokens": "llama.cpp and transformers made the same tokens of it.",
    "weights": "With rounded weights all dots lie on the English side.",
}


@exercise("16.4", "the French riddle", item="quantization", points=1, todo="name the `culprit`")
def check_culprit(culprit: str) -> Verdict:
    """culprit: what makes the Q8_0 file speak French."""
    if culprit == "inputs":
        return right("Rounded to 8 bits, the inputs toss a coin where two words are nearly tied.")
    if isinstance(culprit, str) and culprit in SUSPECTS:
        return wrong(f"not the {culprit}: {SUSPECTS[culprit]}")
    raise Mistake(f"culprit is {described(culprit)}, expected one of {', '.join(map(repr, [*SUSPECTS, 'inputs']))}.")
