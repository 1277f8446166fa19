"""What 06_lora asks of a language model with LoRA around one of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Lora(Protocol):
    """The lesson's own layer: `MyLora`."""

    A: Tensor
    scale: float

    def register_forward_pre_hook(self, hook: Any) -> Any: ...


@dataclass(frozen=True)
class Answer:
    """How a model goes on after a text.

    word: the likeliest next token, without blanks around it. chance: probability of the token that was asked for (0 to
    1). heard: A x at the text's last token, for rank 1.
    """

    word: str
    chance: float
    heard: float


@torch.no_grad()
def answers(model: Any, tokenizer: Any, texts: Sequence[str], word: str, layer: Lora) -> dict[str, Answer]:
    """Each text's Answer. word: one token, with the blank before it. layer: LoRA of rank 1, somewhere in the model."""
    (token,) = tokenizer(word)["input_ids"]
    heard: list[float] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: heard.append((inputs[0][0, -1] @ layer.A.T).item()))
    found = {}
    try:
        for text in texts:
            chances = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
            likeliest = tokenizer.decode([int(chances.argmax())])
            found[text] = Answer(likeliest.strip() or "(blank)", chances[token].item(), heard[-1])
    finally:
        hook.remove()
    return found


def compare(before: dict[str, Answer], after: dict[str, Answer]) -> None:
    """Print a table: how the model goes on after each text before and after training, and what the row hears."""
    print(f"{'':<32}before training           after training")
    print(f"{'':<30}{'next word':>10}{'A x':>7}{'next word':>14}{'P(Rome)':>9}{'A x':>7}")
    for text, now in after.items():
        was = before[text]
        print(f"{text:<30}{was.word:>10}{was.heard:>7.1f}{now.word:>14}{now.chance:>9.0%}{now.heard:>7.1f}")


def chances_by_alpha(
    model: Any, tokenizer: Any, texts: Sequence[str], word: str, layer: Lora, alphas: Sequence[float]
) -> dict[float, dict[str, float]]:
    """For each alpha, the probability of `word` (a token) after each text, with A and B as they are; rank 1."""
    trained_with = layer.scale
    found = {}
    try:
        for alpha in alphas:
            layer.scale = alpha
            now = answers(model, tokenizer, texts, word, layer)
            found[alpha] = {text: answer.chance for text, answer in now.items()}
    finally:
        layer.scale = trained_with
    return found
