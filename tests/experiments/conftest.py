"""Models that are quick on a CPU for the experiments on the orders, and a stand-in for their judge."""

import pytest
import torch

from qlora_lab.evaluation.judge import Judgement
from qlora_lab.evaluation.losses import Loss
from qlora_lab.experiments import accuracy, knobs, orders, presets_compared
from qlora_lab.models.loading import load_model
from qlora_lab.training.data import load_samples

QUICK = {"batch_size": 2, "compute_dtype": torch.float32}


@pytest.fixture
def tiny_model(monkeypatch, tiny_folder):
    """A tiny model in the place of the bundled one, and 100 samples of each split."""
    for module in (accuracy, knobs, presets_compared):
        monkeypatch.setattr(module, "load_model", lambda **named: load_model(tiny_folder, **named))
    for module in (orders, accuracy, presets_compared):
        monkeypatch.setattr(module, "load_samples", lambda *of: load_samples(*of).select(range(100)))


@pytest.fixture
def some_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")


def adapter(ready: orders.Ready) -> dict[str, torch.Tensor]:
    """What is trained, by name, whoever has wrapped the model."""
    return {name: p.detach() for name, p in ready.model.named_parameters() if p.requires_grad}


class Spy:
    """In the place of `Judge`: remembers what it was to put to a model, and what happened in which order."""

    def __init__(self, happened: list, exact: str = "10"):
        self.happened, self.exact = happened, exact

    def __call__(self, conversations, texts, tokenizer, dtype):
        self.conversations, self.texts, self.dtype = conversations, texts, dtype
        return SimpleJudge(self)


class SimpleJudge:
    def __init__(self, spy):
        self.spy = spy

    def losses(self, model) -> dict:
        self.spy.happened.append("losses")
        return {name: Loss(2.0 * len(texts), len(texts)) for name, texts in self.spy.texts.items()}

    def __call__(self, model) -> Judgement:
        return Judgement(dict.fromkeys(self.spy.conversations, self.spy.exact), self.losses(model))
