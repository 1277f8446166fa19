"""Machinery of 16_ship_it: commands in the notebook's process, a llama.cpp server, a run that never learned to stop."""

from __future__ import annotations

import importlib
import os
import pathlib
import shlex
import shutil
from collections.abc import Mapping
from typing import Any, cast

import torch

from qlora_lab.errors import UserError
from qlora_lab.export.gguf_files import write_model
from qlora_lab.export.llama_cpp import is_here
from qlora_lab.export.merged_weights import MergedWeights, checkpoint_index
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.finetuning import Batches, TokenizedSample, load_lora, load_model, save_lora, train_steps
from qlora_lab.models.compatibility import read_config
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.models.loading import locate

INSTALL = "%pip install xllamacpp"


def terminal(line: str) -> None:
    """Do what `python -m qlora_lab.NAME ...` does in a terminal, in this process, which has everything loaded.

    Raises:
        UserError: the command failed; it has said why.
    """
    _, _, module, *arguments = shlex.split(line)
    page = importlib.import_module(module)
    if not hasattr(page, "main"):
        page = importlib.import_module(f"{module}.__main__")
    if page.main(arguments):
        raise UserError(f"this command failed, see above: {line}")


def serve(file: os.PathLike | str, adapter: os.PathLike | str | None = None) -> Any:
    """Start llama.cpp's server with a GGUF file; it listens at `.listening_address` until it is deleted.

    Args:
        file: the model.
        adapter: a LoRA in GGUF beside it.

    Raises:
        UserError: xllamacpp is not installed, or llama.cpp cannot load the file.
    """
    if not is_here():
        raise UserError(f"llama.cpp is not here: run {INSTALL} in a cell of its own, then this cell again")
    import xllamacpp as imported

    xllamacpp: Any = imported  # it has no types
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // 2)
    params.warmup, params.cache_ram_mib, params.verbosity = False, 0, -1
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise UserError(f"llama.cpp cannot load {file}: {error}") from error


class _Checkpoint:
    """The tensors of a checkpoint as they are, in the form of `MergedWeights`."""

    def __init__(self, folder: pathlib.Path):
        from safetensors import safe_open

        self.config = read_config(folder)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in set(checkpoint_index(folder).values()):
            with safe_open(file, "pt") as handle:
                self._tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def base_gguf(file: pathlib.Path, kind: str) -> pathlib.Path:
    """Write the bundled model, which nobody has fine-tuned here, as GGUF. Returns `file`.

    Args:
        kind: of its matrices: "f16", "q8_0" ...
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(locate("smollm2-135m-instruct"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    weights = cast(MergedWeights, _Checkpoint(folder))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_model(weights, read_vocabulary(tokenizer, weights.config.vocab_size), file, kind, "base")
    return file


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


def short_card(file: os.PathLike | str) -> str:
    """A model card from its head to the scores, without what it was run and trained with, and the versions."""
    text = pathlib.Path(file).read_text(encoding="utf-8")
    head, scores = text.partition("## Run it")[0], text.partition("## Scores")[2]
    return f"{head}[...]\n\n## Scores{scores.partition('Written with')[0]}".rstrip()
