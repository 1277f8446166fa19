"""What dive_b_why_low_rank does in one line: it cuts a model in two, poses LoRA a problem, looks at an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qlora_lab.adapters.files import read_adapter
from qlora_lab.finetuning import LoraLinear, collate, load_samples, tokenize

Batch = tuple[dict[str, Any], Tensor]


@dataclass(frozen=True)
class UpperHalf:
    """The last layers of a language model, and orders as those layers read them.

    model: its layers are the last ones only, and it takes what the others have computed. batches: to train on, four
    orders each. unseen: one batch of six other orders.
    """

    model: Any
    batches: list[Batch]
    unseen: Batch

    def loss(self, batch: Batch) -> Tensor:
        """Mean of -log(probability) of the right token, over the tokens of the answers (natural logarithm)."""
        inputs, targets = batch
        return cross_entropy(self.model(**inputs).logits.flatten(0, 1), targets.flatten())  # -100 is ignored

    @torch.no_grad()
    def unseen_loss(self) -> float:
        return self.loss(self.unseen).item()


def cut_in_two(model: Any, tokenizer: Any, keep: int, steps: int) -> UpperHalf:
    """Keep the last `keep` layers of `model`, in place; compute once what the layers below make of the orders.

    steps: how many batches of four training orders.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    training, unseen = (
        tokenize(load_samples("orders", split).select(range(count)), tokenizer, max_length=256)[0]
        for split, count in (("train", 4 * steps), ("validation", 6))
    )
    layers, norm = model.model.layers, model.model.norm
    model.model.layers, model.model.norm = layers[:-keep], nn.Identity()
    batches = [read_by(model, training[i : i + 4], tokenizer.pad_token_id) for i in range(0, len(training), 4)]
    half = UpperHalf(model, batches, read_by(model, unseen, tokenizer.pad_token_id))
    model.model.layers, model.model.norm = layers[-keep:], norm
    return half


@torch.no_grad()
def read_by(lower: Any, samples: list, pad_token_id: int) -> Batch:
    """What the layers of `lower` make of the samples, and the tokens (-100: none) that are to be predicted from it."""
    batch = collate([[sample] for sample in samples], pad_token_id)
    positions, targets = batch["position_ids"], batch["labels"][:, 1:]
    columns = (targets != -100).any(dim=0).nonzero().squeeze(1)  # where some row has a target
    hidden = lower.model(input_ids=batch["input_ids"], position_ids=positions).last_hidden_state
    return {"inputs_embeds": hidden, "position_ids": positions, "logits_to_keep": columns}, targets[:, columns]


class SmallProblem:
    """A layer with 64 inputs and outputs whose weight is wrong by a matrix of rank 4, for LoRA to find."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.base = nn.Linear(64, 64, bias=False)
        self.base.weight.data = torch.randn(64, 64, generator=draw) / 8
        self.x = torch.randn(512, 64, generator=draw)
        missing = torch.randn(64, 4, generator=draw) @ torch.randn(4, 64, generator=draw) / 64
        self.y = self.x @ (self.base.weight.data + missing).T

    def losses(self, rank: int, alpha: float, learning_rate: float, steps: int = 60) -> list[float]:
        """Mean squared error at each step of AdamW."""
        layer = LoraLinear(self.base.requires_grad_(False), rank, alpha, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=learning_rate, weight_decay=0)
        losses = []
        for _ in range(steps):
            loss = (layer(self.x) - self.y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def read_pairs(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank), float32, of each adapted layer in a folder that PEFT has written.

    Raises UserError if the folder holds no LoRA adapter.
    """
    _, tensors, _ = read_adapter(folder)
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {name: (tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()) for name in names}


def directions_for(A: Tensor, B: Tensor, share: float) -> int:
    """The smallest number of directions of B A that hold at least `share` (below 1) of its squared norm."""
    squares = torch.linalg.svdvals(B @ A) ** 2
    return int((squares.cumsum(0) / squares.sum() < share).sum()) + 1
