import contextlib
import json
import subprocess
import sys

import pytest
import torch

from qlora_lab.experiments import memory_runs
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.memory_runs import Wanted
from qlora_lab.experiments.memory_settings import EXPLAINED, GRID, HELD_OUT
from qlora_lab.experiments.record import Record
from qlora_lab.training.presets import PRESETS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would record")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "qlora_lab.experiments", "memory", "--grid"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no GPU here: this records training steps on one\n")


def test_nothing_asked_for_is_told(capsys):
    assert main(["memory"]) == 2
    assert "choose from --grid, --caps" in capsys.readouterr().err


def test_what_is_there_is_not_wanted_again(tmp_path):
    key = {"shape": "llama-7b", "preset": "lean", "card_gb": 5}
    record = Record.begin("memory", tmp_path, "x", packages=())
    assert Wanted()(record, "caps", key, "llama-7b")
    record.add("caps", {**key, "out_of_memory": {"after": "load", "message": "no"}})
    wanted = Wanted(only=("llama-7b",))
    assert not wanted(record, "caps", key, "llama-7b")
    assert wanted(record, "caps", {**key, "card_gb": 6}, "llama-7b")
    assert not wanted(record, "caps", {**key, "shape": "llama-65b"}, "llama-65b")
    with pytest.raises(memory_runs.OutOfTime):
        Wanted(limit_seconds=-1)(record, "caps", {**key, "card_gb": 6}, "llama-7b")


def test_each_run_is_told(tmp_path, capsys):
    row = {"shape": "llama-7b", "preset": "lean", "card_gb": 5, "skipped": "needs 90.0 GB"}
    memory_runs.add(Record.begin("memory", tmp_path, "x", packages=()), "caps", row)
    assert "lean" in (told := capsys.readouterr().out) and "needs 90.0 GB" in told


def test_the_command_goes_on_with_the_record_that_is_there(some_gpu, monkeypatch, tmp_path, capsys):
    """Its second half is made by a second command, on another day; and by a third in another folder."""
    asked = []

    def pretended(setting, device, preset=None, **_):
        asked.append(setting)
        got = {"peak_allocated": 1, "peak_reserved": 1, "managed_bytes": 1, "step_seconds": 1.0}
        return {"measured": got, "phases": {}}

    monkeypatch.setattr(memory_runs, "measure", pretended)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500 * 10**9, 500 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    assert main(["memory", "--grid", "--only", "llama-33b", "--output", str(tmp_path)]) == 0
    path = tmp_path / "memory-some-gpu.json"
    first = json.loads(path.read_text())
    assert {run["shape"] for run in first["runs"]} == {"llama-33b"}
    assert asked[0].shape == "tiny" and len(asked) == 1 + len(first["runs"])
    path.write_text(json.dumps({**first, "date": "2026-11-24"}))

    assert main(["memory", "--grid", "--output", str(tmp_path)]) == 0
    second = json.loads(path.read_text())
    assert second["runs"][: len(first["runs"])] == first["runs"]
    assert len(second["runs"]) == len(GRID) + len(HELD_OUT) == len(asked) - 2
    assert second["date"] == f"2026-11-24, {first['date']}"

    asked.clear()
    elsewhere = ["--output", str(tmp_path / "new"), "--continue-from", str(path)]
    assert main(["memory", "--grid", "--limit-seconds", "-1", *elsewhere]) == 0
    assert len(asked) == 1


def test_lists_are_worked_through(tmp_path, monkeypatch):
    """With a pretended GPU: what does not fit is skipped, and the search for a card ends at the first that trains."""
    asked = []

    def pretended(setting, device, preset=None, **_):
        asked.append((setting, preset))
        phases = {"load": {"allocated": 1}}
        if setting.shape == "llama-33b" and caps and caps[-1] < 24:
            return {"out_of_memory": {"after": "load", "message": "no"}, "phases": phases}
        got = {"peak_allocated": 1, "peak_reserved": 1, "managed_bytes": 1, "step_seconds": 1.0}
        return {"measured": got, "phases": phases}

    @contextlib.contextmanager
    def card(gigabytes, device):
        caps.append(gigabytes)
        yield

    caps: list[int] = []
    monkeypatch.setattr(memory_runs, "measure", pretended)
    monkeypatch.setattr(memory_runs, "card_of", card)
    monkeypatch.setattr(memory_runs, "expandable_segments", lambda device: "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [[]]})
    device = torch.device("cuda", 0)
    kept = Record.begin("memory", tmp_path, "x", packages=())
    memory_runs.run_grid(kept, device)
    memory_runs.run_caps(kept, device)
    memory_runs.run_explain(kept, device)
    written = json.loads(kept.path.read_text())
    assert len(written["runs"]) == len(GRID) + len(HELD_OUT)
    # 50 GB are free, of which 4 are to spare
    fits = [s.predicted() for s in (*GRID, *HELD_OUT)]
    fits = [p.peak_allocated + p.outside["paged optimizer states"] <= 46e9 for p in fits]
    assert ["skipped" not in run for run in written["runs"]] == fits and len(set(fits)) == 2
    smallest = {(r["shape"], r["preset"]): r["card_gb"] for r in written["caps"] if "measured" in r}
    assert len(smallest) == 4 * len(PRESETS)
    assert smallest["llama-33b", "lean"] == 24
    assert smallest["llama-65b", "standard"] == 40
    assert smallest["llama-7b", "lean"] == 5
    assert smallest["llama-13b", "lean"] == 8  # it holds 7.38 GB of 7.5, since one of two embeddings is elsewhere
    assert smallest["llama-7b", "standard"] == 6  # it holds 4.505 GB, and the context leaves 4.5 of 5
    assert len(written["explained"]) == len(EXPLAINED) + 1

    before = len(asked)
    again = Record.read(kept.path)
    for run in (memory_runs.run_grid, memory_runs.run_caps, memory_runs.run_explain):
        run(again, device)
    assert len(asked) == before
