import os
import pathlib
import shutil
import subprocess

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
        subprocess.run([sha256sum, "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


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
    (folder / "SHA256SUMS").unlink()
    assert "is no wheelhouse: it has no SHA256SUMS" in complaint()
    assert wheelhouse.main([]) == 2


def test_make_refuses_a_damaged_wheelhouse_before_it_installs(folder, tmp_path_factory):
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
