"""Errors of formats at equal bits: against other implementations, the papers' tables, and arithmetic by hand."""

import json

import pytest
import torch
from torch import nn

from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments import codebooks
from qlora_lab.experiments.__main__ import main
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import NF4, bof4, double_quantize, error_report, quantize
from qlora_lab.training.chat import TokenizedSample

X = torch.randn(1 << 12, 256, generator=torch.Generator().manual_seed(0))
BOF4_S = {  # Blumenberg et al. 2025 (arXiv 2505.06653), table 7: some of BOF4-S' levels for the squared error
    32: (-0.8732797503471375, -0.3038933575153351, 0.187048003077507, 0.7956376671791077),
    64: (-0.8568463921546936, -0.2910638153553009, 0.1794802695512772, 0.7791395783424377),
    128: (-0.83739173412323, -0.2783779501914978, 0.1720834821462631, 0.761027991771698),
    256: (-0.8146829009056091, -0.2659871876239777, 0.1649149656295776, 0.7418596744537354),
}
BOF4 = (-0.7535689203869577, -0.3168191039791481, 0.1794535266886747, 0.7790828367844242)  # table 8, by integration


@pytest.mark.parametrize("block_size", BOF4_S)
def test_bof4_s_has_the_levels_that_its_paper_prints(block_size):
    """The paper's are from samples; it puts the noise of such levels at up to 1.3e-4 (table 8)."""
    expected = torch.tensor(BOF4_S[block_size])
    torch.testing.assert_close(bof4(block_size, signed=True)[[0, 4, 9, 14]], expected, rtol=0, atol=4e-4)


def test_bof4_has_the_levels_that_its_paper_integrates():
    torch.testing.assert_close(bof4(64)[[1, 4, 9, 14]], torch.tensor(BOF4), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("scales", "of"), [("float32", lambda q: q), ("8 bits", double_quantize)])
def test_an_error_is_that_of_the_librarys_own_report(scales, of):
    report = error_report(X, of(quantize(X, NF4, 64)))
    found = codebooks.errors([X], "NF4", 64, scales)
    assert found["bits"] == report.bits_per_parameter
    assert found["mse"] == pytest.approx(report.relative_rms**2, rel=1e-6)
    assert found["snr_db"] == pytest.approx(report.snr_db, rel=1e-6)


def test_several_tensors_are_pooled_by_element():
    tensors = [X[:1], 100 * X[1:4]]
    each = [codebooks.errors([x], "INT4", 32, "float32") for x in tensors]
    squares, sizes = ([f(x).item() for x in tensors] for f in (lambda x: x.square().sum(), lambda x: x.abs().sum()))
    both = codebooks.errors(tensors, "INT4", 32, "float32")
    for name, weights in (("mse", squares), ("mae", sizes)):
        expected = sum(e[name] * w for e, w in zip(each, weights, strict=True)) / sum(weights)
        assert both[name] == pytest.approx(expected, rel=1e-5)


def test_bits_count_scales_and_outliers():
    names = ("NF4", "NF3", "NF2", "Q4_0", "Q4_1", "MXFP4", "NVFP4", "NF4, outliers apart")
    keys = [key for key in codebooks.combinations() if key[0] in names and key[1] in (16, 32)]
    bits = {key: codebooks.errors([X], *key)["bits"] for key in keys}
    assert bits["NF4", 32, "float32"] == 5.0 and bits["NF4", 32, "8 bits"] == 4 + (8 + 32 / 256) / 32
    assert bits["NF3", 32, "float32"] == 4.0 and bits["NF2", 16, "float32"] == 4.0
    assert (bits["Q4_0", 32, "its own"], bits["Q4_1", 32, "its own"]) == (4.5, 5.0)
    assert (bits["MXFP4", 32, "its own"], bits["NVFP4", 16, "its own"]) == (4.25, 4.5)
    outliers = (X.abs() > codebooks.OUTLIER_SIGMAS * X.std()).sum().item()
    assert outliers and bits["NF4, outliers apart", 32, "float32"] == 5.0 + 48 * outliers / X.numel()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 8, bias=False)])
        self.head = nn.Linear(256, 8, bias=False)


def test_a_model_is_put_in_each_format_and_is_itself_again():
    model = Model()
    before, head = model.layers[0].weight.detach().clone(), model.head.weight.detach().clone()
    seen = {}
    for row in codebooks.each_format(model, without=("Q4_1",)):
        seen[row["format"], row["block_size"]] = model.layers[0].weight.detach().clone(), row["bits"]
        assert torch.equal(model.head.weight, head)
    assert torch.equal(model.layers[0].weight, before) and torch.equal(seen["none", 0][0], before)
    expected = double_quantize(quantize(before, NF4, 64))
    assert torch.equal(seen["NF4", 64][0], expected.dequantize())
    assert seen["NF4", 64][1] == pytest.approx(4.126953125)
    assert not {key for key in seen if key[0] == "Q4_1"} and len(seen) == 1 + 13 * 4 + 3


def test_the_record_has_errors_and_losses(tmp_path, tiny_folder, monkeypatch):
    small = {name: [x[:16] for x in tensors] for name, tensors in codebooks.drawn().items()}
    loaded = load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)
    monkeypatch.setattr(codebooks, "drawn", lambda: small)
    monkeypatch.setattr(codebooks, "load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(codebooks, "held_out", lambda *_: {"prose": [TokenizedSample(tuple(range(9)), 1)]})
    monkeypatch.setattr(codebooks, "MODEL_BLOCKS", (64,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["codebooks", "--losses", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("codebooks-cpu-*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert {row["data"] for row in record["errors"]} == {"Gaussian", "Laplace", "Student-t", "embeddings"}
    assert len(record["errors"]) == 4 * (13 * 5 * 2 + 4)
    first = record["losses"][0]
    assert first["format"] == "none"
    assert first["prose"] == text_loss(loaded[0], codebooks.held_out(None, 1)["prose"]).per_token
    assert len({row["prose"] for row in record["losses"]}) > 12 and record["tokens"] == {"prose": 8}


def test_a_folder_without_an_encoder_is_refused(tmp_path, capsys):
    assert main(["codebooks", "--encoder", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "has no model.safetensors: --encoder takes" in capsys.readouterr().err
