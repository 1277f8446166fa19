"""A model's loss on text, as the sum over tokens, and the perplexity that follows from it.

Adapters stay as they are, on or off; the model is left in eval mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qlora_lab.errors import UserError
from qlora_lab.training.batches import collate
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.loss import token_loss_sum


@dataclass(frozen=True)
class Loss:
    """The sum of the token losses (nats) and the number of target tokens. Adding two pools their tokens.

    Without samples both are 0, since a process's share may be empty. Only `per_token` and `perplexity` need a token.
    """

    total: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean loss per token, in nats. Raises UserError if there is none."""
        if not self.tokens:
            raise UserError("no token to judge the model on: give at least one sample that has a token to predict")
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(self.per_token)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.tokens + other.tokens)


@torch.no_grad()
def text_loss(
    model, samples: list[TokenizedSample], batch_size: int = 16, pad_token_id: int = 0, dtype: torch.dtype | None = None
) -> Loss:
    """The loss over the target tokens of all samples; `.perplexity` is exp of its mean per *token*.

    Long samples weigh more than short ones. A mean of the samples' means would be a different number, and a mean of
    the batches' means would depend on how the samples are batched.
    """
    model.eval()
    device = model.get_output_embeddings().weight.device  # the input embeddings may be on the CPU
    ordered = sorted((s for s in samples if s.target_count), key=lambda sample: len(sample.ids))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        batch = collate([[sample] for sample in ordered[start : start + batch_size]], pad_token_id)
        with autocast(device, dtype):
            total += token_loss_sum(model, batch).item()
    return Loss(total, sum(sample.target_count for sample in samples))


def autocast(device: torch.device, dtype: torch.dtype | None):
    """A context with autocast to `dtype` if that is bf16 or fp16, otherwise one that changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))
