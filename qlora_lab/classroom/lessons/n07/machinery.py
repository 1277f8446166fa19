"""Machinery of 07_qlora_from_scratch: what autograd gives and keeps, an examination of layers, a race of twins."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from unittest import mock

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lab.finetuning import (
    Batches,
    QuantizedLinear,
    from_bitsandbytes,
    load_lora,
    load_samples,
    lora_layers,
    tokenize,
    train,
)
from qlora_lab.quantization import relative_rms


def sent_back(layer: Callable, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """dL/dx, Tensor[..., in], by autograd, for y = layer(x) and dL/dy = gradient, Tensor[..., out]."""
    inputs = x.clone().requires_grad_()
    layer(inputs).backward(gradient)
    assert inputs.grad is not None
    return inputs.grad


def kept_bytes(compute: Callable[[], torch.Tensor], but: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that wait for the backward pass of the tensor `compute()`, without those of the tensors in `but`.

    Counted are the tensors that autograd saves, and those that an autograd.Function hangs on its ctx; each once.
    """
    kept, there = {}, {tensor.data_ptr() for tensor in but}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    for node in nodes_of(result):
        for hung in vars(node).values() if hasattr(node, "__dict__") else ():
            if isinstance(hung, torch.Tensor):
                keep(hung)
    return sum(kept.values())


def nodes_of(result: torch.Tensor) -> list:
    """The nodes of the graph behind a tensor. A node of an autograd.Function is its ctx."""
    found, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return list(found)


@contextlib.contextmanager
def naive_layers() -> Iterator[None]:
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


def nudge(model):
    """Make every number of a model's matrices A larger by one millionth of its size, in place; returns the model."""
    for layer in lora_layers(model).values():
        layer.lora_A.data *= 1 + 1e-6
    return model


def race(models: Mapping[str, nn.Module], samples: list, steps: int) -> dict[str, list[float]]:
    """Train each model with AdamW on the same samples, one a step: its loss in each step, by name."""
    settings = {"learning_rate": 2e-3, "schedule": "constant", "warmup_steps": 3, "progress": False}
    losses = {}
    for name, model in models.items():
        records = train(model, Batches(samples, batch_size=1, seed=0), steps=steps, **settings)
        losses[name] = [record.loss for record in records]
    return losses


def twin_of(stack):
    """Our layers with the numbers of a PEFT model on bitsandbytes' layers: the same 4-bit codes, scales, A and B.

    stack: a peft.PeftModel with plain LoRA. It is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        stack.save_pretrained(folder)
        return load_lora(from_bitsandbytes(copy.deepcopy(stack).unload()), folder)
