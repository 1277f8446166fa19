"""Machinery of 07_qlora_from_scratch: what autograd gives and keeps, and a race of twins."""

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
    collate,
    from_bitsandbytes,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    tokenize,
)
from qlora_lab.training.loss import token_loss_sum


def sent_back(layer: Callable, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """dL/dx, Tensor[..., in], by autograd, for y = layer(x) and dL/dy = gradient, Tensor[..., out]."""
    inputs = x.clone().requires_grad_()
    layer(inputs).backward(gradient)
    assert inputs.grad is not None
    return inputs.grad


def of_an_order(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear layer of the bundled model gets while it learns one order of lesson 01, in float32 on the CPU.

    name: of the layer, such as "model.layers.0.mlp.up_proj". Returns its inputs, Tensor[tokens, in], and the gradient
    of the loss with respect to its outputs, Tensor[tokens, out].
    """
    model, tokenizer = load_model(device="cpu", compute_dtype=torch.float32)
    batch = collate([[short_orders(tokenizer, 1)[0]]], tokenizer.pad_token_id)
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    loss = token_loss_sum(model, batch)
    hook.remove()
    inputs, outputs = seen
    (gradient,) = torch.autograd.grad(loss, outputs)
    return inputs.detach()[0], gradient[0]


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
    """Train each model with AdamW on the same samples, one a step: its loss in each step, by name.

    In a loop of its own: on a CPU, `train` would compute PEFT's layers in another order than PEFT does.
    """
    losses = {}
    for name, model in models.items():
        trained = [p for p in model.train().parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        losses[name] = []
        for _, [rows] in zip(range(steps), Batches(samples, batch_size=1, seed=0), strict=False):
            batch = collate(rows, 0)
            loss = token_loss_sum(model, batch) / (batch["labels"] != -100).sum()
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
            losses[name].append(loss.item())
    return losses


def twin_of(stack):
    """Our layers with the numbers of a PEFT model on bitsandbytes' layers: the same 4-bit codes, scales, A and B.

    stack: a peft.PeftModel with plain LoRA. It is left as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        stack.save_pretrained(folder)
        return load_lora(from_bitsandbytes(copy.deepcopy(stack).unload()), folder)
