"""A chat as the tokenizer's template writes it, whatever form of messages the template wants.

Content as text or as a list of parts, a tool call's arguments as an object or as text: what a template wants is tried.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.training.formats import Chat

# For models without one (base models): a line a message. The start token where the tokenizer begins texts with one.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
OWN_FIELDS = ("tools", "weight")  # of our messages, not the template's


def plain_template(tokenizer) -> str:
    """The template for a tokenizer that has none."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def marker(number: int) -> str:
    """A text that stands for an answer, to see where a template puts it."""
    return f"\ue0f0{number}\ue0f1"  # private-use characters, which no template changes and no text contains


def render(messages: Chat, tokenizer, generation_prompt: bool = False) -> str:
    """The text that the template makes of the messages. Raises UserError: it refuses them."""
    return _applied(messages, tokenizer, add_generation_prompt=generation_prompt, tokenize=False)


def render_with_blocks(messages: Chat, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters that the template itself marks as the assistant's."""
    text, template = render(messages, tokenizer), tokenizer.chat_template or ""
    if not isinstance(template, str) or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return text, []
    from transformers.utils.chat_template_utils import render_jinja_template

    def blocks(messages, tools):
        texts, found = render_jinja_template(
            [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )  # fmt: skip
        return texts[0], [(int(start), int(end)) for start, end in found[0]]

    marked, found = _tried(messages, blocks, _wants_parts(tokenizer, str(tokenizer.chat_template)))
    return (text, found) if marked == text else (text, [])


def _applied(messages: Chat, tokenizer, parts: bool | None = None, **options):
    def apply(messages, tools):
        template = None if tokenizer.chat_template else plain_template(tokenizer)
        return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)

    if parts is None:
        parts = _wants_parts(tokenizer, str(tokenizer.chat_template))
    return _tried(messages, apply, parts)


@functools.lru_cache(maxsize=8)
def _wants_parts(tokenizer, template: str) -> bool:
    """Whether a template writes content only if it is a list of parts, as those of models that see do."""
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker(0)}]
    for parts in (False, True):
        with contextlib.suppress(UserError):
            if marker(0) in _applied(chat, tokenizer, parts, tokenize=False):
                return parts
    return False


def _tried(messages: Chat, render, parts: bool = False):
    """render(messages, tools), with a tool call's arguments as an object or, if the template wants that, as text."""
    tools = json.loads(messages[0]["tools"]) if messages[0].get("tools") else None
    error: Exception | None = None
    for as_object in (True, False):
        try:
            return render([_for_template(message, as_object, parts) for message in messages], tools)
        except Exception as failure:  # whatever a template's code may raise
            error = error or failure
        if not any(message.get("tool_calls") for message in messages):
            break
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    raise UserError(f"the chat template refuses the chat: {first}") from error


def _for_template(message: dict[str, Any], as_object: bool, parts: bool) -> dict[str, Any]:
    """Without what is ours, and without the keys that only other messages have (a data set gives them to all)."""
    message = {key: value for key, value in message.items() if value is not None and key not in OWN_FIELDS}
    if parts:
        message["content"] = [{"type": "text", "text": message["content"]}]
    if as_object and "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_object(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _as_object(arguments):
    try:
        return json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
