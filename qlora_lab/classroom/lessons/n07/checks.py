"""Exercises of 07_qlora_from_scratch."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Mistake,
    Verdict,
    call,
    described,
    exercise,
    expect_diagnosis,
    expect_number,
    right,
    wrong,
)

BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a weight in NF4 with double quantization


@exercise("7.1", "back through a 4-bit layer", item="train", points=1, todo="complete `input_gradient`")
def check_input_gradient(input_gradient: Callable) -> Verdict:
    """input_gradient(gradient, q) -> dL/dx of y = x Wᵀ with W = q.dequantize(), in the gradient's dtype.

    gradient: dL/dy, Tensor[..., out]. q: a QuantizedTensor of shape (out, in).
    """
    import torch

    from qlora_lab.quantization import quantize

    draw = torch.Generator().manual_seed(6)
    for out, features, dtype in [(64, 64, torch.float32), (32, 96, torch.float32), (32, 96, torch.bfloat16)]:
        q = quantize(torch.randn(out, features, generator=draw))
        weight = q.dequantize()
        gradient = torch.randn(2, 5, out, generator=draw).to(dtype)
        expected = gradient @ weight.to(dtype)
        try:
            came = call(input_gradient, gradient.clone(), q)
        except Mistake as mistake:
            if "same dtype" in str(mistake):
                return wrong("gradient is bfloat16 here and the weight float32: cast the weight to gradient.dtype.")
            if "shapes cannot be multiplied" in str(mistake):
                return wrong(
                    f"W is ({out}, {features}) and gradient (..., {out}): is there a .T too many? Going back takes "
                    "the weight as it is."
                )
            raise
        source = "input_gradient"
        if not isinstance(came, torch.Tensor):
            return wrong(f"{source} gives {described(came)}, expected one tensor: dL/dx.")
        if came.shape != expected.shape:
            why = " Is that dL/dW? The weight is frozen." if came.shape[-2:] == weight.shape else ""
            return wrong(f"{source} gives the shape {tuple(came.shape)}, expected x's: {tuple(expected.shape)}.{why}")
        if came.dtype != dtype:
            return wrong(f"{source} gives {came.dtype} for a {dtype} gradient: cast the weight, not the gradient.")
        if torch.allclose(came.float(), expected.float(), rtol=2e-2, atol=1e-1 if dtype == torch.bfloat16 else 1e-3):
            continue
        if out == features and torch.allclose(came, gradient @ weight.T, atol=1e-3):
            return wrong("You used Wᵀ: that is the way forward. It runs because this W is square. Back it is W.")
        levels = q.codebook[q.indices()].to(dtype)
        if torch.allclose(came.float(), (gradient @ levels).float(), rtol=2e-2, atol=1e-1):
            return wrong("These are the levels without their scales: q.dequantize() multiplies by absmax.")
        return wrong(f"The values for a W of shape ({out}, {features}) differ from gradient @ W.")
    return right("The chain rule for x alone. Nobody asks for dL/dW, so x need not be kept.")


@exercise("7.2", "what the short version costs", item="train", points=2, todo="fill in three numbers of `mine`")
def check_short_version(mine: dict[str, float]) -> Verdict:
    """mine: of the learner's model, "parameters" (in linear layers), and GB of weights at the end of the forward pass.

    "FrozenMatmul": codes and scales. "short version": these, and a bf16 copy of every weight.
    """
    names = ("parameters", "FrozenMatmul", "short version")
    if not isinstance(mine, dict) or not set(names) <= set(mine):
        return wrong(f"expected a dict with {', '.join(map(repr, names))}, got {described(mine)}.")
    parameters, low, high = (mine[name] for name in names)
    if not isinstance(parameters, int | float) or not 1e6 <= parameters <= 1e13:
        return wrong(f"'parameters' is {described(parameters)}, expected a number: 8 billion are 8e9.")
    packed, gb = BITS, parameters / 8 / 1e9
    units = [
        (8, "These are gigabits: eight bits make a byte."),
        (1e9, "These are bytes: GB are asked for."),
        (1e9 / 2**30, "These are GiB: 1 GB is 10^9 bytes."),
        (1 / gb, "These are bits for one weight: how many are there?"),
    ]
    for name, came, bits, mistakes in [
        ("FrozenMatmul", low, packed, [(4.0, "These are the codes alone: the scales are missing.")]),
        (
            "short version",
            high,
            packed + 16,
            [
                (packed, "These are the 4-bit weights alone: the dense copies wait beside them."),
                (16.0, "These are the dense copies alone: the 4-bit weights are still there."),
                (packed + 32, "These are float32 copies: in bfloat16 a weight takes 16 bits."),
                (4.0 + 16, "Codes and copies: the scales are missing."),
                (16 - packed, "You subtracted: nothing is saved here, both are in memory at once."),
            ],
        ),
    ]:
        likely = [(wrong_bits * gb, why) for wrong_bits, why in mistakes]
        likely += [(bits * gb * factor, why) for factor, why in units]
        expect_number(f"mine[{name!r}]", came, bits * gb, likely, 1e-3)
    return right(
        f"{packed * gb:.3g} GB, or {(packed + 16) * gb:.3g} with the short version. LoRA on a bf16 base would hold "
        f"{16 * gb:.3g}: less than a 4-bit base that is written carelessly."
    )


DISEASES = {
    "keeps W": "the dense weight waits for the backward pass",
    "keeps x": "keeps its input, to compute a gradient of W that nobody uses",
    "transposed": "multiplies the gradient by Wᵀ instead of W",
    "no scales": "uses the levels without their scales",
    "coarse": "rounds its input to bfloat16, whatever it came in",
    "healthy": "nothing is wrong",
}
PATIENTS = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W"}


def ill_layers(q) -> dict:
    """Four functions x -> x Wᵀ for one frozen quantized W, by name. Solve exercise 7.3 before you read on."""
    import torch

    class KeepsX(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x @ q.dequantize().to(x.dtype).T

        @staticmethod
        def backward(ctx, above):
            (x,) = ctx.saved_tensors
            above.flatten(0, -2).T @ x.flatten(0, -2)  # dL/dW
            return above @ q.dequantize().to(above.dtype)

    class Coarse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.dtype = x.dtype
            return (x.bfloat16() @ q.dequantize().bfloat16().T).to(x.dtype)

        @staticmethod
        def backward(ctx, above):
            return (above.bfloat16() @ q.dequantize().bfloat16()).to(ctx.dtype)

    class Healthy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ q.dequantize().to(x.dtype).T

        @staticmethod
        def backward(ctx, above):
            return above @ q.dequantize().to(above.dtype)

    class KeepsW(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            weight = q.dequantize().to(x.dtype)
            ctx.save_for_backward(weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return gradient @ weight

    layers = {"keeps x": KeepsX, "coarse": Coarse, "healthy": Healthy, "keeps W": KeepsW}
    return {patient: layers[disease].apply for patient, disease in PATIENTS.items()}


@exercise("7.3", "four patients", item="train", points=2, todo="name what is wrong with each of the four")
def check_ill_layers(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the patients A to D, a key of DISEASES."""
    clues = {
        ("A", "keeps W"): "What it keeps grows with the number of tokens. W does not.",
        ("A", "healthy"): "Right numbers are not enough: what does it keep?",
        ("B", "healthy"): "In bfloat16 the dense layer rounds as well. What is its error in float32?",
        ("B", "no scales"): "Then the output would be wrong by far more than a few thousandths.",
        ("B", "transposed"): "Then the gradient would be wrong by more than its own size.",
        ("C", "coarse"): "What is its error in float32?",
        ("C", "keeps x"): "It keeps 0 bytes.",
        ("D", "keeps x"): "What it keeps is the same for 2 tokens and for 200. x is not.",
        ("D", "healthy"): "Right numbers are not enough: what does it keep?",
    }
    expect_diagnosis(diagnosis, PATIENTS, DISEASES, clues)
    return right("Two give the right numbers at the wrong price: a loss curve would never have told you.")
