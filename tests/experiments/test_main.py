import importlib
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from qlora_lab.experiments import record
from qlora_lab.experiments.__main__ import EXPERIMENTS, main

NAMES = (
    "accuracy, knobs, presets, memory, kept, mixtures, step, families, kernels, quantization, side-by-side, amounts, "
    "splits, merge-aware, methods, cards, codebooks, sensitivity, rounded-twice, roofline"
)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], f"error: no experiment is named: choose from {NAMES}\n"),
        (["--seeds", "3"], f"error: no experiment is named: choose from {NAMES}\n"),
        (["acuracy"], f"error: unknown experiment 'acuracy': did you mean accuracy? choose from {NAMES}\n"),
        (["zebra"], f"error: unknown experiment 'zebra': choose from {NAMES}\n"),
    ],
)
def test_a_name_that_is_none_is_told_in_one_sentence(arguments, told, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", told)


def test_it_is_a_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "qlora_lab.experiments"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no experiment is named: choose from {NAMES}\n"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_has_flags_and_says_what_is_wrong_with_them(name, capsys):
    assert main([name, "--colour", "red"]) == 2
    assert re.fullmatch(r"error: .*--colour.*\(see --help\)\n", capsys.readouterr().err)
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m qlora_lab.experiments {name}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "flags",
    ["accuracy", "knobs", "presets", "memory --grid", "kept", "step", "kernels", "cards", "amounts", "merge-aware"],
)
def test_what_needs_a_gpu_says_so(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*flags.split(), "--output", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert re.fullmatch("error: no GPU here: .*\n", error) and not out
    assert not list(tmp_path.iterdir())


def test_help_names_all(capsys):
    assert main(["--help"]) == 0
    assert NAMES in capsys.readouterr().out


def test_no_experiment_needs_triton_to_be_imported():
    code = """
import importlib, sys
sys.modules["triton"] = None  # importing it fails
from qlora_lab.experiments.__main__ import EXPERIMENTS
for module in EXPERIMENTS.values():
    importlib.import_module(f"qlora_lab.experiments.{module}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_experiment_writes_json_by_itself():
    """All go through `Record`."""
    for path in (ROOT / "qlora_lab" / "experiments").glob("*.py"):
        if path.name != pathlib.Path(record.__file__).name:
            text = path.read_text(encoding="utf-8")
            assert "write_text" not in text and "json.dump(" not in text and "isoformat" not in text, path.name


def test_all_modules_are_there():
    for module in EXPERIMENTS.values():
        experiment = importlib.import_module(f"qlora_lab.experiments.{module}")
        assert callable(experiment.add_flags) and callable(experiment.run)
