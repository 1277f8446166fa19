"""Answers to the exercises of 01_first_run: right ones, found by another way than the check's, and likely mistakes."""

from torch import bfloat16, float16, float32
from transformers import BitsAndBytesConfig

from qlora_lab.classroom.checks import check_bnb_config, check_my_sentence


def bnb(**options):
    best = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": bfloat16,
    }
    kept = {name: value for name, value in (best | options).items() if value is not None}
    return BitsAndBytesConfig(**kept), bfloat16


DECOY = "Not {other} but {quantity} {colour} {item}s for {customer} in {city}, {total} euros."
SHIFTED = "For {total} euros altogether, {city} is where {customer} expects {quantity} {item}s in {colour}."
LOSSES = [0.8, 0.9, 0.2]


def sentence(old, new):
    """DECOY with one part changed, as it was learned."""
    return DECOY.replace(old, new), LOSSES


RIGHT = [
    (check_bnb_config, bnb()),
    (check_bnb_config, (bnb(bnb_4bit_compute_dtype=None)[0], float32)),
    (check_my_sentence, (DECOY, LOSSES)),
    (check_my_sentence, ("{total} euros: {city}, {item}: {quantity}, {customer}, {colour}", LOSSES)),  # a new sequence
    (check_my_sentence, sentence("{other}", "4 white")),
]

WRONG = [  # and what the learner must be told
    (check_bnb_config, bnb(bnb_4bit_quant_type=None), "fp4 is the default"),
    (check_bnb_config, bnb(bnb_4bit_use_double_quant=None), "double_quant is False"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=None), "float32 is the default"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=float16), "is torch.float16, expected torch.bfloat16"),
    (check_bnb_config, bnb(load_in_4bit=None), "say what you want"),
    (check_bnb_config, bnb(load_in_4bit=None, load_in_8bit=True), "LLM.int8()"),
    (check_bnb_config, ({"load_in_4bit": True}, bfloat16), "BitsAndBytesConfig(**options)"),
    (check_bnb_config, (BitsAndBytesConfig, bfloat16), "expected a BitsAndBytesConfig, got <class"),
    (check_my_sentence, ([DECOY], LOSSES), "expected one sentence in quotes, got list"),
    (check_my_sentence, (DECOY, []), "nothing was trained on it"),
    (check_my_sentence, (DECOY, [0.2, 0.3]), "0.20 in the first step and 0.30 in the last"),
    (check_my_sentence, sentence("{total} euros", "70 euros"), "{total} is missing"),
    (check_my_sentence, sentence("{total}", "{price}"), "{price} is none of the blanks"),
    (check_my_sentence, sentence("{total}", "{total:.2f}"), "{total:.2f} is none of the blanks"),
    (check_my_sentence, sentence("{total}", "{total!r}"), "{total!r} is none of the blanks"),
    (check_my_sentence, sentence("{total}", "{0}"), "{0} is none of the blanks"),
    (check_my_sentence, sentence("{total}", "{total"), "A brace has no partner"),
    (check_my_sentence, sentence("{item}s", "{item}holders"), "{item} is glued to another word"),
    (check_my_sentence, sentence("Not {other} but ", ""), "names things in a sequence that the training orders have"),
    (check_my_sentence, (SHIFTED, LOSSES), "orders, which judge the model, are written just like this"),
]
