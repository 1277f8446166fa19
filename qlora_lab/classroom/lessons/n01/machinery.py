"""Machinery of 01_first_run: what an answer holds, in which sequence an order names things, and the reader's orders."""

import json
import re
from collections.abc import Iterable, Sequence

from qlora_lab.training.data import stream_chats
from qlora_lab.training.formats import Chat

LEAST = 5  # orders of the reader's own: the last is not trained on
FIELDS = ("customer", "item", "colour", "quantity", "city", "total")
COLOURS = "red blue green yellow black white orange purple grey brown pink silver".split()
ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
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


def fault_in(orders: object) -> str:
    """What is wrong with the reader's orders, in one sentence; empty if nothing is."""
    if not isinstance(orders, list | tuple):
        return f"expected a list of orders, got {type(orders).__name__}."
    if len(orders) < LEAST:
        return f"{len(orders)} orders came, expected {LEAST} or more."
    known = sequences(stream_chats("orders", "train"))
    judged = {chat[-2]["content"] for split in ("test", "shifted") for chat in stream_chats("orders", split)}
    for number, order in enumerate(orders, start=1):
        if not isinstance(order, list | tuple) or len(order) != 1 + len(FIELDS) or not isinstance(order[0], str):
            return f"Order {number} is no tuple of seven: the text, {', '.join(FIELDS)}."
        text, answer = order[0], dict(zip(FIELDS, order[1:], strict=True))
        if fault := fault_of(text, answer):
            return f"Order {number}: {fault}"
        if text in judged:
            return f"Order {number} is one of those that judge the model. Write one that nobody will judge it by."
        if sequence(text, answer) in known and not decoys(text, answer):
            names = ", ".join(sequence(text, answer))
            return (
                f"Order {number} has no decoy, and names things in a sequence that the training orders have: {names}."
            )
    if len({order[0] for order in orders}) < len(orders):
        return "One order stands there twice."
    return ""


def fault_of(text: str, answer: dict) -> str:
    """What in an answer does not follow from its order's text, in one sentence; empty if all does."""
    for field, value in answer.items():
        whole = field in ("quantity", "total")
        if not isinstance(value, int if whole else str) or isinstance(value, bool) or not value:
            return f"{field} is {value!r}, expected {'a whole number, such as 15' if whole else 'a text'}."
        if field == "item" and str(value).endswith("s") and not str(value).endswith("ss"):
            return f"item is {value!r}. The training orders name one of them: 'lamp', not 'lamps'."
        if place_of(field, value, text) is None:
            return f"{field} is {value!r}, which its text does not hold."
    return ""
