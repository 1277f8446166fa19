"""Exercises of 07_qlora_from_scratch."""

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    exercise,
    expect_number,
    right,
    wrong,
)

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight in NF4 with double quantization


@exercise("7.1", "a 4-bit layer that keeps nothing dense", item="train", points=2, todo="complete `FrozenMatmul`")
def check_frozen_matmul(layer: type) -> Verdict:
    """layer: an autograd.Function whose apply(x, q) is x Wᵀ, W = q.dequantize(), and gives x a gradient in its dtype.

    x: Tensor[..., in]. q: a QuantizedTensor of shape (out, in).
    """
    import torch

    from qlora_lab.quantization import quantize

    if not isinstance(layer, type) or not issubclass(layer, torch.autograd.Function):
        return wrong(f"expected the class FrozenMatmul, got {described(layer)}.")
    draw = torch.Generator().manual_seed(6)
    for out, features, dtype in [(64, 64, torch.float32), (32, 96, torch.float32), (32, 96, torch.bfloat16)]:
        q = quantize(torch.randn(out, features, generator=draw))
        x = torch.randn(2, 5, features, generator=draw).to(dtype).requires_grad_()
        gradient = torch.randn(2, 5, out, generator=draw).to(dtype)
        y = call(layer.apply, x, q)
        fault = fault_of("forward", y, x @ q.dequantize().to(dtype).T)
        if fault:
            return wrong(fault)
        for name, hung in vars(y.grad_fn).items():
            if isinstance(hung, torch.Tensor) and hung.numel() == out * features:
                return wrong(f"The dense matrix waits on ctx.{name} for the backward pass: note what is in 4 bits.")
        if any(saved is not None and saved.numel() == out * features for saved in y.grad_fn.saved_tensors):
            return wrong("save_for_backward keeps the dense matrix: note what is in 4 bits.")
        weight = q.dequantize().to(dtype)
        call(backward, y, gradient)
        if x.grad is None:
            return wrong("x gets no gradient: backward returns dL/dx first, and None for q.")
        fault = fault_of("backward", x.grad, gradient @ weight)
        if fault and out == features and torch.allclose(x.grad, gradient @ weight.T, atol=1e-3):
            fault = "backward uses Wᵀ: that is the way forward. It runs because this W is square. Back it is W."
        if fault:
            return wrong(fault)
    return right("Exact, and nothing dense is kept: nobody asks for dL/dW, so not even x.")


def backward(y, gradient) -> bool:
    """Send dL/dy back through y."""
    y.backward(gradient)
    return True


def fault_of(direction: str, came, expected) -> str:
    """What is wrong with a result of forward or backward; "" if nothing is."""
    import torch

    if not isinstance(came, torch.Tensor):
        return f"{direction} gives {described(came)}, expected a tensor first."
    if came.shape != expected.shape:
        return f"{direction} gives the shape {tuple(came.shape)}, expected {tuple(expected.shape)}."
    if came.dtype != expected.dtype:
        return f"{direction} gives {came.dtype} for {expected.dtype}: cast the weight to the dtype of what it meets."
    rough = 0.1 if expected.dtype == torch.bfloat16 else 1e-3
    if torch.allclose(came.float(), expected.float(), rtol=2e-2, atol=rough):
        return ""
    return f"{direction} gives other numbers than the dense layer with W = q.dequantize()."


@exercise("7.2", "what the naive layer costs", item="train", points=2, todo="fill in the numbers of `mine`")
def check_naive(mine: dict[str, float]) -> Verdict:
    """mine: of the learner's model, "parameters", and GB of weights at the end of the forward pass.

    "FrozenMatmul": codes and scales. "naive": these, and a bf16 copy of every weight. "bfloat16": no quantization.
    """
    names = ("parameters", "FrozenMatmul", "naive", "bfloat16")
    if not isinstance(mine, dict) or not set(names) <= set(mine):
        return wrong(f"expected a dict with {', '.join(map(repr, names))}, got {described(mine)}.")
    parameters = mine["parameters"]
    if not isinstance(parameters, int | float) or not 1e6 <= parameters <= 1e13:
        return wrong(f"'parameters' is {described(parameters)}, expected a number: 8 billion are 8e9.")
    bits = {"FrozenMatmul": BITS, "naive": BITS + 16, "bfloat16": 16.0}
    gb = parameters / 8 / 1e9
    for name, expected in bits.items():
        likely = [(wrong_bits * gb, why) for wrong_bits, why in MISTAKEN_BITS[name]]
        likely += [
            (8 * expected * gb, "These are gigabits: eight bits make a byte."),
            (1e9 * expected * gb, "These are bytes: GB are asked for."),
            (1e9 / 2**30 * expected * gb, "These are GiB: 1 GB is 10^9 bytes."),
            (expected, "These are bits for one weight: how many are there?"),
        ]
        expect_number(f"mine[{name!r}]", mine[name], expected * gb, likely, 1e-3)
    return right(
        f"{BITS * gb:.3g}, {(BITS + 16) * gb:.3g} and {16 * gb:.3g} GB: in training, a 4-bit base that is written "
        "carelessly takes more, without checkpointing, than one that is not quantized at all."
    )


MISTAKEN_BITS = {
    "FrozenMatmul": [(4.0, "These are the codes alone: the scales are missing.")],
    "naive": [
        (BITS, "These are the 4-bit weights alone: the dense copies wait beside them."),
        (16.0, "These are the dense copies alone: the 4-bit weights are still there."),
        (BITS + 32, "These are float32 copies: in bfloat16 a weight takes 16 bits."),
        (20.0, "Codes and copies: the scales are missing."),
        (16 - BITS, "You subtracted: nothing is saved here, both are in memory at once."),
    ],
    "bfloat16": [
        (32.0, "That is float32: in bfloat16 a weight takes 16 bits."),
        (BITS + 16, "Without quantization there are no codes and scales."),
    ],
}
