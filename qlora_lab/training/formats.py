"""The formats that people's data come in: recognize a row's, and make it a chat.

    messages         {"messages": [{"role", "content"}]}, OpenAI's: content parts, tools, names, weights
    sharegpt         {"conversations": [{"from", "value"}]}
    alpaca           {"instruction", "input", "output"}, Dolly's "context" and "response", too
    prompt-response  {"prompt", "response"}, or "completion", "output", "answer"; "system" where there is one
    question-answer  {"question", "answer"}
    text             {"text"}: plain text to be continued, learned as a whole

A chat is a list of messages, {"role", "content"}, with the roles system, user, assistant and tool; the last is an
assistant's. A message may have more (`tool_calls`, `name`, `reasoning_content`, a `weight` of 0 for "do not learn").
The tools that a chat may use stand in its first message, as JSON text under "tools"; so do the arguments of a tool
call. Plain text is one message of the role "text".
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.training.rows import shown

Chat = list[dict[str, Any]]

FORMATS = ("messages", "sharegpt", "alpaca", "prompt-response", "question-answer", "text")
FIELDS = ("prompt", "response", "system", "input", "messages", "text", "tools")  # what --columns can name
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
QUESTIONS = {
    "instruction": "alpaca",
    "prompt": "prompt-response",
    "question": "question-answer",
    "query": "question-answer",
}
ANSWERS = ("response", "completion", "output", "answer")
BESIDE = ("input", "context")  # what an instruction or a question is about
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "weight")  # of a message, as they are


class LeftOut(Exception):
    """A sample that there is nothing to learn from. Its message is the reason."""


@dataclass
class Understood:
    """What was made of a file: for people to check that it is what they meant."""

    name: str = ""
    samples: int = 0
    formats: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)  # by column, in how many rows
    left_out: dict[str, list] = field(default_factory=dict)  # by reason: how many, and where the first one stands
    changed: dict[str, list] = field(default_factory=dict)  # the same

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out.setdefault(reason, [0, where])[0] += 1

    def change(self, what: str, where: str) -> None:
        self.changed.setdefault(what, [0, where])[0] += 1

    def summary(self) -> str:
        """One line: how many samples, in which format, and which columns play no part."""
        formats = " and ".join(f"{name} ({count})" for name, count in self.formats.most_common())
        if len(self.formats) == 1:
            formats = next(iter(self.formats))
        unused = f"; columns not used: {', '.join(sorted(self.unused))[:100]}" if self.unused else ""
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        return f"{self.name}: {samples}, read as {formats or 'nothing'}{unused}"

    def remarks(self) -> str:
        """One line on what was left out or changed; "" if nothing was."""
        parts = [f"left out: {counted(*of)} {reason}" for reason, of in self.left_out.items()]
        parts += [f"in {counted(*of)} {what}" for what, of in self.changed.items()]
        return f"note: {'; '.join(parts)}" if parts else ""


def counted(count: int, first: str) -> str:
    """How many samples, and where the first of them stands."""
    return f"1 sample ({first})" if count == 1 else f"{count} samples (the first is {first})"


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,response=answer` -> {"prompt": "question", "response": "answer"}.

    Raises:
        UserError: a pair that is none, an unknown field, or fields that make no sample.
    """
    columns = {}
    for pair in text.split(","):
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or name not in FIELDS or name in columns:
            raise UserError(f"--columns {text}: {pair!r} is no FIELD=COLUMN with a field of {', '.join(FIELDS)}")
        columns[name] = column
    if not ({"prompt", "response"} <= columns.keys() or {"messages", "text"} & columns.keys()):
        raise UserError(f"--columns {text}: a sample needs prompt and response, or messages, or text")
    return columns


def to_chat(
    row: dict[str, Any], where: str, columns: dict[str, str] | None, format: str | None, understood: Understood
) -> Chat:
    """A row as a chat.

    Args:
        row: by column.
        where: "file, line 3".
        columns: by field, which column to take (see `parse_columns`), "qa.question" for a field of an object; None:
            recognize them.
        format: one of FORMATS, if the row is to be taken for that; None: recognize it.
        understood: gets the format, the columns that play no part, and what was changed.

    Raises:
        LeftOut: an empty question or answer.
        UserError: no known format, or something in the row is not what it should be.
    """
    if columns:
        row = {name: _in_column(row, column, where) for name, column in columns.items()}
    for column in ("images", "image", "audio", "videos", "video"):
        if row.get(column):
            raise UserError(f"{where} has {column!r}: only text can be trained on; remove the column to train without")
    kind, used = _recognize(row, where, format)
    if kind in ("messages", "sharegpt"):
        chat = _turns(row[used[0]], where, understood)
    elif kind == "text":
        chat = [{"role": "text", "content": _text(row, "text", where, may_be_empty=False)}]
    elif isinstance(row[used[0]], list):
        kind, chat = "prompt-response, of messages", _continued(row[used[0]], row[used[1]], where, understood)
    else:
        chat = _question_and_answer(row, used, where)
    if kind != "text":
        used = (*used, "system", "tools", "functions", "history")
        chat = _with_tools(_with_system(chat, row, where), row, where)
        _require_whole_characters(chat, where)
    understood.formats[kind] += 1
    understood.unused.update(column for column in row if column not in used)
    return chat


def _in_column(row: dict[str, Any], column: str, where: str) -> Any:
    """The value of a column; with a name such as "qa.question", of a field of the object in the column "qa"."""
    value, rest = row, column
    while rest not in value:
        name, dot, rest = rest.partition(".")
        if not dot or name not in value or not isinstance(value[name], (dict, type(None))):
            raise UserError(f"{where} has no column {column!r} (it has: {named(row)})")
        value = value[name]
        if value is None:  # what Parquet has in place of an object that is missing
            return None
    return value[rest]


def named(row: dict) -> str:
    """A row's columns, for a message; those of objects in it as "qa.question"."""
    inner = ([f"{name}.{key}" for key in of] if isinstance(of, dict) and of else [name] for name, of in row.items())
    names = ", ".join(ascii(name)[1:-1] for name in list(itertools.chain(*inner))[:12])
    return names[:100] or "nothing"


def _recognize(row: dict, where: str, format: str | None) -> tuple[str, tuple[str, ...]]:
    """The format, and the columns that hold it."""
    turns = next((name for name in TURNS if name in row), None)
    question = next((name for name in QUESTIONS if name in row), None)
    answer = next((name for name in ANSWERS if name in row), None)
    beside = tuple(name for name in BESIDE if name in row)
    if question is None and "input" in row and answer:
        question, beside = "input", ()
    if format == "text" and "text" in row:
        return "text", ("text",)
    if format:
        question = next((name for name, of in QUESTIONS.items() if of == format and name in row), None)
        turns = turns if format in ("messages", "sharegpt") else None
    if turns:
        value = row[turns]
        sharegpt = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
        return "sharegpt" if sharegpt else "messages", (turns,)
    if question and answer:
        return QUESTIONS.get(question, "prompt-response"), (question, answer, *beside[:1])
    if format:
        raise UserError(f"{where} is not in the format {format} (it has: {named(row)})")
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where} is a preference (chosen and rejected), for which there is no loss here: to learn the chosen "
            "answers, give --columns prompt=prompt,response=chosen, or messages=chosen"
        )
    if question or answer:
        lacks = "response" if question else "prompt"
        raise UserError(f"{where} has no text in {lacks!r} (it has: {named(row)}): --columns says where else it is")
    if "text" in row:
        return "text", ("text",)
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        raise UserError(f'{where} is a single message: a sample is a conversation, {{"messages": [{{...}}, {{...}}]}}')
    raise UserError(
        f"{where} has no text in 'prompt' (it has: {named(row)}): if other columns hold it, say "
        "--columns prompt=...,response=..."
    )


def _text(row: dict, column: str, where: str, may_be_empty: bool = True) -> str:
    """The text of a column; None counts as "", for that is what an empty cell is in Parquet."""
    value = row.get(column)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise UserError(f"{where} has no text in {column!r}, but {shown(value)}")
    if not may_be_empty and not value.strip():
        raise LeftOut(f"with an empty {column}")
    require_whole(value, column, where)
    return value


def require_whole(text: str, column: str, where: str) -> None:
    """Raise UserError if a text holds half a character (a lone surrogate), which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half a character in {column!r}, {ascii(text[error.start])} at position "
            f"{error.start + 1}: the text may have been cut inside an emoji; repair the line or remove it"
        ) from error


def _question_and_answer(row: dict, used: tuple[str, ...], where: str) -> Chat:
    question = _text(row, used[0], where, may_be_empty=False)
    beside = [_text(row, column, where) for column in used[2:]]
    if beside and beside[0].strip():
        parts = (question, beside[0]) if used[0] in ("instruction", "prompt") else (beside[0], question)
        question = "\n\n".join(parts)
    chat = []
    history = row.get("history") or []  # LLaMA-Factory's: [[question, answer], ...]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: history must be a list of [question, answer], but is {shown(history)}")
    for asked, answered in history:
        for role, text in (("user", asked), ("assistant", answered)):
            chat.append({"role": role, "content": _text({"history": text}, "history", where, may_be_empty=False)})
    answer = _text(row, used[1], where, may_be_empty=False)
    return [*chat, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _continued(prompt, completion, where: str, understood: Understood) -> Chat:
    """TRL's conversational prompt and completion: only the completion is learned."""
    answers = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    chat = _turns([*prompt, *answers], where, understood)
    return [
        {**message, "weight": 0} if number < len(prompt) and message["role"] == "assistant" else message
        for number, message in enumerate(chat)
    ]


# ---------------------------------------------------------------------------------------------------------------- turns


def _turns(messages, where: str, understood: Understood) -> Chat:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{where}: messages must be a list of {{role, content}}")
    chat = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    asked = len(chat)
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if not chat or not any(message["role"] in ("user", "tool") for message in chat):
        raise LeftOut("in which nothing is asked" if chat else "without an answer by the assistant")
    if len(chat) < asked:
        understood.change("turns after the assistant's last answer are dropped", where)
    for message in chat:
        if message["role"] != "system" and not message["content"].strip() and "tool_calls" not in message:
            empty = "response" if message["role"] == "assistant" else "prompt"
            raise LeftOut(f"with an empty {empty}")
    return chat


def _message(message: dict, where: str) -> dict[str, Any]:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not role.strip():
        found = f", but {shown(role)}" if "role" in message or "from" in message else f" (it has: {named(message)})"
        raise UserError(f"{where} has no text in 'role'{found}")
    call = role.lower() == "function_call"  # ShareGPT's
    if not call and role.lower() not in ROLES:
        raise UserError(f"{where} has the role {shown(role)}: expected system, user, assistant or tool")
    column = next((name for name in ("content", "value", "text") if name in message), "content")
    calls = message.get("tool_calls") or (
        [{"function": message["function_call"]}] if message.get("function_call") else []
    )
    if call:
        calls, text = [{"function": _parsed(message.get(column), where)}], ""
    else:
        if column not in message and not calls:
            raise UserError(f"{where} has no text in 'content' (it has: {named(message)})")
        text = _content(message.get(column), column, where)
    kept = {key: message[key] for key in KEPT if message.get(key) is not None}
    if calls:
        kept["tool_calls"] = [_tool_call(item, where) for item in calls] if isinstance(calls, list) else []
        if not kept["tool_calls"]:
            raise UserError(f"{where}: tool_calls must be a list, but is {shown(calls)}")
    return {"role": "assistant" if call else ROLES[role.lower()], "content": text, **kept}


def _content(value, column: str, where: str) -> str:
    """The text of a message, of its parts one after the other."""
    if not isinstance(value, list):
        return _text({column: value}, column, where)
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise UserError(f"{where} has a part of the type {shown(part['type'])}: only text can be trained on")
        texts.append(part.get("text") if isinstance(part, dict) else part)
        if not isinstance(texts[-1], str):
            raise UserError(f"{where} has no text in {column!r}, but {shown(value)}")
    return _text({column: "".join(texts)}, column, where)


def _parsed(text, where: str):
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} should hold a function call as JSON, but holds {shown(text)}") from error


def _tool_call(call, where: str) -> dict[str, Any]:
    """OpenAI's form, with the arguments as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} has a tool call without a function's name: {shown(call)}")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _with_system(chat: Chat, row: dict, where: str) -> Chat:
    """The chat with the row's own system message, if it has one that is not empty."""
    if row.get("system") in (None, ""):
        return chat
    system = _text(row, "system", where)
    if not system.strip():
        raise UserError(f"{where} has no text in 'system', but {shown(system)}")
    if chat[0]["role"] == "system":
        raise UserError(f"{where} has two system messages: in the column 'system' and in its messages")
    return [{"role": "system", "content": system}, *chat]


def _with_tools(chat: Chat, row: dict, where: str) -> Chat:
    tools = row.get("tools") or row.get("functions")
    if not tools:
        return chat
    tools = _parsed(tools, where) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: tools must be a list of objects, but is {shown(tools)}")
    if not tools:
        return chat
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return [{**chat[0], "tools": json.dumps(tools, ensure_ascii=False)}, *chat[1:]]


def _require_whole_characters(chat: Chat, where: str) -> None:
    for number, message in enumerate(chat, 1):
        if len(message) > 2:
            require_whole(json.dumps(message, ensure_ascii=False), "tools or names", f"{where}, message {number}")
