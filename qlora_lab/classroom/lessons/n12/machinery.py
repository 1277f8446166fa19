"""Machinery of 12_ship_it: commands in the notebook's process, a llama.cpp server, a run that never learned to stop."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.merge_aware import requantized
from qlora_lab.adapters.quantized_linear import dense_weight
from qlora_lab.errors import UserError
from qlora_lab.export.gguf_files import write_model
from qlora_lab.export.llama_cpp import LlamaCpp, is_here
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.trained_run import read_run
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.finetuning import Batches, TokenizedSample, load_lora, load_model, save_lora, train_steps
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.models.loading import load_tokenizer

INSTALL = "%pip install xllamacpp"


def terminal(line: str, lines: int | None = None) -> None:
    """Do what `python -m qlora_lab.NAME ...` does in a terminal, in this process, which has everything loaded.

    Args:
        lines: of its output, how many to show from the first on; None: all.

    Raises:
        UserError: the command failed; it has said why.
    """
    _, _, module, *arguments = shlex.split(line)
    page = importlib.import_module(module)
    if not hasattr(page, "main"):
        page = importlib.import_module(f"{module}.__main__")
    printed = io.StringIO()
    with contextlib.nullcontext() if lines is None else contextlib.redirect_stdout(printed):
        failed = page.main(arguments)
    print(*printed.getvalue().splitlines(keepends=True)[:lines], sep="", end="")
    if failed:
        raise UserError(f"this command failed, see above: {line}")


def serve(folder: os.PathLike | str, adapter: os.PathLike | str | None = None) -> LlamaCpp:
    """Start llama.cpp's server with the one GGUF file in a folder; it listens at `.address` until it is deleted.

    Args:
        adapter: a folder with a LoRA in GGUF, to be put beside it.

    Raises:
        UserError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """
    if not is_here():
        raise UserError(f"llama.cpp is not here: run {INSTALL} in a cell of its own, then this cell again")
    (file,), *adapters = (list(pathlib.Path(path).glob("*.gguf")) for path in (folder, adapter) if path is not None)
    return LlamaCpp(file, *adapters, context=1024)


def loss_in(server: LlamaCpp, samples: list[TokenizedSample], tokenizer) -> float:
    """The loss of samples in llama.cpp, nats per learned token."""
    total = sum(server.loss(sample, len(tokenizer)) for sample in samples)
    return total / sum(sample.target_count for sample in samples)


def round_twice(run: pathlib.Path, folder: pathlib.Path) -> None:
    """Write a run's dequantized merge in Q4_0, which `qlora_lab.export` does not: it rounds once."""
    weights = MergedWeights(read_run(run))
    tokenizer = load_tokenizer(weights.run.base)
    folder.mkdir()
    vocabulary = read_vocabulary(tokenizer, weights.config.vocab_size)
    write_model(weights, vocabulary, folder / "twice-Q4_0.gguf", "q4_0", "twice")


def survives(layers: Iterable[LoraLinear], target: str) -> float:
    """The share of adapters that is left when their merge into dequantized bases is rounded to `target`, nf4 or q4_0.

    That is how far the weights have moved along the adapters' products: 0 not at all, 1 as far as those say.
    """
    moved = whole = 0.0
    for layer in layers:
        delta = layer.delta().detach().float()
        after = requantized(layer, target).dequantize().float()
        moved += float(((after - dense_weight(layer.base).float()) * delta).sum())
        whole += float((delta * delta).sum())
    return moved / whole


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x rounded as Q8_0 rounds: 32 numbers of the last dimension share a scale. Tensor[..., n] of the same shape."""
    blocks = x.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape)


def without_end(chats: list, tokenizer) -> list[TokenizedSample]:
    """Tokenize conversations with a chat template that ends no turn, as scripts do that add no end token either."""
    template = tokenizer.chat_template.replace("<|im_end|>", "")

    def ids_of(messages: list, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    return [TokenizedSample(tuple(ids_of(chat, False)), len(ids_of(chat[:-1], True))) for chat in chats]


def go_on_training(run: pathlib.Path, samples: list[TokenizedSample], steps: int, to: pathlib.Path) -> pathlib.Path:
    """Train a run's adapter for a few more steps on other samples, into a run folder of its own. Returns `to`."""
    model, tokenizer = load_model(quantization="nf4")
    load_lora(model, run / "adapter")
    dtype = pick_compute_dtype(pick_device())
    settings: Mapping[str, Any] = {
        "steps": steps,
        "learning_rate": 3e-3,
        "compute_dtype": dtype,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for _ in train_steps(model, Batches(samples, batch_size=2, seed=0), **settings):
        pass
    to.mkdir(parents=True)
    save_lora(model, to / "adapter")
    shutil.copyfile(run / "run.json", to / "run.json")
    return to
