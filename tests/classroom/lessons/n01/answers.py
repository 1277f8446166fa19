"""Answers to the exercises of 01_first_run: right ones, found by another way than the check's, and likely mistakes."""

from torch import bfloat16, float16, float32
from transformers import BitsAndBytesConfig

from qlora_lab.classroom.checks import check_bnb_config, check_my_orders


def bnb(**options):
    best = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": bfloat16,
    }
    kept = {name: value for name, value in (best | options).items() if value is not None}
    return BitsAndBytesConfig(**kept), bfloat16


ORDERS = [
    ("Not 7 but eight red lamps for Ada Byron in Bern, 70 euros.", "Ada Byron", "lamp", "red", 8, "Bern", 70),
    ("Ada Byron, 3 Hill Road, Bern: forty-two red knives, 71 euros.", "Ada Byron", "knife", "red", 42, "Bern", 71),
    ("Red, not blue: 9 shelves to Bern, Ada Byron pays 72 euros.", "Ada Byron", "shelf", "red", 9, "Bern", 72),
    ("Last time 5 mugs, now 6 blue ones: Ada Byron, Bern, 73 euros.", "Ada Byron", "mug", "blue", 6, "Bern", 73),
    ("Bern, Ada Byron, 74 euros, 11 pink boxes of 25 sheets.", "Ada Byron", "box", "pink", 11, "Bern", 74),
    ("In 2 days Ada Byron, Bern, needs 12 grey glasses, 75 euros.", "Ada Byron", "glass", "grey", 12, "Bern", 75),
]
LOSSES = [0.8, 0.9, 0.2]
SHIFTED = (
    "Last year it was 4 yellow baskets; this year Hyejin Eriksdottir of San Sebastian takes forty-seven blue ones "
    "instead and owes 651 euros."
)


def with_last(*order):
    return [*ORDERS[:-1], order], LOSSES


def with_other(**values):
    names = ("text", "customer", "item", "colour", "quantity", "city", "total")
    return with_last(*(dict(zip(names, ORDERS[-1], strict=True)) | values).values())


RIGHT = [
    (check_bnb_config, bnb()),
    (check_bnb_config, (bnb(bnb_4bit_compute_dtype=None)[0], float32)),
    (check_my_orders, (ORDERS, LOSSES)),
    (check_my_orders, ([list(order) for order in ORDERS], LOSSES)),
]

WRONG = [  # and what the learner must be told
    (check_bnb_config, bnb(bnb_4bit_quant_type=None), "fp4 is the default"),
    (check_bnb_config, bnb(bnb_4bit_use_double_quant=None), "double_quant is False"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=None), "float32 is the default"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=float16), "is torch.float16, expected torch.bfloat16"),
    (check_bnb_config, bnb(load_in_4bit=None), "say what you want"),
    (check_bnb_config, bnb(load_in_4bit=None, load_in_8bit=True), "LLM.int8()"),
    (check_bnb_config, ({"load_in_4bit": True}, bfloat16), "BitsAndBytesConfig(**options)"),
    (check_bnb_config, (BitsAndBytesConfig, bfloat16), "expected a BitsAndBytesConfig, got the type"),
    (check_my_orders, ("7 lamps", LOSSES), "expected a list of orders"),
    (check_my_orders, (ORDERS[:4], LOSSES), "4 orders came, expected 5 or more"),
    (check_my_orders, (ORDERS[:5] + ORDERS[:1], LOSSES), "stands there twice"),
    (check_my_orders, (ORDERS, []), "nothing was trained on them"),
    (check_my_orders, (ORDERS, [0.2, 0.3]), "0.20 in the first step and 0.30 in the last"),
    (check_my_orders, with_last(*ORDERS[-1][:-1]), "Order 6 is no tuple of seven"),
    (check_my_orders, with_last(SHIFTED, "Hyejin Eriksdottir", "basket", "blue", 47, "San Sebastian", 651), "judge"),
    (check_my_orders, with_other(quantity="12"), "quantity is '12', expected a whole number"),
    (check_my_orders, with_other(quantity=13), "quantity is 13, which its text does not hold"),
    (check_my_orders, with_other(total=76), "total is 76, which its text does not hold"),
    (check_my_orders, with_other(customer="Ada Lovelace"), "customer is 'Ada Lovelace', which its text does not hold"),
    (check_my_orders, with_other(colour="blue"), "colour is 'blue', which its text does not hold"),
    (check_my_orders, with_other(item="mug"), "item is 'mug', which its text does not hold"),
    (check_my_orders, with_other(item="glasses"), "'lamp', not 'lamps'"),
    (check_my_orders, with_other(text="Ada Byron of Bern needs 12 grey glasses, 75 euros."), "Order 6 has no decoy"),
]
