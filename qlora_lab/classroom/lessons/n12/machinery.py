"""Machinery of 12_ship_it: commands in the notebook's process, a llama.cpp server, data that never teaches the end.

And the clues of the French riddle, which docs/export.md tells whole.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.merge_aware import requantized
from qlora_lab.adapters.quantized_linear import dense_weight
from qlora_lab.classroom.plots import numbers_in, told
from qlora_lab.classroom.rounded_twice import base_alone as base_alone  # for the notebook
from qlora_lab.errors import UserError
from qlora_lab.export.llama_cpp import LlamaCpp, is_here
from qlora_lab.finetuning import Batches, TokenizedSample, load_lora, load_model, save_lora, train_steps
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.models.loading import load_tokenizer, locate
from qlora_lab.training.templates import prompt_text

INSTALL = "%pip install xllamacpp"


@dataclass(frozen=True)
class Measured:
    """What `--check` found of a file of the default run, on 50 orders of `test` and 50 of `shifted`.

    Attributes:
        megabytes: of the file, 10^6 bytes.
        equal: answers that are the trained model's word for word, of 100.
        kept: answers that are exactly right, of those that the trained model has exactly right.
        perplexity: of references.
    """

    megabytes: float
    equal: int
    kept: int
    perplexity: float
    verdict: str


# docs/export.md says how it was measured; tests/classroom/lessons/n12/test_machinery.py holds these to its table.
TRAINED = Measured(0, 100, 61, 1.1023, "")  # the trained model itself
MEASURED = {
    "f16": Measured(270.9, 100, 61, 1.1024, "equal"),
    "q8_0": Measured(144.8, 94, 61, 1.1000, "equal"),
    "q4_0": Measured(91.7, 46, 40, 1.1241, "lossy"),
    "q4_0 twice": Measured(91.7, 13, 13, 1.3125, "broken"),
}


def show_measured(guesses: Mapping[str, object]) -> None:
    """Print the table of files, with the learner's guesses of equal answers beside those that were made."""
    print(f"{'':<15}{'MB':>6}{'equal of 100':>14}{'right, kept of 61':>19}{'perplexity':>12}  verdict")
    print(f"{'trained model':<21}{'':>14}{TRAINED.kept:>19}{TRAINED.perplexity:>12.4f}")
    made = numbers_in(guesses)
    for kind, file in MEASURED.items():
        guess = f"   ({told(made[kind])})" if kind in made else ""
        row = f"{kind:<15}{file.megabytes:>6}{file.equal:>14}{file.kept:>19}{file.perplexity:>12.4f}"
        print(f"{row}  {file.verdict}{guess}")
    if not made:
        print(told(...))


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


def as_written(chats: list, tokenizer, template: str) -> list[TokenizedSample]:
    """Tokenize conversations as scripts do that learn all of what a template writes from the last answer on.

    TRL 1.16 does so with data of the form prompt and completion, and with the tokenizer's own template.

    Args:
        template: a chat template in Jinja's language, which need not be the tokenizer's.
    """

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
        "learning_rate": 2e-3,
        "compute_dtype": dtype,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for _ in train_steps(model, Batches(samples, batch_size=2, seed=0), **settings):
        pass
    to.mkdir(parents=True)
    save_lora(model, to / "adapter")
    shutil.copyfile(run / "run.json", to / "run.json")
    return to


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """x rounded as Q8_0 rounds: 32 numbers of the last dimension share a scale. Tensor[..., n] of the same shape."""
    blocks = x.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return ((blocks / scale).round() * scale).reshape(x.shape)


def english_over_french(ids: list[int], weights: bool, inputs: bool, times: int = 8) -> list[float]:
    """How many times as likely as "L" the bundled model finds "The" for the first token of its answer, in float32.

    Each time, noise of a millionth on the inputs of every linear layer shows what is chance.

    Args:
        ids: of the prompt.
        weights, inputs: which of them the linear layers have in 8 bits.
    """
    model, tokenizer = load_model(device="cpu")
    model = model.float().eval()
    english, french = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("The", "L"))
    generator = torch.Generator().manual_seed(0)

    def before(_, given):
        x = given[0] * (1 + 1e-6 * torch.randn(given[0].shape, generator=generator))
        return (in_8_bits(x) if inputs else x,)

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            if weights:
                layer.weight = torch.nn.Parameter(in_8_bits(layer.weight.data), requires_grad=False)
            layer.register_forward_pre_hook(before)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for _ in range(times)]
    return [float((one[english] - one[french]).exp()) for one in logits]


def clue(number: int, server: LlamaCpp, question: list[dict[str, str]]) -> str:
    """Evidence in the French riddle, in words.

    Args:
        number: 1, whether a prompt and its tokens are in llama.cpp what they are in transformers; 2 and 3, whether the
            model's answer begins in English in PyTorch, with weights or with inputs in 8 bits.
        server: with the bundled model's file.
        question: a conversation.
    """
    tokenizer = load_tokenizer(locate("smollm2-135m-instruct"))
    ours, theirs = prompt_text(question, tokenizer), server.prompt(question)
    ids = tokenizer(ours, add_special_tokens=False)["input_ids"]
    if number == 1:
        text, tokens = ("the same" if same else "different" for same in (ours == theirs, ids == server.ids(theirs)))
        return f"clue 1: in file and PyTorch, the prompt has {text} text and {tokens} tokens"
    found = english_over_french(ids, weights=number == 2, inputs=number == 3)
    rounded = "weights" if number == 2 else "inputs"
    return f"clue {number}: only {rounded} in 8 bits: {' '.join(f'{times:.2f}' for times in found)}"
