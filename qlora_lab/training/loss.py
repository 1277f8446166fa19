"""The loss of a batch: the sum over its target tokens, with the logits of all positions at once or in chunks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.checkpoint

from qlora_lab.models.parts import text_decoder
from qlora_lab.models.trying import require_plain_head
from qlora_lab.training.chat import IGNORED


def token_loss_sum(model, batch: Mapping[str, Any], chunk: int | None = None) -> torch.Tensor:
    """Sum of the cross entropies of a batch's target tokens, in nats: an fp32 scalar.

    The output head turns each hidden state into `vocab_size` logits: a fifth of SmolLM2's arithmetic and most of its
    activations. It runs only at positions where some row has a target.

    Args:
        model: a causal LM of transformers, with or without adapters.
        batch: `input_ids`, `position_ids` and `labels`, int64 of shape (rows, tokens), as `collate` makes them; or
            what `collate_sharing` makes, for the attention in `models/rows.py`.
        chunk: at most this many hidden states have logits at a time; None: all at once.

    Raises:
        UserError: `chunk` is set and the model changes its logits after the head.
    """
    device = model.get_output_embeddings().weight.device  # the input embeddings may be on the CPU
    read = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    targets = read.pop("labels")[:, 1:]  # position i predicts token i + 1
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    if chunk is not None:
        return _chunked_loss_sum(model, read, targets[:, columns].flatten(), columns, chunk)
    logits = model(**read, use_cache=False, logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # some models make all, whatever they are asked to keep
        logits = logits[:, columns]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _chunked_loss_sum(model, read, targets: torch.Tensor, columns: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same sum with the logits of `chunk` hidden states at a time; the backward pass computes them again."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
    require_plain_head(causal_lm)
    head = causal_lm.get_output_embeddings()
    decoder = text_decoder(causal_lm)
    assert decoder is not None  # require_plain_head has seen it
    hidden = decoder(**read, use_cache=False).last_hidden_state[:, columns]  # (rows, len(columns), hidden_size)

    def loss_sum(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")

    pieces = zip(hidden.flatten(0, 1).split(chunk), targets.split(chunk), strict=True)
    sums = (torch.utils.checkpoint.checkpoint(loss_sum, *piece, use_reentrant=False) for piece in pieces)
    return functools.reduce(torch.add, sums)
