"""Exercises of 02_memory_wall."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    error_text,
    exercise,
    expect_number,
    right,
    written,
    wrong,
)
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.memory.tensors import model_parts


@exercise("2.1", "the largest model for a card", item="memory", points=1, todo="complete `largest_model`")
def check_largest_model(largest_model: Callable[[float, int, int, bool], float]) -> Verdict:
    """largest_model(card, bits, moment_bits, copy): parameters that fit into `card` GB.

    bits: of a weight and of its gradient. moment_bits: of each of Adam's two numbers. copy: an fp32 copy of weights.
    """
    for card, bits, moment, copy in [(24, 16, 8, True), (80, 16, 32, True), (40, 32, 32, False)]:
        fp32 = 32 if copy else 0
        expected = card * 1e9 * 8 / (2 * bits + 2 * moment + fp32)

        def fits(total_bits, card=card):
            return card * 1e9 * 8 / total_bits

        mistakes = [
            (expected / 8, "These are bits: a byte has eight, so eight times as many parameters fit."),
            (expected / 1e9, "This is in billions: return the number of parameters itself."),
            (expected * 2**30 / 1e9, "This is a card in GiB (2^30 bytes): GB are 10^9."),
            (fits(2 * bits + moment + fp32), "Adam keeps two numbers for each parameter: mean and mean square."),
            (fits(bits + 2 * moment + fp32), "The gradients are missing, or the copy is too small: 32 bits."),
            (fits(bits), "These are the weights alone, enough to run the model, not to train it."),
            (fits(2 * bits), "Adam's two numbers are missing."),
        ]
        if copy:
            mistakes.append((fits(2 * bits + 2 * moment), "The fp32 copy of the weights is missing."))
        else:
            mistakes.append((fits(2 * bits + 2 * moment + 32), "Here `copy` is False: there is no fp32 copy."))
        source = written(largest_model, (card, bits, moment, copy))
        # 1e-6: rounding to whole parameters is fine
        expect_number(source, call(largest_model, card, bits, moment, copy), expected, mistakes, 1e-6)
    return right("80 GB: 5.0 billion parameters in mixed precision, without one activation. 7B does not fit.")


@exercise("2.2", "a 4-bit model at rest", item="memory", points=2, todo="complete `model_bytes`")
def check_model_bytes(model_bytes: Callable[[object], float]) -> Verdict:
    """model_bytes(shape): bytes of a model in NF4 with double quantization, before anything is trained."""
    constants = 8 / 64 + 32 / (64 * 256)
    for name in ("llama-7b", "llama-3-8b", "smollm2-135m"):
        shape = SHAPES[name]
        linear, embedding, norms = shape.linear_parameters(), shape.embedding_parameters(), shape.norm_parameters()
        dense = embedding + norms
        expected = linear * (4 + constants) / 8 + 2 * dense
        one_layer = linear / shape.num_hidden_layers
        both = 2 * shape.vocab_size * shape.hidden_size
        mistakes = [
            (shape.parameters() / 2, "This is half a byte for each parameter: embeddings, head and norms stay 16-bit."),
            (shape.parameters() * (4 + constants) / 8, "Embeddings, head and norms are not quantized: 2 bytes each."),
            (
                linear / 2 + 2 * dense,
                "The quantization constants are missing: 0.127 bits for each quantized parameter.",
            ),
            (linear * (4 + constants) / 8, "Only the linears are here: embeddings, head and norms come on top."),
            (linear / 2, "Only the 4-bit codes are here: constants, embeddings, head and norms come on top."),
            (linear * 4.5 / 8 + 2 * dense, "4.5 bits is without double quantization: with it, 4.126953."),
            (linear * (4 + constants) / 8 + 2 * embedding, "Close: the norms are missing."),
            (
                linear * (4 + constants) / 8 + dense / 2,
                "Embeddings, head and norms take 16 bits: 2 bytes, not half a one.",
            ),
            (linear * (4 + constants) / 8 + 4 * dense, "Embeddings, head and norms are 16-bit here: 2 bytes, not 4."),
            (linear * (4 + constants) + 16 * dense, "These are bits: eight make a byte."),
            (one_layer * (4 + constants) / 8 + 2 * dense, f"This is one layer: there are {shape.num_hidden_layers}."),
            (expected / 1e9, "These are GB: bytes are asked for."),
        ]
        if shape.tie_word_embeddings:
            twice = linear * (4 + constants) / 8 + 2 * (both + norms)
            mistakes.append((twice, "Here embeddings and head are one matrix (tied): count it once."))
        else:
            once = linear * (4 + constants) / 8 + 2 * (both / 2 + norms)
            mistakes.append((once, "Embeddings and output head are two matrices here: one of them is missing."))
        came = call(model_bytes, shape)
        exactly = sum(model_parts(shape).values())  # with bitsandbytes' tables, one for each linear: right as well
        if isinstance(came, (int, float)) and came == exactly:
            continue
        # 1e-6: 4.126953 bits are near enough
        expect_number(f"model_bytes(SHAPES[{name!r}])", came, expected, mistakes, 1e-6)
    return right("Llama-3-8B: 5.7 GB, of which 2.1 GB are embeddings and head that nobody quantized.")


@exercise("2.3", "what logits leave room for", item="memory", points=2, todo="complete `tokens_that_fit`")
def check_logits(tokens_that_fit: Callable[[int, float], int]) -> Verdict:
    """tokens_that_fit(vocabulary, gigabytes): how many whole tokens' logits and loss fit, 3 fp32 numbers for each."""
    for vocabulary, gigabytes in [(32000, 8), (128256, 8), (49152, 2.5)]:
        room = gigabytes * 1e9
        expected = int(room // (12 * vocabulary))
        mistakes = [
            (room / (12 * vocabulary), "A fraction of a token is no token: round down."),
            (expected + 1, "Rounded up, the last token does not fit: round down."),
            (room // (4 * vocabulary), "This is one fp32 number for each word: at the peak there are three."),
            (room // (2 * vocabulary), "This is one 16-bit number for each word: at the peak there are three in fp32."),
            (room // (6 * vocabulary), "The three numbers are fp32: 4 bytes each, not 2."),
            (room // (8 * vocabulary), "Three fp32 numbers for each word, not two."),
            (room // (16 * vocabulary), "Three fp32 numbers for each word, not four."),
            (room // (96 * vocabulary), "The 12 are bytes already: no factor of 8."),
            (gigabytes * 2**30 // (12 * vocabulary), "These are GiB: 1 GB is 10^9 bytes."),
            (gigabytes // (12 * vocabulary), "GB and bytes are mixed: 1 GB is 10^9 bytes."),
        ]
        source = written(tokens_that_fit, (vocabulary, gigabytes))
        expect_number(source, call(tokens_that_fit, vocabulary, gigabytes), expected, mistakes)
    return right("8 GB hold 20,833 tokens of LLaMA's vocabulary, and 5,197 of Llama 3's, which is four times as large.")


KNOBS = ("batch_size", "sequence_length", "gradient_checkpointing", "optimizer", "adapter_dtype", "double_quant")


@exercise("2.4", "13B on a 12 GB card", item="memory", points=2, todo="fill in `settings`")
def check_12_gb(settings: dict) -> Verdict:
    """settings: arguments of `estimate` under which LLaMA-13B trains within 12 GB, rank 64, 3,072 tokens a step."""
    if not isinstance(settings, dict):
        return wrong(f"expected a dict of estimate's settings, got {described(settings)}.")
    if unknown := [name for name in settings if name not in KNOBS]:
        why = "The task fixes it." if unknown[0] in ("rank", "targets", "method", "shape") else ""
        return wrong(f"{unknown[0]!r} is not among the settings to choose: {', '.join(KNOBS)}. {why}")
    batch, length = settings.get("batch_size", 1), settings.get("sequence_length", 512)
    for name, value in (("batch_size", batch), ("sequence_length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return wrong(f"{name} is {described(value)}, expected a whole number from 1 on.")
    try:
        needed = estimate(SHAPES["llama-13b"], "qlora", rank=64, targets="all-linear", **settings)
        total = needed.total
    except Exception as error:
        return wrong(f"estimate does not take these settings: {error_text(error)}.")
    if batch * length < 3072:
        return wrong(f"{batch} × {length} are {batch * length} tokens a step, expected 3,072 at least. Pay elsewhere.")
    if total > 12e9:
        parts = needed.parts | needed.outside
        fixed = ("base weights", "quantization constants", "embeddings and head", "norms", "CUDA context")
        largest = max((name for name in parts if name not in fixed), key=parts.__getitem__)
        return wrong(
            f"{total / 1e9:.2f} GB, {(total - 12e9) / 1e9:.2f} GB too many. The largest part that you can change: "
            f"{largest}, {parts[largest] / 1e9:.2f} GB."
        )
    return right(f"{total / 1e9:.2f} GB: a model of 26 GB in 16 bits trains on a 12 GB card, by arithmetic.")
