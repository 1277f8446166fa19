"""Messages -> chat template -> token ids, and which of them are learned.

Only the response is learned: every label of the prompt is -100, which torch's cross entropy ignores. The end token
belongs to the response (a model that never learns it never stops), and padding never stands in its way, even where
the pad token is the end token, since labels come from lengths and not from comparing ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_lab.errors import UserError

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids of prompt and response together; the first `prompt_length` of them are not learned.

    Nor is the first of all: nothing stands before it to tell it from.
    """

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        """Ids with the prompt masked. Not shifted: position i is the target of position i - 1."""
        masked = len(self.ids) - self.target_count
        return [IGNORED] * masked + list(self.ids[masked:])

    @property
    def target_count(self) -> int:
        """Tokens that are learned."""
        return max(0, len(self.ids) - max(1, self.prompt_length))


def prompt_text(messages: list[dict[str, str]], tokenizer) -> str:
    """All messages but the answer, in the model's chat template, up to where the assistant begins to speak.

    A model without a chat template (a base model) gets the contents as lines.
    """
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return "".join(message["content"] + "\n" for message in messages)


def tokenize_chat(messages: list[dict[str, str]], tokenizer) -> TokenizedSample:
    """Tokenize a conversation; the last message is the response, and it ends with the end token.

    Prompt and response are tokenized apart, so that training cuts the text where generation will start.
    """
    prompt = prompt_text(messages[:-1], tokenizer)
    response = messages[-1]["content"]
    if tokenizer.chat_template:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if whole.startswith(prompt):  # the template's own ending, and what it does to a response (strips, say)
            response = whole[len(prompt) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end in response_ids:
        response_ids = response_ids[: len(response_ids) - response_ids[::-1].index(end)]  # nothing after the end
    else:
        response_ids.append(end)
    return TokenizedSample((*prompt_ids, *response_ids), len(prompt_ids))


def tokenize_text(text: str, tokenizer) -> TokenizedSample:
    """Tokenize plain text for perplexity: every token but the first is predicted."""
    return TokenizedSample(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), 1)


def tokenize(samples, tokenizer, max_length: int) -> tuple[list[TokenizedSample], str]:
    """Tokenize a data set of messages and leave out what is too long: an answer is never cut.

    Returns:
        the samples that fit, and a sentence about those left out ("" if none)

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
