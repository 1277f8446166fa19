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
    written,
    wrong,
)


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


@exercise("7.2", "what the short version costs", item="train", points=2, todo="complete `short_version_gb`")
def check_short_version(short_version_gb: Callable[[int], float]) -> Verdict:
    """short_version_gb(parameters): GB of linear weights at the end of the forward pass, if autograd keeps dense ones.

    4-bit codes, double-quantized scales, and a bf16 copy of every weight.
    """
    for parameters in (6_476_005_376, 64_760_053_760):
        packed, gb = 4 + 8 / 64 + 32 / (64 * 256), parameters / 8 / 1e9
        mistakes = [
            (packed * gb, "These are the 4-bit weights alone: the dense copies wait beside them."),
            (16 * gb, "These are the dense copies alone: the 4-bit weights are still there."),
            ((packed + 32) * gb, "These are float32 copies: in bfloat16 a weight takes 16 bits."),
            ((4 + 16) * gb, "Codes and copies; the scales are missing, 0.127 bits per parameter."),
            ((4.5 + 16) * gb, "These are float32 scales. Double-quantized ones take 0.127 bits per parameter."),
            ((4 + 8 / 64 + 16) * gb, "The scales have scales: a float32 for every 64 × 256 weights is missing."),
            ((16 - packed) * gb, "You subtracted: nothing is saved here, both are in memory at once."),
            (8 * (packed + 16) * gb, "These are gigabits: eight bits make a byte."),
            ((packed + 16) * gb * 1e9, "These are bytes: GB are asked for."),
            ((packed + 16) * gb * 1e9 / 2**30, "These are GiB: 1 GB is 10^9 bytes."),
            (packed + 16, "These are bits per parameter."),
        ]
        source = written(short_version_gb, (parameters,))
        expect_number(source, call(short_version_gb, parameters), (packed + 16) * gb, mistakes, 1e-3)
    return right("16.3 GB at 7B, where LoRA on a bf16 base would hold 13.0: worse than no 4 bits.")


DISEASES = {
    "keeps W": "the dense weight waits for the backward pass",
    "keeps x": "keeps its input, to compute a gradient of W that nobody uses",
    "transposed": "multiplies the gradient by Wᵀ instead of W",
    "no scales": "uses the levels without their scales",
    "coarse": "multiplies in bfloat16 whatever its input is",
    "healthy": "nothing is wrong",
}
PATIENTS = {"A": "keeps x", "B": "transposed", "C": "healthy", "D": "keeps W"}


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

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ q.dequantize().to(x.dtype).T

        @staticmethod
        def backward(ctx, above):
            return above @ q.dequantize().to(above.dtype).T

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

    layers = {"keeps x": KeepsX, "transposed": Transposed, "healthy": Healthy, "keeps W": KeepsW}
    return {patient: layers[disease].apply for patient, disease in PATIENTS.items()}


@exercise("7.3", "four patients", item="train", points=3, todo="name what is wrong with each of the four")
def check_ill_layers(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the patients A to D, a key of DISEASES."""
    clues = {
        ("A", "keeps W"): "What it keeps grows with the number of tokens. W does not.",
        ("A", "healthy"): "Right numbers are not enough: what does it keep?",
        ("B", "healthy"): "Compare its gradient with the dense layer's.",
        ("B", "no scales"): "Then the output would be wrong too.",
        ("B", "coarse"): "Its gradient is not off by a thousandth but by more than its own size.",
        ("C", "coarse"): "In bfloat16 the dense layer rounds just as much. What is its error in float32?",
        ("C", "keeps x"): "It keeps 0 bytes.",
        ("D", "keeps x"): "What it keeps is the same for 2 tokens and for 200. x is not.",
        ("D", "healthy"): "Right numbers are not enough: what does it keep?",
    }
    expect_diagnosis(diagnosis, PATIENTS, DISEASES, clues)
    return right("Two compute the right numbers at the wrong price: a loss curve would never have told you.")


@exercise("7.4", "what may be quantized", item="train", points=2, todo="complete `quantizable`")
def check_quantizable(quantizable: Callable) -> Verdict:
    """quantizable(model) -> names of the nn.Linear modules whose weight is not an embedding's weight too."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self, head: str, tied: bool, like_embeddings: bool = False):
            super().__init__()
            self.embed = nn.Embedding(40, 16)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"q_proj": nn.Linear(16, 16), "norm": nn.LayerNorm(16)}) for _ in range(2)
            )
            self.add_module(head, nn.Linear(16, 40, bias=False))
            if tied:
                getattr(self, head).weight = self.embed.weight
            elif like_embeddings:
                getattr(self, head).weight.data.copy_(self.embed.weight.data)

    inner = ["blocks.0.q_proj", "blocks.1.q_proj"]
    torch.manual_seed(0)
    for head, tied, equal in [("lm_head", True, False), ("output", True, False), ("lm_head", False, True)]:
        model = Model(head, tied, equal)
        expected = inner if tied else [*inner, head]
        came = call(quantizable, model)
        if isinstance(came, (str, bytes, dict)) or not hasattr(came, "__iter__"):
            return wrong(f"quantizable gives {described(came)}, expected a list of names.")
        names = list(came)
        if not all(isinstance(name, str) for name in names):
            return wrong(f"The list holds {described(names[0])}, expected names, as named_modules() gives them.")
        if sorted(names) == sorted(expected):
            continue
        if tied and head in names:
            if head == "output":
                return wrong(
                    "This model calls its head `output`, and you let it through. A name proves nothing: is its weight "
                    "the very tensor that the embedding holds?"
                )
            return wrong(f"{head} is in the list, but its weight is the embedding matrix too.")
        if not tied and head not in names and sorted(names) == inner:
            return wrong(
                "This model's head has a weight of its own, so it belongs in the list. Its values equal the "
                "embedding's (a copy): compare with `is`, neither by name nor by value."
            )
        if "embed" in names:
            return wrong("embed is in the list: an nn.Embedding is looked up, not multiplied by.")
        if any("norm" in name for name in names):
            return wrong("A norm is in the list: only nn.Linear modules are quantized.")
        if "q_proj" in names:
            return wrong("Names must be complete: blocks.0.q_proj, since every block has a q_proj.")
        return wrong(f"quantizable gives {names}, expected {expected}.")
    return right("Tied weights serve two masters: the one quantized, the other must stay, and nothing is saved.")
