"""The process in which Unsloth is measured, seen from outside: what it is given, what comes back."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

from qlora_lab.experiments.gpu import empty_cache
from qlora_lab.experiments.sft_trainer import wordless_tokenizer
from qlora_lab.experiments.step_ways import RANK, SETTINGS, SHAPE
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.models.random_weights import build_random
from qlora_lab.places import IMPORTED_FROM

PLAIN, ON_THE_GPU = ", plain loop", ", on the GPU"
WITHOUT_CHECKPOINTING = ("unsloth", f"unsloth{PLAIN}")
UNSLOTH = (*WITHOUT_CHECKPOINTING, f"unsloth{ON_THE_GPU}", f"unsloth{PLAIN}{ON_THE_GPU}")
ROWS = [(who, *setting) for setting in SETTINGS for who in (UNSLOTH if setting[1] else WITHOUT_CHECKPOINTING)]


def unsloth_runs(
    rows: list[tuple[str, int, bool]], steps: int, shape=SHAPES[SHAPE], rank: int = RANK
) -> Iterator[dict]:
    """Runs of Unsloth's on the weights that the others have, one after the other as they come.

    rows: of ROWS, those to make. shape: as `build_random` takes it.
    """
    empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        save_quantized(build_random(shape, device="cuda", compute_dtype=torch.bfloat16), pathlib.Path(folder))
        empty_cache()
        module = "qlora_lab.experiments.unsloth_speed"
        command = [sys.executable, "-m", module, folder, str(steps), str(rank), json.dumps(rows)]
        where = [str(IMPORTED_FROM), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, where)), "UNSLOTH_DISABLE_STATISTICS": "1"}
        # Unsloth writes where it is: into the folder that goes
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | environment
        ) as child:
            for line in child.stdout or ():
                if line.startswith("{"):
                    yield json.loads(line)
    if child.returncode:
        print(f"not all of Unsloth's steps were taken, see above (exit status {child.returncode})")


def save_quantized(model, folder: pathlib.Path) -> None:
    """Write a model in 4 bits as transformers does, and a tokenizer that knows no words."""
    import transformers
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    model.config.save_pretrained(folder)
    wordless_tokenizer().save_pretrained(folder)
