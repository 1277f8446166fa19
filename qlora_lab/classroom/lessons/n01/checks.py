"""Exercises of 01_first_run."""

from collections.abc import Sequence

from qlora_lab.classroom.judging import Verdict, described, exercise, right, wrong
from qlora_lab.classroom.lessons.n01.machinery import fault_in


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


@exercise("1.2", "a way of writing, taught", item="train", points=2, todo="write `my_sentence`")
def check_my_sentence(my_sentence: str, losses: Sequence[float]) -> Verdict:
    """my_sentence: an order with blanks, see `machinery.orders_of`. losses: of the steps that learned such orders."""
    if fault := fault_in(my_sentence):
        return wrong(fault)
    if not losses:
        return wrong("The sentence is fine, but nothing was trained on it: losses is empty.")
    if not losses[-1] < losses[0]:
        return wrong(
            f"The loss was {losses[0]:.2f} in the first step and {losses[-1]:.2f} in the last, expected a lower one: "
            "does the answer follow from the sentence?"
        )
    return right(f"You trained on data of your own, and the loss fell from {losses[0]:.2f} to {losses[-1]:.2f}.")
