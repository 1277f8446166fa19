"""Chats -> token ids and labels.

Only the assistant's turns are learned: every other label is -100, which torch's cross entropy ignores. The end token
belongs to the answer (a model that never learns it never stops). It keeps its label even if it doubles as the pad
token, since labels are masked by position, not by comparing ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_lab.errors import UserError
from qlora_lab.training.formats import Chat
from qlora_lab.training.templates import end_ids, rendered

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids of the prompt and the response; the first `prompt_length` of them are not learned.

    Nor is the very first token, which has no token before it to be predicted from; nor are the stretches [start, end)
    of `between`, which others say between the assistant's turns.
    """

    ids: tuple[int, ...]
    prompt_length: int
    between: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> list[int]:
        """The ids, with -100 in place of the others'. Not shifted: label i is the target of position i - 1."""
        first = min(len(self.ids), max(1, self.prompt_length))
        labels = [IGNORED] * first + list(self.ids[first:])
        for start, end in self.between:
            labels[start:end] = [IGNORED] * (end - start)
        return labels

    @property
    def target_count(self) -> int:
        """The number of tokens that are learned."""
        return max(0, len(self.ids) - max(1, self.prompt_length)) - sum(end - start for start, end in self.between)


def tokenize_chat(messages: Chat, tokenizer, learn: str = "all") -> TokenizedSample:
    """Tokenize a conversation, which ends in an answer; an end token follows each.

    The prompt before an answer has the tokens from which generation will start: if the template as a whole would be
    cut into tokens differently there, it is cut between prompt and answer.

    Args:
        messages: see `formats.py`.
        learn: "all" of the assistant's turns (but those with a weight of 0), the "last" one, or "everything".

    Raises:
        UserError: the template cannot serve the conversation, or nothing of it is to be learned.
    """
    ends = end_ids(tokenizer)
    if messages[0]["role"] == "text":  # plain text, to be continued: no template, all of it is learned
        return TokenizedSample((*tokenizer(messages[0]["content"])["input_ids"], tokenizer.eos_token_id or ends[0]), 0)
    chat = rendered(messages, tokenizer, learn)
    ids, places = _cut(chat.text, [place for answer in chat.answers for place in answer], tokenizer)
    if learn == "everything":
        places = [0, places[-1]]
    if not chat.ended:
        ids = [*ids, ends[0]]
    return TokenizedSample(tuple(ids), places[0], tuple(zip(places[1:-1:2], places[2::2], strict=True)))


def _cut(text: str, places: list[int], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the text, and how many of them come before each of the places, which ascend."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    ids = tokens(text)
    before = [ids if place == len(text) else tokens(text[:place]) for place in places]
    if all(ids[: len(some)] == some for some in before):
        return ids, [len(some) for some in before]
    ids, counts, start = [], [], 0
    for place in places:
        ids += tokens(text[start:place])
        counts.append(len(ids))
        start = place
    return ids + tokens(text[start:]), counts


def tokenize_text(text: str, tokenizer) -> TokenizedSample:
    """Tokenize plain text for perplexity: every token but the first is a target."""
    return TokenizedSample(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), 1)


def tokenize(samples, tokenizer, max_length: int, learn: str = "all") -> tuple[list[TokenizedSample], str]:
    """Tokenize a data set and leave out samples of more than `max_length` tokens: an answer is never cut.

    Args:
        samples: a mapping whose "messages" are conversations, such as the data set of `load_samples`.
        learn: see `tokenize_chat`.

    Returns:
        the samples that fit, and a sentence about those left out ("" if there are none)

    Raises:
        UserError: no sample fits, or the model's chat template can serve none of them.
    """
    fitting, report = fitting_chats(list(samples["messages"]), tokenizer, max_length, learn)
    return [sample for _, sample in fitting], report


def fitting_chats(
    chats: list[Chat], tokenizer, max_length: int, learn: str = "all", none_is_fine: bool = False
) -> tuple[list[tuple[Chat, TokenizedSample]], str]:
    """The chats that fit, each with its tokens, and a sentence about those that do not: `tokenize` keeps the tokens.

    Raises:
        UserError: none fits, unless that is fine.
    """
    fitting, lengths, refused = [], [], []
    for chat in chats:
        try:
            sample = tokenize_chat(chat, tokenizer, learn)
        except UserError as error:
            refused.append(str(error))
            continue
        lengths.append(len(sample.ids))
        if lengths[-1] <= max_length:
            fitting.append((chat, sample))
    reports = []
    if refused:
        reports.append(f"{len(refused)} of {len(chats)} samples are left out: {refused[0]}")
    if len(fitting) < len(lengths):
        reports.append(
            f"{len(lengths) - len(fitting)} of {len(chats)} samples are longer than {max_length} tokens "
            f"(the longest has {max(lengths)}) and are left out"
        )
    report = "; ".join(reports)
    if not fitting and not none_is_fine:
        advice = ", raise --max-length" if lengths else ""
        raise UserError(f"{report}: nothing is left{advice}")
    return fitting, report
