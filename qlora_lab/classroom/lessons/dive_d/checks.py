"""Exercises of dive_d_training_tricks."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, wrong

VERDICTS = ("lower", "higher", "open")
SAMPLES, LENGTH, RANK = 16, 512, 64  # of a step in exercise D.2
CARDS = (8, 12, 24, 80)
ROOM = 0.9  # share of a card that the prediction may fill


@exercise("D.1", "what three seeds can show", item="accuracy", points=1, todo="complete `beyond_seeds`")
def check_beyond_seeds(beyond_seeds: Callable[[list[float], list[float]], str]) -> Verdict:
    """beyond_seeds(base, knob): "lower" or "higher" if all of knob lies beyond all of base, else "open"."""
    base = [0.0154, 0.0127, 0.0124]
    cases = [
        ([0.0161, 0.0135, 0.0127], "open", "Higher at every seed, but inside the base's own spread: 0.0127 < 0.0154."),
        ([0.0140, 0.0118, 0.0121], "open", "Lower at every seed, but inside the base's own spread: 0.0140 > 0.0124."),
        ([0.0305, 0.0306, 0.0270], "higher", "Even its lowest is above the base's highest."),
        ([0.0058, 0.0086, 0.0061], "lower", "Even its highest is below the base's lowest."),
        ([0.0148, 0.0179, 0.0188], "open", "Its mean is higher, but its lowest, 0.0148, is below the base's highest."),
        ([0.0113, 0.0148, 0.0132], "open", "The two ranges overlap."),
        ([0.0110, 0.0200, 0.0200], "open", "One seed of three is below the base."),
        ([0.0160, 0.0119, 0.0119], "open", "One seed of three is above the base."),
    ]
    for knob, expected, why in cases:
        came = call(beyond_seeds, list(base), list(knob))
        if isinstance(came, bool) or not isinstance(came, str):
            return wrong(f"beyond_seeds gives {described(came)}, expected one of {', '.join(map(repr, VERDICTS))}.")
        if came not in VERDICTS:
            return wrong(f"beyond_seeds gives {came!r}, expected one of {', '.join(map(repr, VERDICTS))}.")
        if {came, expected} == {"lower", "higher"}:
            return wrong(f"You say the knob's {knob} are {came} than the base's {base}: the other way round.")
        if came != expected:
            return wrong(f"Base {base}, knob {knob}: you say {came!r}, expected {expected!r}. {why}")
    return right("Two sets of three that differ by luck alone pass this test once in ten times. Keep that in mind.")


def on_the_card(micro_batch: int, checkpointing: bool) -> float:
    """GB that a pass of LLaMA-7B is predicted to take, optimizer states and CUDA context included."""
    from qlora_lab.memory.prediction import estimate
    from qlora_lab.memory.shapes import SHAPES

    settings = {"batch_size": micro_batch, "gradient_checkpointing": checkpointing}
    return estimate(SHAPES["llama-7b"], rank=RANK, sequence_length=LENGTH, **settings).total / 1e9


@exercise("D.2", "how to split 16 samples", item="memory", points=2, todo="fill in `splits`")
def check_splits(splits: dict) -> Verdict:
    """splits: for each card (GB) the triple micro-batch, accumulation, checkpointing with the fewest passes."""
    if not isinstance(splits, dict) or not set(CARDS) <= set(splits):
        return wrong(f"expected a dict with the keys {', '.join(map(str, CARDS))}, got {described(splits)}.")
    for card in CARDS:
        split = splits[card]
        if not isinstance(split, (tuple, list)) or len(split) != 3:
            return wrong(
                f"{card} GB: {described(split)}, expected three things: micro-batch, accumulation, checkpointing."
            )
        micro_batch, accumulation, checkpointing = split
        counts = (micro_batch, accumulation)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts):
            return wrong(f"{card} GB: micro-batch and accumulation are {counts!r}, expected whole numbers above 0.")
        if not isinstance(checkpointing, bool):
            return wrong(f"{card} GB: checkpointing is {described(checkpointing)}, expected True or False.")
        if micro_batch * accumulation != SAMPLES:
            return wrong(
                f"{card} GB: {micro_batch} x {accumulation} = {micro_batch * accumulation} samples a step, expected "
                f"{SAMPLES}: another batch size is another training."
            )
        needed, allowed = on_the_card(micro_batch, checkpointing), ROOM * card
        if needed > allowed:
            cure = "Split further." if checkpointing else "Split further, or switch checkpointing on."
            return wrong(
                f"{card} GB: {micro_batch} samples a pass need {needed:.1f} GB, and {allowed:.1f} may be used. {cure}"
            )
        larger = [n for n in (16, 8, 4, 2) if n > micro_batch and on_the_card(n, True) <= allowed]
        if larger:
            return wrong(
                f"{card} GB: it fits, in {accumulation} passes. {larger[0]} samples a pass fit too, with "
                f"checkpointing: {on_the_card(larger[0], True):.1f} GB."
            )
        if checkpointing and on_the_card(micro_batch, False) <= allowed:
            return wrong(
                f"{card} GB: it fits without checkpointing too ({on_the_card(micro_batch, False):.1f} GB): then why "
                "compute everything twice?"
            )
    return right("Fill the card with samples first; checkpointing is what makes the room.")


@exercise("D.3", "accumulation that is a large batch", item="train", points=3, todo="complete `accumulate`")
def check_accumulate(accumulate: Callable) -> Verdict:
    """accumulate(mean_loss, micro_batches): backward on each, so that the gradients are those of one large batch.

    mean_loss(batch): mean over the batch's targets, a scalar with a graph. A batch is a dict of int64 tensors of shape
    (rows, length), `input_ids` and `labels`; labels of -100 are no targets, and position i is predicted from i - 1.
    """
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(11, 11, generator=draw))

    def mean_loss(batch):
        logits = weight[batch["input_ids"][:, :-1]]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def batch_of(rows, length):
        ids = torch.randint(0, 11, (len(rows), length), generator=draw)
        labels = ids.clone()
        for row, targets in enumerate(rows):
            labels[row, : length - targets] = -100
        labels[0, 0] = ids[0, 0]  # a label that nothing predicts
        return {"input_ids": ids, "labels": labels}

    micro_batches = [batch_of([9, 2], 12), batch_of([1], 8), batch_of([3, 3, 1], 6)]

    def gradient(weights):
        losses = [w * mean_loss(batch) for w, batch in zip(weights, micro_batches, strict=True)]
        total = sum(losses, start=torch.zeros(()))
        return torch.autograd.grad(total, weight)[0]

    def shares(counts):
        return [count / sum(counts) for count in counts]

    targets = [(batch["labels"][:, 1:] != -100).sum().item() for batch in micro_batches]
    labels = [(batch["labels"] != -100).sum().item() for batch in micro_batches]
    rows = [len(batch["labels"]) for batch in micro_batches]
    tokens = [batch["labels"].numel() for batch in micro_batches]
    k = len(micro_batches)
    mistakes = [
        ([0.0] * k, "No gradient has arrived: call `.backward()` on each micro-batch's loss."),
        ([1 / k] * k, "This is the mean of the means: a micro-batch of one target weighs as much as one of eleven."),
        ([1.0] * k, "These are the means' gradients, added up: each must be weighted."),
        (targets, "You turned means into sums; the sum has to be divided by the targets of the whole step."),
        ([n / k for n in targets], "Divide by the targets of the whole step, not by the number of micro-batches."),
        (shares(rows), "You weighted by rows: the loss is a mean over target tokens."),
        (shares(tokens), "You weighted by all tokens: prompts and padding are no targets."),
        (shares(labels), "You counted the first label of a row too: nothing comes before it that could predict it."),
        ([0.0] * (k - 1) + [shares(targets)[-1]], "Only the last micro-batch is left: gradients add up until zeroed."),
    ]
    given = [{name: values.clone() for name, values in batch.items()} for batch in micro_batches]
    weight.grad = None
    try:
        call(accumulate, mean_loss, given)
    except NotImplementedError:  # it returns nothing, as it should; whether it did something, the gradient tells
        if weight.grad is None:
            raise
    came = torch.zeros_like(weight) if weight.grad is None else weight.grad
    expected = gradient(shares(targets))
    if torch.allclose(came, expected, rtol=1e-4, atol=1e-7):
        return right("A large batch in small pieces, to the last digits: 4 x 4 is 16, whatever the lengths.")
    for weights, why in mistakes:
        if torch.allclose(came, gradient(weights), rtol=1e-4, atol=1e-7):
            raise Mistake(f"The gradients differ from those of one large batch. {why}")
    off = (came - expected).norm() / expected.norm()
    return wrong(f"The gradients differ from those of one large batch by {off:.0%}. Weight by the targets' shares.")


WIDTH = 300
LENGTHS = [  # in the first, every way to pack opens another number of rows
    [210, 100, 250, 130, 240, 250, 220, 180, 20, 160, 90, 220, 30, 70],
    [90] * 9,
    [300, 10, 290, 150, 150, 1],
]


def rows_open(lengths: list[int], width: int, first_fit: bool, longest_first: bool) -> int:
    """How many rows a packing opens: looking at all open rows, or at the last one; in the given order, or sorted."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True) if longest_first else lengths:
        fitting = [i for i, left in enumerate(room) if left >= length] if first_fit else range(len(room))[-1:]
        place = next((i for i in fitting if room[i] >= length), None)
        if place is None:
            room.append(width)
            place = len(room) - 1
        room[place] -= length
    return len(room)


@exercise("D.4", "packing", item="train", points=2, todo="complete `pack`")
def check_pack(pack: Callable[[list[int], int], list[list[int]]]) -> Verdict:
    """pack(lengths, width): the samples' numbers, row by row; no row is longer than width, and few rows are opened."""
    width = WIDTH
    for lengths in LENGTHS:
        came = call(pack, list(lengths), width)
        if not isinstance(came, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in came):
            return wrong(f"pack gives {described(came)}, expected a list of rows, each a list of the samples' numbers.")
        numbers = [i for row in came for i in row]
        if sorted(map(str, numbers)) == sorted(map(str, lengths)):
            return wrong("Your rows hold the lengths: the samples' numbers are asked for, 0 is the first.")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
            return wrong(f"A row of yours holds {described(numbers[0])}, expected the samples' numbers.")
        if any(not 0 <= i < len(lengths) for i in numbers):
            return wrong(f"There are {len(lengths)} samples, numbered from 0, and a row of yours holds {max(numbers)}.")
        if missing := sorted(set(range(len(lengths))) - set(numbers)):
            return wrong(f"pack({lengths}, {width}) loses sample {missing[0]}. (The last row, or what did not fit?)")
        if len(numbers) != len(lengths):
            return wrong(f"pack({lengths}, {width}) puts a sample into two rows: it would be learned twice.")
        fullest = max(sum(lengths[i] for i in row) for row in came)
        if fullest > width:
            return wrong(f"pack({lengths}, {width}) fills a row with {fullest} tokens: an answer would be cut.")
        best = rows_open(lengths, width, True, True)
        if len([row for row in came if row]) > best:
            why = {
                len(lengths): "One sample a row is what batches do without packing.",
                rows_open(lengths, width, False, True): "You look at the last row only: earlier rows still have room.",
                rows_open(lengths, width, False, False): "You look at the last row only: earlier rows still have room.",
                rows_open(lengths, width, True, False): "The order matters: a long sample that comes last needs a row.",
            }.get(len(came), "")
            return wrong(f"pack({lengths}, {width}) opens {len(came)} rows, {best} are enough. {why}")
    return right("Longest first, each into the first row with room: nearly nothing is padded.")
