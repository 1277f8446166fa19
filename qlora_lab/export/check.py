"""`--check`: does the file answer as the trained model does, and where do they part?

The trained model is loaded as it was for training, 4-bit base and adapter, and answers in transformers. The file
answers in llama.cpp, which formats the messages with the template in the file and cuts them into tokens with the
vocabulary in the file. Both are greedy. A file is *broken* when

- a prompt has other tokens in llama.cpp: template or vocabulary went wrong;
- it runs on where the trained model stops: the end token went wrong;
- fewer answers are equal than `LEAST_EQUAL` says: the weights went wrong.

Some differences are rounding: where two tokens are nearly equally likely, either may come first.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

from qlora_lab.adapters.quantized_linear import dequantize_linears
from qlora_lab.errors import UserError
from qlora_lab.evaluation.answers import generate, is_exact
from qlora_lab.evaluation.judge import SPARE_TOKENS
from qlora_lab.evaluation.reports import ANSWERED
from qlora_lab.export.llama_cpp import LlamaCpp
from qlora_lab.export.trained_run import TrainedRun
from qlora_lab.models.loading import load_model
from qlora_lab.training.data import split_chats
from qlora_lab.training.templates import prompt_text

# The share of answers that must be equal. 16 and 8 bits change less than the rounding of activations; what 4 bits cost
# is the learner's to judge, so there only a file that lost what was learned is called broken.
LEAST_EQUAL = {"merged": 0.95, "f16": 0.95, "bf16": 0.95, "q8_0": 0.9, "q4_0": 0.5, "q4_1": 0.5}


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        samples: orders or questions that both answered.
        equal: share of answers that are the same text.
        exact_match: share of exactly right answers, of the trained model and of the export.
        stopped: share of the export's answers that ended by themselves.
        tokens_per_second: of the export, prompt and answer, one conversation at a time; None for checkpoints.
        nbytes: of the weights on the disk.
        broken: why the export is broken; "" if it is not.
        parts: where the first unequal answers part, a line each.
    """

    samples: int
    equal: float
    exact_match: tuple[float, float]
    stopped: float
    tokens_per_second: float | None
    nbytes: int
    broken: str
    parts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        lines = [
            f"{self.samples} judged samples: {self.equal:.1%} equal answers, exact match {self.exact_match[1]:.1%} "
            f"(trained model {self.exact_match[0]:.1%}), {self.stopped:.1%} stop by themselves{speed}, "
            f"{self.nbytes / 1e6:,.1f} MB",
            *self.parts,
        ]
        return "\n".join([*lines, f"BROKEN: {self.broken}" if self.broken else "it answers as the trained model does"])


def judged_chats(run: TrainedRun, samples: int | None = None) -> list[list[dict[str, str]]]:
    """The conversations that the run was judged on; `samples` of each split, as many as in the run if None.

    Raises:
        UserError: the data is gone, or has none to judge on.
    """
    count = int(run.settings["eval_samples"]) if samples is None else samples
    _, judged = split_chats(run.settings["data"], ANSWERED, count, int(run.settings["seed"]))
    chats = [chat for split in ANSWERED for chat in judged.get(split, [])]
    if not chats:
        raise UserError(f"{run.settings['data']} has no samples to judge on: --check needs a run with --eval-samples")
    return chats


def trained_answers(run: TrainedRun, chats: list, limit: int) -> tuple[list[str], Any]:
    """What the trained model, base and adapter side by side, answers in transformers; and its tokenizer."""
    from peft import PeftModel

    base, tokenizer = load_model(str(run.base), "nf4" if run.quantized else None, compute_dtype=run.dtype)
    if run.quantized:
        dequantize_linears(base)  # once, not for each token: the rounded weights are the same
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which is renamed
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        model = PeftModel.from_pretrained(base, str(run.adapter))
    return generate(model, tokenizer, [chat[:-1] for chat in chats], limit, dtype=run.dtype), tokenizer


def answer_limit(chats: list, tokenizer) -> int:
    """The judge's: tokens of the longest reference, and some."""
    return max(len(tokenizer(chat[-1]["content"])["input_ids"]) for chat in chats) + SPARE_TOKENS


def check_checkpoint(run: TrainedRun, folder: pathlib.Path, chats: list) -> Check:
    """Compare a merged checkpoint, loaded by transformers as anybody would."""
    merged, tokenizer = load_model(str(folder), compute_dtype=run.dtype)
    limit = answer_limit(chats, tokenizer)
    answers = generate(merged, tokenizer, [chat[:-1] for chat in chats], limit, dtype=run.dtype)
    del merged
    trained, _ = trained_answers(run, chats, limit)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    stopped = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) < limit for answer in answers]
    return compare(chats, trained, answers, stopped, "merged", None, nbytes, tokenizer, "")


def check_gguf(run: TrainedRun, file: pathlib.Path, kind: str, chats: list) -> Check:
    """Compare a GGUF file, loaded by llama.cpp.

    Args:
        kind: type of its weights, a key of `LEAST_EQUAL`.
        chats: conversations, each with its reference answer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.base, trust_remote_code=False)
    limit = answer_limit(chats, tokenizer)
    served = LlamaCpp(file)  # first: if it is not there or cannot load the file, nobody need wait for the rest
    start = time.perf_counter()
    replies = [served.chat(chat[:-1], limit) for chat in chats]
    seconds = time.perf_counter() - start
    prompts = prompts_part(served, tokenizer, chats)
    del served
    trained, tokenizer = trained_answers(run, chats, limit)
    tokens = sum(reply.prompt_tokens + reply.tokens for reply in replies)
    answers = [reply.text for reply in replies]
    stopped = [reply.stopped for reply in replies]
    nbytes = file.stat().st_size
    return compare(chats, trained, answers, stopped, kind, tokens / seconds, nbytes, tokenizer, prompts)


def prompts_part(served: LlamaCpp, tokenizer, chats: list) -> str:
    """Where the first prompt that differs does so: template's text, then ids. "" if all are the same."""
    for chat in chats:
        ours, theirs = prompt_text(chat[:-1], tokenizer), served.prompt(chat[:-1])
        own_ids = tokenizer(ours, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        their_ids = served.ids(theirs, start=True)
        if own_ids == their_ids:
            continue
        at = _first_difference(own_ids, their_ids)
        start = tokenizer.bos_token or ""
        if ours.removeprefix(start) != theirs.removeprefix(start):
            at = _first_difference(ours, theirs)
            return (
                "the chat template's text differs in llama.cpp: trained on "
                f"{ours[max(0, at - 20) : at + 20]!r}, the file says {theirs[max(0, at - 20) : at + 20]!r}"
            )
        return (
            f"the prompt has other tokens in llama.cpp from the {at + 1}. on: trained on {own_ids[at : at + 6]}, "
            f"the file says {their_ids[at : at + 6]}, in {tokenizer.decode(own_ids[max(0, at - 3) : at + 6])!r}"
        )
    return ""


def _first_difference(one, other) -> int:
    """The index of the first unequal element, or the shorter's length."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def compare(
    chats: list,
    trained: list[str],
    answers: list[str],
    stopped: list[bool],
    kind: str,
    speed: float | None,
    nbytes: int,
    tokenizer,
    prompts: str,
) -> Check:
    """Hold an export's answers against the trained model's.

    Args:
        stopped: of the export's answers, which ended by themselves.
        kind: type of the weights, a key of `LEAST_EQUAL`.
        speed, nbytes: as in `Check`.
        prompts: what `prompts_part` found.
    """
    references = [chat[-1]["content"] for chat in chats]
    unequal = [i for i, (a, b) in enumerate(zip(trained, answers, strict=True)) if a != b]
    equal = 1 - len(unequal) / len(chats)
    limit = answer_limit(chats, tokenizer)
    ends = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) < limit for answer in trained]
    runs_on = [i for i, (theirs, ours) in enumerate(zip(stopped, ends, strict=True)) if ours and not theirs]
    broken = prompts
    if not broken and len(runs_on) > (1 - LEAST_EQUAL[kind]) * len(chats):
        tail = answers[runs_on[0]][len(trained[runs_on[0]]) :][:40]
        broken = f"{len(runs_on)} answers run on where the trained model stops, the first with {tail!r}"
    if not broken and equal < LEAST_EQUAL[kind]:
        broken = f"{equal:.1%} of the answers are equal, and of {kind} at least {LEAST_EQUAL[kind]:.0%} should be"
    return Check(
        samples=len(chats),
        equal=equal,
        exact_match=(_share(trained, references), _share(answers, references)),
        stopped=sum(stopped) / len(stopped),
        tokens_per_second=speed,
        nbytes=nbytes,
        broken=broken,
        parts=tuple(_part(i, chats[i], trained[i], answers[i], tokenizer) for i in unequal[:3]),
    )


def _share(answers: list[str], references: list[str]) -> float:
    return sum(is_exact(a, r) for a, r in zip(answers, references, strict=True)) / len(references)


def _part(number: int, chat: list, trained: str, exported: str, tokenizer) -> str:
    """Where two answers part: the first token that differs, and the text around it."""
    one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (trained, exported))
    at = _first_difference(one, other)
    said = tokenizer.decode(one[max(0, at - 6) : at])
    return (
        f"  sample {number + 1} ({chat[-2]['content'][:40]!r}) parts at token {at + 1}, after {said!r}: trained "
        f"{tokenizer.decode(one[at : at + 4])!r} {one[at : at + 1]}, exported {tokenizer.decode(other[at : at + 4])!r} "
        f"{other[at : at + 1]}"
    )
