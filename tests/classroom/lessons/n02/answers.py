"""Answers to the exercises of 02_memory_wall: right ones, found in another way than the check, and likely mistakes."""

from qlora_lab.classroom.checks import check_cures, check_gigabytes, check_mine
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.memory.tensors import model_parts


def matrix_by_matrix(shape, bits, trained):
    total = 0
    for _ in range(shape.num_hidden_layers):
        for inputs, outputs in shape.linears().values():
            total += inputs * outputs * bits / 8
        total += 2 * 2 * shape.hidden_size
    matrices = 1 if shape.tie_word_embeddings else 2
    total += 2 * shape.hidden_size + matrices * 2 * shape.vocab_size * shape.hidden_size
    return (total + trained * 4 * 4) / 10**9


def from_16_bits(shape, bits, trained):
    """What the linears save, taken from the 16-bit model."""
    in_16_bits = sum(model_parts(shape, "lora").values())
    return (in_16_bits - shape.linear_parameters() * (16 - bits) / 8 + 16 * trained) / 1e9


def summed(of):
    """gigabytes with another sum: of linears' parameters, other parameters, bits, and trained ones."""
    return lambda s, b, t: of(s.linear_parameters(), s.parameters() - s.linear_parameters(), b, t)


def most_samples(model, card, tokens, reserve=1, share=0.5):
    """By bisection: the sum, and what lies in torch's memory at the peak and grows with the tokens."""
    low, high = 0, 10**6
    while high - low > 1:
        middle = (low + high) // 2
        memory = estimate(SHAPES[model], batch_size=middle, sequence_length=tokens)
        grows = sum(size for part, size in memory.parts.items() if part in ("activations", "logits and loss"))
        fits = memory.total + share * grows <= (card - reserve) * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return low


BILLION = 10**9
CURES = {"Ada": "4 bits", "Ben": "checkpointing", "Carla": "a quarter of the rank", "Dora": "half the samples"}
CHANGES = {*CURES.values(), "8-bit Adam"}
MINE = {"model": "llama-7b", "card": 16, "tokens": 512, "samples": most_samples("llama-7b", 16, 512)}

RIGHT = [
    (check_gigabytes, (matrix_by_matrix,)),
    (check_gigabytes, (from_16_bits,)),
    (check_cures, (CURES,)),
    (check_cures, (CURES | {"Eve": "prayer"},)),
    (check_mine, (MINE,)),
    (check_mine, (MINE | {"model": "Llama-3-70B", "card": 80.5, "samples": most_samples("llama-3-70b", 80.5, 512)},)),
    (check_mine, (MINE | {"model": SHAPES["mistral-7b"], "samples": most_samples("mistral-7b", 16, 512)},)),
]

WRONG = [  # and what the learner must be told
    (check_gigabytes, summed(lambda n, o, b, t: n * b / 8 + 2 * o + 16 * t), "These are bytes"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 16 * t) / 2**30), "GiB"),
    (
        check_gigabytes,
        summed(lambda n, o, b, t: (n * b + 16 * o + 16 * t) / BILLION),
        "the weights must be divided by 8",
    ),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b + 2 * o + 16 * t) / BILLION), "divide the linears' by 8"),
    (check_gigabytes, lambda s, b, t: (s.parameters() * b / 8 + 16 * t) / BILLION, "are not quantized"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 16 * t) / BILLION), "The linears are not all"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 4 * o + 16 * t) / BILLION), "2 bytes each, not 4"),
    (check_gigabytes, summed(lambda n, o, b, t: ((n + o) * b / 8 + 2 * o + 16 * t) / BILLION), "counted twice"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o) / BILLION), "The adapter is missing"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 4 * t) / BILLION), "the adapter at rest"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 8 * t) / BILLION), "Adam's two numbers for each"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 12 * t) / BILLION), "*two* of Adam's"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 2 * t) / BILLION), "adds twelve more"),
    (check_gigabytes, summed(lambda n, o, b, t: (n * b / 8 + 2 * o + 20 * t) / BILLION), "no other fp32 copy"),
    (check_gigabytes, lambda s, b, t: 7.0, "expected 6.342295552"),
    (check_gigabytes, lambda s, b, t: "13 GB", "expected one number"),
    *(  # every other change is too little for every step
        (check_cures, CURES | {patient: change}, "are too many for")
        for patient, cure in CURES.items()
        for change in sorted(CHANGES - {cure})
    ),
    (
        check_cures,
        CURES | {"Ada": "checkpointing"},
        "Ada: 'checkpointing' changes nothing, but 5.4 are too many for 16",
    ),
    (check_cures, CURES | {"Ben": "half the samples"}, "Ben: 'half the samples' saves 22.9 GB, but 31.5 are too many"),
    (check_cures, CURES | {"Carla": "8-bit Adam"}, "Carla: '8-bit Adam' saves 4.0 GB, but 4.8 are too many"),
    (check_cures, CURES | {"Dora": "rank 8"}, "expected one of '4 bits'"),
    (check_cures, ["4 bits"], "expected a dict with a change for Ada, Ben, Carla, Dora"),
    (check_mine, MINE | {"samples": MINE["samples"] + 1}, "leave a GB free, but the gaps grow, too"),
    (check_mine, MINE | {"samples": most_samples("llama-7b", 16, 512, share=0)}, "leave a GB free, but the gaps"),
    (check_mine, MINE | {"samples": most_samples("llama-7b", 16, 512, 0, 0)}, "and the card has 16"),
    (check_mine, MINE | {"samples": MINE["samples"] - 1}, "There is room"),
    (check_mine, MINE | {"card": 8}, "One sample asks for 8.2 GB of 8 already"),
    (check_mine, MINE | {"card": "T4"}, "expected its size in GB"),
    (check_mine, MINE | {"model": "llama-9b"}, "expected one of llama-7b"),
    (check_mine, MINE | {"samples": 0}, "whole number from 1 on"),
    (check_mine, MINE | {"tokens": 512.5}, "whole number from 1 on"),
    (check_mine, MINE | {"tokens": 1}, "nothing to learn"),
    (check_mine, {"model": "llama-7b"}, "expected a dict with 'model', 'card', 'tokens', 'samples'"),
]
