"""What a run of `train_qlora` learns from, and what it is judged and validated on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from qlora_lab.errors import UserError
from qlora_lab.evaluation.judge import Judge
from qlora_lab.evaluation.reports import ANSWERED
from qlora_lab.evaluation.scores import require_scorable
from qlora_lab.train_flags import scores_of
from qlora_lab.training.batches import replayed_count
from qlora_lab.training.chat import fitting_chats, tokenize_text
from qlora_lab.training.data import has_splits, load_prose, split_chats, stream_chats
from qlora_lab.training.data_report import Draw
from qlora_lab.training.formats import Chat, Understood, parse_columns
from qlora_lab.training.holding_out import LEAST
from qlora_lab.training.processes import of_main_process
from qlora_lab.training.validation import Validation

REPLAY_SHARE = 0.1  # where --replay is given and --replay-share is not


def load_data(args: argparse.Namespace) -> tuple[list, dict[str, list], Understood]:
    """The chats to train on; by split, those to evaluate on; and what was understood of those to train on."""
    columns = parse_columns(args.columns) if args.columns else None
    understood, splits = Understood(), ("validation", *ANSWERED)
    chats, judged = split_chats(
        args.data,
        splits,
        args.eval_samples,
        args.seed,
        columns,
        args.format,
        understood,
        validates=bool(args.validate_every),  # samples that choose a step would flatter it as its judges
        split_by=args.split_by,
    )
    if args.validate_every and not judged.get("validation"):
        lacks = "a validation split" if has_splits(args.data) else f"{LEAST} samples or more"
        raise UserError(f"--validate-every has no held-out samples: {args.data} would need {lacks}")
    require_scorable(scores_of(args), judged)
    return chats, judged, understood


def held_out_in_words(judged: dict[str, list[Chat]], args: argparse.Namespace, samples: int) -> str:
    """What is held out of so many samples without splits, in a line or two."""
    if not judged:
        return f"fewer than {LEAST} samples: none is held out to judge the model on"
    by = f", drawn by {args.split_by}" if args.split_by else ""
    text = f"held out to judge the model on: {len(judged['test'])} of {samples} samples{by}"
    if args.validate_every:
        text += f"\n{len(judged['validation'])} others are held out to validate it, and do not judge its answers"
    return text


def share_of(args: argparse.Namespace) -> float:
    return args.replay_share or REPLAY_SHARE


def replayed_of(args: argparse.Namespace, samples: int) -> list[Chat]:
    """What --replay mixes into so many samples: drawn at random, as many as --replay-share asks for, if there are."""
    if not args.replay:
        return []
    draw = Draw(replayed_count(samples, share_of(args)), args.seed)
    for chat in stream_chats(args.replay):
        draw.see(chat)
    return draw.things


def fitting_of(judged: dict[str, list], args: argparse.Namespace, tokenizer, warn) -> dict[str, list]:
    """What is to be judged on, split by split, each conversation with its tokens.

    No sample is longer than those trained on. warn: gets a sentence about what is left out.
    """
    fitting = {}
    for split, chats in judged.items():
        fitting[split], left_out = fitting_chats(chats, tokenizer, args.max_length, args.learn, none_is_fine=True)
        if left_out:
            warn(f"note: of those to judge on ({split}), {left_out}")
    return fitting


def judge_of(
    fitting: dict[str, list],
    args: argparse.Namespace,
    tokenizer,
    dtype: torch.dtype,
    accelerator,
    replayed: Sequence[Chat] = (),
) -> Judge:
    """For the splits that exist: exact match on test and shifted; perplexity on validation and on prose.

    replayed: what is mixed into the samples; if it is the course's prose, the other paragraphs are judged.
    """
    texts, conversations = {}, {}
    learned = {chat[-1]["content"] for chat in replayed}
    prose = [text for text in load_prose() if text not in learned][: args.eval_samples]
    if fitting and prose:
        texts["prose"] = [tokenize_text(text, tokenizer) for text in prose]
    for split, pairs in fitting.items():
        if split == "validation" and pairs:
            texts[split] = [sample for _, sample in pairs]
        asked = [chat for chat, _ in pairs if chat[0]["role"] != "text"]
        if split in ANSWERED and asked:
            conversations[split] = asked
    return Judge(conversations, texts, tokenizer, dtype, accelerator, scores_of(args))


def validation_of(judge: Judge, args: argparse.Namespace, accelerator) -> Validation | None:
    """What --validate-every asks for: the loss of the judge's validation samples."""
    if not args.validate_every:
        return None
    if "validation" not in judge.texts:
        raise UserError("no validation sample is left: raise --max-length")
    return Validation(
        lambda model: of_main_process(accelerator, judge.loss(model, "validation").per_token),
        args.validate_every,
        args.patience,
        keep_best=args.keep == "best",
    )
