"""Exercises of 00_start_here."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, exercise, expect_number, right, written


@exercise("0.1", "bytes of a model's weights", item="memory", points=1, todo="complete `weight_bytes`")
def check_bytes_of_weights(weight_bytes: Callable[[float, int], float]) -> Verdict:
    """weight_bytes(parameters, bits): how many bytes so many weights take, at so many bits each."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for parameters, bits in [(134_515_008, 32), (134_515_008, 16), (134_515_008, 4), (7e9, 4)]:
        expected = parameters * bits / 8
        mistakes = [
            (parameters * bits, "These are bits: eight make a byte."),
            (parameters * bits * 8, "You multiplied by 8. A byte holds eight bits, so divide."),
            (parameters * (bits // 8), "`bits // 8` turns half a byte into 0: divide with `/`."),
            (parameters * 8 / bits, "You divided by `bits`: fewer bits must give fewer bytes."),
            (parameters * 4, "That is the result for 32 bits: is `bits` used?"),
        ]
        for unit, size in units.items():
            why = f"These are {unit}. Plain bytes are asked for: choose the unit when you print."
            mistakes += [(value, why) for value in (expected / size, expected // size, round(expected / size))]
        source = written(weight_bytes, (parameters, bits))
        expect_number(source, call(weight_bytes, parameters, bits), expected, mistakes)
    return right(
        "Seven billion weights: 28 GB at 32 bits, 3.5 GB at 4. What training adds on top is the subject of lesson 02."
    )
