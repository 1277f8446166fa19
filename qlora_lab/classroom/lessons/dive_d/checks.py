"""Exercises of dive_d_training_tricks."""

from collections.abc import Callable, Sequence

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, wrong
from qlora_lab.classroom.lessons.dive_d.machinery import ROOM, SAMPLES, needs_of

VERDICTS = ("lower", "higher", "open")
CARDS = (("llama-7b", 80), ("llama-7b", 8), ("llama-13b", 24), ("llama-7b", 24), ("llama-7b", 12), ("llama-65b", 80))
TOO_SMALL = ("llama-33b", 12)


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


@exercise("D.2", "how to split 16 samples", item="memory", points=2, todo="complete `best_split`")
def check_splits(best_split: Callable[[Callable[[int, bool], float], float], tuple[int, int, bool] | None]) -> Verdict:
    """best_split(needs, card): samples in a pass, passes, checkpointing, with the fewest passes; None: none fits."""
    for model, card in CARDS:
        try:
            came = call(best_split, needs_of(model), card)
        except NotImplementedError:
            if (model, card) == CARDS[0]:
                raise
            return wrong(f"{model} on {card} GB: best_split gives nothing, and something fits.")
        judge_split(came, model, card)
    model, card = TOO_SMALL
    try:
        nothing = call(best_split, needs_of(model), card)
    except NotImplementedError:  # None, as it should be
        nothing = None
    if nothing is not None:
        return wrong(f"{model} on {card} GB: nothing fits, so return None, not {described(nothing)}.")
    return right("Fill the card with samples first; checkpointing is what makes the room.")


def judge_split(split: object, model: str, card: int) -> None:
    """Raise Mistake unless the split fits, with the fewest passes, and checkpoints only where it has to."""
    needs, allowed, where = needs_of(model), ROOM * card, f"{model} on {card} GB"
    if not isinstance(split, (tuple, list)) or len(split) != 3:
        raise Mistake(f"{where}: {described(split)}, expected three things: samples in a pass, passes, checkpointing.")
    samples, passes, checkpointing = split
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (samples, passes)):
        raise Mistake(f"{where}: samples and passes are {(samples, passes)!r}, expected whole numbers above 0.")
    if not isinstance(checkpointing, bool):
        raise Mistake(f"{where}: checkpointing is {described(checkpointing)}, expected True or False.")
    if samples * passes != SAMPLES:
        raise Mistake(
            f"{where}: {samples} x {passes} = {samples * passes} samples a step, expected {SAMPLES}: another batch "
            "size is another training."
        )
    if needs(samples, checkpointing) > allowed:
        raise Mistake(
            f"{where}: {samples} samples a pass need {needs(samples, checkpointing):.1f} GB, and {allowed:.1f} may be "
            f"used. {'Split further.' if checkpointing else 'Split further, or switch checkpointing on.'}"
        )
    larger = [n for n in (16, 8, 4, 2) if n > samples and needs(n, True) <= allowed]
    if larger:
        raise Mistake(
            f"{where}: it fits, in {passes} passes. {larger[0]} samples a pass fit too, with checkpointing: "
            f"{needs(larger[0], True):.1f} GB."
        )
    if checkpointing and needs(samples, False) <= allowed:
        raise Mistake(
            f"{where}: it fits without checkpointing too ({needs(samples, False):.1f} GB): then why compute everything "
            "twice?"
        )


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


CLIPPED = [  # gradients (one list a tensor) and limit
    ([[3.0, -4.0], [12.0]], 1.0),
    ([[0.3, -0.4], [0.0, 0.0, 1.2]], 2.0),
    ([[-6.0], [2.0, 3.0], [0.0]], 0.5),
]


@exercise("D.4", "clipping", item="train", points=2, todo="complete `clipped`")
def check_clipped(clipped: Callable) -> Verdict:
    """clipped(gradients, limit): the tensors scaled by one factor, so that their common norm is at most limit."""
    import torch

    def norm(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()

    for numbers, limit in CLIPPED:
        gradients = [torch.tensor(values) for values in numbers]
        came = call(clipped, [gradient.clone() for gradient in gradients], limit)
        if not isinstance(came, (list, tuple)) or not all(isinstance(tensor, torch.Tensor) for tensor in came):
            return wrong(f"clipped gives {described(came)}, expected a list of tensors.")
        if [tensor.shape for tensor in came] != [gradient.shape for gradient in gradients]:
            return wrong("clipped gives tensors of other shapes, or another number of them, than it got.")
        whole = norm(gradients)
        norms, largest = [gradient.norm() for gradient in gradients], max(g.abs().max() for g in gradients)
        one = min(1.0, limit / whole)
        mistakes = [
            ([gradient * limit / whole for gradient in gradients], "Their norm is below the limit: leave them alone."),
            ([g * torch.clamp(limit / n, max=1) for g, n in zip(gradients, norms, strict=True)],
             "You scaled each tensor by its own norm: the limit is on the norm of all numbers together, or some "
             "parameters would be slowed down and others not."),
            ([gradient.clamp(-limit, limit) for gradient in gradients],
             "You cut each number off at the limit: the direction of the step changes with that."),
            ([g * min(1.0, limit / sum(n.item() for n in norms)) for g in gradients],
             "You added up the tensors' norms: add up the squares of all numbers, then take the root."),
            ([g * min(1.0, limit / whole**2) for g in gradients], "You divided by the sum of squares: take its root."),
            ([g * min(1.0, limit / largest.item()) for g in gradients],
             "You divided by the largest number: the limit is on the norm of all."),
            ([g * min(1.0, 1 / whole) for g in gradients], "The norm is at most 1 now, and not at most the limit."),
            (gradients, "They are as they were."),
        ]  # fmt: skip
        if same(came, [gradient * one for gradient in gradients]):
            continue
        why = next((told for tensors, told in mistakes if same(came, tensors)), "")
        return wrong(
            f"The gradients {numbers} have a norm of {whole:.3g}, the limit is {limit:g}, and yours have a norm of "
            f"{norm(came):.3g}. {why}"
        )
    return right("One factor for all, so the direction stays. It is what `torch.nn.utils.clip_grad_norm_` does.")


def same(came: Sequence, expected: Sequence) -> bool:
    """Whether two lists of tensors hold the same numbers, up to rounding."""
    import torch

    return all(
        a.is_floating_point() and torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-7)
        for a, b in zip(came, expected, strict=True)
    )
