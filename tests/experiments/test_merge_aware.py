import pytest
import torch

from qlora_lab.adapters.lora import add_lora, lora_layers
from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.experiments import merge_aware
from qlora_lab.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch, tiny_folder):
    monkeypatch.setattr(merge_aware, "load_model", lambda **named: load_model(tiny_folder, **named))


@pytest.mark.parametrize(
    ("way", "kinds"),
    [("plain, 30 steps", ["beside", "nf4", "q4_0"]), ("nf4, 30 steps", ["nf4"]), ("q4_0, 120 steps", ["q4_0"])],
)
def test_a_way_is_judged_in_what_it_was_trained_for(tiny, way, kinds):
    run = merge_aware.train_way(way, 1, CPU, steps=2, judged=2)
    assert (run["way"], run["seed"], len(run["losses"])) == (way, 1, 2)
    assert [kind for kind in run if kind in ("beside", "nf4", "q4_0")] == kinds
    for kind in kinds:
        assert {split: len(answers) for split, answers in run[kind]["exact"].items()} == {"test": 2, "shifted": 2}
        assert set(run[kind]["after"]) == {"validation", "prose"}
    losses = {kind: run[kind]["after"]["validation"] for kind in kinds}
    assert len(set(losses.values())) == len(kinds), "merges in other bits are other models"
    assert all(f"{kind}: validation {loss:.4f}, test 0/2" in merge_aware.summary(run) for kind, loss in losses.items())


def test_each_way_trains_with_its_target_in_view_for_its_steps(tiny, monkeypatch):
    asked = []

    def spy(model, batches, **settings):
        asked.append((settings["merge_aware"], settings["steps"]))
        return iter(())

    monkeypatch.setattr(merge_aware, "train_steps", spy)
    for way in merge_aware.WAYS:
        merge_aware.train_way(way, 0, CPU, judged=1)
    assert asked == [(target, steps) for steps in (30, 120) for target in (None, "nf4", "q4_0")]


def test_the_judged_model_is_the_merge(tiny, monkeypatch, tiny_folder):
    """Untrained, B is 0: the merge into NF4 is the base again, and what is judged has no adapter."""
    seen = []
    monkeypatch.setattr(merge_aware, "train_steps", lambda *_, **__: iter(()))
    monkeypatch.setattr(merge_aware, "judged_by", lambda judge, model: seen.append(model) or {})
    merge_aware.train_way("q4_0, 30 steps", 0, CPU, judged=1)
    base, _ = load_model(tiny_folder, quantization="nf4", device=CPU)
    expected = merge_requantized(add_lora(base, rank=16, alpha=32), "q4_0")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(seen[0](ids).logits, expected(ids).logits)
    assert not lora_layers(seen[0])
