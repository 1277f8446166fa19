"""The data sets are what their README says they are."""

import hashlib
import pathlib
import re
import subprocess
import sys

from qlora_lab.finetuning import load_samples

DATA = pathlib.Path(__file__).parents[1] / "data"


def test_sums_in_the_readme():
    listed = dict(
        reversed(line.split())
        for line in re.findall(r"^[0-9a-f]{64}  \S+$", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    files = {str(path.relative_to(DATA)): path for path in DATA.glob("*/*.jsonl")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_orders_are_what_their_generator_writes(tmp_path):
    (tmp_path / "generate.py").write_text((DATA / "orders" / "generate.py").read_text())
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    prompts = {}
    for split in ("train", "validation", "test", "shifted"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / "orders" / f"{split}.jsonl").read_bytes()
        prompts[split] = {chat[-2]["content"] for chat in load_samples("orders", split)["messages"]}
    names = list(prompts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not prompts[first] & prompts[second]
