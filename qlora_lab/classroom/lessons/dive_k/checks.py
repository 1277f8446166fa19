"""Exercises of dive_k_to_the_last_bit."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_diagnosis, right, wrong

POINTS = 65_536  # of the table, from -1 to 1


def by_search(numbers, levels):
    """Codes of the nearest levels, the lower one of two that are equally near. numbers, levels: float32 tensors."""
    import torch

    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, numbers.contiguous())


def on_grid(numbers):
    """The nearest of the table's points, Tensor[n]."""
    return ((numbers + 1) / 2 * (POINTS - 1)).round() * 2 / (POINTS - 1) - 1


def steps_below(numbers):
    """The table's points below, Tensor[n]."""
    return ((numbers + 1) / 2 * (POINTS - 1)).floor() * 2 / (POINTS - 1) - 1


@exercise("K.1", "a search by table", item="quantization", points=2, todo="complete `by_table`")
def check_by_table(by_table: Callable) -> Verdict:
    """by_table(numbers, levels): of each number, the index of the level that is nearest to its *grid point*."""
    import torch

    from qlora_lab.quantization import DYNAMIC8

    draw = torch.Generator().manual_seed(5)
    for spread in (1.0, 1e-2, 1e-4):
        near = (DYNAMIC8[1:] + DYNAMIC8[:-1]) / 2
        numbers = torch.cat([near + 2e-5 * torch.randn(255, generator=draw), torch.rand(500, generator=draw) * 2 - 1])
        numbers = (numbers * spread).clamp(-1, 1)
        steps = (numbers + 1) / 2 * (POINTS - 1)
        numbers = numbers[((steps - steps.floor()) - 0.5).abs() > 0.02]  # none half-way between two points
        expected = by_search(on_grid(numbers), DYNAMIC8)
        came = call(by_table, numbers.clone(), DYNAMIC8.clone())
        if not isinstance(came, torch.Tensor) or came.shape != numbers.shape:
            return wrong(f"by_table gives {described(came)}, expected an index for each of {len(numbers)} numbers.")
        if came.is_floating_point():
            return wrong("by_table gives numbers with a point: the *index* of the level is asked for.")
        came = came.long()
        share = (came != expected).float().mean().item()
        if share == 0:
            continue
        mistakes = [
            (numbers, "That is the nearest level to the number itself: move it to its grid point first."),
            (steps_below(numbers), "You took the grid point *below* each number: take the nearest one."),
            (
                (numbers * (POINTS - 1)).round() / (POINTS - 1),
                "Your grid steps are half as wide: 65,535 steps reach from -1 to 1, not from 0 to 1.",
            ),
        ]
        for moved, why in mistakes:
            if (came != by_search(moved, DYNAMIC8)).float().mean() < 0.003:
                return wrong(why)
        return wrong(f"{share:.1%} of the codes differ from those of the table.")
    return right("Bit for bit what bitsandbytes' C++ code does on a CPU, and no line of it was read.")


LEAST = 0.1


@exercise("K.2", "scales that the table misses", item="quantization", points=3, todo="make 256 scales")
def check_missed(my_scales) -> Verdict:
    """my_scales: Tensor[256], positive, for which search and table find different levels for a tenth or more."""
    import torch

    from qlora_lab.quantization import DYNAMIC8

    if not isinstance(my_scales, torch.Tensor) or my_scales.shape != (256,):
        return wrong(f"expected a tensor of 256 scales, got {described(my_scales)}.")
    scales = my_scales.float()
    if not torch.isfinite(scales).all() or (scales <= 0).any():
        return wrong("Scales are largest absolute values: all must be finite and above 0.")
    centred = scales - scales.mean()
    if not centred.any():
        return wrong("All scales are equal: minus their mean, nothing is left to look up.")
    numbers = centred / centred.abs().max()
    share = (by_search(on_grid(numbers), DYNAMIC8) != by_search(numbers, DYNAMIC8)).float().mean().item()
    if share < LEAST:
        inside = (numbers.abs() < 1e-3).float().mean().item()
        return wrong(
            f"{share:.0%} of them are missed, expected {LEAST:.0%} or more. Where are levels closer together than grid "
            f"points? {inside:.0%} of your numbers lie there, below 0.001, once the mean is taken off."
        )
    return right(f"{share:.0%} of the scales miss their nearest level. In the bundled model it was one in 440.")


DISEASES = {
    "keeps W": "the dense weight waits for the backward pass",
    "keeps x": "keeps its input, to compute a gradient of W that nobody uses",
    "transposed": "multiplies the gradient by Wᵀ instead of W",
    "no scales": "uses the levels without their scales",
    "coarse": "rounds its input to bfloat16, whatever it came in",
    "healthy": "nothing is wrong",
}
PATIENTS = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W", "E": "healthy"}


def ill_layers(q) -> dict:
    """Functions x -> x Wᵀ for one frozen quantized W, by name. Solve exercise K.3 before you read on."""
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


@exercise("K.3", "five patients", item="train", points=2, todo="name what is wrong with each of the five")
def check_ill_layers(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the patients A to E, a key of DISEASES."""
    clues = {
        ("A", "keeps W"): "What it keeps grows with the number of tokens. W does not.",
        ("A", "healthy"): "Right numbers are not enough: what does it keep?",
        ("B", "healthy"): "In bfloat16 the dense layer rounds as well. What is its error in float32?",
        ("B", "no scales"): "Then the output would be wrong by far more than a few thousandths.",
        ("B", "transposed"): "Then the gradient would be wrong by more than its own size.",
        ("C", "coarse"): "What is its error in float32?",
        ("C", "keeps x"): "It keeps 0 bytes.",
        ("E", "coarse"): "What is its error in float32?",
        ("E", "keeps x"): "It keeps 0 bytes.",
        ("D", "keeps x"): "What it keeps is the same for 2 tokens and for 200. x is not.",
        ("D", "healthy"): "Right numbers are not enough: what does it keep?",
    }
    expect_diagnosis(diagnosis, PATIENTS, DISEASES, clues)
    return right("Two give the right numbers at the wrong price: no loss curve would have told you.")
