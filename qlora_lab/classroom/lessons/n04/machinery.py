"""What the folded cells and one-line helpers of 04_nf4 do."""

from collections.abc import Callable

import torch

from qlora_lab.finetuning import load_model, load_prose, text_loss
from qlora_lab.training.chat import tokenize_text


def levels_in_float64(offset: float) -> torch.Tensor:
    """NF4's recipe in float64 throughout, rounded once at the end: float32, Tensor[16], ascending, the largest is 1.

    Equal to bitsandbytes' table in six of sixteen levels, and near it in all: that table comes from float32
    probabilities (`qlora_lab.quantization.normal_float`).
    """
    up = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([down, torch.zeros(1, dtype=torch.float64), up.flip(0)])
    return (levels / levels.max()).float()


def levels_used_equally(x: torch.Tensor, block_size: int = 64) -> torch.Tensor:
    """Sixteen levels that x uses about equally often in blocks of `block_size`: float32, Tensor[16], ascending.

    They stand at the quantiles 1/32, 3/32, ... 31/32 of the numbers that are left after the division by the absmax.
    """
    blocks = x.flatten().view(-1, block_size)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().sort().values
    return scaled[((torch.arange(16) + 0.5) / 16 * len(scaled)).long()].float()


def losses_in(formats: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> dict[str, float]:
    """Loss of the bundled model on five paragraphs (nats per token), its linear layers rounded in one way or another.

    formats: by name, a function from a weight (float32) to what is left of it. The paragraphs are lesson 03's.
    """
    model, tokenizer = load_model("smollm2-135m-instruct", compute_dtype=torch.float32, device="cpu")
    prose = [tokenize_text(text, tokenizer) for text in load_prose()[:5]]
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    originals = [layer.weight.data for layer in layers]
    losses = {}
    for name, rounded in formats.items():
        for layer, weight in zip(layers, originals, strict=True):
            layer.weight.data = rounded(weight)
        losses[name] = text_loss(model, prose).per_token
    return losses
