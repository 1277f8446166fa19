"""The evaluation of a model before and after training, shared by the command line, the experiments and the lessons."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_lab.evaluation.answers import generate, is_exact
from qlora_lab.evaluation.losses import Loss, text_loss
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.templates import reference_text

SPARE_TOKENS = 8  # that an answer may have beyond the longest reference: JSON may be spaced differently


@dataclass(frozen=True)
class Judgement:
    """A model's results.

    exact: by split, one character per conversation: "1" if its answer is exactly right, else "0".
    losses: by text, the sum over its tokens (nats) and their number.
    """

    exact: dict[str, str]
    losses: dict[str, Loss]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """{"exact_match": share by split, "perplexity": by text}, as `train_qlora` reports them."""
        return {
            "exact_match": {split: answers.count("1") / len(answers) for split, answers in self.exact.items()},
            "perplexity": {name: loss.perplexity for name, loss in self.losses.items()},
        }


class Judge:
    """Evaluates one model after another on the same held-out conversations and texts.

    Args:
        conversations: by split; each ends in the reference answer. No split may be empty.
        texts: by name, tokenized samples whose targets the model is to predict.
        tokenizer: the one that all the models use.
        dtype: bf16 or fp16 run under autocast; None and fp32 do not.
        accelerator: 🤗 Accelerate's, if several processes share the samples: all must call, and all get every result.
    """

    def __init__(
        self,
        conversations: dict[str, list[list[dict[str, str]]]],
        texts: dict[str, list[TokenizedSample]],
        tokenizer,
        dtype: torch.dtype | None = None,
        accelerator=None,
    ):
        self.conversations, self.texts = conversations, texts
        self.tokenizer, self.dtype, self.accelerator = tokenizer, dtype, accelerator

    def __call__(self, model) -> Judgement:
        return Judgement(self.exactness(model), self.losses(model))

    def losses(self, model) -> dict[str, Loss]:
        """The losses by text, without the answers, which take longest."""
        return {name: self.loss(model, name) for name in self.texts}

    def loss(self, model, name: str) -> Loss:
        """The loss of one of the texts."""
        loss = text_loss(
            model, self._share(self.texts[name]), pad_token_id=self.tokenizer.pad_token_id, dtype=self.dtype
        )
        total, tokens = self._sum(loss.total, loss.tokens)
        return Loss(total, int(tokens))

    def exactness(self, model) -> dict[str, str]:
        """`Judgement.exact`. All splits are answered together, in a few large batches."""
        asked = [(split, chat) for split, chats in self.conversations.items() for chat in chats]
        mine = self._share(range(len(asked)))
        references = [reference_text(chat, self.tokenizer) for _, chat in asked]
        longest = max((len(self.tokenizer(text)["input_ids"]) for text in references), default=0)
        prompts = [asked[i][1][:-1] for i in mine]
        answers = generate(model, self.tokenizer, prompts, max_new_tokens=longest + SPARE_TOKENS, dtype=self.dtype)
        exact = [0] * len(asked)
        for i, answer in zip(mine, answers, strict=True):
            exact[i] = int(is_exact(answer, references[i]))
        exact = "".join(str(int(right)) for right in self._sum(*exact))
        return {
            split: "".join(right for right, (of, _) in zip(exact, asked, strict=True) if of == split)
            for split in self.conversations
        }

    def _share(self, items):
        """This process's share of the items."""
        if self.accelerator is None:
            return items
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def _sum(self, *numbers: float) -> list[float]:
        """The numbers, each summed over all processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()
