import pathlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="Triton is not installed (on Linux: pip install triton)")

from qlora_lab.experiments import card_roofline
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.card_roofline import T4, Card, attention_operations, floor, product_operations
from qlora_lab.memory import Shape
from qlora_lab.memory.shapes import from_config
from qlora_lab.training.steps.fast import linear
from tests.training.steps.test_fast_families import family_model, fast_step, interpreted, samples

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"


@interpreted
@pytest.mark.parametrize("checkpointing", [True, False])
def test_operations_are_those_that_torch_counts_in_a_fast_step(monkeypatch, checkpointing):
    """So are the weights that are made dense. 64 tokens fill a row, and as many targets are computed."""
    adapted = family_model("llama", quantized=True)
    shape = from_config(adapted.config)
    step = fast_step(adapted, gradient_checkpointing=checkpointing)
    dense = []
    write = linear.write_dense
    monkeypatch.setattr(linear, "write_dense", lambda weight, out: dense.append(out.numel()) or write(weight, out))
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step.gradients(step.flattened([[[sample] for sample in samples(40, 24)]]), 58)
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    assert product_operations(shape, 8, 64, 64, checkpointing) == counted
    assert card_roofline.weights_made_dense(shape, checkpointing) == sum(dense)


def test_a_floor_by_hand():
    """One layer: hidden 8, MLP 16, 2 heads, 10 words, 4 tokens, rank 8."""
    shape = Shape(8, 16, 1, 2, 2, 10)
    assert shape.linear_parameters() == 4 * 64 + 3 * 128
    slow_memory = floor(Card(1e30, 1e3, 0), shape, 8, 1, 4)
    assert slow_memory.dequantizing == pytest.approx(2 * 640 * (4.126953 / 8 + 2) / 1e3)
    assert slow_memory.multiplying == pytest.approx(2 * (2 * 640 + 2 * 80) / 1e3)
    assert attention_operations(shape, 1, 4, False) == 7 * 4 * 4 * 8
    operations = product_operations(shape, 8, 4, 3, True) + 7 * 4 * 4 * 8
    assert floor(Card(1e3, 1e30, 0), shape, 8, 1, 4).seconds == pytest.approx(operations / 1e3)


def test_the_benchmarks_show_what_the_command_prints(capsys):
    assert main(["roofline"]) == 0
    printed = capsys.readouterr().out
    assert printed in (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert printed == card_roofline.table(T4, 16, 512) + "\n"


def test_another_card(capsys):
    assert main(["roofline", "--memory", "8", "--rate", "1e6", "--bandwidth", "1e6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| Qwen2.5-7B, 4 | 0 ms | 0 ms |") and lines[-1].endswith("GB: does not fit |")
    assert main(["roofline", "--rate", "0"]) == 2
    assert "--rate" in capsys.readouterr().err
