"""A real llama.cpp in this process: PyPI's `xllamacpp`, the extra `export`.

It also listens on this machine with an OpenAI-style API, on a port that the system chooses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import urllib.request
from dataclasses import dataclass
from typing import Any

import numpy

from qlora_lab.errors import UserError
from qlora_lab.training.chat import IGNORED, TokenizedSample

FEW = 200  # tokens whose probabilities are asked for first
INSTALL = "pip install -c constraints.txt -e '.[export]'"


@dataclass(frozen=True)
class Reply:
    """An answer of llama.cpp.

    Attributes:
        text: without special tokens and surrounding whitespace.
        stopped: it ended by itself, not at the limit.
        prompt_tokens, tokens: that were read and written.
        seconds: of reading and writing.
    """

    text: str
    stopped: bool
    prompt_tokens: int
    tokens: int
    seconds: float


def is_here() -> bool:
    """Whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file, loaded.

    Args:
        file: the model.
        adapter: a LoRA in GGUF beside it, or several, of which `use` chooses one.
        context: tokens of prompt and answer, at most.

    Raises:
        UserError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """

    def __init__(
        self, file: pathlib.Path, adapter: pathlib.Path | list[pathlib.Path] | None = None, context: int = 2048
    ):
        if not is_here():
            raise UserError(f"llama.cpp is not here: {INSTALL} brings it")
        import xllamacpp as imported

        xllamacpp: Any = imported  # it has no types
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = context, 1
        # its threads spin while they wait: beside another program two of them on two cores made 5 tokens/s, one 129
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // 2)
        params.warmup, params.cache_ram_mib, params.verbosity = False, 0, -1
        adapters = [adapter] if isinstance(adapter, pathlib.Path) else adapter or []
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
        self._scales = [1.0] * len(adapters)
        self.use(0 if adapters else None)
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp cannot load {file}: {error}") from error
        self._a = self.ids("a")[-1]

    @property
    def address(self) -> str:
        """Where it listens, for any program on this machine, until it is deleted: http://127.0.0.1:PORT."""
        return self._server.listening_address

    def use(self, adapter: int | None) -> None:
        """Answer with one of the adapters from now on, by its number, or with none of them.

        Each request says which: others, of other users, may have others at the same time.
        """
        self._scales = [float(number == adapter) for number in range(len(self._scales))]

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> Reply:
        """Answer greedily, as its users would have it: llama.cpp formats the messages with the file's own template."""
        request = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "cache_prompt": False}
        reply = self._server.handle_chat_completions({**request, **self._lora()})
        if "choices" not in reply:
            raise UserError(f"llama.cpp does not answer: {json.dumps(reply)[:300]}")
        choice, usage, timings = reply["choices"][0], reply["usage"], reply["timings"]
        return Reply(
            (choice["message"].get("content") or "").strip(),
            choice["finish_reason"] == "stop",
            usage["prompt_tokens"],
            usage["completion_tokens"],
            (timings["prompt_ms"] + timings["predicted_ms"]) / 1000,
        )

    def log_probabilities(self, ids: list[int], size: int) -> numpy.ndarray:
        """Of the token that follows `ids`: float64[size], for a vocabulary of `size` tokens."""
        found = numpy.full(size, -numpy.inf)
        for id, value in self._likeliest(ids, size).items():
            found[id] = value
        return found

    def loss(self, sample: TokenizedSample, size: int) -> float:
        """The summed loss (nats) of a sample's target tokens. size: of the vocabulary.

        Each token is a request, which reads one token more than the last. Nearly always the target is among the
        likeliest few; to be told of all would take longer than to compute them.
        """
        total = 0.0
        for at, target in enumerate(sample.labels):
            if target == IGNORED:
                continue
            found = self._likeliest(list(sample.ids[:at]), FEW)
            if target not in found:
                found = self._likeliest(list(sample.ids[:at]), size)
            total -= found[target]
        return total

    def _likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        """Log probabilities of the likeliest tokens after `ids`, by id.

        The server tells none where the token that it chooses is part of a character. So it must choose an "a", which
        does not change what it tells.
        """
        request = {"prompt": ids, "max_tokens": 1, "temperature": 0, "n_probs": count, "cache_prompt": True}
        reply = self._server.handle_completions({**request, **self._lora(), "logit_bias": [[self._a, 1e4]]})
        if "choices" not in reply:
            raise UserError(f"llama.cpp does not answer: {json.dumps(reply)[:300]}")
        entries = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in entries}

    def _lora(self) -> dict[str, list]:
        return {"lora": [{"id": number, "scale": scale} for number, scale in enumerate(self._scales)]}

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The messages as llama.cpp formats them, up to where the answer begins."""
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def ids(self, text: str, start: bool = False) -> list[int]:
        """The text's tokens, special ones read as such; `start`: with what the file says comes before a text."""
        request = {"content": text, "add_special": start, "parse_special": True}
        return self._post("/tokenize", request)["tokens"]

    def _post(self, path: str, request: dict) -> dict:
        url = f"{self.address}{path}"
        body = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(body, timeout=60) as answer:
            return json.loads(answer.read())
