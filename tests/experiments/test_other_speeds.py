"""Quantization, kernels and two trainings side by side: that they run, and what they write."""

import json
import subprocess

import pytest

from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.side_by_side import ways


def test_quantization_is_timed_and_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["--rows", "8", "--columns", "64", "--repeats", "2", "--threads", "1", "--output", str(tmp_path)]
    assert main(["quantization", *flags]) == 0
    written = json.loads((tmp_path / "quantization-cpu.json").read_text())
    assert written["device"] == "cpu" and written["elements"] == [8, 64]
    found = written["results"]["cpu"]
    tasks = [f"{task}, {dtype}" for dtype in ("float32", "bfloat16") for task in TASKS]
    assert list(found["milliseconds"]) == tasks
    assert {tuple(row) for row in found["milliseconds"].values()} == {("ours", "bitsandbytes", "copy", "plain")}
    assert found["codes that differ"] == {"float32": 0, "bfloat16": 0}
    assert "0 of 512 codes differ; equal codes decode to equal values" in capsys.readouterr().out
    assert main(["quantization", *flags]) == 2  # times of two runs are not mixed


TASKS = ("quantize", "dequantize", "dequantize, double")


@pytest.mark.gpu
def test_kernels_are_timed_and_recorded(tmp_path):
    assert main(["kernels", "--rows", "256", "--columns", "256", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("kernels-*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["nf4, bfloat16", "fp4, bfloat16", "nf4, float32"]
    assert all(result["equal to the plain version"] for result in results.values())


@pytest.mark.gpu
def test_steps_of_the_bundled_model_are_timed_and_recorded(tmp_path):
    assert main(["step", "--only", "bundled", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("step-*.json")
    assert set(json.loads(path.read_text())["bundled"]) == {"standard", "fast"}


class Training:
    """In the place of a process: one alone makes 100 tokens a second, one of two 40; or it fails."""

    begun: list = []
    fails = False

    def __init__(self, command, env, **_):
        self.returncode = 2 if self.fails else 0
        self.turn = command[command.index("--output") + 1].rpartition("-")[0].endswith("-1")
        self.begun.append((command, {name: env.get(name) for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}))

    def communicate(self):
        if self.fails:
            return "", "a line\nerror: no room\n"
        return json.dumps({"tokens_per_second": 100.0 if self.turn else 40.0}), ""


def test_trainings_side_by_side_are_recorded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(subprocess, "Popen", Training)
    monkeypatch.setattr(Training, "begun", [])
    command = ["side-by-side", "--rounds", "2", "--spin", "7", "--output", str(tmp_path)]
    assert main([*command, "--", "--rank", "4"]) == 0
    assert all("--rank" in command and "--json" in command for command, _ in Training.begun)
    assert len(Training.begun) == 2 * 4 * 3  # rounds, ways, one alone and two
    assert any(environment["GOMP_SPINCOUNT"] == "7" for _, environment in Training.begun)
    (path,) = tmp_path.iterdir()
    runs = json.loads(path.read_text())["runs"]
    assert [run["way"] for run in runs[::2]] == 2 * list(ways([7]))
    assert runs[0]["tokens_per_second"] == [100.0] and runs[1]["tokens_per_second"] == [40.0, 40.0]
    assert "0.80" in capsys.readouterr().out


def test_a_training_that_fails_is_told(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Training)
    monkeypatch.setattr(Training, "fails", True)
    assert main(["side-by-side"]) == 2
    assert "a training ended with exit status 2, and said last: error: no room" in capsys.readouterr().err
