"""What a run of `train_qlora` learns from, and what it is judged and validated on."""

from __future__ import annotations

import argparse

import torch

from qlora_lab.errors import UserError
from qlora_lab.evaluation.judge import Judge
from qlora_lab.evaluation.reports import ANSWERED
from qlora_lab.evaluation.scores import require_references
from qlora_lab.train_flags import scores_of
from qlora_lab.training.chat import fitting_chats, tokenize_text
from qlora_lab.training.data import has_splits, load_prose, split_chats
from qlora_lab.training.formats import Understood, parse_columns
from qlora_lab.training.validation import Validation


def load_data(args: argparse.Namespace) -> tuple[list, dict[str, list], Understood]:
    """The chats to train on; by split, those to evaluate on; and what was understood of those to train on."""
    columns = parse_columns(args.columns) if args.columns else None
    understood, splits = Understood(), ("validation", *ANSWERED)
    chats, judged = split_chats(args.data, splits, args.eval_samples, args.seed, columns, args.format, understood)
    if judged and args.validate_every and not has_splits(args.data):
        held_out = judged["test"]  # samples that choose a step would flatter it as its judges
        judged = {"test": held_out[::2], "validation": held_out[1::2]}
    if args.validate_every and not judged.get("validation"):
        lacks = "a validation split" if has_splits(args.data) else "20 samples or more, and --eval-samples 2 or more"
        raise UserError(f"--validate-every has no held-out samples: {args.data} would need {lacks}")
    answered = {
        split: [
            chat[-1]["content"] for chat in judged[split] if chat[0]["role"] != "text" and "tool_calls" not in chat[-1]
        ]
        for split in ANSWERED
        if split in judged
    }
    if args.judge and not any(answered.values()):
        raise UserError(f"--judge has no answers to score: {args.data} has no test split, nor samples to hold out")
    require_references(scores_of(args), answered)
    return chats, judged, understood


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


def judge_of(fitting: dict[str, list], args: argparse.Namespace, tokenizer, dtype: torch.dtype, accelerator) -> Judge:
    """For the splits that exist: exact match on test and shifted; perplexity on validation and on prose."""
    texts, conversations = {}, {}
    if fitting:
        texts["prose"] = [tokenize_text(text, tokenizer) for text in load_prose()[: args.eval_samples]]
    for split, pairs in fitting.items():
        if split == "validation" and pairs:
            texts[split] = [sample for _, sample in pairs]
        asked = [chat for chat, _ in pairs if chat[0]["role"] != "text"]
        if split in ANSWERED and asked:
            conversations[split] = asked
    return Judge(conversations, texts, tokenizer, dtype, accelerator, scores_of(args))


def validation_of(judge: Judge, args: argparse.Namespace) -> Validation | None:
    """What --validate-every asks for: the loss of the judge's validation samples."""
    if not args.validate_every:
        return None
    if "validation" not in judge.texts:
        raise UserError("no validation sample is left: raise --max-length")
    return Validation(
        lambda model: judge.loss(model, "validation").per_token,
        args.validate_every,
        args.patience,
        keep_best=args.keep == "best",
    )
