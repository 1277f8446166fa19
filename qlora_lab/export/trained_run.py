"""What the folder of a run of `train_qlora` says about the model that was trained."""

from __future__ import annotations

import contextlib
import json
import pathlib
from dataclasses import dataclass

import torch

from qlora_lab.adapters.files import INITIAL
from qlora_lab.errors import UserError
from qlora_lab.models.compatibility import read_config
from qlora_lab.models.hardware import DTYPES, pick_compute_dtype, pick_device
from qlora_lab.models.loading import first_sentence, locate


@dataclass(frozen=True)
class TrainedRun:
    """A run that has left an adapter.

    Attributes:
        folder: the run's.
        settings: its command line, as text.
        report: its report.json; {} if it has none.
        base: folder of the base's checkpoint.
        dtype: in which the base was loaded and the run computed.
    """

    folder: pathlib.Path
    settings: dict[str, str]
    report: dict
    base: pathlib.Path
    dtype: torch.dtype

    @property
    def model(self) -> str:
        """The base's name, as `train_qlora` was given it."""
        return self.settings["model"]

    @property
    def quantized(self) -> bool:
        """Whether the base's linear layers were held in 4 bits."""
        return self.settings["method"] == "qlora"

    @property
    def merge_aware(self) -> str | None:
        """The 4-bit numbers that the adapter was trained to be merged into: "nf4", "q4_0" or None."""
        named = self.settings.get("merge_aware", "None")
        return None if named == "None" else named

    def rounded_for(self, kind: str) -> bool:
        """Whether a file of these weights holds the base as it was rounded for training, or as its checkpoint has it.

        Args:
            kind: type of the matrices. Those of Q4_0 are rounded anyway, and rounding twice loses more than once. Not
                so Q4_1: where a checkpoint was made from a Q4_1 file, as the bundled one was, its weights lie on the
                levels, and the adapter would be rounded away.
        """
        corrects_it = self.merge_aware is not None or self.settings.get("init") == "loftq"  # the adapter knows of it
        return self.quantized and (corrects_it or kind != "q4_0")

    @property
    def left_over(self) -> bool:
        """Whether the base was trained without what its adapter began as: PiSSA, beside a base in 4 bits."""
        return (self.adapter / INITIAL).is_file()

    @property
    def adapter(self) -> pathlib.Path:
        return self.folder / "adapter"


def read_run(folder: pathlib.Path) -> TrainedRun:
    """Read a run's folder; its base is fetched if it is not on this machine.

    Raises:
        UserError: no run, a damaged one, one without an adapter, or a base that is gone.
    """
    settings = _read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    if settings is None:
        raise UserError(f"{folder} is no run of train_qlora: it has no run.json")
    if missing := [key for key in ("model", "method", "data", "seed", "eval_samples") if key not in settings]:
        raise UserError(f"{folder / 'run.json'} does not say {missing[0]}: was it written by train_qlora?")
    if not (folder / "adapter").is_dir():
        raise UserError(f"{folder} has no adapter: finish the run with train_qlora --output {folder} --resume")
    report = _read_json(folder / "report.json") if (folder / "report.json").is_file() else {}
    named = report.get("compute_dtype") or settings.get("compute_dtype")
    dtype = DTYPES.get(str(named)) or pick_compute_dtype(pick_device())
    return TrainedRun(folder, settings, report, _checkpoint_folder(settings["model"]), dtype)


def read_base(model: str) -> TrainedRun:
    """A model that nobody has fine-tuned here, as a run without data or adapter: its weights are as they are stored.

    Raises:
        UserError: no such model.
    """
    folder = _checkpoint_folder(model)
    dtype = getattr(read_config(folder), "dtype", None)
    return TrainedRun(folder, {"model": model, "method": "lora"}, {}, folder, dtype or torch.float32)


def _read_json(path: pathlib.Path) -> dict:
    value = None
    with contextlib.suppress(ValueError, OSError):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return value


def _checkpoint_folder(name: str) -> pathlib.Path:
    """The folder with the base's files; for a model of the hub, that of its snapshot."""
    source = locate(name)
    if pathlib.Path(source).is_dir():
        return pathlib.Path(source)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # from the network, the hub, the cache
        raise UserError(f"cannot get the base {name!r}: {first_sentence(error)}") from error
