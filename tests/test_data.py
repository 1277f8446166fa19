"""`python -m qlora_lab.data`, as a user calls it."""

import io
import json
import subprocess
import sys

import pytest

from qlora_lab import data


def rows(path, *prompts: str) -> str:
    path.write_text("\n".join(json.dumps({"frage": text, "antwort": "Ja."}) for text in prompts))
    return str(path)


COLUMNS = ("--columns", "prompt=frage,response=antwort")


def test_it_prints_the_report_and_trains_nothing(capsys, tmp_path, tokenizer):
    path = rows(tmp_path / "mine.jsonl", "Ist es da?", "Wo?", "Wo?")
    assert data.main([path, *COLUMNS, "--learn", "everything", "--max-length", "30"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mine.jsonl: 3 samples, read as prompt-response\n")
    assert "1 sample repeats an earlier one (mine.jsonl, line 3 repeats mine.jsonl, line 2)" in out
    assert "learned: all of it, what others say, too\n" in out
    assert "3 of 3 samples are longer than --max-length 30" in out
    assert "\n  learned  system" in out
    assert err == "" and list(tmp_path.iterdir()) == [tmp_path / "mine.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: FILE"),
        (["{path}"], "mine.jsonl, line 1 has no text in 'prompt' (it has: frage, antwort)"),
        (["{path}", "--columns", "prompt=frage"], "a sample needs prompt and response"),
        (["{path}", "--format", "text"], "mine.jsonl, line 1 is not in the format text"),
        (["{path}", "--learn", "first"], "invalid choice: 'first'"),
        (["{path}", "--max-length", "0"], "'0' is not a whole number"),
        (["{path}x"], "no data at"),
        (["{path}", *COLUMNS, "--drop-near"], "--drop-near leaves samples out of what --clean FOLDER writes"),
        (["{path}", *COLUMNS, "--split-by", "kunde"], "mine.jsonl, line 1 has no column 'kunde' to split by"),
        (["orders", "--split-by", "kunde"], "orders comes in splits of its own"),
        (["{path}", "--model", "smolm2-135m-instruct"], "did you mean 'smollm2-135m-instruct'"),
        (["{path}", "--model", "{folder}"], "is no model: the folder has no config.json"),
    ],
)
def test_mistakes_are_one_sentence(capsys, tmp_path, arguments, sentence):
    path = rows(tmp_path / "mine.jsonl", "Ist es da?")
    assert data.main([word.format(path=path, folder=tmp_path) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused(capsys, tmp_path):
    path = rows(tmp_path / "mine.jsonl", "Ist es da?")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert data.main([path, *COLUMNS, "--model", str(tmp_path / "model")]) == 2
    assert "error: cannot load the tokenizer of " in capsys.readouterr().err


def test_it_writes_what_is_left_and_nothing_else(capsys, tmp_path):
    path = rows(tmp_path / "mine.jsonl", "Ist es da?", "Wo?", "Wo?")
    assert data.main([path, *COLUMNS, "--clean", str(tmp_path / "out.jsonl")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"2 of 3 samples of {path} kept, in {tmp_path / 'out.jsonl'}\n") and err == ""
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    path = rows(tmp_path / "more.jsonl", *(f"Wo ist {n}?" for n in range(20)))
    arguments = [path, *COLUMNS, "--split-by", "frage", "--eval-samples", "3", "--clean", str(tmp_path / "out")]
    assert data.main(arguments) == 0
    assert "20 of 20 samples" in (out := capsys.readouterr().out) and ": train 15, validation 2, test 3\n" in out
    assert data.main(arguments) == 2
    assert "out is there already" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(capsys, monkeypatch, tmp_path):
    path = rows(tmp_path / "mine.jsonl", "Wo?")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "clean", full)
    assert data.main([path, *COLUMNS, "--clean", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err == "error: cannot write: No space left on device; nothing is left of it\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_console_can_print_it(monkeypatch, tmp_path, encoding):
    """Cyrillic is in neither code page, the dot for a blank in one; the report is there all the same."""
    path, console = rows(tmp_path / "mine.jsonl", "Где ☕?", "é\u202e"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding=encoding))
    assert data.main([path, *COLUMNS]) == 0
    sys.stdout.flush()
    out = console.getvalue().decode(encoding)
    assert "\n  learned  J a . <|im_end|>" in out and "?(3)" in out
    assert ("(· is a blank" if encoding == "cp1252" else "(. is a blank") in out  # a full stop looks like it


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    path = rows(tmp_path / "mine.jsonl", "Wo?")
    command = [sys.executable, "-m", "qlora_lab.data", path, *COLUMNS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head -0` does
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
