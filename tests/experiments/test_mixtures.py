"""The mixtures whose memory is measured, which needs a GPU."""

import pytest
import torch
from transformers import AutoConfig

from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.mixtures import MIXTURES
from qlora_lab.experiments.record import Record
from qlora_lab.memory import estimate, from_config
from qlora_lab.places import RECORDS

BILLIONS = {"Mixtral-8x7B": 46.7, "gpt-oss-20b": 20.9, "Qwen3-30B-A3B": 30.5}  # as their model cards say


def shape_of(name):
    kind, features = MIXTURES[name]
    return from_config(AutoConfig.for_model(kind, **features))


@pytest.mark.parametrize("name", MIXTURES)
def test_they_have_their_published_sizes(name):
    assert shape_of(name).parameters() / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)


def test_the_recorded_steps_are_predicted_today():
    """Within 1 %, by today's formulas; on a card of 32 GB."""
    record = Record.read(RECORDS / "mixtures-nvidia-h200.json")
    targets = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    targets["attention and experts"] = [*targets["attention"], "gate_up_proj", "down_proj"]
    assert {row["model"] for row in record.rows("runs")} == set(MIXTURES)
    for row in record.rows("runs"):
        said = estimate(
            shape_of(row["model"]),
            "qlora",
            rank=16,
            targets=targets[row["targets"]],
            batch_size=row["batch_size"],
            sequence_length=512,
        )
        assert row["measured"] == pytest.approx(said.peak_allocated, rel=0.01), row["model"]
        assert row["reserved"] < 28.5e9


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["mixtures"]) == 2
    assert "GPU" in capsys.readouterr().err
