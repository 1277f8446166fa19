"""Machinery of 01_first_run: what an answer holds, in which sequence an order names things, and the reader's orders."""

import json
import re
import string
from collections.abc import Iterable, Sequence

from qlora_lab.training.data import stream_chats
from qlora_lab.training.formats import Chat

FIELDS = ("customer", "item", "colour", "quantity", "city", "total")
COLOURS = "red blue green yellow black white orange purple grey brown pink silver".split()
ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
BLANKS = [  # to fill in the reader's sentence: the values of FIELDS, and a number that is none of them
    ("Peter Novak", "vase", "orange", 9, "Porto", 120, 5),
    ("Dora Engel", "kettle", "grey", 14, "Lyon", 310, 21),
    ("Hugo Evans", "lamp", "silver", 20, "Cardiff", 99, 8),
    ("Nadia Young", "chair", "green", 3, "Turin", 875, 30),
    ("Ivan Costa", "basket", "brown", 27, "Bergen", 640, 12),
]
PHRASES = {"half a dozen": 6, "two dozen": 24, "a dozen": 12, "a pair of": 2, "a couple of": 2}
WORDS = {word: number for number, word in enumerate(ONES + TEENS)}
WORDS |= {ten: 10 * number for number, ten in enumerate(TENS, start=2)}
WORDS |= {f"{ten}{dash}{ONES[n]}": WORDS[ten] + n for ten in TENS for n in range(1, 10) for dash in "- "}
WORDS |= PHRASES
NUMBER = re.compile(r"\d+|\b(?:" + "|".join(sorted(WORDS, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def megabytes_by_part(model) -> dict[str, float]:
    """MB (10^6 bytes) of a model that was loaded in 4 bits with double quantization; last, of the same in 16 bits."""
    from qlora_lab.memory import bits_per_parameter

    shapes = [layer.quant_state.shape for layer in model.modules() if hasattr(layer, "quant_state")]
    quantized = sum(rows * columns for rows, columns in shapes)
    embeddings = model.get_input_embeddings().weight
    layers = quantized * bits_per_parameter() / 8
    sizes = {
        "layers, in 4 bits": layers,
        "embeddings": embeddings.nbytes,
        "all": layers + embeddings.nbytes,
        "all, if in 16 bits": 2 * (quantized + embeddings.numel()),
    }
    return {part: size / 1e6 for part, size in sizes.items()}


def adapter_weights(model) -> dict:
    """A copy of the weights that are trained, by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def restore(model, weights: dict) -> None:
    """Give the weights that are trained the values of a copy."""
    for name, weight in model.named_parameters():
        if name in weights:
            weight.data.copy_(weights[name])


def parsed(answer: str) -> dict:
    """The JSON object that an answer is; empty if it is none."""
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def shares_by_field(answers: Sequence[str], chats: Sequence[Chat]) -> dict[str, float]:
    """For each of the six fields the share of answers in which it is exactly right, from 0 to 1."""
    pairs = [(parsed(answer), parsed(chat[-1]["content"])) for answer, chat in zip(answers, chats, strict=True)]
    return {field: sum(got.get(field) == right[field] for got, right in pairs) / len(pairs) for field in FIELDS}


# --- What stands where in an order ------------------------------------------------------------------------------------


def numbers_in(text: str) -> list[tuple[int, int]]:
    """The numbers of a sentence, in digits or in words below a hundred: (place of the first letter, number)."""
    found = [(match.start(), match[0].lower()) for match in NUMBER.finditer(text)]
    return [(place, int(word) if word.isdigit() else WORDS[word]) for place, word in found]


def place_of(field: str, value: str | int, text: str) -> int | None:
    """Where in an order's text the value of a field begins; None if it is not there. An item may be in the plural."""
    if isinstance(value, int):
        return next((place for place, number in numbers_in(text) if number == value), None)
    pattern = re.escape(value)
    if field == "item":  # lamps, boxes, shelves, knives, berries
        pattern = rf"(?:{pattern}|{re.escape(value[:-1])}(?:ve|ie)|{re.escape(value[:-2])}ve)(?:s|es)?"
    found = re.search(rf"\b{pattern}\b", text, re.IGNORECASE)
    return found.start() if found else None


def sequence(text: str, order: dict) -> tuple[str, ...]:
    """The fields of an order in the sequence in which its text names them; those that are not found are left out."""
    places = {field: place_of(field, order[field], text) for field in FIELDS}
    return tuple(sorted((f for f in FIELDS if places[f] is not None), key=lambda field: places[field] or 0))


def sequences(chats: Iterable[Chat]) -> set[tuple[str, ...]]:
    """All sequences of fields in some orders."""
    return {sequence(chat[-2]["content"], parsed(chat[-1]["content"])) for chat in chats}


def decoys(text: str, order: dict) -> list[str]:
    """What in an order's text does not belong in the answer: other numbers above one, other colours of the shop's."""
    numbers = {number for _, number in numbers_in(text)} - {0, 1, order["quantity"], order["total"]}
    colours = set(re.findall(r"\w+", text.lower())) & set(COLOURS)
    return [*map(str, sorted(numbers)), *sorted(colours - {str(order["colour"]).lower()})]


def quantities_by_place(answers: Sequence[str], chats: Sequence[Chat]) -> dict[str, tuple[int, int]]:
    """In how many answers the quantity is right, of how many orders: by what stands where in the order's text."""
    counts = {"quantity before total": (0, 0), "the same, with a decoy number": (0, 0), "total before quantity": (0, 0)}
    for answer, chat in zip(answers, chats, strict=True):
        text, order = chat[-2]["content"], parsed(chat[-1]["content"])
        places = sequence(text, order)
        if places.index("total") < places.index("quantity"):
            kind = "total before quantity"
        elif any(decoy.isdigit() for decoy in decoys(text, order)):
            kind = "the same, with a decoy number"
        else:
            kind = "quantity before total"
        right, count = counts[kind]
        counts[kind] = (right + (parsed(answer).get("quantity") == order["quantity"]), count + 1)
    return counts


def wrong_quantities(answers: Sequence[str], chats: Sequence[Chat]) -> dict[str, int]:
    """How many answers name a wrong quantity, and what it is instead: the order's total, a decoy, or something else."""
    counts = {"the total": 0, "a decoy": 0, "something else": 0}
    for answer, chat in zip(answers, chats, strict=True):
        order, said = parsed(chat[-1]["content"]), parsed(answer).get("quantity")
        if said == order["quantity"]:
            continue
        decoy = str(said) in decoys(chat[-2]["content"], order)
        counts["the total" if said == order["total"] else "a decoy" if decoy else "something else"] += 1
    return counts


# --- The reader's own orders ------------------------------------------------------------------------------------------


def orders_of(sentence: str) -> list[tuple]:
    """Orders that are all written as the reader's sentence, one for each row of BLANKS.

    sentence: holds {customer}, {item}, {colour}, {quantity}, {city} and {total}, and perhaps {other}, a number that
    does not belong in the answer. Each order is a tuple: its text, and the values of FIELDS.
    """
    return [
        (sentence.format(**dict(zip(FIELDS, values, strict=True)), other=other), *values) for *values, other in BLANKS
    ]


def as_chats(orders: Sequence[tuple], task: dict[str, str]) -> list[Chat]:
    """Chats to train on, from tuples: the order's text and, in the sequence of FIELDS, what the answer holds.

    task: the message that says what to do.
    """
    return [
        [
            task,
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(dict(zip(FIELDS, values, strict=True)), separators=(",", ":"))},
        ]
        for text, *values in orders
    ]


def fault_in(sentence: object) -> str:
    """What is wrong with the reader's sentence, in one or two sentences; empty if nothing is."""
    if not isinstance(sentence, str):
        return f"expected one sentence in quotes, got {type(sentence).__name__}."
    try:
        parts = [part for part in string.Formatter().parse(sentence) if part[1] is not None]
    except ValueError:
        return "A brace has no partner: each blank is a name in braces, such as {total}."
    blanks = [f"{name}{'!' if how else ''}{how or ''}{':' if form else ''}{form}" for _, name, form, how in parts]
    for name in blanks:
        if name not in (*FIELDS, "other"):
            return f"{{{name}}} is none of the blanks: {', '.join(FIELDS)} and, if you like, other."
    for name in FIELDS:
        if name not in blanks:
            return f"{{{name}}} is missing: an order names all six things."
    for split in ("test", "shifted"):
        for *_, asked, answer in stream_chats("orders", split):
            order = parsed(answer["content"])
            other = next((decoy for decoy in decoys(asked["content"], order) if decoy.isdigit()), "")
            if sentence.format(**order, other=other) == asked["content"]:
                return f"Some of the {split} orders, which judge the model, are written just like this. Write another."
    text, *values = orders_of(sentence)[0]
    order = dict(zip(FIELDS, values, strict=True))
    for field in FIELDS:
        if place_of(field, order[field], text) is None:
            return f"{{{field}}} is glued to another word: write it on its own (and {{item}}s for more than one)."
    known = sequences(stream_chats("orders", "train"))
    if sequence(text, order) in known and not decoys(text, order):
        names = ", ".join(sequence(text, order))
        return f"It has no decoy, and names things in a sequence that the training orders have: {names}."
    return ""
