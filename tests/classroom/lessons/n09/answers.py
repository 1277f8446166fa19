"""Answers to the exercises of 09_your_gpu: right ones, found by another way, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_as_chat, check_faulty, check_first_bad, check_plan
from qlora_lab.memory import SHAPES, estimate


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


def plan(**changes):
    """2,000 samples of 512 tokens, three epochs; written out by hand for Llama-3-8B on a T4."""
    made = {"model": "llama-3-8b", "card": T4, "batch": 4, "length": 512, "samples": 2000, "epochs": 3} | changes
    shape = SHAPES.get(made["model"], SHAPES["llama-3-8b"])
    settings = {"rank": 16, "optimizer": "adamw_torch", "loss_chunk": 512}
    needed = estimate(shape, batch_size=made["batch"], sequence_length=made["length"], **settings)
    head = shape.vocab_size * shape.hidden_size
    products = 2 * 3 * (shape.linear_parameters() + head) * made["batch"] * made["length"]
    moved = 3 * 4.5 * shape.linear_parameters()
    step = products / made["card"].get("FLOP/s", 1) + moved / made["card"].get("bytes/s", 1)
    hours = 3 * step * made["samples"] * made["epochs"] / made["batch"] / 3600
    return {"gigabytes": needed.total / 1e9, "hours": hours} | made


def hours(factor):
    return plan(hours=plan()["hours"] * factor)


RIGHT = [
    (check_as_chat, (as_chat,)),
    (check_first_bad, (first_bad,)),
    (check_faulty, ([108, 85, 95],)),
    (check_plan, (plan(),)),
    (check_plan, (plan(model="llama-2-7b", batch=1, length=1024, epochs=1),)),
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
    (check_faulty, {85, 95}, "2 of 3 found. About another: What numbers does the adapter have"),
    (check_faulty, {108}, "1 of 3 found. About another: Which samples does it hold out"),
    (check_faulty, {85, 108}, "What becomes of a sample of 90 tokens"),
    (check_faulty, {68}, "the completion alone"),
    (check_faulty, {73}, "But are the others whole"),
    (check_faulty, {81}, "A fifth to test on"),
    (check_faulty, {91}, "The adapter's settings are the lesson's"),
    (check_faulty, {85, 96}, "saves memory, and changes nothing else"),
    (check_faulty, {85, 95, 97}, "follow `dtype` there"),
    (check_faulty, {99}, "Is that loss to be trusted"),
    (check_faulty, {110}, "goes on from its last checkpoint"),
    (check_faulty, {999}, "as in the lesson's script"),
    (check_faulty, "55, 63", "expected a set of three line numbers"),
    (check_faulty, {"a"}, "expected whole numbers"),
    (check_plan, {"model": "llama-3-8b"}, "expected a dict with"),
    (check_plan, plan(model="llama-8b"), "is no name in SHAPES"),
    (check_plan, plan(card={"GB": 16}), 'card is a dict with "GB"'),
    (check_plan, plan(card=T4 | {"FLOP/s": 65}), "about 1e13 to 1e15"),
    (check_plan, plan(model="smollm2-135m"), "fits anywhere"),
    (check_plan, plan(gigabytes=plan()["gigabytes"] - 0.5), "holds CUDA's context"),
    (check_plan, plan(gigabytes=plan()["gigabytes"] * 1e9 / 2**30), "Those are GiB"),
    (check_plan, plan(gigabytes=19.77), "has gradient checkpointing on"),
    (check_plan, plan(model="llama-3-70b"), "do not fit on a card of 15.6 GB: try a smaller batch"),
    (check_plan, plan(model="llama-3-70b", batch=1), "it needs several cards"),
    (check_plan, plan(card=T4 | {"GB": plan()["gigabytes"] + 0.5}), "with what lesson 02 leaves free, do not fit"),
    (check_plan, hours(1 / 3), "plan three times as long"),
    (check_plan, hours(3600), "3,600 make an hour"),
    (check_plan, hours(60), "60 make an hour"),
    (check_plan, plan(epochs=2, hours=plan(epochs=2)["hours"] / 2), "That is one epoch"),
    (check_plan, hours(4), "there are fewer steps"),
    (check_plan, hours(1 / 9), "takes three times as long"),
]
