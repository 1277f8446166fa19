"""What the lesson's cells do: lines of the script, sessions that end, memory that runs out, a louder model."""

import json
import os
import pathlib
import sys

import pytest
import torch

from qlora_lab.classroom.lessons.n09 import machinery, suspects
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError
from tests.conftest import tiny_model

FAKE = """
import pathlib, sys
from time import sleep
out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
begun = max([int(path.name[11:]) for path in out.glob("checkpoint-*")], default=0)
print("train: 3 samples", flush=True)
for step in range(begun + 1, 7):
    print(f"\\r   {{'loss': '{1 / step:.4g}', 'grad_norm': '1'}}", flush=True)
    if step % 2 == 0:
        (out / f"checkpoint-{step}").mkdir(parents=True)
        print({"eval_loss": "0.5"}, flush=True)
    if step == 3 and "--wait" in sys.argv:
        sleep(600)
if "--fail" in sys.argv:
    raise ValueError("Attempting to unscale FP16 gradients.")
print("asked: a\\nexpected: b\\nanswered: c\\nexact match: 0 of 1; chance alone may move that by 98 points")
"""

HUGE = """
import torch

def forward(n):
    return torch.ones(n)

[forward(n) for n in (1000, 2 * 10**9)]
print({"loss": "1"})
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("fake.py").write_text(FAKE)
    return "python fake.py --output out"


def test_a_session_that_is_killed_is_gone_on_with(script, capsys):
    first = machinery.session(script + " --wait", kill_after=3)
    assert first.losses == {1: 1.0, 2: 0.5, 3: 0.3333} and first.validated == {2: 0.5}
    assert first.words == {"train": "3 samples"}
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "train: 3 samples" and said[-2:] == ["step  3  loss 0.3333", "killed"]
    second = machinery.session(script)
    assert second.began == 2 and list(second.losses) == [3, 4, 5, 6]
    assert second.words["exact match"].startswith("0 of 1;")
    assert capsys.readouterr().out.splitlines()[1] == "step  3  loss 0.3333"  # what it read is told once
    assert [second.words[name] for name in ("asked", "expected", "answered")] == ["a", "b", "c"]


def test_a_script_that_fails_is_one_sentence(script):
    with pytest.raises(UserError, match=r"^the script failed: ValueError: Attempting to unscale FP16 gradients.$"):
        machinery.session(script + " --fail")


def test_the_lesson_shows_the_whole_script_in_its_text():
    """In markdown, which needs no kernel: as it is in examples/, in both editions, without the course's package."""
    script = machinery.SCRIPT.read_text(encoding="utf-8").rstrip()
    assert "qlora_lab" not in script and len(script.splitlines()) <= 155
    for edition in (".", "solutions"):
        notebook = json.loads((REPOSITORY / "notebooks" / edition / "09_your_gpu.ipynb").read_text(encoding="utf-8"))
        texts = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
        assert sum(f"```python\n{script}\n```" in text for text in texts) == 1


def test_lines_are_quoted_from_the_only_one_that_begins_so():
    text = "a\n    bc\n      d\nab"
    assert machinery.lines_of(text, "    b", 2) == "bc\n  d"
    for beginning in ("a", "nonsense"):
        with pytest.raises(ValueError, match="expected one"):
            machinery.lines_of(text, beginning, 1)


def test_an_edit_that_fits_nowhere_or_twice_is_refused(script):
    machinery.edit("max_length=args.max_length", "max_length=2", to="new.py")
    assert "max_length=2" in pathlib.Path("new.py").read_text()
    for old in ("no such words", "args."):
        with pytest.raises(UserError, match="expected once"):
            machinery.edit(old, "", to="new.py")


def test_the_dozen_lines_differ_from_the_script_in_three_at_which_colleagues_are_to_blame(capsys):
    script = [line.partition("  # ")[0].rstrip() for line in machinery.SCRIPT.read_text(encoding="utf-8").splitlines()]
    shown = [line for part in suspects.broken().values() for line in part]
    differ = [number for number, line in enumerate(shown, 1) if line not in script]
    assert differ == sorted(suspects.faulty_lines().values()) == [2, 5, 12] and len(shown) == 12
    for name, number in suspects.faulty_lines().items():
        old, new = suspects.FAULTS[name]
        assert shown[number - 1].replace(new, old) in script
    suspects.show_broken()
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["---- split", f" 1  {shown[0]}"] and said[-1] == f"12  {shown[-1]}"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits a process's memory")
def test_memory_that_runs_out_is_told_with_its_place(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    pathlib.Path("modeling_huge.py").write_text(HUGE)
    error = machinery.attempt("python modeling_huge.py", gigabytes=0.5)
    where = capsys.readouterr().out.splitlines()[1]
    if torch.cuda.is_available():  # the tensor is on the CPU, whose memory is not limited then
        assert error is None
    else:
        assert "tried to allocate 8000000000 bytes" in error
        assert where == "modeling_huge.py, forward: return torch.ones(n)"


def test_a_louder_model_says_the_same_and_its_layers_are_louder():
    ids = torch.tensor([[1, 5, 9, 4]])
    model, loud = tiny_model().eval(), tiny_model().eval()
    base = loud.get_base_model() if hasattr(loud, "get_base_model") else loud
    machinery.louder(base, 4)
    with torch.no_grad():
        torch.testing.assert_close(loud(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    quiet, louder = (dict(machinery.outputs_of(m, ids)) for m in (model, loud))
    names = [name for name in quiet if name.endswith("layers.1")]
    assert names
    torch.testing.assert_close(louder[names[0]], 4 * quiet[names[0]], rtol=1e-3, atol=1e-3)


def test_without_trl_the_lesson_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    here = os.getcwd()
    with pytest.raises(UserError, match="TRL is not here: run %pip install trl"):
        machinery.work_in(tmp_path)
    assert os.getcwd() == here
