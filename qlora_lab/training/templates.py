"""A tokenizer's chat template: what it makes of a chat, and which of it are the assistant's own words.

What a template does is found out by trying it. The assistant's answers are replaced by markers; what the template then
writes around the markers is its own, and what it writes in their place is the answer.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass

from qlora_lab.errors import UserError
from qlora_lab.training.formats import Chat
from qlora_lab.training.rendering import marker, plain_template, render, render_with_blocks
from qlora_lab.training.rows import shown

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
    prompt = render(messages, tokenizer, generation_prompt=True)
    before, found, _ = render([*messages, {"role": "assistant", "content": marker(0)}], tokenizer).partition(marker(0))
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
    """The messages, with each of the system's that the template has no place for put before the next user's words."""
    habits = _habits(tokenizer, str(tokenizer.chat_template))
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    moved = set() if habits.takes_system or messages[0]["role"] != "system" else {0}
    if not habits.takes_later_system and users:
        moved |= {number for number in range(1, users[-1]) if messages[number]["role"] == "system"}
    if not moved:
        return messages
    chat, before = [], []
    for number, message in enumerate(messages):
        if number in moved:
            before += [message["content"]] if message["content"].strip() else []
        elif message["role"] == "user" and before:
            chat.append({**message, "content": "\n\n".join([*before, message["content"]])})
            before = []
        else:
            chat.append(message)
    extra = {"tools": messages[0]["tools"]} if "tools" in messages[0] else {}
    return [{**chat[0], **extra}, *chat[1:]]


def remarks(tokenizer, chats: list[Chat]) -> list[str]:
    """What people should know about how this template serves these chats, a sentence each."""
    habits, said = _habits(tokenizer, str(tokenizer.chat_template)), []
    if not tokenizer.chat_template:
        said.append("the model has no chat template: it gets a plain one, a line a message, kept with the adapter")
    if not habits.takes_system and any(chat[0]["role"] == "system" for chat in chats):
        said.append("the chat template has no place for a system message: it is put before the first user's")
    if not habits.takes_later_system and any(message["role"] == "system" for chat in chats for message in chat[1:]):
        said.append("the chat template has no place for a later system message: it is put before the next user's")
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
    text, blocks = render_with_blocks(messages, tokenizer)
    _require_all(messages, text, tokenizer)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = dict(zip(turns, _by_markers(messages, turns, text, tokenizer), strict=True))
    marked = dict(zip(turns, blocks, strict=True)) if len(blocks) == len(turns) else {}
    chosen = [turn for turn in turns if messages[turn].get("weight") != 0]
    if not chosen:
        raise UserError("no turn of the assistant is to be learned: all have a weight of 0")
    answers = []
    for turn in chosen if learn == "all" else chosen[-1:]:
        prompt = render(messages[:turn], tokenizer, generation_prompt=True) if turn else ""
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
    """end: the tokens after an answer; after: all that is after the last one; lead: between prompt and answer.

    takes_system, takes_later_system: whether a system's message is written at the beginning, and after an answer.
    """

    end: str | None
    after: str
    takes_system: bool
    takes_later_system: bool
    lead: str


@functools.lru_cache(maxsize=8)
def _habits(tokenizer, template: str) -> _Habits:
    """Find out by a short chat. template: the tokenizer's as text, so that a changed one is tried anew."""
    user, answer = {"role": "user", "content": "a question"}, {"role": "assistant", "content": marker(0)}
    prompt = render([user], tokenizer, generation_prompt=True)
    before, found, after = render([user, answer], tokenizer).partition(marker(0))
    if not found:
        raise UserError("the chat template does not write what the assistant says: no answer can be learned with it")
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    tokens |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    end = re.match(r"\s*((?:" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")+)", after)
    system = {"role": "system", "content": f"be {marker(1)}"}
    takes_system = _writes(system["content"], [system, user, answer], tokenizer)
    takes_later = _writes(system["content"], [user, answer, system, user, answer], tokenizer)
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    return _Habits(end[1] if end and tokens else None, after, takes_system, takes_later, lead)


def _writes(text: str, messages: Chat, tokenizer) -> bool:
    """Whether the text is in what the template makes of the messages; not if it refuses them."""
    try:
        return text in render(messages, tokenizer)
    except UserError:
        return False


def _require_tools(messages: Chat, tokenizer) -> None:
    """Raise UserError if the template silently drops the tools or a tool call."""
    tools, calls = messages[0].get("tools"), [m for m in messages if m.get("tool_calls")]
    if tools:
        bare = [{key: value for key, value in messages[0].items() if key != "tools"}, *messages[1:]]
        if render(bare, tokenizer) == render(messages, tokenizer):
            raise UserError(
                "the chat template drops the tools that a chat may use: choose a model that is made for tools, or "
                "remove them from the data"
            )
    if calls:
        silent = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
        try:
            dropped = render(silent, tokenizer) == render(messages, tokenizer)
        except UserError:  # it refuses a turn that says nothing
            dropped = False
        if dropped:
            raise UserError(
                "the chat template drops tool calls: choose a model that is made for tools, or remove them from the "
                "data"
            )


def _require_all(messages: Chat, text: str, tokenizer) -> None:
    """Raise UserError if the template silently drops what somebody other than the assistant says."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant" or message["content"].strip() in text:
            continue  # what is not there may be rewritten; then a longer content makes another text
        longer = {**message, "content": message["content"] + marker(0)}
        if render([*messages[:number], longer, *messages[number + 1 :]], tokenizer) == text:
            raise UserError(
                f"the chat template drops what the {message['role']} says in {shown(message['content'])}: choose a "
                "model whose template has a place for it, or remove it from the data"
            )


# -------------------------------------------------------------------------------------------------- finding the answers


def _by_markers(messages: Chat, turns: list[int], text: str, tokenizer) -> list[tuple[int, int] | None]:
    """Where each answer's content stands in the text; None for all if that cannot be told."""
    nothing: list[tuple[int, int] | None] = [None] * len(turns)
    if any(messages[turn].get("tool_calls") for turn in turns):
        return nothing  # the answer is more than its content
    if any(messages[turn].get(name) for turn in turns for name in REASONING):
        silent = [{key: value for key, value in message.items() if key not in REASONING} for message in messages]
        if render(silent, tokenizer) != text:
            return nothing  # here too
    marked = list(messages)
    for number, turn in enumerate(turns):
        marked[turn] = {**messages[turn], "content": marker(number)}
    try:
        around = re.split("\ue0f0\\d+\ue0f1", render(marked, tokenizer))
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
    until = text.removesuffix(habits.after) if is_last else render(messages[: turn + 1], tokenizer)
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
