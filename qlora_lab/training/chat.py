"""Messages -> chat template -> token ids and labels.

Only the response is learned: every label of the prompt is -100, which torch's cross entropy ignores. The end token
belongs to the response (a model that never learns it never stops). It keeps its label even if it doubles as the pad
token, since labels are masked by position, not by comparing ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_lab.errors import UserError

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids of the prompt and the response; the first `prompt_length` of them are not learned.

    Nor is the very first token, which has no token before it to be predicted from.
    """

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """The ids, with -100 in place of the prompt's. Not shifted: label i is the target of position i - 1."""
        masked = len(self.ids) - self.target_count
        return [IGNORED] * masked + list(self.ids[masked:])

    @property
    def target_count(self) -> int:
        """The number of tokens that are learned."""
        return max(0, len(self.ids) - max(1, self.prompt_length))


def prompt_text(messages: list[dict[str, str]], tokenizer) -> str:
    """Format the messages before the answer with the chat template, up to where the assistant's turn begins.

    Without a chat template (a base model) each message's content is a line.
    """
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "".join(message["content"] + "\n" for message in messages)


def tokenize_chat(messages: list[dict[str, str]], tokenizer) -> TokenizedSample:
    """Tokenize a conversation, whose last message is the response; an end token follows it.

    The prompt and the response are tokenized separately, so that in training, too, the prompt ends in the tokens from
    which generation will start.
    """
    prompt = prompt_text(messages[:-1], tokenizer)
    response = messages[-1]["content"]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        if text.startswith(prompt):  # with the template's ending, and its changes (it may strip)
            response = text[len(prompt) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end in response_ids:
        response_ids = response_ids[: len(response_ids) - response_ids[::-1].index(end)]  # nothing after it
    else:
        response_ids.append(end)
    return TokenizedSample((*prompt_ids, *response_ids), len(prompt_ids))


def tokenize_text(text: str, tokenizer) -> TokenizedSample:
    """Tokenize plain text for perplexity: every token but the first is a target."""
    return TokenizedSample(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), 1)


def tokenize(samples, tokenizer, max_length: int) -> tuple[list[TokenizedSample], str]:
    """Tokenize a data set and leave out samples of more than `max_length` tokens: an answer is never cut.

    Args:
        samples: a mapping whose "messages" are conversations, such as the data set of `load_samples`.

    Returns:
        the samples that fit, and a sentence about those left out ("" if there are none)

    Raises:
        UserError: no sample fits.
    """
    tokenized = [tokenize_chat(messages, tokenizer) for messages in samples["messages"]]
    fitting = [sample for sample in tokenized if len(sample.ids) <= max_length]
    if len(fitting) == len(tokenized):
        return fitting, ""
    longest = max(len(sample.ids) for sample in tokenized)
    report = (
        f"{len(tokenized) - len(fitting)} of {len(tokenized)} samples are longer than {max_length} tokens "
        f"(the longest has {longest}) and are left out"
    )
    if not fitting:
        raise UserError(f"{report}: nothing is left, raise --max-length")
    return fitting, report
