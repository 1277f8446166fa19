"""The data sets are what their README says they are, and the records what docs/benchmarks.md says."""

import hashlib
import json
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


def test_speeds_in_the_benchmarks_are_the_records():
    record = json.loads((DATA / "records" / "step-nvidia-h100-80gb-hbm3.json").read_text())
    page = (DATA.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for batch, checkpointing in ((1, True), (4, True), (4, False), (16, True)):
        runs = {
            run["who"]: run
            for run in record["runs"]
            if (run["batch_size"], run["gradient_checkpointing"]) == (batch, checkpointing)
        }
        cells = [f"{batch}, checkpointing" if checkpointing else f"{batch}"]
        for who in ("standard", "trl", "fast"):
            peak = runs[who]["peak_allocated"] / 1e9
            cells.append(f"{runs[who]['tokens_per_second']:,.0f} · {peak:.{1 if peak >= 10 else 2}f} GB")
        cells.append(f"{runs['fast']['tokens_per_second'] / runs['standard']['tokens_per_second']:.1f} ×")
        assert f"| {' | '.join(cells)} |" in page
        assert not checkpointing or f"{runs['offloading']['peak_allocated'] / 1e9:.2f}" in page
        for host in record["other_hosts"] if (batch, checkpointing) in ((1, True), (4, False)) else []:
            speeds = {
                run["who"]: run["tokens_per_second"]
                for run in host["runs"]
                if (run["batch_size"], run["gradient_checkpointing"]) == (batch, checkpointing)
            }
            if "fast" in speeds:
                assert f"{speeds['standard']:,.0f}" in page
                assert abs(speeds["fast"] / runs["fast"]["tokens_per_second"] - 1) < 0.0145
        unsloth = [
            run
            for host in (record, *record["other_hosts"])
            for run in host["runs"]
            if (run["who"], run["batch_size"], run["gradient_checkpointing"]) == ("unsloth", batch, checkpointing)
        ]
        speeds = [run["tokens_per_second"] for run in unsloth]
        assert f"{min(speeds):,.0f} to" in page and f"{max(speeds):,.0f}" in page
        assert f"{min(run['peak_allocated'] for run in unsloth) / 1e9:.3g}" in page
    standard, fast = (record["bundled"][who]["tokens_per_second"] for who in ("standard", "fast"))
    assert f"| {standard:,.0f} | | {fast:,.0f} | {fast / standard:.0f} × |" in page


def test_unsloths_speeds_are_the_records():
    record = json.loads((DATA / "records" / "step-nvidia-h200.json").read_text())
    page = (DATA.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    for run in record["runs"]:
        name = f"{run['batch_size']}, checkpointing" if run["gradient_checkpointing"] else str(run["batch_size"])
        peak = run["peak_allocated"] / 1e9
        cell = f"{run['tokens_per_second']:,.0f} · {peak:.{1 if peak >= 10 else 2}f} GB"
        if run["who"] != "unsloth, on the GPU":  # SFTTrainer again, and no faster
            assert any(row[0] == f"| {name}" and cell in " | ".join(row) for row in rows), (run["who"], name, cell)
