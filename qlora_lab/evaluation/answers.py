"""A model's greedy answers, and whether they match the references exactly.

Adapters stay as they are, on or off; the model is left in eval mode.
"""

from __future__ import annotations

import json

import torch

from qlora_lab.adapters.as_one import as_one
from qlora_lab.errors import UserError
from qlora_lab.evaluation.losses import autocast
from qlora_lab.training.templates import end_ids, prompt_text


@torch.no_grad()
def generate(
    model,
    tokenizer,
    conversations: list[list[dict[str, str]]],
    max_new_tokens: int = 64,
    batch_size: int = 128,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Generate one greedy answer per conversation.

    Prompts are padded on the left, so all answers of a batch start at the same position. An answer ends where the chat
    template ends a turn, as in training, whatever the model's generation config says.

    Args:
        conversations: each the messages up to and including the user's last.
        max_new_tokens: an answer that reaches this length is cut there.
        batch_size: conversations answered at a time.
        dtype: bf16 or fp16 run under autocast; None and fp32 do not.

    Returns:
        the answers in the order of the conversations, without special tokens and surrounding whitespace
    """
    model.eval()
    device = model.get_output_embeddings().weight.device  # the input embeddings may be on the CPU
    texts = [prompt_text(messages, tokenizer) for messages in conversations]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: less padding
    answers, ends = [""] * len(texts), end_ids(tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = tokenizer(
            [texts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the template has written those that it wants
        ).to(device)
        with autocast(device, dtype), as_one(model):
            ids = model.generate(
                **prompts,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
            )
        new = ids[:, prompts["input_ids"].shape[1] :].tolist()
        for i, answer in zip(chosen, new, strict=True):
            length = next((at for at, token in enumerate(answer) if token in ends), len(answer))
            answers[i] = tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
    return answers


def is_exact(answer: str, reference: str) -> bool:
    """Whether the answer equals the reference: as JSON if the reference is a JSON object, otherwise as stripped text.

    Spacing and the order of keys do not matter in JSON, but the answer must be the object and nothing else.
    """
    expected = _json_object(reference)
    if expected is None:
        return answer.strip() == reference.strip()
    return _json_object(answer) == expected


def exact_match(answers: list[str], references: list[str]) -> float:
    """The share of answers that are exact, from 0 to 1.

    Raises:
        UserError: there are no references.
        ValueError: the numbers of answers and references differ.
    """
    if not references:
        raise UserError("no references to compare with: give at least one answer and its reference")
    return sum(is_exact(a, r) for a, r in zip(answers, references, strict=True)) / len(references)


def _json_object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
