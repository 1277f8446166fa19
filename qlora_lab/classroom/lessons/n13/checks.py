"""Exercises of 13_fact_check."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, right, wrong
from qlora_lab.places import DATA

LINES, STEPS = 20, 8  # what a project needs at least


# --- 13.1 -------------------------------------------------------------------------------------------------------------

GOOD = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
WHY = {  # what was overlooked
    "load_in_4bit": "without load_in_4bit=True nothing asks for 4 bits, even if transformers 5 loads them",
    "bnb_4bit_quant_type": "fp4 is the default, nf4 has to be asked for",
    "bnb_4bit_use_double_quant": "double quantization is off unless it is asked for",
    "trust_remote_code": "trust_remote_code=True runs strangers' code",
}
FINE = {  # what was blamed in vain
    "trust_remote_code": "left out or False it is as it should be",
    "bnb_4bit_quant_type": "nf4 is right",
    "bnb_4bit_use_double_quant": "True is right",
    "load_in_4bit": "True is right",
}


@exercise("13.1", "what is wrong with a tutorial's settings", item="config", points=2, todo="complete `faults`")
def check_faults(faults: Callable[[dict, bool], list]) -> Verdict:
    """faults(settings, has_bf16): the names of the settings that are wrong, or missing, for QLoRA on a GPU.

    settings: arguments of BitsAndBytesConfig and from_pretrained, dtypes as strings. A set, list or tuple of names.
    """
    float16 = GOOD | {"bnb_4bit_compute_dtype": "float16"}
    cases = [
        (GOOD, True, set()),
        (float16, False, set()),
        ({"load_in_4bit": True}, True, {*GOOD} - {"load_in_4bit"}),
        ({**GOOD, "trust_remote_code": True}, True, {"trust_remote_code"}),
        ({**GOOD, "trust_remote_code": False}, True, set()),
        (GOOD, False, {"bnb_4bit_compute_dtype"}),
        (float16, True, {"bnb_4bit_compute_dtype"}),
        ({**GOOD, "bnb_4bit_use_double_quant": False}, True, {"bnb_4bit_use_double_quant"}),
        ({**GOOD, "bnb_4bit_quant_type": "fp4"}, True, {"bnb_4bit_quant_type"}),
        ({**float16, "load_in_4bit": False, "trust_remote_code": True}, False, {"load_in_4bit", "trust_remote_code"}),
        ({}, True, {*GOOD}),
    ]
    for settings, has_bf16, expected in cases:
        came = call(faults, dict(settings), has_bf16)
        if isinstance(came, str) or not isinstance(came, (set, frozenset, list, tuple)):
            return wrong(f"faults gives {described(came)}, expected a set of names, such as {{'load_in_4bit'}}.")
        if came := {str(name) for name in came} ^ expected:
            name = sorted(came)[0]
            return wrong(
                _overlooked(name, settings, has_bf16) if name in expected else _blamed(name, settings, has_bf16)
            )
    return right("Five lines, and most of what goes wrong silently: none of these mistakes raises an error.")


def _on(has_bf16: bool) -> str:
    return "on a GPU with bf16" if has_bf16 else "on a GPU without bf16"


def _overlooked(name: str, settings: dict, has_bf16: bool) -> str:
    why = WHY.get(name) or (
        "float32 is the default"
        if name not in settings
        else "a GPU that has bf16 should use it"
        if has_bf16
        else "without bf16 in hardware, it is imitated, slowly: float16"
    )
    if name not in settings:
        return f"You overlook {name}, which is not set, {_on(has_bf16)}: {why}."
    return f"You overlook {name}={settings[name]!r} {_on(has_bf16)}: {why}."


def _blamed(name: str, settings: dict, has_bf16: bool) -> str:
    if name not in WHY and name != "bnb_4bit_compute_dtype":
        return f"You name {name!r}, which is none of the five settings."
    value = repr(settings[name]) if name in settings else "not set"
    why = FINE.get(name, f"{settings.get(name)} is right there")
    return f"You blame {name} ({value}) {_on(has_bf16)}: {why}."


# --- 13.2 -------------------------------------------------------------------------------------------------------------


@exercise("13.2", "your own data, your own model", item="train", points=3, todo="set `project` to your run's folder")
def check_project(project) -> Verdict:
    """project: the folder (--output) of a finished run of train_qlora on the learner's own data."""
    if not isinstance(project, (str, os.PathLike)) or isinstance(project, bytes) or not str(project).strip():
        return wrong(f"expected the run's folder, such as 'runs/mine', got {described(project)}.")
    folder = _found(Path(project), Path.is_dir)
    if folder is None:
        return wrong(f"there is no folder {str(project)!r}, neither here nor in the folder above: give the full path.")
    settings, report = (_read(folder / name) for name in ("run.json", "report.json"))
    if report.get("interrupted"):
        return wrong("The run was interrupted: continue it with the same command and --resume.")
    lines = _lines(str(settings.get("data", "")), folder)
    if lines < LINES:
        return wrong(
            f"The data has {lines} lines, expected at least {LINES}: with fewer, the model learns them by heart."
        )
    losses = report["losses"]
    if len(losses) < STEPS:
        return wrong(f"The run has {len(losses)} steps, expected at least {STEPS}: raise --steps.")
    first, last = losses[0], sum(losses[-3:]) / 3
    if not last < 0.5 * first:
        return wrong(
            f"The loss went from {first:.2f} to {last:.2f} (mean of the last three steps), expected less than half. "
            "More --steps, another --lr, or lines that have more in common?"
        )
    if not all((folder / "adapter" / name).is_file() for name in ("adapter_model.safetensors", "adapter_config.json")):
        return wrong(f"The adapter is missing: {project} has no adapter/adapter_model.safetensors with its config.")
    exact = report["after"]["exact_match"].get("test")
    if exact is None:
        return right(f"{lines} lines of your own, {len(losses)} steps. Not judged yet: next time, --eval-samples 20.")
    return right(f"{lines} lines of your own, {len(losses)} steps, {exact:.0%} of the held-out answers exactly right.")


def _found(path: Path, test: Callable[[Path], bool], *more: Path) -> Path | None:
    """The path, seen from here, the folders above (a notebook runs in notebooks/, or in a folder of it for another
    language) or `more`; None if it is nowhere."""
    path = path.expanduser()
    candidates = [path, *(base / path for base in (*Path.cwd().parents[:2], *more))]
    return next((candidate for candidate in candidates if test(candidate)), None)


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Mistake(
            f"{file.parent.name} has no readable {file.name}: it is no finished run of train_qlora."
        ) from None
    if not isinstance(content, dict):
        raise Mistake(f"{file.name} holds {described(content)}, expected train_qlora's own.")
    return content


def _lines(data: str, folder: Path) -> int:
    """Lines of the training data that the run was given."""
    if (DATA / data / "train.jsonl").is_file() and not Path(data).is_absolute():
        raise Mistake(f"The run was trained on the course's {data!r}: give it a file of your own with --data.")
    file = _found(Path(data), Path.exists, folder.parent, *folder.parents)
    if file is not None and file.is_dir():
        file = file / "train.jsonl"
    if file is None or not file.is_file():
        raise Mistake(f"The data of the run, {data}, cannot be found any more: put it back, or run with a full path.")
    return sum(1 for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
