"""Exercises of 09_your_gpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, wrong

if TYPE_CHECKING:
    import torch

# --- 9.1: another data file ------------------------------------------------------------------------------------------

TALKS = [
    {"rules": "Answer in one sentence.", "turns": ["Is the library open?", "Until six."]},
    {"rules": "", "turns": ["My card is lost.", "Since when?", "Since Monday.", "It is blocked now."]},
    {"rules": "Be brief.", "turns": ["a", "b", "c", "d", "e", "f"]},
]


def chat_of(row: dict) -> dict:
    """What the script's `as_chat` would make of such a row."""
    names = ["user", "assistant"] * len(row["turns"])
    messages = [{"role": role, "content": text} for role, text in zip(names, row["turns"], strict=False)]
    system = [{"role": "system", "content": row["rules"]}] if row["rules"] else []
    return {"prompt": [*system, *messages[:-1]], "completion": messages[-1:]}


@exercise("9.1", "another data file", item="train", points=2, todo="complete `as_chat`")
def check_as_chat(as_chat: Callable[[dict], dict]) -> Verdict:
    """as_chat(row): a row with "rules" and "turns" as TRL wants it, with "prompt" and "completion"."""
    for row in TALKS:
        came = call(as_chat, {"rules": row["rules"], "turns": list(row["turns"])})
        if not isinstance(came, dict) or set(came) != {"prompt", "completion"}:
            raise Mistake(f'as_chat gives {described(came)}, expected a dict with "prompt" and "completion".')
        if fault := _fault(came, chat_of(row), row):
            return wrong(f"For {row} your result is wrong: {fault}")
    return right(
        "In the script, these lines take the place of its own `as_chat`, and `--split-by` names a column of your file."
    )


def _fault(came: dict, expected: dict, row: dict) -> str:
    for name in ("prompt", "completion"):
        if not isinstance(came[name], list) or not all(
            isinstance(message, dict) and set(message) == {"role", "content"} for message in came[name]
        ):
            return f'"{name}" is {described(came[name])}, expected a list of messages, each with "role" and "content".'
    if came == expected:
        return ""
    prompt, completion = came["prompt"], came["completion"]
    texts = [message["content"] for message in [*prompt, *completion]]
    if not row["rules"] and any(message["role"] == "system" for message in prompt):
        return "where there are no rules, leave the system message out; an empty one is a message too."
    if row["rules"] and row["rules"] not in texts:
        return "the rules are lost: they are the system message, at the beginning of the prompt."
    if row["turns"][-1] in [message["content"] for message in prompt]:
        return "the last turn is in the prompt: the model would read what it should learn to say."
    if len(completion) > 1:
        return "only the last turn is the completion; earlier answers belong to the prompt."
    if texts != [message["content"] for message in [*expected["prompt"], *expected["completion"]]]:
        return f"its texts are {texts}: one message for each turn, in their order."
    roles = [message["role"] for message in [*prompt, *completion]]
    return f"the roles are {roles}: turns begin with the user, and user and assistant take turns."


# --- 9.2: where the numbers end --------------------------------------------------------------------------------------


@exercise("9.2", "the first bad number", item="train", points=2, todo="complete `first_bad`")
def check_first_bad(first_bad: Callable[[list[tuple[str, torch.Tensor]]], str | None]) -> Verdict:
    """first_bad(outputs): the name of the first tensor in which not all numbers are finite; None if all are."""
    import torch

    fine, large = torch.tensor([[1.0, -2.0]]), torch.tensor([6e4], dtype=torch.float16)
    nan, inf = torch.tensor([[0.0, float("nan")]]), torch.tensor([1.0, float("-inf"), 3.0])
    cases = [
        ([("a", fine), ("b", nan), ("c", nan)], "b", "It is the first in which a number is not finite."),
        (
            [("a", fine), ("b", inf), ("c", nan)],
            "b",
            "Infinity is not finite either: NaN comes from it a little later.",
        ),
        ([("a", inf)], "a", "The first tensor may be bad at once."),
        ([("a", fine), ("b", large)], None, "60,000 is large, and finite. If all are finite, return None."),
    ]
    for outputs, expected, why in cases:
        came = first_bad(outputs) if expected is None else call(first_bad, outputs)
        shown = [(name, tensor.tolist()) for name, tensor in outputs]
        if came != expected:
            return wrong(f"first_bad({shown}) gives {came!r}, expected {expected!r}. {why}")
    return right("With this, a NaN has an address.")


# --- 9.3: a broken script --------------------------------------------------------------------------------------------

WHY = {
    "Ana": "What numbers does the adapter have where the script computes in fp16?",
    "Ben": "Which samples does it hold out, and which does it train on?",
    "Cleo": "What becomes of a sample of 90 tokens?",
}
INNOCENT = {  # words on a line that is as it should be
    "for part in": "The three parts of the data, as in the lesson's script.",
    "filter(fits)": "It leaves out what is longer than `--max-length`, as in the lesson's script.",
    "gradient_checkpointing": "Gradient checkpointing saves memory, and changes nothing else.",
    "bf16=": "bf16 and fp16 follow `dtype` there, as they should.",
    "load_best": "It takes the checkpoint with the lowest validation loss. Is that loss to be trusted?",
    "requires_grad": "It finds the adapter's weights, as it should. What becomes of them?",
}


@exercise("9.3", "three colleagues' scripts", item="config", points=3, todo="fill in `blame`")
def check_blame(blame: dict[str, int]) -> Verdict:
    """blame: by colleague, the number of the line that makes that script's trouble."""
    from qlora_lab.classroom.lessons.n09.suspects import broken, faulty_lines

    lines, text = faulty_lines(), [line for part in broken().values() for line in part]
    if not isinstance(blame, dict) or set(blame) != set(lines):
        raise Mistake(f"blame is {described(blame)}, expected a dict with {', '.join(map(repr, lines))}.")
    for name, number in blame.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(text):
            raise Mistake(f'blame["{name}"] is {described(number)}, expected the number of a line, 1 to {len(text)}.')
    for name, number in ((name, blame[name]) for name in lines):
        if number in set(lines.values()) - {lines[name]}:
            return wrong(f"{name}: line {number} is at fault, but it causes another complaint. {WHY[name]}")
        if number != lines[name]:
            line = text[number - 1].strip()
            why = next((why for words, why in INNOCENT.items() if words in line), "That line is as in the lesson's.")
            return wrong(f"{name}: line {number}, `{line}`: {why}")
    return right("An adapter that fp16 cannot train, test questions among the training data, answers that are cut off.")


# --- 9.4: a plan -----------------------------------------------------------------------------------------------------

MODELS = ("llama-2-7b", "llama-3-8b", "mistral-7b", "qwen2.5-7b", "llama-2-13b", "llama-2-70b", "llama-3-70b")
LONGEST = 12  # hours: about what Colab and Kaggle lend at a time
SLOWER = 2  # times the planned hours, which a run must end in, too
LISTED = (512, 1024)  # lengths in section 3's table, which has the largest batches for them


@exercise("9.4", "a plan for your card", item="memory", points=3, todo="fill in `plan`")
def check_plan(plan: dict, case: dict) -> Verdict:
    """plan: batch and samples of the largest run that ends in time. case: model (in SHAPES), card, length, epochs."""
    from qlora_lab.classroom.cards import hours, needed_by_script
    from qlora_lab.memory import SHAPES

    if not isinstance(plan, dict) or {"batch", "samples"} - set(plan):
        raise Mistake(f"plan is {described(plan)}, expected a dict with 'batch' and 'samples'.")
    if not isinstance(case, dict) or {"model", "card", "length", "epochs"} - set(case):
        raise Mistake(f"case is {described(case)}, expected a dict with 'model', 'card', 'length' and 'epochs'.")
    model, card, length, epochs = (case[name] for name in ("model", "card", "length", "epochs"))
    if model not in SHAPES:
        raise Mistake(f"{model!r} is no name in SHAPES: choose from {', '.join(MODELS)}.")
    if not isinstance(card, dict) or {"GB", "FLOP/s", "bytes/s"} - set(card):
        raise Mistake('card is a dict with "GB", "FLOP/s" and "bytes/s", as in CARDS.')
    if card["FLOP/s"] < 1e11 or card["bytes/s"] < 1e9 or card["GB"] > 1000:
        raise Mistake("card: FLOP/s are about 1e13 to 1e15, bytes/s about 1e11 to 1e13, GB at most a few hundred.")
    for name, number in (plan | {"length": length, "epochs": epochs}).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise Mistake(f"{name} is {described(number)}, expected a whole number from 1 up.")
    batch, samples = plan["batch"], plan["samples"]
    if SHAPES[model].parameters() < 1e9:
        return wrong("That model fits anywhere: plan a larger one.")
    if length in LISTED:
        return wrong(f"Section 3's table has the batches for {length:,} tokens already: plan with another length.")
    need = needed_by_script(model, batch, length).card_bytes / 1e9
    if need > card["GB"]:
        less = "it needs several cards" if batch == 1 else "try a smaller batch"
        room = f"{need:.1f} GB, with what lesson 02 leaves free,"
        return wrong(f"{room} do not fit on a card of {card['GB']} GB: {less}, or a smaller model.")
    if needed_by_script(model, 2 * batch, length).card_bytes / 1e9 <= card["GB"]:
        return wrong(f"{need:.1f} of {card['GB']} GB: twice the batch would fit, too.")
    took = SLOWER * hours(model, card, batch, length, samples, epochs)
    if took > LONGEST:
        return wrong(f"It fits, but at half the speed takes {took:.1f} hours: plan fewer samples.")
    if 1.1 * took <= LONGEST:
        return wrong(f"Even at half the speed it ends after {took:.1f} hours: a tenth more samples would end in time.")
    accumulate = max(1, 16 // batch)
    steps = round(samples * epochs / (batch * accumulate))
    return right(
        f"{need:.1f} of {card['GB']} GB, {took:.1f} hours at half the speed. "
        f"As flags: --max-length {length} --batch {batch} --accumulate {accumulate} --steps {steps}"
    )
