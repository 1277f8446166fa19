"""Exercises of 00_start_here."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, written, wrong


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
    return right("Seven billion weights: 28 GB at 32 bits, 3.5 GB at 4. What training adds on top is notebook 02.")


@exercise("0.2", "the compute dtype of a machine", item="config", points=1, todo="complete `choose_compute_dtype`")
def check_compute_dtype(choose_compute_dtype: Callable) -> Verdict:
    """choose_compute_dtype(device_type, has_bf16): the torch.dtype to multiply matrices in, on "cpu" or "cuda"."""
    from torch import bfloat16, dtype, float16, float32

    mistakes = {
        ("cpu", False, bfloat16): "Without bf16 instructions a CPU is far slower in bfloat16: you measured it.",
        ("cpu", False, float16): "float16 is slow on a CPU, and overflows beyond 65,504.",
        ("cpu", True, float16): "float16 is slow on a CPU, and overflows beyond 65,504.",
        ("cpu", True, float32): "That works, but leaves the CPU's bf16 instructions unused.",
        ("cuda", True, float16): "That runs, but overflows beyond 65,504: bfloat16 has float32's range.",
        ("cuda", True, float32): "That works, but slowly: the tensor cores want 16 bits.",
        ("cuda", False, bfloat16): "A GPU without bf16, such as the T4, imitates it, slowly: float16 is native.",
        ("cuda", False, float32): "That works on a T4, but slowly: its tensor cores want float16.",
    }
    best = {("cpu", False): float32, ("cpu", True): bfloat16, ("cuda", True): bfloat16, ("cuda", False): float16}
    for machine, expected in best.items():
        came = call(choose_compute_dtype, *machine)
        source = written(choose_compute_dtype, machine)
        if isinstance(came, str):
            return wrong(f"{source} gives the string {came!r}, expected a dtype: torch.{came.removeprefix('torch.')}.")
        if not isinstance(came, dtype):
            return wrong(f"{source} gives {described(came)}, expected a torch.dtype.")
        if came != expected:
            return wrong(f"{source} gives {came}, expected {expected}. {mistakes.get((*machine, came), '')}")
    return right("bf16 where the hardware has it, float16 on older GPUs, float32 on older CPUs.")
