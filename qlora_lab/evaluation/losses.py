"""How surprised a model is by text: the sum of its token losses, and the perplexity that follows from it.

The model is taken as it is (adapter on or off) and left in eval mode.
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
    """Sum of the token losses (nats) and the number of target tokens. Adding two pools them, token by token.

    Of no samples it is 0 of 0: a process's share may be empty. Only `perplexity` needs a token.
    """

    total: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean loss of a token, in nats."""
        if not self.tokens:
            raise UserError("no token to judge the model on: give at least one sample that has a token to predict")
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, self.tokens + other.tokens)


@torch.no_grad()
def text_loss(
    model, samples: list[TokenizedSample], batch_size: int = 16, pad_token_id: int = 0, dtype: torch.dtype | None = None
) -> Loss:
    """The loss over the target tokens of all samples; `.perplexity` is exp of its mean per *token*.

    Long samples weigh more than short ones. The mean of the samples' own means would be another number, and one that
    depends on how the samples are batched if it is taken per batch.
    """
    model.eval()
    device = model.get_output_embeddings().weight.device  # the input's may lie on the CPU
    ordered = sorted((s for s in samples if s.target_count), key=lambda sample: len(sample.ids))
    total = 0.0
    for start in range(0, len(ordered), batch_size):
        batch = collate([[sample] for sample in ordered[start : start + batch_size]], pad_token_id)
        with autocast(device, dtype):
            total += token_loss_sum(model, batch).item()
    return Loss(total, sum(sample.target_count for sample in samples))


def autocast(device: torch.device, dtype: torch.dtype | None):
    """A context that multiplies in bf16 or fp16 if `dtype` is one of these, else one that changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16))
