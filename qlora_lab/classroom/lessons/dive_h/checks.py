"""Exercises of dive_h_merging."""

import functools
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, wrong

VERDICTS = ("fits", "works, but", "hardly pays")


@exercise("H.1", "which base was it merged into?", item="accuracy", points=2, todo="complete `which_base`")
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


@exercise("H.2", "two adapters in one", item="train", points=2, todo="complete `joined`")
def check_joined(joined: Callable) -> Verdict:
    """joined(first, second): A and B of the one adapter, of scale 1, that adds what both add together.

    Each of the two is (A, B, scale), of shapes (rank, in) and (out, rank); their ranks may differ.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    for ranks, scales in [((3, 3), (2.0, 0.5)), ((2, 4), (0.5, 1.5))]:
        (A1, B1), (A2, B2) = (
            (torch.randn(rank, 6, generator=draw), torch.randn(5, rank, generator=draw)) for rank in ranks
        )
        s1, s2 = scales
        came = call(joined, (A1.clone(), B1.clone(), s1), (A2.clone(), B2.clone(), s2))
        pair = isinstance(came, (tuple, list)) and len(came) == 2
        if not pair or not all(isinstance(tensor, torch.Tensor) and tensor.ndim == 2 for tensor in came):
            return wrong(f"joined gives {described(came)}, expected the pair A, B of matrices.")
        A, B = came
        if (A.shape[1], B.shape[0]) != (6, 5) or A.shape[0] != B.shape[1]:
            shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
            return wrong(f"A and B have the shapes {shapes}, expected (rank, in) and (out, rank) of one rank.")
        first, second = B1 @ A1, B2 @ A2
        mistakes = [
            (first + second, "Both scales are missing: yours has scale 1, so they belong into A or B."),
            (s1**2 * first + s2**2 * second, "Each scale is in twice: multiply A by it or B, not both."),
            (s1 * first, "That is the first one alone."),
            (s2 * second, "That is the second one alone."),
            (s2 * first + s1 * second, "Each adapter has the other one's scale."),
        ]
        if A1.shape == A2.shape:
            A_sum, B_sum = A1 + A2, s1 * B1 + s2 * B2
            scaled = (s1**0.5 * B1 + s2**0.5 * B2) @ (s1**0.5 * A1 + s2**0.5 * A2)
            crossed = "You added A to A and B to B: then B1 meets A2 as well, and B2 meets A1."
            mistakes += [
                (B_sum @ A_sum, crossed),
                ((B1 + B2) @ A_sum, crossed),
                (scaled, crossed),
                ((B1 + B2) @ (s1 * A1 + s2 * A2), crossed),
            ]
        expected = s1 * first + s2 * second
        if not torch.allclose(B @ A, expected, rtol=1e-3, atol=1e-4):
            likely = (why for mistake, why in mistakes if torch.allclose(B @ A, mistake, rtol=1e-3, atol=1e-4))
            off = (B @ A - expected).abs().max()
            why = next(likely, "Expected B A = scale1 · B1 A1 + scale2 · B2 A2.")
            return wrong(f"With ranks {ranks[0]} and {ranks[1]}, B A is off by up to {off:.3g}. {why}")
    return right("Rows below rows and columns beside columns: ranks add up, and so do the corrections.")


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
        "Qwen2.5-1.5B": transformers.Qwen2Config(
            vocab_size=151_936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"],
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
        "Llama-3-8B": transformers.LlamaConfig(
            vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, architectures=["LlamaForCausalLM"]
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
    "Qwen2.5-1.5B": "Its tied table takes 0.47 GB in 16 bits, its linears 0.68 GB in 4.",
    "Gemma-2-2B": "Its vocabulary has 256,000 tokens: in 16 bits the embedding alone outweighs all linears in 4.",
    "Llama-3-8B": "Its embedding and head take 2.1 GB, its linears 3.6 GB.",
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
