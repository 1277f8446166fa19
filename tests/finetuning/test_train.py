import contextlib
import math
import os
import shutil
import signal
import sys
import weakref

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import Batches, TokenizedSample, TrainingDiverged, collate, train, train_steps
from qlora_lab.finetuning.train import (
    checkpoint_activations,
    make_accelerator,
    newest_checkpoint,
    offloaded_hidden_states,
    rate,
    save_checkpoint,
    token_loss_sum,
)


def random_samples(count: int, seed: int = 0, longest: int = 24) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=draw))
        ids = torch.randint(3, 97, (length,), generator=draw).tolist()
        samples.append(TokenizedSample(tuple(ids), length // 3))
    return samples


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fresh(start, model):
    """The model as it was at the start."""
    model.load_state_dict(start)
    return model


@pytest.fixture
def start(tiny):
    return {name: value.clone() for name, value in tiny.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ the loss


def test_loss_is_transformers_loss(tiny):
    batch = collate([[s] for s in random_samples(4)], pad_token_id=0)
    targets = (batch["labels"][:, 1:] != -100).sum()
    theirs = tiny(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(token_loss_sum(tiny, batch) / targets, theirs)


def test_loss_is_the_sum_over_hand_counted_tokens(tiny):
    one = TokenizedSample((5, 6, 7, 8, 9), 3)
    with torch.no_grad():
        logits = tiny(torch.tensor([one.ids])).logits[0].double()
        by_hand = -sum(logits[i - 1].log_softmax(0)[one.ids[i]] for i in (3, 4))
        ours = token_loss_sum(tiny, collate([[one]], pad_token_id=0))
    torch.testing.assert_close(ours.double(), by_hand, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- accumulation


def one_step(model, samples, batch_size: int, accumulation: int, packing: bool = False):
    batches = Batches(samples, batch_size, accumulation, packing, max_length=64)
    (record,) = train_steps(model, batches, steps=1, warmup_steps=0, max_grad_norm=1e9)
    return record, trained(model)


def test_accumulation_is_the_same_step_as_one_large_batch(tiny, start):
    samples = random_samples(16)
    large, large_weights = one_step(fresh(start, tiny), samples, 16, 1)
    small, small_weights = one_step(fresh(start, tiny), samples, 4, 4)
    assert small.tokens == large.tokens
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    assert small.gradient_norm == pytest.approx(large.gradient_norm, rel=1e-4)
    for name, weight in large_weights.items():
        torch.testing.assert_close(small_weights[name], weight, rtol=1e-3, atol=1e-5)


def test_mean_of_means_would_be_another_loss(tiny):
    """The mistake that dividing by all tokens avoids, so that the test above is known to have teeth."""
    samples = sorted(random_samples(16), key=lambda s: len(s.ids))
    groups = [samples[i : i + 4] for i in range(0, 16, 4)]
    with torch.no_grad():
        sums = [token_loss_sum(tiny, collate([[s] for s in g], 0)).item() for g in groups]
    counts = [sum(len(s.ids) - s.prompt_length for s in g) for g in groups]
    token_mean = sum(sums) / sum(counts)
    mean_of_means = sum(s / n for s, n in zip(sums, counts, strict=True)) / 4
    assert abs(mean_of_means - token_mean) > 1e-3


def test_packed_rows_give_the_same_step(tiny, start):
    samples = random_samples(4, longest=12)
    padded, padded_weights = one_step(fresh(start, tiny), samples, 4, 1)
    packed, packed_weights = one_step(fresh(start, tiny), samples, 1, 1, packing=True)
    assert packed.tokens == padded.tokens
    assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
    for name, weight in padded_weights.items():
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------- what a run must do


def test_training_learns_and_leaves_the_base_alone(tiny, start):
    records = train(tiny, Batches(random_samples(4), 4), steps=30, learning_rate=2e-2, progress=False)
    assert records[-1].loss < records[0].loss / 2
    assert [r.step for r in records] == list(range(1, 31))
    changed = {name for name, value in tiny.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "lora_" in name}
    assert not tiny.training


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, start):
    kept = []
    for checkpointing, offloading in ((False, False), (True, False), (True, True)):
        fresh(start, tiny)
        settings = {"gradient_checkpointing": checkpointing, "activation_offloading": offloading}
        train(tiny, Batches(random_samples(8), 4), steps=3, progress=False, **settings)
        kept.append(trained(tiny))
    for name in kept[0]:
        assert torch.equal(kept[0][name], kept[1][name]) and torch.equal(kept[0][name], kept[2][name])


def test_offloaded_hidden_states_are_let_go_of(tiny):
    layers, inputs = tiny.get_base_model().get_decoder().layers, []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(weakref.ref(arguments[0])))
    batch = collate([[sample] for sample in random_samples(2)], 0)
    checkpoint_activations(tiny.train())
    alive = []
    for context in (contextlib.nullcontext(), offloaded_hidden_states(tiny.config.hidden_size)):
        inputs.clear()
        with context:
            loss = token_loss_sum(tiny, batch)
        alive.append(sum(reference() is not None for reference in inputs))
        loss.backward()
    assert alive == [len(layers), 1]  # the first layer's, which the embedding has made, is still in use


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_resumed_losses_are_those_of_an_uninterrupted_run(tiny, start, tmp_path, optimizer):
    samples, settings = random_samples(40), {"steps": 9, "optimizer": optimizer, "checkpoint_every": 2}
    whole = train(fresh(start, tiny), Batches(samples, 4, seed=5), progress=False, **settings)
    end = trained(tiny)

    steps = train_steps(fresh(start, tiny), Batches(samples, 4, seed=5), checkpoints=tmp_path, **settings)
    for record in steps:
        if record.step == 5:  # the checkpoint of step 4 is there, step 5 is lost
            steps.close()
    assert newest_checkpoint(tmp_path).name == "checkpoint-000004"
    torch.manual_seed(123)  # whatever happened in between
    resumed = train(
        fresh(start, tiny), Batches(samples, 4, seed=5), progress=False, checkpoints=tmp_path, resume=True, **settings
    )
    assert [r.loss for r in resumed] == [r.loss for r in whole]
    assert [r.gradient_norm for r in resumed] == [r.gradient_norm for r in whole]
    for name, weight in end.items():
        assert torch.equal(dict(tiny.named_parameters())[name], weight)


def test_dropout_goes_on_where_it_was(make_tiny, tmp_path):
    """The random generator's state is part of a checkpoint."""
    batches, settings = Batches(random_samples(20), 4), {"steps": 6, "checkpoint_every": 3}
    whole = train(make_tiny(dropout=0.5), batches, progress=False, **settings)
    steps = train_steps(make_tiny(dropout=0.5), batches, checkpoints=tmp_path, **settings)
    for record in steps:
        if record.step == 4:
            steps.close()
    resumed = train(make_tiny(dropout=0.5), batches, progress=False, checkpoints=tmp_path, resume=True, **settings)
    assert [r.loss for r in resumed] == [r.loss for r in whole]


def test_nan_stops_before_the_update_and_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    def poisoned(model, batch, chunk):
        loss = token_loss_sum(model, batch)
        calls.append(1)
        return loss * math.nan if len(calls) == 5 else loss

    calls = []
    monkeypatch.setattr(sys.modules[train.__module__], "token_loss_sum", poisoned)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan .* at step 5: .*Lower the learning rate"):
        train(tiny, Batches(random_samples(8), 4), steps=9, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-000004"
    assert all(torch.isfinite(p).all() for p in tiny.parameters())


def test_interrupted_write_leaves_the_older_checkpoint(tiny, tmp_path, monkeypatch):
    batches = Batches(random_samples(8), 4)
    train(tiny, batches, steps=2, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        train(tiny, batches, steps=4, checkpoints=tmp_path, checkpoint_every=2, resume=True, progress=False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-000002"
    monkeypatch.undo()
    records = train(tiny, batches, steps=4, checkpoints=tmp_path, checkpoint_every=2, resume=True, progress=False)
    assert len(records) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000004"]


def test_damaged_checkpoint_is_named(tiny, tmp_path):
    batches = Batches(random_samples(8), 4)
    train(tiny, batches, steps=2, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    (tmp_path / "checkpoint-000002" / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="checkpoint-000002 is damaged"):
        train(tiny, batches, steps=4, checkpoints=tmp_path, resume=True, progress=False)


def test_checkpoint_of_another_rank_is_refused(make_tiny, tmp_path):
    batches = Batches(random_samples(8), 4)
    train(make_tiny(), batches, steps=2, checkpoints=tmp_path, progress=False)
    with pytest.raises(UserError, match="resume with the same --rank"):
        train(make_tiny(rank=8), batches, steps=4, checkpoints=tmp_path, resume=True, progress=False)


def test_checkpoints_hold_no_pickle(tiny, tmp_path):
    train(tiny, Batches(random_samples(8), 4), steps=1, checkpoints=tmp_path, progress=False)
    names = {p.suffix for p in newest_checkpoint(tmp_path).iterdir()}
    assert names == {".safetensors", ".json"}


def test_ctrl_c_returns_what_was_reached(tiny, monkeypatch, capsys):
    calls = []

    def interrupting(model, batch, chunk):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return token_loss_sum(model, batch)

    monkeypatch.setattr(sys.modules[train.__module__], "token_loss_sum", interrupting)
    records = train(tiny, Batches(random_samples(8), 4), steps=9, progress=False)
    assert len(records) == 3
    assert "stopped after 3 of 9 steps" in capsys.readouterr().err
    assert not tiny.training


class Interrupting:
    """Presses Ctrl-C when it is destroyed: a KeyboardInterrupt that came up here would be ignored, and lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("presses", "reached"), [(1, 2), (2, 1)])
def test_ctrl_c_is_never_lost(tiny, monkeypatch, presses, reached):
    """One ends the training after its step, even from a destructor; a second one ends it at once."""
    calls = []

    def interrupting(model, batch, chunk):
        calls.append(1)
        if len(calls) == 2:
            Interrupting()
            if presses == 2:
                signal.raise_signal(signal.SIGINT)
        return token_loss_sum(model, batch)

    monkeypatch.setattr(sys.modules[train.__module__], "token_loss_sum", interrupting)
    usual = signal.getsignal(signal.SIGINT)
    assert len(train(tiny, Batches(random_samples(8), 4), steps=9, progress=False)) == reached
    assert signal.getsignal(signal.SIGINT) is usual


# ------------------------------------------------------------------------------------------------------------ settings


def test_schedule():
    cosine = [rate(step, 10, 2, "cosine") for step in range(1, 11)]
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert cosine[2:] == sorted(cosine[2:], reverse=True)
    assert 0 < cosine[-1] < 0.05
    assert [rate(step, 10, 0, "constant") for step in range(1, 11)] == [1.0] * 10
    assert rate(1, 1, 5, "cosine") == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"steps": 1, "schedule": "linear"}, "choose from cosine, constant"),
        ({"steps": 1, "optimizer": "sgd"}, "choose from adamw_torch"),
        (
            {"steps": 1, "optimizer": "paged_adamw_8bit"},
            "pages GPU memory, and this model is on a CPU: use 'adamw_8bit'",
        ),
        ({"steps": 1, "optimizer": "paged_adamw_32bit"}, "on a CPU: use 'adamw_torch'"),
        ({"steps": 1, "activation_offloading": True}, "keeps: switch that on too"),
        ({"steps": 1, "compute_dtype": torch.float16}, "float16 compute needs a GPU"),
        ({"steps": 1, "compute_dtype": torch.float64}, "choose torch.float32"),
    ],
)
def test_impossible_settings(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        train(tiny, Batches(random_samples(4), 4), progress=False, **settings)


def test_model_without_adapters_is_refused(make_tiny):
    model = make_tiny().unload()
    model.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train: give it adapters first"):
        train(model, Batches(random_samples(4), 4), steps=1, progress=False)


def test_gradients_of_an_interrupted_step_do_not_leak_into_the_next(tiny, start):
    clean, weights = one_step(fresh(start, tiny), random_samples(4), 4, 1)
    fresh(start, tiny)
    token_loss_sum(tiny, collate([[s] for s in random_samples(4, seed=9)], 0)).backward()  # and then Ctrl-C
    again, weights_again = one_step(tiny, random_samples(4), 4, 1)
    assert again.gradient_norm == clean.gradient_norm
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_bf16_compute_trains_close_to_fp32(tiny, start):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        records = train(fresh(start, tiny), Batches(random_samples(8), 4), steps=4, compute_dtype=dtype, progress=False)
        losses.append(records[-1].loss)
    AcceleratorState._reset_state(True)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # bf16 has 8 bits: steps of 0.4 %, over a few layers


def test_save_replaces_the_same_step(tiny, tmp_path):
    records = train(tiny, Batches(random_samples(8), 4), steps=1, progress=False)
    names = [n for n, p in tiny.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([tiny.get_parameter(n) for n in names])
    for _ in range(2):
        save_checkpoint(tmp_path, tiny, names, optimizer, records)
    shutil.rmtree(newest_checkpoint(tmp_path))
    assert newest_checkpoint(tmp_path) is None


def test_one_process_may_train_in_two_precisions(make_tiny):
    """Accelerate alone would refuse the second."""
    cpu = torch.device("cpu")
    assert make_accelerator(torch.bfloat16, cpu).mixed_precision == "bf16"
    assert make_accelerator(torch.float32, cpu).mixed_precision == "no"
    assert make_accelerator(torch.float32, cpu).mixed_precision == "no"
