"""Exercises of 01_first_run."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, written, wrong


@exercise("1.1", "a BitsAndBytesConfig for QLoRA", item="config", points=1, todo="build a BitsAndBytesConfig")
def check_bnb_config(config, compute_dtype) -> Verdict:
    """config: a transformers.BitsAndBytesConfig for QLoRA. compute_dtype: the torch.dtype that suits this machine."""
    from transformers import BitsAndBytesConfig

    if isinstance(config, dict):
        return wrong("This is a dict of options, expected a BitsAndBytesConfig: write BitsAndBytesConfig(**options).")
    if not isinstance(config, BitsAndBytesConfig):
        return wrong(f"expected a BitsAndBytesConfig, got {described(config)}.")
    if config.load_in_8bit:
        return wrong("load_in_8bit is True: that is LLM.int8(), twice the size. QLoRA wants load_in_4bit=True.")
    if not config.load_in_4bit:
        return wrong(
            "load_in_4bit is False, expected True: say what you want. (transformers 5 loads in 4 bits all the same.)"
        )
    if (quant_type := config.bnb_4bit_quant_type) != "nf4":
        why = " fp4 is the default, nf4 has to be asked for." if quant_type == "fp4" else ""
        return wrong(f"bnb_4bit_quant_type is {quant_type!r}, expected 'nf4'.{why}")
    if not config.bnb_4bit_use_double_quant:
        return wrong(
            "bnb_4bit_use_double_quant is False, the default, expected True: it takes the scales from 0.5 to 0.127 "
            "bits per parameter."
        )
    if (dtype := config.bnb_4bit_compute_dtype) != compute_dtype:
        why = " float32 is the default, another dtype has to be asked for." if str(dtype) == "torch.float32" else ""
        return wrong(f"bnb_4bit_compute_dtype is {dtype}, expected {compute_dtype} on this machine.{why}")
    return right("The defaults are fp4, plain float32 scales and float32 compute, and nothing would have warned you.")


@exercise("1.2", "the labels of a training sample", item="train", points=2, todo="complete `mask_prompt`")
def check_labels(mask_prompt: Callable) -> Verdict:
    """mask_prompt(prompt_ids, response_ids) -> (input_ids, labels): -100 over the prompt, the response kept.

    Lists of ints or 1-D tensors. Labels are not shifted (transformers shifts them), and the end token, the last of
    the response, is learned too.
    """
    # The end token, 2, also occurs in a prompt; lengths differ, so that none can be built in.
    for prompt, response in [([1, 41, 42, 2, 1], [51, 52, 2]), ([1, 43], [53, 54, 55, 2])]:
        everything, expected = prompt + response, [-100] * len(prompt) + response
        came = call(mask_prompt, list(prompt), list(response))
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"mask_prompt gives {described(came)}, expected the pair input_ids, labels.")
        input_ids, labels = (part.tolist() if hasattr(part, "tolist") else list(part) for part in came)
        if any(isinstance(part, list) for part in [*input_ids, *labels]):
            return wrong("mask_prompt gives two dimensions, expected one: a single sample is not a batch yet.")
        if (input_ids, labels) == (expected, everything):
            return wrong("mask_prompt gives labels, input_ids, expected input_ids, labels: swap them.")
        if input_ids != everything:
            why = " Are labels and input_ids one and the same list? Mask a copy." if -100 in input_ids else ""
            return wrong(f"input_ids are {input_ids}, expected prompt and response: {everything}.{why}")
        if labels != expected:
            return wrong(f"labels are {labels}, expected {expected}. {mistake_in_labels(labels, prompt, response)}")
    return right("The model reads the whole sample and is graded on the answer alone, its end token included.")


def mistake_in_labels(labels: list, prompt: list, response: list) -> str:
    """How `labels` may have come out wrong; empty if nothing comes to mind."""
    expected, n = [-100] * len(prompt) + response, len(prompt)
    if labels[: len(expected) - 1] == expected[1:] or labels[1:] == expected[:-1]:
        return "They are shifted by one. transformers shifts by itself: label i belongs to token i."
    if labels == response:
        return "Every token needs a label: -100 for those of the prompt."
    if len(labels) != len(expected):
        return f"These are {len(labels)} labels for {len(expected)} tokens."
    if labels == prompt + response:
        return "The prompt is not masked: the model would learn to write the questions too."
    if labels == [*expected[:-1], -100]:
        return "The end token is masked: the model would never learn to stop."
    if labels == prompt + [-100] * len(response):
        return "It is the other way round: mask the prompt, keep the response."
    if set(labels) == {-100}:
        return "Everything is masked: nothing is left to learn."
    if labels[n:] == response and len(set(labels[:n])) == 1:
        return f"You masked with {labels[0]}, which is a token to learn. Cross entropy skips -100 only."
    if labels[: n + 1] == [-100] * (n + 1) or labels[n - 1 :] == [prompt[-1], *response]:
        return "The mask is off by one where the response begins."
    return ""


@exercise("1.3", "LoRA's trainable parameters", item="train", points=2, todo="complete `lora_parameters`")
def check_trainable_parameters(lora_parameters: Callable[[int, list], int]) -> Verdict:
    """lora_parameters(rank, shapes): how many parameters LoRA adds to linears of the shapes (inputs, outputs)."""
    hidden, mlp = 4096, 11008
    llama_7b = [*[(hidden, hidden)] * 4, (hidden, mlp), (hidden, mlp), (mlp, hidden)] * 32
    for rank, shapes in [(2, [(3, 5)]), (4, [(10, 30), (20, 70)]), (64, llama_7b)]:
        inputs, outputs = (sum(side) for side in zip(*shapes, strict=True))
        full = sum(inputs * outputs for inputs, outputs in shapes)
        first, last, many = rank * sum(shapes[0]), rank * sum(shapes[-1]), len(shapes)
        mistakes = [
            (full, "in × out is the whole matrix. LoRA trains A (r × in) and B (out × r) instead."),
            (rank * full, "r × in × out is more than the whole matrix. A has r × in, B has out × r."),
            (rank * rank * full, "You multiplied A's parameters by B's: add them."),
            (rank * inputs, "This is A alone: B (out × r) is trained too."),
            (rank * outputs, "This is B alone: A (r × in) is trained too."),
            (inputs + outputs, "This is in + out without the rank."),
            (2 * rank * inputs, "2 × r × in is right for square matrices only."),
            (first, f"This is the first of {many} layers: add them all up."),
            (last, f"This is the last of {many} layers: add them all up."),
            (first * many, f"This is {many} times the first layer: the shapes differ."),
        ]
        source = written(lora_parameters, (rank, shapes))
        expect_number(source, call(lora_parameters, rank, list(shapes)), rank * (inputs + outputs), mistakes)
    return right("LLaMA-7B gets 159,907,840 at rank 64, 2.4 % of its weights. PEFT counts the same.")


@exercise("1.4", "the loss of several micro-batches", item="train", points=2, todo="complete `global_loss`")
def check_token_weighted_loss(global_loss: Callable[[list, list], float]) -> Verdict:
    """global_loss(micro_batch_losses, target_tokens): the mean loss per token over all micro-batches.

    micro_batch_losses: each the mean over its own target tokens. target_tokens: how many those are.
    """
    for losses, tokens in [([2.0, 1.0, 4.0], [10, 70, 20]), ([0.5, 3.0], [300, 100])]:
        total = sum(loss * n for loss, n in zip(losses, tokens, strict=True))
        inverse = sum(loss / n for loss, n in zip(losses, tokens, strict=True))
        mistakes = [
            (
                sum(losses) / len(losses),
                "This is the mean of means, the gradient accumulation bug: ten tokens count as much as seventy.",
            ),
            (total, "This is the sum over all tokens: divide it by their number."),
            (total / len(losses), "You divided by the number of micro-batches: divide by the number of tokens."),
            (sum(losses), "The losses are added up without their weights."),
            (sum(losses) / sum(tokens), "Weigh each loss by its number of tokens before you divide by all tokens."),
            (inverse / sum(1 / n for n in tokens), "You weighed by 1/n: more tokens must count more, not less."),
            (inverse, "You divided each loss by its tokens. It is a mean already: multiply."),
        ]
        # 1e-6: float32 has seven digits, should the answer be computed with tensors
        source = written(global_loss, (losses, tokens))
        expect_number(source, call(global_loss, list(losses), list(tokens)), total / sum(tokens), mistakes, 1e-6)
    return right("Every token counts once: the loss is that of one big batch, however you slice it.")
