"""Machinery of 07_qlora_from_scratch: what autograd gives and keeps, an examination of layers, a twin."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch
from torch.nn.functional import linear

from qlora_lab.finetuning import QuantizedLinear, from_bitsandbytes, load_lora, load_samples, tokenize
from qlora_lab.quantization import relative_rms


def sent_back(layer: Callable, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """dL/dx, Tensor[..., in], by autograd, for y = layer(x) and dL/dy = gradient, Tensor[..., out]."""
    inputs = x.clone().requires_grad_()
    layer(inputs).backward(gradient)
    assert inputs.grad is not None
    return inputs.grad


def kept_bytes(compute: Callable[[], object], but: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps of `compute()` for the backward pass, without those of the tensors in `but`.

    A tensor that is kept twice is counted once.
    """
    kept, there = {}, {tensor.data_ptr() for tensor in but}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    del result  # only now may what was kept go
    return sum(kept.values())


@contextlib.contextmanager
def short_version() -> Iterator[None]:
    """Within it, each QuantizedLinear multiplies by its dense weight and leaves the way back to autograd."""
    with mock.patch.object(QuantizedLinear, "forward", lambda self, x: linear(x, self.weight.dequantize())):
        yield


def examine(layer: Callable, q, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """Print how a layer differs from the dense one with the same rounded weight, and what it keeps.

    Args:
        layer: x, Tensor[1, tokens, in] -> x Wᵀ, Tensor[1, tokens, out]
        q: W, a QuantizedTensor of shape (out, in)
        tokens, dtype: of the random input
    """
    a = torch.randn(1, tokens, q.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = layer(a), linear(b, q.dequantize().to(dtype))
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(y))
    assert a.grad is not None and b.grad is not None
    errors = relative_rms(expected.float(), y.float()), relative_rms(b.grad.float(), a.grad.float())
    kept = kept_bytes(lambda: layer(a))
    print(
        f"{tokens} tokens: error of the output {errors[0]:.4f}, of the gradient {errors[1]:.4f}; keeps {kept:,} bytes"
    )


def short_orders(tokenizer, count: int = 100) -> list:
    """The shortest of the first 400 training orders, tokenized: short ones are quicker."""
    samples, _ = tokenize(load_samples("orders", "train").select(range(400)), tokenizer, max_length=256)
    return sorted(samples, key=lambda sample: len(sample.ids))[:count]


def twin_of(stack):
    """Our layers with the numbers of a PEFT model on bitsandbytes' layers: the same 4-bit codes, scales, A and B.

    stack: a peft.PeftModel with plain LoRA. It is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        stack.save_pretrained(folder)
        return load_lora(from_bitsandbytes(copy.deepcopy(stack).unload()), folder)
