"""The evaluation of a model before and after training, shared by the command line, the experiments and the lessons."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qlora_lab.evaluation.answers import generate, is_exact
from qlora_lab.evaluation.losses import Loss, text_loss
from qlora_lab.evaluation.scores import Score, field_shares
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.templates import reference_text

TRIED = 50  # different references that are tried as the dullest guess
SPARE_TOKENS = 8  # that an answer may have beyond the longest reference: JSON may be spaced differently


@dataclass(frozen=True)
class Judgement:
    """A model's results.

    exact: by split, one character per conversation: "1" if its answer is exactly right, else "0".
    losses: by text, the sum over its tokens (nats) and their number.
    answers: by split, in the order of the conversations.
    scores: by the name of a score and by split, one per conversation, from 0 to 1.
    json_fields: by split and field, the share of answers that have it right, if the score "json" is among them.
    """

    exact: dict[str, str]
    losses: dict[str, Loss]
    answers: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    json_fields: dict[str, dict[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, dict]:
        """As `train_qlora` reports it.

        {"exact_match": share by split, "perplexity": by text}; beside them, the mean of each score by split, and
        "json_fields" if there are any.
        """
        scores = {name: {s: statistics.fmean(v) for s, v in splits.items()} for name, splits in self.scores.items()}
        return {
            "exact_match": {split: answers.count("1") / len(answers) for split, answers in self.exact.items()},
            "perplexity": {name: loss.perplexity for name, loss in self.losses.items()},
            **scores,
            **({"json_fields": self.json_fields} if self.json_fields else {}),
        }


class Judge:
    """Evaluates one model after another on the same held-out conversations and texts.

    Args:
        conversations: by split; each ends in the reference answer. No split may be empty.
        texts: by name, tokenized samples whose targets the model is to predict.
        tokenizer: the one that all the models use.
        dtype: bf16 or fp16 run under autocast; None and fp32 do not.
        accelerator: 🤗 Accelerate's, if several processes share the samples: all must call, and all get every result.
        scores: for the answers, beside exact match.
    """

    def __init__(
        self,
        conversations: dict[str, list[list[dict[str, str]]]],
        texts: dict[str, list[TokenizedSample]],
        tokenizer,
        dtype: torch.dtype | None = None,
        accelerator=None,
        scores: Sequence[Score] = (),
    ):
        self.conversations, self.texts = conversations, texts
        self.tokenizer, self.dtype, self.accelerator, self.scores = tokenizer, dtype, accelerator, scores

    def __call__(self, model) -> Judgement:
        answers, references = self.answers(model), self.references()
        pairs = {split: list(zip(answers[split], references[split], strict=True)) for split in answers}
        return Judgement(
            exact={split: "".join("1" if is_exact(*pair) else "0" for pair in pairs[split]) for split in pairs},
            losses=self.losses(model),
            answers=answers,
            scores={score.name: {s: [score.of(*pair) for pair in pairs[s]] for s in pairs} for score in self.scores},
            json_fields={split: field_shares(answers[split], references[split]) for split in answers}
            if any(score.name == "json" for score in self.scores)
            else {},
        )

    def references(self) -> dict[str, list[str]]:
        """By split, the answers that a model should give."""
        return {
            split: [reference_text(chat, self.tokenizer) for chat in chats]
            for split, chats in self.conversations.items()
        }

    def dullest(self) -> dict[str, dict]:
        """What the dullest guess scores: of one answer, the same to all questions of a split.

        For each score it is the reference that scores most then; so a guess that has only seen the samples trained on
        can hardly do better. Of more than `TRIED` different references, the most frequent are tried. A split with one
        reference has none, since it would always be right. As in `Judgement.as_dict`, without perplexity.
        """
        scores = {"exact_match": is_exact, **{score.name: score.of for score in self.scores}}
        dullest: dict[str, dict] = {name: {} for name in scores}
        for split, references in self.references().items():
            if len(references) < 2:
                continue
            tried = [text for text, _ in Counter(references).most_common(TRIED)]
            for name, of in scores.items():
                means = {guess: statistics.fmean(of(guess, text) for text in references) for guess in tried}
                best = max(means, key=means.__getitem__)
                dullest[name][split] = means[best]
                if name == "json":
                    fields = field_shares([best] * len(references), references)
                    dullest.setdefault("json_fields", {})[split] = fields
        return dullest

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

    def answers(self, model) -> dict[str, list[str]]:
        """A model's answers by split. All splits are answered together, in a few large batches."""
        asked = [chat[:-1] for chats in self.conversations.values() for chat in chats]
        mine = self._share(range(len(asked)))
        references = [text for texts in self.references().values() for text in texts]
        longest = max((len(self.tokenizer(text)["input_ids"]) for text in references), default=0)
        limit, prompts = longest + SPARE_TOKENS, [asked[i] for i in mine]
        answers = generate(model, self.tokenizer, prompts, max_new_tokens=limit, dtype=self.dtype)
        by_number = dict(self._all(list(zip(mine, answers, strict=True))))
        in_order = iter([by_number[i] for i in range(len(asked))])
        return {split: [next(in_order) for _ in chats] for split, chats in self.conversations.items()}

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

    def _all(self, values: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The values of all processes."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)
