"""Several adapters beside one frozen base, trained in the same forward and backward pass.

A model of 135 million parameters leaves a GPU idle most of the time, so that eight runs of eight samples take hardly
longer than one. Each run of a stack has its own parameters, samples, learning rate and clipping: it learns what it
would learn alone, up to rounding (tests compare it with `train_steps`). The rows of a batch are sorted by run.

    starts_of(model)                what a model trains: a list of tensors by name, one for each run
    stack(model, starts)            its layers with all runs' parameters, in place
    train_stack(model, ...)         trains all of them
    losses_of, answers_of           judges all of them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.lora import LoraLinear, lora_layers
from qlora_lab.adapters.quantized_linear import dense_weight, is_quantized
from qlora_lab.adapters.targets import set_module
from qlora_lab.evaluation.losses import autocast
from qlora_lab.quantization import DYNAMIC8, NF4
from qlora_lab.quantization.codebooks import nearest_level
from qlora_lab.quantization.scales import SMALLEST_ABSMAX
from qlora_lab.training.batches import Batches, collate
from qlora_lab.training.chat import IGNORED, TokenizedSample
from qlora_lab.training.schedules import rate
from qlora_lab.training.templates import end_ids, prompt_text

Starts = dict[str, list[torch.Tensor]]  # by a parameter's name, where each run begins

# -------------------------------------------------------------------------------------------------------------- layers


class StackedLora(nn.Module):
    """A LoRA or DoRA layer of several runs, around one base without bias.

    Args:
        layer: whose base, scale and kind all runs have.
        starts: `lora_A`, `lora_B` and for DoRA `lora_magnitude` of each run.
        merge_aware: whether the forward pass sees each run's merged weight, rounded to NF4, as in
            `adapters/merge_aware.py`.
    """

    def __init__(self, layer: LoraLinear, starts: Starts, merge_aware: bool):
        super().__init__()
        self.base, self.scale, self.merge_aware = layer.base, layer.scale, merge_aware
        self.lora_A = nn.Parameter(torch.stack(starts["lora_A"]))  # (runs, rank, in)
        self.lora_B = nn.Parameter(torch.stack(starts["lora_B"]))  # (runs, out, rank)
        dora = isinstance(layer, DoraLinear)
        self.lora_magnitude = nn.Parameter(torch.stack(starts["lora_magnitude"])) if dora else None  # (runs, out)
        self.merged: torch.Tensor | None = None  # (runs, out, in): a weight to compute with instead

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (runs * rows, tokens, in) -> (runs * rows, tokens, out)
        z = x.reshape(len(self.lora_A), -1, x.shape[-1])
        if self.merged is not None:
            y = z @ self.merged.mT
        elif self.merge_aware:
            # The value is the merged weight's; A and B get plain LoRA's gradients, see adapters/merge_aware.py.
            through = self.correction(z.detach())
            y = z @ self.requantized().mT
            y = y + (through - through.detach()).to(y.dtype)
        else:
            y = self.base(x).view(len(z), z.shape[1], -1)
            correction = self.correction(z)
            if self.lora_magnitude is None:
                y = y + correction.to(y.dtype)
            else:
                stretch = (self.lora_magnitude / self.lengths())[:, None]
                y = y + (stretch - 1).to(y.dtype) * y + stretch.to(y.dtype) * correction.to(y.dtype)
        return y.view(*x.shape[:-1], -1)

    def correction(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.lora_A.mT @ self.lora_B.mT * self.scale  # autocast has them in one dtype

    @torch.no_grad()
    def lengths(self) -> torch.Tensor:
        """DoRA's |V| for each run, as `DoraLinear.lengths`: float32, Tensor[runs, out]."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            W, A, b = self._dense().float(), self.lora_A.float(), self.scale * self.lora_B.float()
            square = W.square().sum(1) + 2 * (b * (W @ A.mT)).sum(2) + ((b @ (A @ A.mT)) * b).sum(2)
        return square.clamp(min=0).sqrt()

    @torch.no_grad()
    def requantized(self) -> torch.Tensor:
        """Each run's merged weight after rounding to NF4: Tensor[runs, out, in], in the base's dtype."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            dense = self._dense()
            sums = (self.scale * (self.lora_B.float() @ self.lora_A.float()) + dense).to(dense.dtype)
            return through_nf4(sums.float()).to(dense.dtype)

    def _dense(self) -> torch.Tensor:
        return dense_weight(self.base) if is_quantized(self.base) else self.base.weight.detach()


def through_nf4(stack: torch.Tensor, block_size: int = 64, scale_block_size: int = 256) -> torch.Tensor:
    """What is left of each matrix after NF4 with double quantization: float32, Tensor[runs, out, in].

    `nf4_double(matrix).dequantize()` for all at once, and without its checks, for which the GPU would have to wait.
    """
    blocks = stack.reshape(len(stack), -1, block_size)
    absmax = blocks.abs().amax(2)
    levels, codes = NF4.to(stack.device), DYNAMIC8.to(stack.device)
    found = levels[nearest_level(blocks * (1 / absmax.clamp(min=SMALLEST_ABSMAX))[..., None], levels)]
    offset = absmax.mean(1, keepdim=True)
    padded = nn.functional.pad(absmax - offset, (0, -absmax.shape[1] % scale_block_size))
    scales = padded.view(len(stack), -1, scale_block_size)
    largest = scales.abs().amax(2, keepdim=True)
    rounded = codes[nearest_level(scales * (1 / largest.clamp(min=SMALLEST_ABSMAX)), codes)] * largest
    absmax = rounded.view(len(stack), -1)[:, : absmax.shape[1]] + offset
    return (found * absmax[..., None]).view(stack.shape)


class StackedLinear(nn.Module):
    """A dense linear layer with a trained weight of each run, Parameter[runs, out, in]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (runs * rows, tokens, in) -> (runs * rows, tokens, out)
        return (x.reshape(len(self.weight), -1, x.shape[-1]) @ self.weight.mT).view(*x.shape[:-1], -1)


class StackedEmbedding(nn.Module):
    """Embeddings of each run, Parameter[runs, words, width]. padding_idx: as in nn.Embedding, gets no gradient."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None):
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (runs * rows, tokens) -> (runs * rows, tokens, width)
        runs, words, _ = self.weight.shape
        first = torch.arange(runs, device=ids.device).repeat_interleave(len(ids) // runs) * words
        found = nn.functional.embedding(ids + first[:, None], self.weight.flatten(0, 1))
        return (
            found
            if self.padding_idx is None
            else torch.where(ids[..., None] == self.padding_idx, found.detach(), found)
        )


class StackedNorm(nn.Module):
    """LLaMA's RMSNorm with a weight of each run, Parameter[runs, width]."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (runs * rows, tokens, width)
        runs, width = self.weight.shape
        normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.epsilon)
        return (normal.view(runs, -1, width) * self.weight[:, None]).view(x.shape).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------- stack


def starts_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what a model trains, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def stack(model: Any, starts: Sequence[dict[str, torch.Tensor]], merge_aware: bool = False) -> Any:
    """Give a LLaMA model the trained parameters of several runs, in place.

    Args:
        model: with LoRA or DoRA layers of ours; or without, and then all its parameters are trained.
        starts: `starts_of` each run.
    """
    if layers := lora_layers(model):
        for name, layer in layers.items():
            own = {p: [start[f"{name}.{p}"] for start in starts] for p, _ in layer.named_parameters(recurse=False)}
            set_module(model, name, StackedLora(layer, own, merge_aware))
        return model
    weights = {name: nn.Parameter(torch.stack([start[name] for start in starts])) for name in starts[0]}
    for name, module in list(model.named_modules()):
        weight = weights.get(f"{name}.weight")
        if isinstance(module, nn.Embedding):
            assert weight is not None
            set_module(model, name, StackedEmbedding(weight, module.padding_idx))
            set_module(model, "lm_head", StackedLinear(weight))  # tied
        elif isinstance(module, nn.Linear) and weight is not None:
            set_module(model, name, StackedLinear(weight))
        elif weight is not None:
            set_module(model, name, StackedNorm(weight, cast(float, module.variance_epsilon)))
    return model


@torch.no_grad()
def keep_runs(model: nn.Module, runs: Sequence[int]) -> None:
    """Let go of all but these runs of a trained stack, in place."""
    for module in model.modules():
        if isinstance(module, StackedLora | StackedLinear | StackedEmbedding | StackedNorm):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter[list(runs)].contiguous(), requires_grad=False))


@torch.no_grad()
def merge_into_nf4(model: nn.Module) -> None:
    """From now on, compute with each run's merged weight, rounded again to NF4."""
    for module in model.modules():
        if isinstance(module, StackedLora):
            module.merged = module.requantized()


# --------------------------------------------------------------------------------------------------------------- train


class StackedAdam:
    """Adam with a learning rate, and a limit for the gradients' norm, of each run.

    The numbers of `clip_grad_norm_` and `torch.optim.AdamW` without weight decay. The parameters become views of one
    matrix with a row for each run: a few operations update all of them.

    Args:
        parameters: their first dimension counts the runs.
        rates: Tensor[runs]. scales: LoRA+'s ratio, by parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], rates: torch.Tensor, scales: list[float], largest: float = 1.0):
        self.parameters, self.largest, self.steps = parameters, largest, 0
        self.values = torch.cat([p.detach().flatten(1) for p in parameters], dim=1)  # (runs, numbers)
        columns, start = [], 0
        for p, scale in zip(parameters, scales, strict=True):
            count = p[0].numel()
            p.data = self.values[:, start : start + count].view(p.shape)
            columns.append(torch.full((count,), scale, device=p.device))
            start += count
        self.scale = torch.cat(columns) if len(set(scales)) > 1 else scales[0]
        self.rates = rates.to(self.values.device)[:, None]
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update at this share of each run's rate; the gradients are dropped."""
        self.steps += 1
        gradient = torch.cat([p.grad.flatten(1) for p in self.parameters if p.grad is not None], dim=1)
        for p in self.parameters:
            p.grad = None
        norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient *= (self.largest / (norm + 1e-6)).clamp(max=1.0)
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = torch.sqrt(self.square, out=gradient).div_((1 - 0.999**self.steps) ** 0.5).add_(1e-8)
        move = torch.div(self.mean, root, out=root).mul_(self.rates).mul_(share / (1 - 0.9**self.steps))
        self.values -= move.mul_(self.scale)


def train_stack(
    model: Any,
    batches: Sequence[Batches],
    rates: Sequence[float],
    steps: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype,
    lora_plus: float = 1.0,
) -> list[list[float]]:
    """Train all runs of a stack as `train_steps` with its defaults would train each.

    Args:
        batches: of each run; all with the same batch size and accumulation.
        rates: the learning rate of each run.

    Returns:
        the losses of each run, nats per token, one a step
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters, runs = list(named.values()), len(batches)
    scales = [1.0 if "lora_A" in name else lora_plus for name in named]
    adam, streams = StackedAdam(parameters, torch.tensor(rates), scales), [iter(each) for each in batches]
    device, losses = parameters[0].device, []
    model.train()
    for step in range(1, steps + 1):
        taken = [next(stream) for stream in streams]
        targets = [sum(sample.target_count for rows in one for row in rows for sample in row) for one in taken]
        count, loss = torch.tensor(targets, device=device), torch.zeros(runs, device=device)
        for micro in range(len(taken[0])):
            rows = [row for one in taken for row in one[micro]]
            with autocast(device, dtype):
                part = loss_sums(model, rows, runs, pad_token_id) / count
            part.sum().backward()
            loss += part.detach()
        adam.step(rate(step, steps, 3, "cosine"))
        losses.append(loss)
    model.eval()
    return torch.stack(losses, dim=1).tolist()


def loss_sums(model: Any, rows: list[list[TokenizedSample]], runs: int, pad_token_id: int) -> torch.Tensor:
    """`token_loss_sum` for each run: Tensor[runs], in nats. rows: of all runs, the first run's first."""
    batch = {name: values.to(model.device) for name, values in collate(rows, pad_token_id).items()}
    targets = batch["labels"][:, 1:]  # position i predicts token i + 1
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=columns
    ).logits
    each = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets[:, columns].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(runs, -1).sum(1)


# --------------------------------------------------------------------------------------------------------------- judge


@torch.no_grad()
def losses_of(
    model: Any,
    samples: list[TokenizedSample],
    runs: int,
    *,
    pad_token_id: int,
    dtype: torch.dtype,
    rows_at_once: int = 128,
) -> list[float | None]:
    """The loss of the same samples for each run, nats per token; None where it is not finite."""
    model.eval()
    batch_size = max(1, rows_at_once // runs)
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    total = torch.zeros(runs, dtype=torch.float64, device=model.device)
    for start in range(0, len(ordered), batch_size):
        rows = [[sample] for sample in ordered[start : start + batch_size]] * runs
        with autocast(model.device, dtype):
            total += loss_sums(model, rows, runs, pad_token_id)
    tokens = sum(sample.target_count for sample in samples)
    return [value if math.isfinite(value) else None for value in (total / tokens).tolist()]


@torch.no_grad()
def answers_of(
    model: Any,
    tokenizer,
    conversations: list[list[dict[str, str]]],
    runs: int,
    *,
    max_new_tokens: int,
    dtype: torch.dtype,
    batch_size: int = 256,
) -> list[list[str]]:
    """Each run's greedy answers to the same conversations, as `evaluation.answers.generate` gives them."""
    model.eval()
    texts = [prompt_text(messages, tokenizer) for messages in conversations]
    order, ends = sorted(range(len(texts)), key=lambda i: len(texts[i])), end_ids(tokenizer)
    answers = [[""] * len(texts) for _ in range(runs)]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = tokenizer(
            [texts[i] for i in chosen] * runs,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        with autocast(model.device, dtype):
            ids = model.generate(
                **prompts,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
            )
        new = ids[:, prompts["input_ids"].shape[1] :].tolist()
        for row, answer in enumerate(new):
            length = next((at for at, token in enumerate(answer) if token in ends), len(answer))
            text = tokenizer.decode(answer[:length], skip_special_tokens=True).strip()
            answers[row // len(chosen)][chosen[row % len(chosen)]] = text
    return answers
