"""The data sets are what their README says they are, and the records what pages in docs say."""

import hashlib
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

from qlora_lab.finetuning import load_samples

DATA = pathlib.Path(__file__).parents[1] / "data"


def test_sums_in_the_readme():
    listed = dict(
        reversed(line.split())
        for line in re.findall(r"^[0-9a-f]{64}  \S+$", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    files = {str(path.relative_to(DATA)): path for path in DATA.glob("*/*.jsonl")}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


@pytest.mark.parametrize("task", ["orders", "diary"])
def test_samples_are_what_their_generator_writes(tmp_path, task):
    (tmp_path / "generate.py").write_text((DATA / task / "generate.py").read_text())
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    prompts = {}
    for split in ("train", "validation", "test", "shifted"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (DATA / task / f"{split}.jsonl").read_bytes()
        prompts[split] = {chat[-2]["content"] for chat in load_samples(task, split)["messages"]}
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


def test_the_families_speeds_and_losses_are_the_records():
    record = json.loads((DATA / "records" / "families-nvidia-h200.json").read_text())
    page = (DATA.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    runs = {}
    for run in record["speeds"]:
        setting = f"{run['model']}, {run['batch_size']}{', checkpointing' if run['gradient_checkpointing'] else ''}"
        runs.setdefault((run["rank"], setting), {})[run["who"]] = run
    assert len(runs) == 2 * 4 * 4
    for (rank, setting), of_each in runs.items():
        ways = ("standard", "trl", "unsloth, plain loop", "fast") if rank == 64 else ("standard", "fast")
        found = [of_each[way] for way in ways]
        cells = [f"{r['tokens_per_second']:,.0f} · {r['peak_allocated'] / 1e9:.1f} GB" for r in found]
        fast = of_each["fast"]["tokens_per_second"]
        times = " · ".join(f"{fast / r['tokens_per_second']:.1f}" for r in found[:-1])
        share = f"{100 * of_each['fast']['share_of_floor']:.0f} %"
        assert f"| {' | '.join([setting, *cells, f'{times} ×', share])} |" in page
    off = {way: [] for way in ("plain", "fast")}
    for row in record["losses"]:
        assert len(row["float32"]) == 50 and row["fast"] == row["fast, checkpointing"]
        for way, largest in off.items():
            largest.append(max(abs(a / b - 1) for a, b in zip(row[way], row["float32"], strict=True)))
    assert len(off["fast"]) == 11 and all(ours < plain for ours, plain in zip(off["fast"], off["plain"], strict=True))
    assert f"off by {100 * max(off['fast']):.2f} % at most" in " ".join(page.split())
    assert f"the plain step's by {100 * max(off['plain']):.2f} %" in " ".join(page.split())


def test_the_page_on_exports_says_what_the_record_of_merge_aware_training_holds():
    """Exact match of `test`, three seeds: plain training beside the base and merged, and training for the merge."""
    page = (DATA.parent / "docs" / "export.md").read_text(encoding="utf-8")
    record = json.loads((DATA / "records" / "merge-aware-nvidia-h200.json").read_text(encoding="utf-8"))

    def right(way: str, kind: str) -> str:
        runs = sorted((run for run in record["runs"] if run["way"] == way), key=lambda run: run["seed"])
        assert len(runs) == 3 and all(len(run[kind]["exact"]["test"]) == 100 for run in runs)
        return ", ".join(str(run[kind]["exact"]["test"].count("1")) for run in runs)

    for steps in (30, 120):
        plain = " | ".join(right(f"plain, {steps} steps", kind) for kind in ("beside", "nf4", "q4_0"))
        assert f"| plainly | {steps} | {plain} |" in page
        aware = " | ".join(right(f"{kind}, {steps} steps", kind) for kind in ("nf4", "q4_0"))
        assert f"| for this merge | {steps} | | {aware} |" in page
    prose = {kind: [run[kind]["after"]["prose"] for run in record["runs"] if kind in run] for kind in ("nf4", "q4_0")}
    beside = [run["beside"]["after"]["prose"] for run in record["runs"] if "beside" in run]
    long = [run["nf4"]["after"]["prose"] for run in record["runs"] if run["way"] == "nf4, 120 steps"]
    assert min(beside) > 3.75 and max(beside) < 3.9 and min(prose["q4_0"]) > 4.1 and max(prose["q4_0"]) < 4.3
    assert f"{min(long):.1f} to {max(long):.1f} after 120 steps for NF4" in page


def test_the_page_on_exports_says_what_the_record_of_weights_rounded_twice_holds():
    page = (DATA.parent / "docs" / "export.md").read_text(encoding="utf-8")
    record = json.loads((DATA / "records" / "rounded-twice-cpu-x86_64.json").read_text(encoding="utf-8"))
    shares = record["shares"]
    assert record["settings"]["orders"] == 10 and {row["tokens"] for row in record["rows"]} == {340}
    for row in record["rows"]:
        cells = [row["way"], f"{row['loss']:.3f}", "", "", "", ""]
        if "error" in row:
            size, mean = (sum(map(math.prod, zip(shares, row[of], strict=True))) for of in ("absolute", "error"))
            common = sum(share * abs(error) for share, error in zip(shares, row["error"], strict=True))
            cells[2:] = [f"{size:.3f}", f"{round(mean, 3) + 0.0:+.3f}", f"{common:.3f}", f"{row['error'][13]:+.2f}"]
        assert " ".join(f"| {' | '.join(cells)} |".split()) in page
    assert f"on which {100 * shares[13]:.1f} % of all weights lie" in " ".join(page.split())


# ---------------------------------------------------------------------------------------------- docs/decisions.md


@pytest.fixture(scope="module")
def decisions() -> str:
    return " ".join((DATA.parent / "docs" / "decisions.md").read_text(encoding="utf-8").split())


def runs_of(name: str) -> list[dict]:
    return json.loads((DATA / "records" / name).read_text(encoding="utf-8"))["runs"]


def between(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def test_decisions_about_rates_layers_and_batches_are_the_records(decisions):
    knobs = runs_of("knobs-nvidia-h100-80gb-hbm3.json")

    def mean(knob: str, text: str = "validation") -> float:
        return statistics.fmean(run["after"][text] for run in knobs if run["knob"] == knob)

    rates = ["lr 1.5e-4", "lr 5e-4", "as it is", "lr 5e-3"]
    told = zip(rates, ("1.5e-4", "5e-4", "1.5e-3", "5e-3"), strict=True)
    assert ", ".join(f"{mean(knob):.4f} at {rate}" for knob, rate in told) in decisions
    assert "{:.2f}, {:.2f}, {:.2f} and {:.2f} nats".format(*(mean(knob, "prose") for knob in rates)) in decisions
    assert mean("lr 1.5e-2") > 1.5
    layers = [f"{mean(knob):.4f}" for knob in ("as it is", "q, k, v, o", "q, v")]
    assert "loss {}, with the attention's alone {}, with `q` and `v` alone {}.".format(*layers) in decisions
    sizes = [f"{mean(knob):.4f}" for knob in ("as it is", "batch 4 x 2", "batch 1 x 8")]
    assert "end at {}, {} and {},".format(*sizes) in decisions


def test_decisions_about_amounts_and_when_to_stop_are_the_records(decisions):
    runs = runs_of("amounts-nvidia-h200.json")
    by_amount = {}
    for run in runs:
        by_amount.setdefault(run["amount"], []).append(run)
    for amount, several in by_amount.items():
        test, shifted = (between([run["exact"][split].count("1") for run in several]) for split in ("test", "shifted"))
        english = between([math.exp(run["after"]["prose"]) for run in several])
        count, _, replay = amount.partition(" + ")
        name = f"{int(count):,}{' and replay' if replay else ''}"
        assert f"| {name} | {test} | {shifted} | {english} |" in decisions
    few, many = (next(run for run in by_amount[amount] if run["seed"] == 0) for amount in ("50", "2000"))
    curve = dict(few["curve"])
    assert f"falls to {few['losses'][-1]:.4f} at last, while the validation loss is {curve[30]:.4f}" in decisions
    best = min(curve, key=lambda step: curve[step])
    assert f"lowest at step {best} with {curve[best]:.4f}, and {curve[120]:.4f} at the end" in decisions
    best, stalls = math.inf, [0]
    for loss in curve.values():
        stalls.append(0 if loss < best else stalls[-1] + 1)
        best = min(best, loss)
    assert f"would have stopped at step {[0, *curve][stalls.index(3)]}." in decisions
    step, loss = min(many["curve"], key=lambda point: point[1])
    assert f"is lowest at step {step}, with {loss:.4f}." in decisions


@pytest.mark.parametrize(
    ("name", "way", "kind"),
    [
        ("held out at random", "at random", "held out"),
        ("held out by customer", "by customer", "held out"),
        ("of later customers", "", "later"),
        ("trained on, with another greeting", "", "seen"),
    ],
)
def test_decisions_about_splits_are_the_record(decisions, name, way, kind):
    texts = [run["exact"][kind] for run in runs_of("splits-nvidia-h200.json") if way in (run["way"], "")]
    share = 100 * sum(bits.count("1") for bits in texts) / sum(map(len, texts))
    each = between([100 * bits.count("1") / len(bits) for bits in texts])
    assert f"| {name} | {share:.0f} % of {sum(map(len, texts)):,} | {each} % |" in decisions
