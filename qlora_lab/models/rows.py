"""Attention for a batch whose rows begin with the same tokens, which are computed once: for training on a CPU.

Chats of one data set share a system prompt, often a quarter of their tokens. Under causal attention what a layer makes
of a token depends only on the tokens before it, so the common beginning has the same hidden states in each row. A batch
is then one sequence, of which every layer but the attention computes each token by itself:

    beginning (P tokens) | row 1 (S tokens) | row 2 (S tokens) | ...        P + rows * S tokens, not rows * (P + S)

A row's tokens attend to the beginning and to those before them in their own row. The gradients that the rows send back
to the beginning add up, which is what they do when each row has its own.

    with attention_of_rows(model):
        model(input_ids=ids, position_ids=positions, use_cache=False, beginning=P, rows=rows)

Scores of short rows are computed here as plain products: in bf16 on a CPU, PyTorch 2.13's flash attention with its
backward pass takes three times as long for 92 tokens, and twice as long for 256.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

NAME = "qlora_lab_rows"  # among transformers' attention implementations
SHORT = 256  # tokens in a row; of longer ones, all layers' scores would take gigabytes


@contextlib.contextmanager
def attention_of_rows(model) -> Iterator[None]:
    """Have a model of transformers, with PEFT's adapters or without, attend by rows, inside a `with`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def attend(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    beginning: int = 0,
    rows: int = 1,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention as transformers calls it, for one sequence of `rows` rows behind their common beginning.

    Args:
        query: Tensor[1, heads, tokens, width]; key and value may have fewer heads, each for several of query's.
        attention_mask: must be None.
        scaling: of the scores; None: 1 / sqrt(width).
        beginning: P, tokens of the common beginning; 0: there is none.
        sliding_window: a token attends to so many, itself included; None: to all before it.
        dropout, is_causal, softcap, s_aux: what some models ask for, and what is not computed here.

    Returns:
        Tensor[1, tokens, heads, width], and None for the weights

    Raises:
        NotImplementedError: several sequences, a mask, dropout, attention to later tokens, capped scores, sinks.
    """
    if len(query) != 1 or attention_mask is not None:
        raise NotImplementedError("attention by rows takes one sequence without a mask")
    if dropout or is_causal is False or softcap is not None or s_aux is not None:
        raise NotImplementedError("no dropout, attention to later tokens, capped scores or sinks in attention by rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0, :, beginning:].unflatten(1, (rows, -1)).transpose(0, 1) for x in (query, key, value))
    if beginning:
        k, v = (
            torch.cat([whole[:, :, :beginning].expand(rows, -1, -1, -1), own], dim=2)
            for whole, own in ((key, k), (value, v))
        )
    y = _causal(q, k, v, scale, sliding_window).transpose(0, 1).flatten(1, 2)  # (heads, rows * S, width)
    if beginning:
        q, k, v = (x[:, :, :beginning] for x in (query, key, value))
        first = _causal(q, k, v, scale, sliding_window)
        y = torch.cat([first[0], y], dim=1)
    return y.transpose(0, 1)[None], None


def _causal(q, k, v, scaling: float, window: int | None) -> torch.Tensor:
    """Attention of (batch, heads, S, width) to the last S of T keys and to what comes before them."""
    S, T = q.shape[2], k.shape[2]
    seen = torch.ones(S, T, dtype=torch.bool, device=q.device).tril(T - S)
    if window is not None:
        seen = seen.triu(T - S - window + 1)
    if q.dtype == torch.float32 or T > SHORT:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    batch, heads, groups = q.shape[0], q.shape[1], k.shape[1]
    q = (q * scaling).reshape(batch * groups, heads // groups * S, -1)  # the heads of one key's head, below each other
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    unseen = torch.zeros(S, T, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, S, T) + unseen
    weights = torch.softmax(scores, dim=-1).view(batch * groups, -1, T)
    return torch.bmm(weights, v).view(batch, heads, S, -1)
