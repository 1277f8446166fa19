"""Is a base model fit to be trained? What gives NaN before training gives NaN after it."""

from __future__ import annotations

import math

import torch

from qlora_lab.errors import UserError
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.models.tokens import require_embeddings
from qlora_lab.models.trying import where_not_finite
from qlora_lab.training.chat import TokenizedSample


def require_sound(model, tokenizer, samples: list[TokenizedSample], dtype: torch.dtype | None = None) -> None:
    """Raise UserError unless the base has an embedding for every token, and a finite loss on the shortest sample.

    Args:
        samples: all that the model is to read, in training or when it is judged.
        dtype: bf16 or fp16 run under autocast; None and fp32 do not.
    """
    require_embeddings(model, tokenizer, {token for sample in samples for token in sample.ids})
    sample = min((s for s in samples if s.target_count), key=lambda sample: len(sample.ids), default=None)
    if sample is None:
        return
    total = text_loss(model, [sample], pad_token_id=tokenizer.pad_token_id, dtype=dtype).total
    if not math.isfinite(total):
        where = where_not_finite(model, torch.tensor([sample.ids])) or "its loss"
        raise UserError(
            f"the base model gives a loss of {total}, before any training: the first numbers that are not finite come "
            f"out of {where}; its weights are damaged, or too large for {str(dtype).removeprefix('torch.')}"
        )


def require_finite(judgement: dict) -> None:
    """Raise UserError if a base model's perplexity is not a number. judgement: as `Judgement.as_dict` makes it."""
    for text, perplexity in judgement["perplexity"].items():
        if not math.isfinite(perplexity):
            raise UserError(f"the base model has a perplexity of {perplexity} on {text}, before any training")
