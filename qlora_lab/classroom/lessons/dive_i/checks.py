"""Exercises of dive_i_the_offset."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, wrong

if TYPE_CHECKING:
    import torch

OFFSETS = [0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99]


def best_by(cost: Callable[[torch.Tensor], float], x: torch.Tensor, block_size: int, pick: Callable = min) -> float:
    """The offset whose 16 levels give the least cost of the errors; with `pick=max`, the largest."""
    from qlora_lab.quantization import normal_float, quantize

    costs = [cost(quantize(x, normal_float(4, offset), block_size).dequantize() - x) for offset in OFFSETS]
    return OFFSETS[costs.index(pick(costs))]


@exercise("I.1", "the best offset for given weights", item="nf4", points=2, todo="complete `best_offset`")
def check_best_offset(best_offset: Callable[..., float]) -> Verdict:
    """best_offset(x, block_size, offsets): the offset whose 16 levels have the least relative RMS error on x."""
    from qlora_lab.classroom.samples import sample

    def squares(error: torch.Tensor) -> float:
        return error.double().square().sum().item()

    def largest(error: torch.Tensor) -> float:
        return error.abs().max().item()

    for distribution, block_size in (("Gaussian", 32), ("Student-t", 64), ("Gaussian", 512)):
        x = 0.02 * sample(distribution, 2**15, seed=17)
        source = f"best_offset({distribution} numbers, {block_size}, {OFFSETS})"
        came = call(best_offset, x.clone(), block_size, list(OFFSETS))
        expected = best_by(squares, x, block_size)
        mistakes = [
            (OFFSETS.index(expected), "That is an index: return the offset itself."),
            (best_by(squares, x, 64), "That is the best in blocks of 64: is block_size used?"),
            (best_by(squares, x, block_size, max), "With that one the error is the largest."),
            (
                best_by(largest, x, block_size),
                "There the *largest* miss is smallest. Take the relative RMS error.",
            ),
        ]
        expect_number(source, came, expected, mistakes)
    return right("Now ask it about weights of your own.")


DIAGNOSES = ("innocent", "15 values", "swapped digits", "midpoint formula", "one scale", "nibbles swapped")
SUSPECTS = {
    "A": ("swapped digits", "Its codebook has 15 of NF4's values. Which one differs, and in what way?"),
    "B": ("one scale", "Its codebook is NF4. Look at absmax."),
    "C": ("midpoint formula", "Its codebook is symmetric and has no 0, and its error is lower than NF4's."),
    "D": ("innocent", "Compare codes, absmax and codebook with those of quantize(x, NF4)."),
    "E": ("15 values", "How many different values does its codebook hold?"),
    "F": ("nibbles swapped", "Codebook and absmax are right. Compare its first codes with those of quantize(x, NF4)."),
}


@exercise("I.2", "six suspects", item="nf4", points=3, todo="name what each suspect did")
def check_suspects(verdict) -> Verdict:
    """verdict: {"A": one of DIAGNOSES, ..., "F": ...}."""
    if not isinstance(verdict, dict) or set(verdict) != set(SUSPECTS):
        return wrong(f'expected a dict with the keys "A" to "F", got {described(verdict)}.')
    for name, diagnosis in verdict.items():
        if diagnosis not in DIAGNOSES:
            return wrong(f"{name}: {described(diagnosis)} is no diagnosis; choose from {', '.join(DIAGNOSES)}.")
    misjudged = [name for name, (truth, _) in SUSPECTS.items() if verdict[name] != truth]
    if misjudged:
        name = misjudged[0]
        solved = f"{6 - len(misjudged)} of 6 are right. "
        return wrong(f"{solved}{name} is not {verdict[name]!r}. {SUSPECTS[name][1]}")
    return right("All six. Two of the bugs leave the error as it is or lower it: only equality finds them.")
