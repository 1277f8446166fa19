"""Causal attention within each of several samples that are concatenated in one row of tokens.

On a GPU it is PyTorch's flash attention where that runs, from compute capability 8.0 on, and otherwise (a T4 has 7.5)
PyTorch's memory-efficient attention, which is slower and wants as many heads of k and v as of q. Capped scores (Gemma
2) are in none of PyTorch's kernels: there it is plain products, in as much memory as all scores of a layer take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from qlora_lab.training.steps.fast.description import Attention

CAUSAL = 1  # what PyTorch's memory-efficient attention calls a causal mask


@dataclass(frozen=True)
class Samples:
    """The extent of S samples.

    starts: where each sample begins, and the end of the last: int32, (S + 1,). longest: no sample has more tokens.
    flash: on a GPU, compute with flash attention (see `has_flash`).
    """

    starts: torch.Tensor
    longest: int
    flash: bool = True


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch's flash attention runs on this GPU and is not turned off (`torch.nn.attention.sdpa_kernel`)."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.flash_sdp_enabled()


def attend(q, k, v, samples: Samples, kind: Attention) -> tuple[torch.Tensor, tuple]:
    """Causal attention within each sample. q: (T, heads, head_dim), k and v: (T, kv_heads, head_dim).

    Returns:
        the output, of q's shape, and what `attend_backward` needs besides
    """
    if attend_plainly := _plain(q, kind):
        return attend_plainly(q, k, v, samples, kind), ()
    if not samples.flash:
        return _attend_memory_efficient(q, k, v, samples, kind)
    starts, longest = samples.starts, samples.longest
    out, logsumexp, *random, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, **_options(samples, kind)
    )
    return out, (logsumexp, *random)


def attend_backward(gradient, q, k, v, out, kept: tuple, samples: Samples, kind: Attention) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k and v, given that of `out`. Sums are in a fixed order, so the bits repeat."""
    if attend_plainly := _plain(q, kind):
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        with torch.enable_grad():
            return torch.autograd.grad(attend_plainly(q, k, v, samples, kind), (q, k, v), gradient)
    if not samples.flash:
        return _memory_efficient_backward(gradient, q, k, v, out, kept, samples, kind)
    starts, longest = samples.starts, samples.longest
    logsumexp, *random = kept
    with repeatable():
        return torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, logsumexp, starts, starts, longest, longest, 0.0, True, *random,
            **_options(samples, kind),
        )  # fmt: skip


def _plain(q: torch.Tensor, kind: Attention) -> Callable[..., torch.Tensor] | None:
    """Attention of PyTorch's differentiable operators, where no kernel serves: with capped scores, and on a CPU."""
    if kind.score_cap is not None:
        return _attend_capped
    return None if q.is_cuda else _attend_sample_by_sample


def _window(samples: Samples, kind: Attention) -> int | None:
    """The window, if a sample may be longer."""
    return kind.window if kind.window and kind.window < samples.longest else None


def _options(samples: Samples, kind: Attention) -> dict:
    """Arguments of PyTorch's flash attention for what is not as in LLaMA."""
    options: dict[str, Any] = {} if kind.scale is None else {"scale": kind.scale}
    if window := _window(samples, kind):
        options |= {"window_size_left": window - 1, "window_size_right": 0}  # besides the token itself
    return options


def _attend_memory_efficient(q, k, v, samples: Samples, kind: Attention) -> tuple[torch.Tensor, tuple]:
    """`attend` with PyTorch's memory-efficient attention."""
    k, v = (_for_each_head(tensor, q.shape[1]) for tensor in (k, v))
    starts, longest = samples.starts, min(samples.longest, len(q))
    out, logsumexp, *random, _, _ = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, starts, starts, longest, longest, 0.0, CAUSAL, True,
        scale=kind.scale, window_size=_window(samples, kind),
    )  # fmt: skip
    return out[0], (logsumexp, *random)


def _memory_efficient_backward(gradient, q, k, v, out, kept: tuple, samples: Samples, kind: Attention):
    """`attend_backward` with PyTorch's memory-efficient attention.

    While it runs it takes 4 bytes for each of S * heads * longest * head_dim numbers: 134 MB for 8 samples of up to
    1024 tokens in a layer of LLaMA-7B.
    """
    starts, longest, kv_heads = samples.starts, min(samples.longest, len(q)), k.shape[1]
    logsumexp, *random = kept
    k, v = (_for_each_head(tensor, q.shape[1]) for tensor in (k, v))
    with repeatable():
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            gradient[None], q[None], k[None], v[None], None, out[None], starts, starts, longest, longest, logsumexp,
            0.0, *random, CAUSAL, False, scale=kind.scale, window_size=_window(samples, kind),
        )  # fmt: skip
    return dq[0], *(tensor[0].unflatten(1, (kv_heads, -1)).sum(2) for tensor in (dk, dv))


def _for_each_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat each head of k or v for the heads of q that read it: (T, kv_heads, head_dim) to (T, heads, head_dim)."""
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2)


def _attend_sample_by_sample(q, k, v, samples: Samples, kind: Attention) -> torch.Tensor:
    """`attend` with PyTorch's operators, for a CPU."""
    outs, starts = [], samples.starts.tolist()
    window = _window(samples, kind)
    for start, end in zip(starts, starts[1:], strict=False):
        if end > start:
            one = [tensor[start:end].transpose(0, 1)[None] for tensor in (q, k, v)]  # (1, heads, tokens, head_dim)
            mask = None
            if window:
                back = torch.arange(end - start)[:, None] - torch.arange(end - start)
                mask = (back >= 0) & (back < window)
            out = nn.functional.scaled_dot_product_attention(
                *one, attn_mask=mask, is_causal=mask is None, scale=kind.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _attend_capped(q, k, v, samples: Samples, kind: Attention) -> torch.Tensor:
    """`attend` for scores that are capped, on any device.

    The samples stand below each other, filled up to the longest of them. Scores and their softmax are in float32: with
    its backward pass, some 16 bytes for each of S * heads * longest² scores; 0.4 GB for 4 samples of 640 tokens in a
    layer of Gemma-2-9B.
    """
    starts, longest, cap = samples.starts.long(), min(samples.longest, len(q)), cast(float, kind.score_cap)
    token = torch.arange(len(q), device=q.device)
    sample = torch.searchsorted(starts, token, right=True) - 1
    place = sample, token - starts[sample]

    def rows(x: torch.Tensor) -> torch.Tensor:
        """(T, heads, head_dim) to (S, kv_heads, heads / kv_heads, longest, head_dim)."""
        filled = x.new_zeros(len(starts) - 1, longest, *x.shape[1:]).index_put(place, x)
        return filled.transpose(1, 2).unflatten(1, (k.shape[1], -1))

    scale = q.shape[-1] ** -0.5 if kind.scale is None else kind.scale
    scores = torch.matmul(rows(q * scale), rows(k).transpose(-1, -2)).float()
    seen = torch.ones(longest, longest, dtype=torch.bool, device=q.device).tril()
    if window := _window(samples, kind):
        seen = seen.triu(1 - window)
    weights = torch.softmax((cap * torch.tanh(scores / cap)).masked_fill(~seen, -torch.inf), dim=-1).to(v.dtype)
    return torch.matmul(weights, rows(v)).flatten(1, 2).transpose(1, 2)[place]


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms: flash attention's backward pass would otherwise add atomically."""
    settings = cast(Any, torch.utils.deterministic)  # torch's stub lacks what this module holds
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
