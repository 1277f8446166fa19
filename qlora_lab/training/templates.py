"""A tokenizer's chat template: what it makes of a chat, and which of it are the assistant's own words.

What a template does is found out by trying it. The assistant's answers are replaced by markers; what the template then
writes around the markers is its own, and what it writes in their place is the answer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.training.formats import Chat

# For models without one (base models): a line a message. The start token where the tokenizer begins texts with one.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
OWN_FIELDS = ("tools", "weight")  # of our messages, not the template's
REASONING = ("reasoning_content", "reasoning", "thinking")
LEARN = {
    "all": "every turn of the assistant",
    "last": "the assistant's last turn",
    "everything": "all of it, what others say, too",
}


@dataclass(frozen=True)
class Rendered:
    """A chat as the template writes it, up to the end of its last answer.

    text: without the special tokens that a tokenizer would add.
    answers: of each assistant's turn, the characters [start, end) that are its own: the answer, and the token that
        ends the turn, but not what the template writes before it (such as an empty thought).
    ended: whether the last turn's end token is in the text; else it is still to be added.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    ended: bool


def plain_template(tokenizer) -> str:
    """The template for a tokenizer that has none."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def keep_template(tokenizer):
    """The tokenizer with the plain template, to be saved with the adapter; None if it has one of its own."""
    if tokenizer.chat_template:
        return None
    kept = copy.deepcopy(tokenizer)
    kept.chat_template = plain_template(tokenizer)
    return kept


def prompt_text(messages: Chat, tokenizer) -> str:
    """The messages before an answer as the template writes them, up to where the answer's own words begin.

    That is the template's generation prompt, and what else the template writes before an answer (such as an empty
    thought), since that is what stands before answers in training.
    """
    messages = served(messages, tokenizer)
    prompt = _render(messages, tokenizer, generation_prompt=True)
    before, found, _ = _render([*messages, {"role": "assistant", "content": _marker(0)}], tokenizer).partition(
        _marker(0)
    )
    if not found or before.startswith(prompt) and before[len(prompt) :].strip() == "":
        return prompt
    return before


def turn_end(tokenizer) -> str | None:
    """The token, or tokens, with which the template ends an assistant's turn; None if it writes none."""
    return _habits(tokenizer, str(tokenizer.chat_template)).end


def end_ids(tokenizer) -> list[int]:
    """The tokens at which an answer ends: the template's, and the tokenizer's own.

    Raises:
        UserError: there is none.
    """
    end = turn_end(tokenizer)
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    ids += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not ids:
        raise UserError(
            "no token ends a turn: the chat template writes none, and the tokenizer has no eos_token; set eos_token in "
            "the model's tokenizer_config.json"
        )
    return sorted(set(ids), key=ids.index)


def reference_text(messages: Chat, tokenizer) -> str:
    """The answer that a model should give: the last message's content, a tool call as the template writes it."""
    if not messages[-1].get("tool_calls"):
        return messages[-1]["content"]
    chat = rendered(messages, tokenizer, "last")
    start, end = chat.answers[-1]
    ids = tokenizer(chat.text[start:end], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)  # as answers are decoded


def served(messages: Chat, tokenizer) -> Chat:
    """The messages, with the system's folded into the first user's if the template has no place for it."""
    if messages[0]["role"] != "system" or _habits(tokenizer, str(tokenizer.chat_template)).takes_system:
        return messages
    system, *rest = messages
    extra = {"tools": system["tools"]} if "tools" in system else {}
    first = next((number for number, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None or not system["content"].strip():
        folded = rest
    else:
        content = f"{system['content']}\n\n{rest[first]['content']}"
        folded = [*rest[:first], {**rest[first], "content": content}, *rest[first + 1 :]]
    return [{**folded[0], **extra}, *folded[1:]]


def remarks(tokenizer, chats: list[Chat]) -> list[str]:
    """What people should know about how this template serves these chats, a sentence each."""
    habits, said = _habits(tokenizer, str(tokenizer.chat_template)), []
    if not tokenizer.chat_template:
        said.append("the model has no chat template: it gets a plain one, a line a message, kept with the adapter")
    if not habits.takes_system and any(chat[0]["role"] == "system" for chat in chats):
        said.append("the chat template has no place for a system message: it is put before the first user's")
    if habits.lead.strip():
        said.append(
            f"the chat template writes {ascii(habits.lead)} before an answer: neither learned nor judged, and answers "
            "are asked for after it"
        )
    if habits.end is None:
        said.append(f"the chat template ends no turn: {tokenizer.eos_token} is added after the last answer")
    return said


def rendered(messages: Chat, tokenizer, learn: str = "all") -> Rendered:
    """Write a chat with the template, and find the assistant's own words in it.

    They are what the template marks as such (`{% generation %}`); otherwise what stands in the place of the markers;
    otherwise what comes after the generation prompt, for answers that are more than a content or are rewritten.

    Args:
        learn: one of LEARN; only these turns are looked for. Those with a weight of 0 are never.

    Raises:
        UserError: the template refuses the chat, drops part of it, or cannot be told apart from the answers.
    """
    messages = served(messages, tokenizer)
    _require_tools(messages, tokenizer)
    habits = _habits(tokenizer, str(tokenizer.chat_template))
    text, blocks = _render_with_blocks(messages, tokenizer)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = dict(zip(turns, _by_markers(messages, turns, text, tokenizer), strict=True))
    marked = dict(zip(turns, blocks, strict=True)) if len(blocks) == len(turns) else {}
    chosen = [turn for turn in turns if messages[turn].get("weight") != 0]
    if not chosen:
        raise UserError("no turn of the assistant is to be learned: all have a weight of 0")
    answers = []
    for turn in chosen if learn == "all" else chosen[-1:]:
        prompt = _render(messages[:turn], tokenizer, generation_prompt=True) if turn else ""
        answer, block = _answer(found[turn], prompt, text), marked.get(turn)
        if block is None:
            answer = answer or _by_prefix(messages, turn, prompt, text, tokenizer)
        else:
            start = answer[0] if answer else len(prompt) if text.startswith(prompt) else block[0]
            answer = (start if block[0] < start < block[1] else block[0], block[1])
        answers.append(_with_end(answer, text, habits.end))
    last = answers[-1][1]
    ends = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special] + [habits.end or ""]
    return Rendered(text[:last], tuple(answers), any(end and text[:last].endswith(end) for end in ends))


# ---------------------------------------------------------------------------------------------------- trying a template


@dataclass(frozen=True)
class _Habits:
    """end: the tokens after an answer; after: all that is after the last one; lead: between prompt and answer."""

    end: str | None
    after: str
    takes_system: bool
    lead: str


@functools.lru_cache(maxsize=8)
def _habits(tokenizer, template: str) -> _Habits:
    """Find out by a short chat. template: the tokenizer's as text, so that a changed one is tried anew."""
    user, answer = {"role": "user", "content": "a question"}, {"role": "assistant", "content": _marker(0)}
    prompt = _render([user], tokenizer, generation_prompt=True)
    before, found, after = _render([user, answer], tokenizer).partition(_marker(0))
    if not found:
        raise UserError("the chat template does not write what the assistant says: no answer can be learned with it")
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    tokens |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    end = re.match(r"\s*((?:" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")+)", after)
    system = f"be {_marker(1)}"
    try:
        takes_system = _marker(1) in _render([{"role": "system", "content": system}, user, answer], tokenizer)
    except UserError:
        takes_system = False
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    return _Habits(end[1] if end and tokens else None, after, takes_system, lead)


def _marker(number: int) -> str:
    return f"\ue0f0{number}\ue0f1"  # private-use characters, which no template changes and no text contains


def _render(messages: Chat, tokenizer, generation_prompt: bool = False) -> str:
    return _applied(messages, tokenizer, add_generation_prompt=generation_prompt, tokenize=False)


def _render_with_blocks(messages: Chat, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters that the template itself marks as the assistant's."""
    text, template = _render(messages, tokenizer), tokenizer.chat_template or ""
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
    chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _marker(0)}]
    for parts in (False, True):
        with contextlib.suppress(UserError):
            if _marker(0) in _applied(chat, tokenizer, parts, tokenize=False):
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


def _require_tools(messages: Chat, tokenizer) -> None:
    """Raise UserError if the template silently drops the tools or a tool call."""
    tools, calls = messages[0].get("tools"), [m for m in messages if m.get("tool_calls")]
    if tools:
        bare = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
        if _render(bare, tokenizer) == _render(messages, tokenizer):
            raise UserError(
                "the chat template drops the tools that a chat may use: choose a model that is made for tools, or "
                "remove them from the data"
            )
    if calls:
        silent = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
        try:
            dropped = _render(silent, tokenizer) == _render(messages, tokenizer)
        except UserError:  # it refuses a turn that says nothing
            dropped = False
        if dropped:
            raise UserError(
                "the chat template drops tool calls: choose a model that is made for tools, or remove them from the "
                "data"
            )


# -------------------------------------------------------------------------------------------------- finding the answers


def _by_markers(messages: Chat, turns: list[int], text: str, tokenizer) -> list[tuple[int, int] | None]:
    """Where each answer's content stands in the text; None for all if that cannot be told."""
    nothing: list[tuple[int, int] | None] = [None] * len(turns)
    if any(messages[turn].get("tool_calls") for turn in turns):
        return nothing  # the answer is more than its content
    if any(messages[turn].get(name) for turn in turns for name in REASONING):
        silent = [{key: value for key, value in message.items() if key not in REASONING} for message in messages]
        if _render(silent, tokenizer) != text:
            return nothing  # here too
    marked = list(messages)
    for number, turn in enumerate(turns):
        marked[turn] = {**messages[turn], "content": _marker(number)}
    try:
        around = re.split("\ue0f0\\d+\ue0f1", _render(marked, tokenizer))
    except UserError:
        return nothing
    if len(around) != len(turns) + 1 or not text.startswith(around[0]):
        return nothing
    found, at = [], len(around[0])
    for turn, after in zip(turns, around[1:], strict=True):
        content = messages[turn]["content"]
        for words in (content, content.strip(), content.lstrip(), content.rstrip()):
            end = at + len(words)
            if text.startswith(words, at) and text.startswith(after, end) and (after or end == len(text)):
                break
        else:
            return nothing
        found.append((at, end))
        at = end + len(after)
    return found if at == len(text) else nothing


def _answer(own: tuple[int, int] | None, prompt: str, text: str) -> tuple[int, int] | None:
    """An answer begins where the generation prompt ends, if there are but blanks between: " Yes" is one token."""
    if own and text.startswith(prompt) and not text[len(prompt) : own[0]].strip():
        return min(len(prompt), own[0]), own[1]
    return own


def _by_prefix(messages: Chat, turn: int, prompt: str, text: str, tokenizer) -> tuple[int, int]:
    """What comes after the generation prompt, up to where the next message begins."""
    habits, message = _habits(tokenizer, str(tokenizer.chat_template)), messages[turn]
    is_last = turn + 1 == len(messages)
    until = text.removesuffix(habits.after) if is_last else _render(messages[: turn + 1], tokenizer)
    if not text.startswith(prompt) or not text.startswith(until) or len(until) <= len(prompt):
        raise UserError(
            f"it cannot be told where message {turn + 1} begins and ends in what the chat template makes of it, which "
            "rewrites it and has no {% generation %} marks"
            + ("" if is_last else ": --learn last learns the last message only")
        )
    lead = habits.lead if is_last and habits.lead.strip() and not any(message.get(name) for name in REASONING) else ""
    return len(prompt) + len(lead) * text.startswith(lead, len(prompt)), len(until)


def _with_end(answer: tuple[int, int], text: str, end: str | None) -> tuple[int, int]:
    """The answer with the token that ends the turn, and nothing after that."""
    if end is None:
        return answer
    start, stop = answer
    within = text.rfind(end, start, stop)
    if within >= 0 and not text[within + len(end) : stop].strip():
        return start, within + len(end)
    after = re.compile(r"\s*" + re.escape(end)).match(text, stop)
    return (start, after.end()) if after else answer
