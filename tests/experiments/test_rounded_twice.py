"""Weights that are rounded to NF4 and then to Q4_0: against gguf, bitsandbytes, and arithmetic by hand."""

import json

import gguf
import pytest
import torch

from qlora_lab.adapters.targets import get_linear
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments import rounded_twice
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.rounded_twice import WAYS, Layers
from qlora_lab.finetuning import dequantize_linears
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import NF4, quantize, quantize_q4_0
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.data import load_samples

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture
def loaded(tiny_folder):
    return load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)


def by_gguf(x: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


@pytest.mark.parametrize(
    ("level", "largest", "by", "before", "after"),
    [  # in steps of an eighth of the block's largest
        (13, 1.0, 0.0, 4.5009, 5),
        (13, 1.0, -0.002, 4.4919, 4),
        (10, NF4[13].item(), 0.0, 3.4995, 3),
        (10, NF4[13].item(), 0.002, 3.5065, 4),
    ],
)
def test_a_level_between_two_goes_to_one_side_and_a_nudge_sends_it_to_the_other(level, largest, by, before, after):
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 32], x[0, 33:40] = 1.0, largest, NF4[level]
    q = quantize(x, NF4, 64)
    moved = rounded_twice.nudged(level, by)(x, q)
    assert moved[0, 33].item() == pytest.approx(NF4[level].item() * (1 + by)) and moved[0, 32] == x[0, 32]
    errors = rounded_twice.error_in_steps(quantize_q4_0(moved), moved)
    assert errors[0, 33:40].tolist() == pytest.approx([after - before] * 7, abs=2e-3)  # scales are in float16
    assert rounded_twice.sums_by_level(errors, q)[level].item() == pytest.approx(7 * (after - before), abs=0.014)


def test_blocks_of_zeros_have_no_error():
    assert rounded_twice.error_in_steps(quantize_q4_0(torch.zeros(1, 32)), torch.zeros(1, 32)).tolist() == [[0.0] * 32]


def test_layers_are_bitsandbytes_and_ggufs(loaded, tiny_folder):
    layers = Layers(loaded[0])
    before = get_linear(loaded[0], NAME).weight.detach().clone()
    bnb = load_model(tiny_folder, quantization="nf4", device="cpu", compute_dtype=torch.float32)[0]
    in_nf4 = get_linear(dequantize_linears(bnb), NAME).weight.detach()
    expected = {
        "not quantized": before,
        "NF4": in_nf4,
        "Q4_0": by_gguf(before),
        "Q4_0 from NF4": by_gguf(in_nf4),
        "Q4_0 from NF4 in bf16": by_gguf(in_nf4.bfloat16().float()),
    }
    for name, weight in expected.items():
        errors = layers.put(WAYS[name])
        torch.testing.assert_close(get_linear(loaded[0], NAME).weight.detach(), weight, rtol=0, atol=0)
        assert bool(errors) == name.startswith("Q4_0")


def test_shuffled_errors_are_the_same_elsewhere(loaded):
    layers, found = Layers(loaded[0]), []
    x = layers.q[-1].dequantize()
    steps = rounded_twice.steps_of(quantize_q4_0(x))
    for name in ("Q4_0 from NF4", "Q4_0 from NF4, errors shuffled"):
        errors = layers.put(WAYS[name])
        found.append((layers.layers[-1].weight.detach() - x) / steps)
    assert not torch.allclose(*found, atol=0.1)
    torch.testing.assert_close(*(each.flatten().sort().values for each in found), rtol=0, atol=1e-4)
    assert max(errors["error"]) - min(errors["error"]) < 0.05 < min(errors["absolute"])


def test_the_record_has_a_row_for_each_way(loaded, tiny_folder, tmp_path):
    assert main(["rounded-twice", "--model", str(tiny_folder), "--orders", "2", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("rounded-twice-cpu-*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert sum(record["shares"]) == pytest.approx(1) and record["levels"] == NF4.tolist()
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == list(WAYS)
    other = [row for way, row in rows.items() if way != "Q4_0 from NF4, 0.2461 -0.2%"]  # on that side it is already
    assert len({row["loss"] for row in other}) == len(WAYS) - 1
    samples = [tokenize_chat(chat, loaded[1]) for chat in load_samples("orders", "test")["messages"][:2]]
    own = text_loss(loaded[0], samples, pad_token_id=loaded[1].pad_token_id)
    assert (rows["not quantized"]["loss"], rows["not quantized"]["tokens"]) == (own.per_token, own.tokens)
    once, twice = rows["Q4_0"], rows["Q4_0 from NF4"]
    assert max(map(abs, once["error"][1:-1])) < 0.1 < max(map(abs, twice["error"][1:-1]))
    for row in (once, twice):
        assert all(abs(e) <= a for e, a in zip(row["error"], row["absolute"], strict=True))


def test_a_record_is_gone_on_with(tiny_folder, tmp_path, capsys):
    flags = ["rounded-twice", "--model", str(tiny_folder), "--orders", "1", "--output", str(tmp_path)]
    assert main(flags) == 0
    (file,) = tmp_path.glob("rounded-twice-cpu-*.json")
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(whole | {"rows": whole["rows"][:-1]}), encoding="utf-8")
    capsys.readouterr()
    assert main(flags) == 0
    assert json.loads(file.read_text(encoding="utf-8")) == whole
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [list(WAYS)[-1]]
    assert main([*flags, "--orders", "2"]) == 2
