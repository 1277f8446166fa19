"""From JSON lines to batches: load, apply the chat template, mask the prompt, bucket or pack.

    load_samples   JSONL -> datasets.Dataset with a column of messages
    tokenize       messages -> TokenizedSample (ids, and how many of them are the prompt)
    Batches        TokenizedSamples -> an endless, seeded stream of optimizer steps
    collate        some rows -> the tensors that a model takes

Only the response is learned: every label of the prompt is -100, which torch's cross entropy ignores. The end token
belongs to the response (a model that never learns it never stops), and padding never stands in its way, even where
the pad token is the end token, since labels come from lengths and not from comparing ids.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_lab.errors import UserError

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
DATA_FOLDER = pathlib.Path(__file__).parents[2] / "data"


# -------------------------------------------------------------------------------------------------------------- loading


def load_samples(source: str | pathlib.Path, split: str = "train"):
    """Read samples through 🤗 datasets, each line checked.

    Args:
        source: the name of a data set of the course ("orders"), a folder with `{split}.jsonl`, or a .jsonl file.
        split: "train", "validation", "test", ... ; ignored for a file.

    Returns:
        datasets.Dataset with one column, `messages`: a list of {"role", "content"} that ends with the assistant's.

    A line is `{"prompt": ..., "response": ...}`, with an optional `"system"`, or `{"messages": [...]}`.

    Raises:
        UserError: no such file, an empty file, a line that is no JSON, or with a field missing, empty or of the wrong
            type (with the line's number).
    """
    import datasets

    return datasets.Dataset.from_list([{"messages": chat} for chat in read_chats(source, split)])


def read_chats(source: str | pathlib.Path, split: str = "train") -> list[list[dict[str, str]]]:
    """The messages of `load_samples`, a list for each line. Quick: nothing is imported for it."""
    path = _find(source, split)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.name}, line {number} is not UTF-8 text: {error.reason}; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = io.StringIO(text, newline=None)  # unlike splitlines(), leaves the line separators of Unicode alone
    chats = [_messages(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise UserError(f"{path} is empty: it needs at least one line of JSON")
    return chats


def _find(source: str | pathlib.Path, split: str) -> pathlib.Path:
    if os.path.isfile(source):
        return pathlib.Path(source)
    folder = _folder(source)
    if not os.path.isdir(folder):
        known = ", ".join(sorted(p.name for p in DATA_FOLDER.glob("*") if (p / "train.jsonl").is_file()))
        raise UserError(f"no data at {str(source)!r}: give a .jsonl file, a folder, or one of: {known}")
    if not has_split(source, split):
        raise UserError(f"{folder} has no {split}.jsonl")
    return folder / f"{split}.jsonl"


def _folder(source: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(source) if os.path.isdir(source) else DATA_FOLDER / source


def has_split(source: str | pathlib.Path, split: str) -> bool:
    """True when the data is a folder that holds this split."""
    return os.path.isfile(_folder(source) / f"{split}.jsonl")


def _messages(line: str, where: str) -> list[dict[str, str]]:
    """One line's messages, from whichever of the two forms it has."""
    row = _json_object(line, where)
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{where}: messages must be a list of {{role, content}}")
        for number, message in enumerate(messages, 1):
            silent = message.get("role") == "system" and message.get("content") == ""  # keeps a template's own away
            _require_text(message, ("role",) if silent else ("role", "content"), f"{where}, message {number}")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: messages must hold a question and end with the assistant's answer")
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    fields = ("prompt", "response") if row.get("system") in (None, "") else ("system", "prompt", "response")
    _require_text(row, fields, where)
    roles = {"system": "system", "prompt": "user", "response": "assistant"}
    return [{"role": roles[field], "content": row[field]} for field in fields]


def _json_object(line: str, where: str) -> dict:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
        raise UserError(f"{where} is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} holds {json.dumps(row)[:40]}, not an object like {{"prompt": ..., "response": ...}}')
    return row


def _require_text(row: dict, fields: tuple[str, ...], where: str) -> None:
    """Raise UserError unless each field holds text that is not blank and can be written as UTF-8."""
    for field in fields:
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            found = f", but {json.dumps(value)[:40]}" if field in row else f" (it has: {', '.join(row) or 'nothing'})"
            raise UserError(f"{where} has no text in {field!r}{found}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} has half a character in {field!r}, {ascii(value[error.start])} at position "
                f"{error.start + 1}: text that was cut within an emoji, say; mend the line or take it out"
            ) from error


def load_prose() -> list[str]:
    """The course's paragraphs of general English (`data/prose/`)."""
    lines = (DATA_FOLDER / "prose" / "paragraphs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


# ---------------------------------------------------------------------------------------------------------- tokenizing


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


# ------------------------------------------------------------------------------------------------------------- batching


@dataclass(frozen=True)
class Batches:
    """An endless, seeded stream of optimizer steps, each a list of micro-batches of rows of samples.

    A row is what stands in one row of the input tensor: one sample, or with `packing` as many as fit `max_length`.
    Without packing, samples of similar length come together, so that little is padded. The same seed gives the same
    stream, so a resumed run continues it by skipping the steps that were done. 4 rows x 2 micro-batches are the same
    step as 8 rows at once.

    Args:
        samples: at least one.
        batch_size: rows of one forward pass over all processes together.
        accumulation: forward and backward passes to one optimizer step.
        packing: several samples in one row; they do not see one another (see `collate`).
        max_length: tokens in a packed row.
    """

    samples: list[TokenizedSample]
    batch_size: int = 8
    accumulation: int = 1
    packing: bool = False
    max_length: int = 512
    seed: int = 0

    def __post_init__(self):
        if not self.samples:
            raise UserError("there are no samples to train on")
        if self.batch_size < 1 or self.accumulation < 1:
            raise UserError(
                f"batch_size={self.batch_size} and accumulation={self.accumulation}: both must be at least 1"
            )

    def steps_per_epoch(self) -> int:
        """Optimizer steps after which each sample has been seen about once."""
        rows = len(self._pack(list(self.samples))) if self.packing else len(self.samples)
        return math.ceil(rows / (self.batch_size * self.accumulation))

    def __iter__(self) -> Iterator[list[list[list[TokenizedSample]]]]:
        rows_a_step = self.batch_size * self.accumulation
        draw = torch.Generator().manual_seed(self.seed)
        rows = []
        while True:
            while len(rows) < rows_a_step:
                epoch = _shuffled(self.samples, draw)
                rows += self._pack(epoch) if self.packing else [[sample] for sample in epoch]
            size = min(16, len(rows) // rows_a_step) * rows_a_step
            window, rows = rows[:size], rows[size:]
            if not self.packing:
                window.sort(key=lambda row: len(row[0].ids))
            steps = [window[i : i + rows_a_step] for i in range(0, size, rows_a_step)]
            for step in _shuffled(steps, draw):
                yield [step[i : i + self.batch_size] for i in range(0, rows_a_step, self.batch_size)]

    def _pack(self, samples: list[TokenizedSample]) -> list[list[TokenizedSample]]:
        """Greedy: a sample goes into the row that is open, or opens the next one."""
        rows, room = [], 0
        for sample in samples:
            if len(sample.ids) > room:
                rows.append([])
                room = self.max_length
            rows[-1].append(sample)
            room -= len(sample.ids)
        return rows


def _shuffled(values: list, draw: torch.Generator) -> list:
    return [values[i] for i in torch.randperm(len(values), generator=draw).tolist()]


def collate(rows: list[list[TokenizedSample]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of samples -> `input_ids`, `position_ids`, `labels`, each int64 of shape (len(rows), longest row).

    There is no attention mask. Positions start again at 0 with each sample; transformers (masking_utils,
    `find_packed_sequence_indices`) reads from that where a sample begins and lets none see another. Padding comes
    last and goes on counting: under causal attention nothing that counts can see it, and its labels are ignored.
    So is the label of each sample's first token: the token before it belongs to another sample.
    """
    if not rows:
        raise UserError("there are no rows to make a batch of: give at least one")
    length = max(sum(len(sample.ids) for sample in row) for row in rows)
    batch = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        ids, positions, labels = [], [], []
        for sample in row:
            ids += sample.ids
            positions += range(len(sample.ids))
            labels += sample.labels
        padding = length - len(ids)
        batch["input_ids"].append(ids + [pad_token_id] * padding)
        batch["position_ids"].append(positions + list(range(len(row[-1].ids), len(row[-1].ids) + padding)))
        batch["labels"].append(labels + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}
