"""Answers to the exercises of 09_your_gpu: right ones, found by another way, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_as_chat, check_blame, check_first_bad, check_plan


def as_chat(row, empty=False, roles=("user", "assistant"), cut=1):
    talk = [{"role": "system", "content": row["rules"]}] if row["rules"] or empty else []
    for place, text in enumerate(row["turns"]):
        talk.append({"role": roles[place % 2], "content": text})
    return {"prompt": talk[:-cut], "completion": talk[-cut:]}


def changed(**parts):
    return lambda row: as_chat(row) | {name: part(row) for name, part in parts.items()}


def first_bad(outputs, bad=lambda number: not math.isfinite(number)):
    for name, tensor in outputs:
        if any(bad(number) for number in tensor.flatten().tolist()):
            return name
    return None


T4 = {"GB": 15.6, "FLOP/s": 65e12, "bytes/s": 320e9}


def plan(batch=8, samples=4000, **changes):
    """4,000 samples of 768 tokens, three epochs: Llama-3-8B on a T4, in twelve hours at half the speed."""
    case = {"model": "llama-3-8b", "card": T4, "length": 768, "epochs": 3} | changes
    return {"batch": batch, "samples": samples}, case


def blame(**changes):
    return {"Cleo": 5, "Ana": 12, "Ben": 2} | changes


RIGHT = [
    (check_as_chat, (as_chat,)),
    (check_first_bad, (first_bad,)),
    (check_blame, (blame(),)),
    (check_plan, plan()),
    (check_plan, plan(model="llama-2-13b", card=T4 | {"GB": 24}, batch=8, length=1500, samples=3700, epochs=1)),
]

WRONG = [  # and what the learner must be told
    (check_as_chat, lambda row: as_chat(row)["prompt"], 'expected a dict with "prompt" and "completion"'),
    (check_as_chat, changed(completion=lambda row: row["turns"][-1]), "expected a list of messages"),
    (check_as_chat, lambda row: as_chat(row, empty=True), "leave the system message out"),
    (check_as_chat, lambda row: as_chat(row | {"rules": ""}), "the rules are lost"),
    (
        check_as_chat,
        changed(prompt=lambda row: [*as_chat(row)["prompt"], *as_chat(row)["completion"]]),
        "the last turn is in the prompt",
    ),
    (check_as_chat, lambda row: as_chat(row, cut=2), "only the last turn is the completion"),
    (check_as_chat, changed(prompt=lambda row: as_chat(row)["prompt"][:2]), "one message for each turn"),
    (check_as_chat, lambda row: as_chat(row, roles=("assistant", "user")), "turns begin with the user"),
    (check_as_chat, lambda row: row["prompt"], "raised KeyError"),
    (check_first_bad, lambda outputs: first_bad(outputs, math.isnan), "Infinity is not finite either"),
    (check_first_bad, lambda outputs: first_bad(outputs[::-1]), "It is the first"),
    (check_first_bad, lambda outputs: first_bad(outputs[1:]) or "b", "may be bad at once"),
    (check_first_bad, lambda outputs: first_bad(outputs, lambda x: not abs(x) < 5e4), "60,000 is large, and finite"),
    (check_blame, {"Ana": 12, "Ben": 2}, "expected a dict with 'Ana', 'Ben', 'Cleo'"),
    (check_blame, {5, 12, 2}, "expected a dict with 'Ana', 'Ben', 'Cleo'"),
    (check_blame, blame(Ana=0), 'blame["Ana"] is 0 (int), expected the number of a line, 1 to 12'),
    (check_blame, blame(Ana=13), "expected the number of a line, 1 to 12"),
    (check_blame, blame(Ana="12"), "expected the number of a line, 1 to 12"),
    (check_blame, blame(Ben=True), "expected the number of a line, 1 to 12"),
    (check_blame, blame(Ana=7), "follow `dtype` there"),
    (check_blame, blame(Ana=10), "That line is as in the lesson's"),
    (check_blame, blame(Ana=11), "What becomes of them?"),
    (check_blame, blame(Ana=6), "saves memory, and changes nothing else"),
    (check_blame, blame(Ana=5, Cleo=12), "Ana: line 5 is at fault, but it causes another complaint. What numbers does"),
    (check_blame, blame(Ben=5, Cleo=2), "Ben: line 5 is at fault, but it causes another complaint. Which samples"),
    (check_blame, blame(Ben=1), "The three parts of the data"),
    (check_blame, blame(Ben=9), "Is that loss to be trusted"),
    (check_blame, blame(Cleo=2), "Cleo: line 2 is at fault, but it causes another complaint. What becomes of"),
    (check_blame, blame(Cleo=4), "It leaves out what is longer than `--max-length`"),
    (check_plan, ({"batch": 8}, plan()[1]), "expected a dict with 'batch' and 'samples'"),
    (check_plan, (plan()[0], {"model": "llama-3-8b"}), "expected a dict with 'model', 'card', 'length' and 'epochs'"),
    (check_plan, plan(model="llama-8b"), "is no name in SHAPES"),
    (check_plan, plan(card={"GB": 16}), 'card is a dict with "GB"'),
    (check_plan, plan(card=T4 | {"FLOP/s": 65}), "about 1e13 to 1e15"),
    (check_plan, plan(model="smollm2-135m"), "fits anywhere"),
    (check_plan, plan(batch=4.5), "batch is 4.5 (float), expected a whole number from 1 up"),
    (check_plan, plan(epochs=True), "epochs is True (bool), expected a whole number from 1 up"),
    (check_plan, plan(model="llama-3-70b"), "do not fit on a card of 15.6 GB: try a smaller batch"),
    (check_plan, plan(model="llama-3-70b", batch=1), "it needs several cards"),
    (check_plan, plan(batch=64), "with what lesson 02 leaves free, do not fit"),
    (check_plan, plan(batch=4), "twice the batch would fit, too"),
    (check_plan, plan(batch=16, length=512, samples=6000), "has the batches for 512 tokens already"),
    (check_plan, plan(samples=8000), "at half the speed takes"),  # in time at full speed only
    (check_plan, plan(samples=3500), "a tenth more samples would end in time"),
]
