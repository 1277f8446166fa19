"""The folder of a training run: what it holds, and which run may use it.

run.json        the settings, as text, that a resumed run must share with the interrupted one, its length apart
before.json     the judgement before training
log.jsonl       a line for each step, as soon as it is taken: see `step_log.py`
tracked.json    the run's name for a tracker, with --track; tensorboard/ has what TensorBoard is told
checkpoints/    see `checkpoints.py`
initial.safetensors  with --init pissa, what the adapters began as and the base is without
adapter/        in PEFT's format, with a model card; with --keep best, the best one that was validated
answers.jsonl   what was asked, expected and answered, before training and after
report.json     the finished run
report.html     the same for a browser, with the answers side by side and the loss as a curve
"""

from __future__ import annotations

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping

import torch

from qlora_lab.adapters.files import add_fingerprint, convert_to_plain, fingerprint_of, keep_beside_left_over, save_lora
from qlora_lab.adapters.lora import lora_layers
from qlora_lab.adapters.quantized_linear import is_quantized
from qlora_lab.errors import UserError
from qlora_lab.training.checkpoints import newest_checkpoint
from qlora_lab.training.sharding import is_sharded, whole

LENGTH = ("steps", "epochs", "patience")  # a run may be resumed for longer than it was meant to last


class RunFolder:
    """The output folder of one run. Nothing in it is changed before `claim`.

    Args:
        path: the folder, which need not exist.
        settings: this run's, as text.
        resume: continue the run that the folder holds, instead of starting one in a free folder.
        defaults: what a setting was, if the folder's run is older than the flag for it.
    """

    def __init__(self, path: pathlib.Path, settings: dict[str, str], resume: bool, defaults: dict[str, str]):
        self.path, self.settings, self.resume, self.defaults = path, settings, resume, defaults
        self.adapter, self.checkpoints, self.log = path / "adapter", path / "checkpoints", path / "log.jsonl"

    def look(self) -> tuple[dict | None, int]:
        """Check that the folder is free or, to resume, that it holds this run.

        Returns:
            the judgement before training (None: yet to be made) and the number of steps taken, of the run to resume

        Raises:
            UserError: the folder cannot be written; or it holds a run, and this is a new one; or it holds no run to
                resume, one with other settings, or only damaged checkpoints.
        """
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {self.path}: {nearest} is not a folder, or not one you may write to")
        if not self.resume:
            self._require_free()
            return None, 0
        if not (self.path / "run.json").is_file():
            raise UserError(f"nothing to resume: {self.path} holds no run")
        then = {**self.defaults, **self._read("run.json")}
        for key, now in self.settings.items():
            if then.get(key) != now and key not in LENGTH:
                flag = "what is held out" if key == "held_out" else "--" + key.replace("_", "-")
                raise UserError(f"cannot resume {self.path}: {flag} was {then.get(key)}, now it is {now}")
        newest = newest_checkpoint(self.checkpoints)
        before = self._read("before.json") if (self.path / "before.json").is_file() else None
        return before, len(newest.records) if newest else 0

    def claim(self, accelerator) -> None:
        """Make the folder this run's. All processes must call this. Raises UserError if it is no longer free."""
        if not self.resume:
            self._require_free()  # again: loading took a while
        accelerator.wait_for_everyone()  # all have looked before the first one writes
        if accelerator.is_main_process:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("run.json", self.settings)

    def write(self, name: str, value: dict | list[dict] | str) -> None:
        """Write one of the files atomically: there is the old one or the new one, never half of one.

        value: an object for a JSON file, a list of them for one of JSON lines, or the text itself. Letters of all
        languages stand there as they are; half a character, which UTF-8 does not have, as an escape.
        """
        if isinstance(value, list):
            value = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        part = self.path / f"{name}.part"
        text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(self.path / name)

    def tracked_as(self) -> str:
        """The run's name for a tracker, which it has from its first call on: the folder's, and what makes it unique."""
        if (self.path / "tracked.json").is_file():
            return str(self._read("tracked.json").get("run"))
        run = f"{self.path.absolute().name}-{secrets.token_hex(4)}"
        self.write("tracked.json", {"run": run})
        return run

    def answers(self) -> list[dict]:
        """The rows of answers.jsonl; none if there is no such file. Raises UserError if it is damaged."""
        path = self.path / "answers.jsonl"
        if not path.is_file():
            return []
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split within answers, at U+2028
            rows = [json.loads(line) for line in lines if line]
            _ = [(row["split"], row["expected"], row["before"]["answer"]) for row in rows]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is damaged: without it, the answers before training will not be shown") from error
        return rows

    def _read(self, name: str) -> dict:
        path = self.path / name
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{path} is damaged: delete {self.path} and start anew, or give another --output")
        return value

    def _require_free(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} holds another run: give another --output, or --resume to continue it")


def save_adapter(
    model,
    folder: pathlib.Path,
    tokenizer=None,
    writes: bool = True,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Save an adapter, PEFT's or ours, with its base's fingerprint.

    The folder is replaced only when all files are written.

    Of a sharded model all processes must call this, since each has a part.

    Args:
        tokenizer: saved beside the adapter if given, for it is no longer the base model's own.
        writes: whether this process is the one that writes the files.
        initial: from `begin_with_pissa`, if the adapter began so: see `adapters/files.py`.
    """
    gathered: dict[str, torch.Tensor] = {  # the adapters, and what the base's fingerprint is made of
        name: whole(parameter.detach(), parameter)
        for name, parameter in model.named_parameters()
        if is_sharded(parameter) and (parameter.requires_grad or parameter.ndim == 1)
    }
    if not writes:
        return
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if lora_layers(model):
        save_lora(model, part)
    else:
        model.save_pretrained(part, state_dict=gathered or None)
        fingerprint = fingerprint_of({**dict(model.named_parameters()), **gathered}.items())
        if initial and any(is_quantized(module) for module in model.modules()):
            keep_beside_left_over(part, initial, fingerprint)
        else:
            if initial:
                convert_to_plain(part, initial)
            add_fingerprint(part, fingerprint)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's, an empty form: a card is written when there are scores
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
