"""Exercises of dive_h_merging."""

import functools
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, wrong

VERDICTS = ("fits", "works, but", "hardly pays")


@exercise("H.1", "merging one layer", item="train", points=1, todo="complete `merged_weight`")
def check_merged_weight(merged_weight: Callable) -> Verdict:
    """merged_weight(weight, A, B, alpha): the weight that does alone what the layer and its adapter do together.

    Tensors of shapes (out, in), (rank, in) and (out, rank).
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    for outputs, inputs, rank, alpha in [(6, 10, 2, 8.0), (12, 5, 3, 1.5)]:
        weight, a, b = (
            torch.randn(shape, generator=draw) for shape in ((outputs, inputs), (rank, inputs), (outputs, rank))
        )
        given = [tensor.clone() for tensor in (weight, a, b)]
        came = call(merged_weight, *given, alpha)
        if not isinstance(came, torch.Tensor):
            return wrong(f"merged_weight gives {described(came)}, expected a tensor.")
        if came.shape != weight.shape:
            turned = " Is it transposed?" if came.shape == weight.T.shape else ""
            shape = tuple(came.shape)
            return wrong(
                f"merged_weight gives the shape {shape}, expected the weight's, {tuple(weight.shape)}.{turned}"
            )
        product = b @ a
        if torch.allclose(came, weight + alpha / rank * product, rtol=1e-3, atol=1e-4):
            if not torch.equal(given[0], weight):
                return wrong(
                    "The result is right, but the weight was changed on the way: the base should stay as it is."
                )
            continue
        mistakes = [
            (weight + product, "This is W + B A: the factor alpha / rank is missing."),
            (weight + alpha * product, "This is W + alpha · B A: divide by the rank."),
            (weight + product / rank, "This is W + B A / rank: multiply by alpha."),
            (weight + rank / alpha * product, "The factor is upside down: alpha / rank."),
            (
                weight + alpha / inputs * product,
                "You divided by the number of inputs: the rank is A's *first* dimension.",
            ),
            (weight + alpha / outputs * product, "You divided by the number of outputs: the rank is B's *second* one."),
            (alpha / rank * product, "This is the correction alone: add it to the weight."),
            (weight - alpha / rank * product, "You subtracted: that would unmerge."),
            (weight, "The weight is unchanged."),
        ]
        likely = (why for mistake, why in mistakes if torch.allclose(came, mistake, rtol=1e-3, atol=1e-4))
        off = (came - weight - alpha / rank * product).abs().max()
        return wrong(f"The weight is off by up to {off:.3g}. {next(likely, 'Expected W + alpha / rank · B A.')}")
    return right("One matrix does the work of three: no extra time per token, and no way to take the adapter off.")


@exercise("H.2", "which base was it merged into?", item="accuracy", points=3, todo="complete `which_base`")
def check_which_base(which_base: Callable) -> Verdict:
    """which_base(merged, delta, original, rounded): "dequantized", "requantized" or "pristine".

    merged: a weight of a checkpoint, in bf16. delta: what the adapter adds. original: the base's weight before it was
    quantized; rounded: after, dequantized. All (out, in), float32 except `merged`.
    """
    import torch

    from qlora_lab.quantization import dequantize, quantize

    draw = torch.Generator().manual_seed(0)
    for round_ in range(3):  # small and large corrections
        original = torch.randn(32, 128, generator=draw)
        rounded = dequantize(quantize(original))
        delta = (0.01, 0.05, 0.2)[round_] * torch.randn(32, 128, generator=draw)
        cases = {
            "pristine": original + delta,
            "dequantized": rounded + delta,
            "requantized": dequantize(quantize(rounded + delta)),
        }
        for expected, merged in cases.items():
            came = call(which_base, merged.to(torch.bfloat16), delta.clone(), original.clone(), rounded.clone())
            if not isinstance(came, str) or came not in cases:
                return wrong(f"which_base gives {described(came)}, expected one of {', '.join(cases)}.")
            if came != expected:
                return wrong(f"You took a {expected} checkpoint for a {came} one. {CONFUSED[expected, came]}")
    return right("Merged weights tell where they come from, as long as somebody kept the adapter.")


CONFUSED = {
    ("pristine", "dequantized"): "What is left when delta is subtracted, the original or the rounded weight?",
    ("dequantized", "pristine"): "What is left when delta is subtracted, the original or the rounded weight?",
    ("requantized", "dequantized"): "Neither base is left when delta is subtracted: round `rounded + delta` yourself.",
    (
        "dequantized",
        "requantized",
    ): "Its values lie off the 16 levels. The checkpoint is rounded to bf16: never ask `==`.",
    ("requantized", "pristine"): "Compare all three candidates and take the nearest.",
    ("pristine", "requantized"): "Compare all three candidates and take the nearest.",
}


@exercise("H.3", "how many adapters fit?", item="memory", points=1, todo="complete `adapters_that_fit`")
def check_adapters_that_fit(adapters_that_fit: Callable) -> Verdict:
    """adapters_that_fit(card, merged, base, adapter): how many adapters plan A and plan B can keep ready.

    In bytes: the card, a merged model, the 4-bit base, an adapter.
    """
    cases = [(24e9, 13.5e9, 3.9e9, 0.16e9), (80e9, 13.5e9, 3.9e9, 0.64e9), (3e9, 13.5e9, 3.9e9, 0.64e9)]
    for card, merged, base, adapter in cases:
        came = call(adapters_that_fit, card, merged, base, adapter)
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"adapters_that_fit gives {described(came)}, expected the pair plan_a, plan_b.")
        plan_a, plan_b = card // merged, max(0.0, (card - base) // adapter)
        source = f"adapters_that_fit({card:g}, {merged:g}, {base:g}, {adapter:g})"
        a_mistakes = [
            (card / merged, "Half a model serves nobody: round down."),
            ((card - base) // merged, "Plan A needs no 4-bit base: the merged models stand alone."),
            (card // (merged + adapter), "A merged model has its adapter inside."),
            (plan_b, "That is plan B's number: plan A comes first."),
        ]
        b_mistakes = [
            (card // adapter, "The base has to fit too."),
            (card // (base + adapter), "One base serves all adapters: subtract it once."),
            ((card - base) / adapter, "Part of an adapter serves nobody: round down."),
            ((card - base) // adapter, "Where not even the base fits there is no adapter, not a negative number."),
        ]
        expect_number(f"plan A of {source}", came[0], plan_a, a_mistakes)
        expect_number(f"plan B of {source}", came[1], plan_b, b_mistakes)
    return right("On 24 GB: one merged 7B model, or 125 adapters of 160 MB on one 4-bit base.")


def unseen_configs() -> dict:
    """Configs of four models, in the sizes that their makers published."""
    import transformers

    return {
        "Llama-3-8B": transformers.LlamaConfig(
            vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, architectures=["LlamaForCausalLM"]
        ),
        "Gemma-2-2B": transformers.Gemma2Config(
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            hidden_size=2304,
            intermediate_size=9216,
            head_dim=256,
            vocab_size=256_000,
            architectures=["Gemma2ForCausalLM"],
        ),
        "T5-large": transformers.T5Config(
            d_model=1024, d_ff=4096, num_layers=24, num_heads=16, architectures=["T5ForConditionalGeneration"]
        ),
        "Qwen3-30B-A3B": transformers.Qwen3MoeConfig(
            num_hidden_layers=48,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,  # pyright: ignore[reportCallIssue]  # its class does not list it, and takes it
            num_experts=128,
            architectures=["Qwen3MoeForCausalLM"],
        ),
    }


WHY = {  # by model: what was overlooked
    "Llama-3-8B": "Its embedding and head take 2.1 GB, its linears 3.6 GB.",
    "Gemma-2-2B": "Its vocabulary has 256,000 tokens: in 16 bits the embedding alone outweighs all linears in 4.",
    "T5-large": "Its class lists `wo`, 29 % of the linears, in `_keep_in_fp32_modules`: those stay in 16 or 32 bits.",
    "Qwen3-30B-A3B": "128 experts a layer, held as 3-D parameters: nothing replaces those.",
}


@functools.cache
def said_of(name: str) -> str:
    """The preflight's verdict on one of `unseen_configs`."""
    from qlora_lab.models.compatibility import preflight

    return preflight(unseen_configs()[name]).verdict


@exercise("H.4", "the preflight's verdicts", item="config", points=2, todo="fill in `verdicts`")
def check_verdicts(verdicts: dict) -> Verdict:
    """verdicts: for each model of `unseen_configs`, one of VERDICTS."""
    configs = unseen_configs()
    if not isinstance(verdicts, dict) or set(verdicts) != set(configs):
        return wrong(f"expected a dict with the keys {', '.join(configs)}, got {described(verdicts)}.")
    for name in configs:
        said = said_of(name)
        expected = next(verdict for verdict in VERDICTS if said.startswith(verdict))
        if verdicts[name] not in VERDICTS:
            return wrong(f"{name}: {described(verdicts[name])}, expected one of {', '.join(map(repr, VERDICTS))}.")
        if verdicts[name] != expected:
            return wrong(f"{name} {said}. {WHY[name]}")
    return right("A gigabyte of weights says little; where in the model they sit says it all.")


@exercise("H.5", "a 4-bit model's real parameters", item="quantization", points=2, todo="complete `real_parameters`")
def check_real_parameters(real_parameters: Callable) -> Verdict:
    """real_parameters(model): how many numbers the model's parameters stand for, packed 4-bit weights included."""
    from math import prod

    from torch import bfloat16

    for name, model in _models().items():
        parameters = list(model.parameters())
        packed = [p for p in parameters if getattr(p, "quant_state", None) is not None]
        dense = sum(p.numel() for p in parameters) - sum(p.numel() for p in packed)
        expected = dense + sum(prod(p.quant_state.shape) for p in packed)
        held = dense + sum(p.numel() for p in packed)
        twice = dense + 2 * sum(p.numel() for p in packed)
        state = model.state_dict()
        constants = sum(value.numel() for key, value in state.items() if ".weight." in key)
        tied = sum(p.numel() for p in parameters if p.dtype == bfloat16)
        padded = "15 weights fill 8 bytes, and the last half byte is padding. Ask `quant_state` for the real shape."
        mistakes = [
            (held, "You counted a byte as one weight: two 4-bit codes hide in each."),
            (twice, padded),
            (expected + tied, "A tied matrix is one parameter with two names: `model.parameters()` gives it once."),
            (2 * held, "You doubled everything. Embeddings and adapters are not packed."),
            (sum(p.numel() for p in parameters if p.requires_grad), "Those are the trainable ones alone."),
            (expected - dense, "Those are the packed weights alone: the others count too."),
            (dense, "The packed weights are missing."),
            (expected + constants, "Scales and code tables are not parameters: they say how to read them."),
            (held + constants, "`state_dict()` holds scales and code tables too, and codes by the byte."),
        ]
        came = call(real_parameters, model)
        expect_number(f"real_parameters of {name}", came, expected, mistakes)
    return right(
        "PEFT and transformers double what is packed. A bare `numel()` finds 3.5 billion parameters in LLaMA-7B."
    )


def _models() -> dict:
    """Small models by description: dense, 4-bit, 4-bit with an odd number of weights, 4-bit beside a tied head."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from torch import nn

    def four_bits(inputs: int, outputs: int) -> nn.Module:
        return Linear4bit(inputs, outputs, bias=False, quant_type="nf4").to("cpu")

    tied = nn.Sequential(nn.Embedding(10, 64, dtype=torch.bfloat16), four_bits(64, 64), nn.Linear(64, 10, bias=False))
    tied[2].weight = tied[0].weight
    adapted = nn.Sequential(four_bits(64, 96), nn.Linear(64, 4, bias=False), nn.Linear(4, 96, bias=False))
    for linear in (tied[1], adapted[0]):
        linear.weight.requires_grad_(False)
    return {
        "a dense Linear(7, 5)": nn.Linear(7, 5),
        "a 4-bit Linear(64, 96) with an adapter of rank 4": adapted,
        "a 4-bit Linear(64, 64) between tied embeddings (10, 64)": tied,
        "a 4-bit Linear(5, 3)": nn.Sequential(four_bits(5, 3)),
    }
