"""`--check`: does the file answer as the trained model does, and where do they part?

The trained model, 4-bit base and adapter, answers in transformers, computing in float32 if it is small. The file
answers in llama.cpp, which formats the messages with the template in the file and cuts them into tokens with the
vocabulary in the file. Both are greedy. There are three verdicts:

- *equal*: the answers are the trained model's, but for rounding.
- *lossy*: a file in 4 bits that has lost some of what the model had learned, as rounding to 4 bits does. How much is
  too much is the user's to say, so the exit code is 0; the verdict says what was lost.
- *broken*: nobody wants this file, and the exit code is 2.
    - A prompt has other tokens in llama.cpp: template or vocabulary went wrong.
    - In 16 and 8 bits, more answers run on where the trained model stops, or more are unequal, than `UNEQUAL` and
      chance explain: end token or weights went wrong.
    - In 4 bits, less than half of the answers that the trained model has exactly right are left, or the perplexity of
      the references has doubled.

A file in 4 bits is lossy if it keeps fewer of the right answers than 98 of 100 and chance explain, or if the perplexity
of the references is more than 5 % higher. The half, the doubling and the 5 % are chosen, not derived.

Some differences are rounding: where two tokens are nearly equally likely, either may come first. So it is said of the
first answers that part how much likelier the trained model finds its own token. What `UNEQUAL` says was measured on
answers of some 40 tokens; long free texts meet more such ties, and a file that is called broken there may be whole.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lab.adapters.files import load_lora
from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.peft_adapter import load_adapter
from qlora_lab.adapters.quantized_linear import dequantize_linears
from qlora_lab.errors import UserError
from qlora_lab.evaluation.answers import generate, is_exact
from qlora_lab.evaluation.judge import SPARE_TOKENS
from qlora_lab.evaluation.losses import Loss, autocast, text_loss
from qlora_lab.evaluation.reports import ANSWERED
from qlora_lab.export.llama_cpp import LlamaCpp
from qlora_lab.export.trained_run import TrainedRun
from qlora_lab.models.loading import load_model, load_tokenizer
from qlora_lab.models.sharded import CheckpointWeights
from qlora_lab.training.chat import TokenizedSample, tokenize_chat
from qlora_lab.training.data import split_chats
from qlora_lab.training.formats import parse_columns
from qlora_lab.training.templates import end_ids, prompt_text

# By type of weights, the share of unequal answers of a whole file: what is promised of 16 bits, what was measured of 8
# (docs/export.md). A file is broken if it has so many more that chance would bring them once in a thousand checks.
UNEQUAL = {"merged": 0.02, "f16": 0.02, "bf16": 0.02, "q8_0": 0.1}
FLOAT32_AT_MOST = 2_000_000_000  # parameters, 8 GB
RIGHT_LOST = 0.02  # by chance, of the right answers of a file in 4 bits that is not lossy
LOSSY_ABOVE, BROKEN_ABOVE = 1.05, 2.0  # perplexity in 4 bits, over the trained model's
READ_BY = ("columns", "format", "split_by")  # flags of the run that say how its data was read
READ_AT_MOST = 20  # references whose perplexity is compared: in llama.cpp each of their tokens is a request


@dataclass(frozen=True)
class Told:
    """What a model made of the judged conversations.

    Attributes:
        answers: greedy ones.
        stopped: which of them ended by themselves.
        perplexity: of some of the references.
    """

    answers: list[str]
    stopped: list[bool]
    perplexity: float


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        samples: orders or questions that both answered.
        equal: share of answers that are the same text.
        exact_match: share of exactly right answers, of the trained model and of the export.
        stopped: share of answers that ended by themselves, of the trained model and of the export.
        perplexity: of some of the references, by the trained model and by the export.
        tokens_per_second: of the export, prompt and answer, one conversation at a time; None for checkpoints.
        nbytes: of the weights on the disk.
        verdict: "equal", "lossy" or "broken".
        why: the export is lossy or broken; "" if it is neither.
        parts: which answers run on, and where the first unequal answers part, a line each.
    """

    samples: int
    equal: float
    exact_match: tuple[float, float]
    stopped: tuple[float, float]
    perplexity: tuple[float, float]
    tokens_per_second: float | None
    nbytes: int
    verdict: str
    why: str
    parts: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        lines = [
            f"{self.samples} judged samples: {self.equal:.1%} equal answers, exact match {self.exact_match[1]:.1%} "
            f"(trained model {self.exact_match[0]:.1%}), {self.stopped[1]:.1%} stop by themselves "
            f"({self.stopped[0]:.1%}), perplexity of references {self.perplexity[1]:.4f} ({self.perplexity[0]:.4f})"
            f"{speed}, {self.nbytes / 1e6:,.1f} MB",
            *self.parts,
            f"{self.verdict.upper()}: {self.why}" if self.why else "EQUAL: it answers as the trained model does",
        ]
        return "\n".join(lines)


def judged_chats(run: TrainedRun, samples: int | None = None) -> list[list[dict[str, str]]]:
    """The conversations that the run was judged on; `samples` of each split, as many as in the run if None.

    Raises:
        UserError: the data is gone, or has none to judge on.
    """
    count = int(run.settings["eval_samples"]) if samples is None else samples
    named = {key: None if run.settings.get(key) == "None" else run.settings.get(key) for key in READ_BY}
    columns = parse_columns(named["columns"]) if named["columns"] else None
    _, judged = split_chats(
        run.settings["data"],
        ANSWERED,
        count,
        int(run.settings["seed"]),
        columns,
        named["format"],
        split_by=named["split_by"],
    )
    chats = [chat for split in ANSWERED for chat in judged.get(split, [])]
    if not chats:
        raise UserError(f"{run.settings['data']} has no samples to judge on: --check needs a run with --eval-samples")
    return chats


def trained_model(run: TrainedRun) -> tuple[Any, Any]:
    """The trained model in transformers, and its tokenizer.

    Base and adapter side by side; after merge-aware training the merge that it was meant for. See `in_float32`.
    """
    from peft import PeftModel

    base, tokenizer = load_model(str(run.base), "nf4" if run.quantized else None, compute_dtype=run.dtype)
    if run.merge_aware:
        merged = merge_requantized(load_lora(base, run.adapter), run.merge_aware)
        return in_float32(dequantize_linears(merged)), tokenizer
    if run.left_over:
        return in_float32(
            dequantize_linears(load_adapter(base, run.adapter, CheckpointWeights(str(run.base))))
        ), tokenizer
    if run.quantized:
        dequantize_linears(base)  # once, not for each token: the rounded weights are the same
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which is renamed
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        return in_float32(PeftModel.from_pretrained(base, str(run.adapter))), tokenizer


def in_float32(model):
    """The model with the same weights in float32, unless it has more than `FLOAT32_AT_MOST` of them.

    Else transformers, computing in bf16, would round more than the export: of the bundled model's answers to 100 orders
    5 changed when it did, and llama.cpp's, from an F16 file, were those of float32.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) <= FLOAT32_AT_MOST
    return model.float() if small else model


def answer_limit(chats: list, tokenizer) -> int:
    """The judge's: tokens of the longest reference, and some."""
    return max(len(tokenizer(chat[-1]["content"])["input_ids"]) for chat in chats) + SPARE_TOKENS


def read_texts(chats: list, tokenizer) -> list[TokenizedSample]:
    """Of the judged conversations those whose answers' perplexity is compared, evenly spread."""
    return [tokenize_chat(chat, tokenizer) for chat in chats[:: -(-len(chats) // READ_AT_MOST)]]


def told_by(model, tokenizer, chats: list) -> Told:
    """What a model of transformers makes of the judged conversations, computing in the dtype of its weights."""
    dtype = model.get_input_embeddings().weight.dtype
    limit = answer_limit(chats, tokenizer)
    answers = generate(model, tokenizer, [chat[:-1] for chat in chats], limit, dtype=dtype)
    stopped = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) < limit for answer in answers]
    loss = text_loss(model, read_texts(chats, tokenizer), pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    return Told(answers, stopped, loss.perplexity)


def check_checkpoint(run: TrainedRun, folder: pathlib.Path, chats: list) -> Check:
    """Compare a merged checkpoint, loaded by transformers as anybody would: in 4 bits, if it was trained for that."""
    in_4_bits = "nf4" if run.merge_aware == "nf4" else None
    merged, tokenizer = load_model(str(folder), in_4_bits, compute_dtype=run.dtype)
    merged = in_float32(dequantize_linears(merged) if in_4_bits else merged)
    exported = told_by(merged, tokenizer, chats)
    del merged
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return compare(run, chats, exported, "merged", None, nbytes, "")


def check_gguf(run: TrainedRun, file: pathlib.Path, kind: str, chats: list) -> Check:
    """Compare a GGUF file, loaded by llama.cpp.

    Args:
        kind: type of its weights.
        chats: conversations, each with its reference answer.
    """
    tokenizer = load_tokenizer(run.base)
    limit = answer_limit(chats, tokenizer)
    served = LlamaCpp(file)  # first: if it is not there or cannot load the file, nobody need wait for the rest
    start = time.perf_counter()
    replies = [served.chat(chat[:-1], limit) for chat in chats]
    seconds = time.perf_counter() - start
    prompts = prompts_part(served, tokenizer, chats)
    texts = read_texts(chats, tokenizer)
    total = sum(served.loss(text, len(tokenizer)) for text in texts)
    del served
    perplexity = Loss(total, sum(text.target_count for text in texts)).perplexity
    exported = Told([reply.text for reply in replies], [reply.stopped for reply in replies], perplexity)
    speed = sum(reply.prompt_tokens + reply.tokens for reply in replies) / seconds
    return compare(run, chats, exported, kind, speed, file.stat().st_size, prompts)


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
    run: TrainedRun, chats: list, exported: Told, kind: str, speed: float | None, nbytes: int, prompts: str
) -> Check:
    """Load the trained model and hold what an export told against what it tells.

    Args:
        kind: type of the weights.
        speed, nbytes: as in `Check`.
        prompts: what `prompts_part` found.
    """
    model, tokenizer = trained_model(run)
    trained = told_by(model, tokenizer, chats)
    pairs = enumerate(zip(trained.answers, exported.answers, strict=True))
    unequal = [i for i, (one, other) in pairs if one != other]
    references = [chat[-1]["content"] for chat in chats]
    verdict, why = ("broken", prompts) if prompts else judged(trained, exported, references, kind)
    return Check(
        samples=len(chats),
        equal=1 - len(unequal) / len(chats),
        exact_match=(_share(trained.answers, references), _share(exported.answers, references)),
        stopped=(sum(trained.stopped) / len(chats), sum(exported.stopped) / len(chats)),
        perplexity=(trained.perplexity, exported.perplexity),
        tokens_per_second=speed,
        nbytes=nbytes,
        verdict=verdict,
        why=why,
        parts=(
            *run_on(trained, exported),
            *(_part(i, chats[i], trained, exported, model, tokenizer) for i in unequal[:3]),
        ),
    )


def judged(trained: Told, exported: Told, references: list[str], kind: str) -> tuple[str, str]:
    """The verdict on what an export told: "equal", "lossy" or "broken", and why. kind: type of the weights."""
    if kind in UNEQUAL:
        why = fault(trained, exported, kind)
        return ("broken", why) if why else ("equal", "")
    of_both = zip(trained.answers, exported.answers, references, strict=True)
    kept = [is_exact(other, right) for one, other, right in of_both if is_exact(one, right)]
    rise = exported.perplexity / trained.perplexity
    why = (
        f"of {len(kept)} answers that the trained model has right, {sum(kept)} are left in {kind}, and the perplexity "
        f"of references is {rise:.2f} times the trained model's; export with --weights q8_0, or train with "
        "--merge-aware q4_0"
    )
    if sum(kept) < len(kept) / 2 or not rise <= BROKEN_ABOVE:
        return "broken", why
    if len(kept) - sum(kept) > most_unequal(RIGHT_LOST, len(kept)) or rise > LOSSY_ABOVE:
        return "lossy", why
    return "equal", ""


def fault(trained: Told, exported: Told, kind: str) -> str:
    """Why an export in 16 or 8 bits is broken, from what it told; "" if it is not. kind: of UNEQUAL."""
    pairs = list(zip(trained.answers, exported.answers, strict=True))
    most = most_unequal(UNEQUAL[kind], len(pairs))
    ends = enumerate(zip(trained.stopped, exported.stopped, strict=True))
    runs_on = [i for i, (ours, theirs) in ends if ours and not theirs]
    if len(runs_on) > most:
        one, other = pairs[runs_on[0]]
        tail = other[len(one) :][:40]
        return f"{len(runs_on)} answers run on where the trained model stops, the first with {tail!r}"
    unequal = sum(one != other for one, other in pairs)
    if unequal > most:
        return f"{unequal} of {len(pairs)} answers are unequal, and of a whole {kind} file at most {most} should be"
    return ""


def run_on(trained: Told, exported: Told) -> list[str]:
    """A line about the export's answers that do not end by themselves, if there are any, and the trained model's."""
    numbers = [i for i, stopped in enumerate(exported.stopped) if not stopped]
    if not numbers:
        return []
    both = sum(not trained.stopped[i] for i in numbers)
    theirs = "so does the trained model" if both == len(numbers) else f"the trained model does in {both} of these"
    named = ", ".join(str(i + 1) for i in numbers[:5]) + (", ..." if numbers[5:] else "")
    return [f"  {len(numbers)} of {len(exported.stopped)} run on to the limit of tokens (sample {named}): {theirs}"]


def most_unequal(rate: float, count: int) -> int:
    """The most unequal answers that chance brings more than once in a thousand checks of `count` answers.

    >>> [most_unequal(0.02, count) for count in (0, 3, 50, 100)]
    [0, 2, 5, 7]
    """
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    more = 1.0  # the probability of more than `most` unequal answers
    for most in range(count + 1):
        ways = math.lgamma(count + 1) - math.lgamma(most + 1) - math.lgamma(count - most + 1)
        more -= math.exp(ways + most * log_rate + (count - most) * log_rest)
        if more < 1e-3:
            return most
    return count


def _share(answers: list[str], references: list[str]) -> float:
    return sum(is_exact(a, r) for a, r in zip(answers, references, strict=True)) / len(references)


def _part(number: int, chat: list, trained: Told, exported: Told, model, tokenizer) -> str:
    """Where two answers part: the text before, both tokens, and how sure the trained model is of its own."""
    texts = trained.answers[number], exported.answers[number]
    end = end_ids(tokenizer)[0]
    one, other = ([*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts)
    at = _first_difference(one, other)
    gap = advantage(model, tokenizer, chat, one[: at + 1], other[at])
    said = tokenizer.decode(one[max(0, at - 6) : at])
    return (
        f"  sample {number + 1} ({chat[-2]['content'][:40]!r}) parts at token {at + 1}, after {said!r}: trained "
        f"{tokenizer.decode(one[at : at + 4])!r} [{one[at]}], exported {tokenizer.decode(other[at : at + 4])!r} "
        f"[{other[at]}]; the trained model finds its own token {math.exp(gap):,.2f} times as likely"
    )


@torch.no_grad()
def advantage(model, tokenizer, chat: list, answer: list[int], other: int) -> float:
    """Log probability (nats) of an answer's last token, minus that of another token in its place."""
    ids = tokenizer(prompt_text(chat[:-1], tokenizer), add_special_tokens=False)["input_ids"] + answer
    device = model.get_output_embeddings().weight.device
    with autocast(device, model.get_input_embeddings().weight.dtype):
        logits = model(input_ids=torch.tensor([ids[:-1]], device=device)).logits[0, -1].double()
    return float(logits[ids[-1]] - logits[other])
