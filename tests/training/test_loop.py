import contextlib
import json
import math
import os
import shutil
import signal
import weakref
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab.errors import UserError
from qlora_lab.finetuning import Batches, TokenizedSample, TrainingDiverged, collate, text_loss, train, train_steps
from qlora_lab.training.activations import checkpoint_activations, offloaded_hidden_states
from qlora_lab.training.checkpoints import Checkpoint, checkpoints_in, newest_checkpoint, restore, save_checkpoint
from qlora_lab.training.loop import with_next
from qlora_lab.training.loss import token_loss_sum
from qlora_lab.training.optimizers import make_optimizer, parameter_groups
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.schedules import rate
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.steps import plain
from qlora_lab.training.validation import Validation
from tests.conftest import in_two_processes

RISING_AGAIN = {"steps": 30, "learning_rate": 3e-2, "schedule": "constant"}  # the validation loss, after eight steps


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


def stopped_at(step: int, model, batches, folder, **settings) -> None:
    """Train until the step is taken and its checkpoint, if it were due, is not written."""
    steps = train_steps(model, batches, checkpoints=folder, **settings)
    next(islice(steps, step - 1, None))
    steps.close()


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


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, start, monkeypatch):
    passes, offloaded, kept = [], [], []
    tiny.get_base_model().get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    original = offloaded_hidden_states
    monkeypatch.setattr(plain, "offloaded_hidden_states", lambda size: offloaded.append(size) or original(size))
    for checkpointing, offloading in ((False, False), (True, False), (True, True)):
        passes.clear()
        settings = {"gradient_checkpointing": checkpointing, "activation_offloading": offloading}
        train(fresh(start, tiny), Batches(random_samples(8), 4), steps=3, progress=False, **settings)
        assert len(passes) == 3 * (1 + checkpointing)  # the backward pass computes a layer again
        assert offloaded == [64] * 3 * offloading
        kept.append(trained(tiny))
        token_loss_sum(tiny.train(), collate([[random_samples(1)[0]]], 0)).backward()
        assert len(passes) == 3 * (1 + checkpointing) + 1  # and is switched off again
    for name in kept[0]:
        assert torch.equal(kept[0][name], kept[1][name]) and torch.equal(kept[0][name], kept[2][name])


def test_loss_chunk_is_kept_to(tiny):
    positions = []
    tiny.get_output_embeddings().register_forward_hook(lambda _, __, logits: positions.append(logits.numel() // 97))
    train(tiny, Batches(random_samples(8), 8), steps=1, loss_chunk=16, progress=False)
    assert max(positions) == 16


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
def test_resumed_losses_are_those_of_an_uninterrupted_run(make_tiny, tmp_path, optimizer):
    tiny = make_tiny(rank=64)  # 64 x 64 = 4,096 numbers: smaller ones have their states in 32 bits
    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    samples, settings = random_samples(40), {"steps": 9, "optimizer": optimizer, "checkpoint_every": 2}
    whole = train(fresh(start, tiny), Batches(samples, 4, seed=5), progress=False, **settings)
    end = trained(tiny)

    stopped_at(5, fresh(start, tiny), Batches(samples, 4, seed=5), tmp_path, **settings)  # step 5 is lost
    saved = load_file(tmp_path / "checkpoint-000004" / "optimizer.safetensors").values()
    assert any(t.dtype == torch.uint8 and t.numel() == 4096 for t in saved) == (optimizer == "adamw_8bit")
    assert newest_checkpoint(tmp_path).path.name == "checkpoint-000004"
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
    batches, settings = Batches(random_samples(20), 4), {"steps": 6, "checkpoint_every": 3, "learning_rate": 1e-2}
    losses = {}
    for dropout in (0.0, 0.5):
        model = make_tiny(dropout=dropout)
        torch.manual_seed(1)
        losses[dropout] = [r.loss for r in train(model, batches, progress=False, **settings)]
    assert losses[0.5] != losses[0.0]
    model = make_tiny(dropout=0.5)
    torch.manual_seed(1)
    stopped_at(4, model, batches, tmp_path, **settings)
    model = make_tiny(dropout=0.5)
    torch.manual_seed(2)  # whatever happened in between
    resumed = train(model, batches, progress=False, checkpoints=tmp_path, resume=True, **settings)
    assert [r.loss for r in resumed] == losses[0.5]


def test_every_step_is_one_of_a_loop_written_out(tiny, start):
    """transformers' loss one sample at a time, torch's clipping and AdamW, learning rates by hand."""
    batches, peak = Batches(random_samples(40), 2, accumulation=2, seed=3), 1e-2
    settings = {"steps": 6, "learning_rate": peak, "warmup_steps": 2, "max_grad_norm": 1.0, "weight_decay": 0.3}
    records = train(fresh(start, tiny), batches, progress=False, **settings)
    ours = trained(tiny)

    model = fresh(start, tiny)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.3)
    shares = [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    for record, micro_batches, share in zip(records, islice(batches, 6), shares, strict=True):
        samples = [sample for rows in micro_batches for (sample,) in rows]
        targets = sum(len(sample.ids) - sample.prompt_length for sample in samples)
        loss = 0.0
        for sample in samples:
            part = model(input_ids=torch.tensor([sample.ids]), labels=torch.tensor([sample.labels])).loss
            part = part * (len(sample.ids) - sample.prompt_length) / targets
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        adamw.param_groups[0]["lr"] = peak * share
        adamw.step()
        adamw.zero_grad()
        assert record.learning_rate == pytest.approx(peak * share)
        assert record.loss == pytest.approx(loss, rel=1e-5)
        assert record.gradient_norm == pytest.approx(norm, rel=1e-3)
        assert record.tokens == sum(len(sample.ids) for sample in samples)
        assert record.seconds > 0
    assert min(r.gradient_norm for r in records) > 1  # so each step was clipped
    for name, weight in ours.items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=1e-3, atol=1e-4)


def test_each_step_knows_the_one_that_follows():
    """The fast step copies it to the GPU beforehand, and would only be slower without."""
    assert list(with_next(iter([1, 2, 3]))) == [(1, 2), (2, 3), (3, None)]
    assert list(with_next([])) == []


def test_the_model_trains_in_training_mode_and_is_left_as_it_came(make_tiny):
    model, modes = make_tiny(dropout=0.5).eval(), []
    model.get_output_embeddings().register_forward_hook(lambda *_: modes.append(model.training))
    train(model, Batches(random_samples(8), 4), steps=2, progress=False)
    assert modes == [True, True]
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("early", "when"), [(False, "before"), (True, "after")])
def test_an_infinite_gradient_beside_a_finite_loss_stops_too(tiny, early, when):
    before = trained(tiny)
    name, parameter = next((name, p) for name, p in tiny.named_parameters() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    message = rf"^the loss is \d\.\d+ and the gradient norm (inf|nan) at step 1: training stopped {when} this update"
    with pytest.raises(TrainingDiverged, match=message):
        train(
            tiny,
            Batches(random_samples(8), 4),
            steps=2,
            progress=False,
            update_in_backward=early,
            max_grad_norm=None if early else 1.0,
        )
    assert all(torch.equal(trained(tiny)[n], weight) for n, weight in before.items()) != early
    assert not tiny.training


def test_a_loss_that_is_no_number_updates_nothing_in_backward_either(tiny, monkeypatch):
    before = trained(tiny)
    poisoned = lambda *arguments: token_loss_sum(*arguments) * math.nan  # noqa: E731
    monkeypatch.setattr(plain, "token_loss_sum", poisoned)
    with pytest.raises(TrainingDiverged, match="the loss is nan at the first step, before any update"):
        train(
            tiny,
            Batches(random_samples(8), 4),
            steps=2,
            progress=False,
            update_in_backward=True,
            max_grad_norm=None,
        )
    assert all(torch.equal(trained(tiny)[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("chunk", [None, 4])
def test_samples_without_a_token_to_learn(tiny, chunk):
    """Beside others they count nothing; a step of nothing else is refused, and not as a loss that is no number."""
    prompt, (sample,) = TokenizedSample((5, 6, 7), 3), random_samples(1)
    batches = [Batches(s, 1, accumulation=2, seed=1) for s in ([sample, prompt], [prompt])]
    with torch.no_grad():
        alone = token_loss_sum(tiny, collate([[sample]], 0)).item() / sample.target_count
    (record,) = train(tiny, batches[0], steps=1, loss_chunk=chunk, progress=False)
    assert record.loss == pytest.approx(alone, rel=1e-6)
    with pytest.raises(UserError, match="step 1 has no token to learn: its 2 samples are prompts only"):
        train(tiny, batches[1], steps=1, loss_chunk=chunk, progress=False)


@pytest.mark.parametrize(
    ("name", "bits", "paged"),
    [("adamw_8bit", 8, False), ("paged_adamw_32bit", 32, True), ("paged_adamw_8bit", 8, True)],
)
def test_bitsandbytes_optimizers_are_what_they_are_called(name, bits, paged):
    optimizer = make_optimizer(name, [torch.nn.Parameter(torch.zeros(4))], 0.25, 0.125)
    assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, paged)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.125


def test_loaded_states_lie_where_the_optimizer_wants_them():
    """A CPU has no managed memory; what asks for it there is a stand-in."""

    class Paged:
        is_paged = True

        def __init__(self):
            self.param_groups = [{"params": [parameter], "names": ["a|b"]}]
            self.state, self.buffers = {parameter: {}}, []

        def get_state_buffer(self, p, dtype):
            self.buffers.append(torch.zeros_like(p, dtype=dtype))
            return self.buffers[-1]

    parameter, state = torch.nn.Parameter(torch.zeros(3)), torch.tensor([1, 2, 3], dtype=torch.uint8)
    loaded = {"a|b|state1": state, "a|b|state2": state + 1, "a|b|absmax1": torch.ones(1), "a|b|step": 7}
    begun = Checkpoint(
        path=None,
        records=(),
        trained={"a|b": torch.ones(3)},
        optimizer=loaded,
        generators={"cpu": torch.get_rng_state()[None]},
        scaler=None,
        run=None,
    )
    optimizer = Paged()
    restore(begun, {"a|b": parameter}, optimizer, make_accelerator(torch.float32, torch.device("cpu")))
    restored = optimizer.state[parameter]
    assert [restored["state1"] is optimizer.buffers[0], restored["state2"] is optimizer.buffers[1]] == [True, True]
    assert torch.equal(restored["state1"], state) and torch.equal(restored["state2"], state + 1)
    assert (len(optimizer.buffers), restored["absmax1"].item(), restored["step"]) == (2, 1, 7)
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_nan_stops_before_the_update_and_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    def poisoned(model, batch, chunk):
        loss = token_loss_sum(model, batch)
        calls.append(1)
        return loss * math.nan if len(calls) == 5 else loss

    calls = []
    monkeypatch.setattr(plain, "token_loss_sum", poisoned)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan .* at step 5: .*Lower the learning rate"):
        train(tiny, Batches(random_samples(8), 4), steps=9, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    assert newest_checkpoint(tmp_path).path.name == "checkpoint-000004"
    assert all(torch.isfinite(p).all() for p in tiny.parameters())


def test_interrupted_write_leaves_the_older_checkpoint(tiny, tmp_path, monkeypatch):
    batches = Batches(random_samples(8), 4)
    train(tiny, batches, steps=2, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        train(tiny, batches, steps=4, checkpoints=tmp_path, checkpoint_every=2, resume=True, progress=False)
    assert newest_checkpoint(tmp_path).path.name == "checkpoint-000002"
    monkeypatch.undo()
    records = train(tiny, batches, steps=4, checkpoints=tmp_path, checkpoint_every=2, resume=True, progress=False)
    assert len(records) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000004"]


# --------------------------------------------------------------------------------------------------------- checkpoints


def files(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def stopped(make_tiny, tmp_path):
    """A run of six steps that was stopped after its fourth: its folder and how to go on with it."""
    batches, settings = Batches(random_samples(20), 4, seed=5), {"steps": 6, "checkpoint_every": 2, "warmup_steps": 1}
    folder = tmp_path / "checkpoints"
    stopped_at(5, make_tiny(), batches, folder, **settings)
    return folder, batches, settings


def test_the_last_two_checkpoints_are_kept(tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "checkpoint-000001.part").mkdir()  # an interrupted write's
    train(tiny, Batches(random_samples(8), 4), steps=7, checkpoints=tmp_path, checkpoint_every=2, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000006", "checkpoint-000007", "notes"]


def test_only_whole_checkpoints_count_and_by_their_number(tmp_path):
    for name in ("1000000", "999999", "000007", "2000000.part", "best"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    assert [p.name.removeprefix("checkpoint-") for p in checkpoints_in(tmp_path)] == ["000007", "999999", "1000000"]


def test_checkpoints_of_another_run_are_left_alone(stopped, tiny):
    folder, batches, settings = stopped
    before = files(folder)
    with pytest.raises(UserError, match=r"holds checkpoint-000004 of another run: resume=True continues it, ano"):
        train_steps(tiny, batches, checkpoints=folder, **settings)  # here and now, not with its first step
    with pytest.raises(UserError, match="give its folder as checkpoints="):
        train_steps(tiny, batches, resume=True, **settings)
    assert files(folder) == before


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["short", "missing"])
def test_a_damaged_checkpoint_is_passed_over(stopped, make_tiny, capsys, file, damage):
    folder, batches, settings = stopped
    whole = train(make_tiny(), batches, progress=False, **settings)
    path = folder / "checkpoint-000004" / file
    path.write_bytes(path.read_bytes()[:100]) if damage == "short" else path.unlink()
    resumed = train(make_tiny(), batches, checkpoints=folder, resume=True, progress=False, **settings)
    assert [r.loss for r in resumed] == [r.loss for r in whole]
    assert [r.seconds for r in resumed][:2] == [r.seconds for r in newest_checkpoint(folder).records][:2]
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-000004", "checkpoint-000006"]
    err = capsys.readouterr().err
    assert err.startswith("note: checkpoint-000004 is damaged (")
    assert err.endswith("): going on from checkpoint-000002\n")
    assert err.count("\n") == 1

    for path in checkpoints_in(folder):
        (path / file).write_bytes(b"short")
    with pytest.raises(
        UserError, match=r"000006 is damaged \(.*000004 is damaged \(.*no other checkpoint, so start an"
    ):
        train_steps(make_tiny(), batches, checkpoints=folder, resume=True, **settings)


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_whole_one(stopped, make_tiny):
    folder, batches, settings = stopped
    (folder / "checkpoint-000004" / "progress.json").write_text("{")
    settings = {**settings, "checkpoint_every": 3}
    steps = train_steps(make_tiny(), batches, checkpoints=folder, resume=True, **settings)
    next(islice(steps, 3, None))  # step 3 is written when the next one is asked for
    steps.close()
    assert [p.name for p in checkpoints_in(folder)] == ["checkpoint-000002", "checkpoint-000003"]


@pytest.mark.parametrize(
    ("stream", "changed", "message"),
    [
        ({}, {"learning_rate": 2e-3}, r"belongs to another run: learning_rate was 0.0015 and is now 0.002; resume"),
        ({}, {"schedule": "constant"}, "schedule was cosine and is now constant"),
        ({}, {"warmup_steps": 2}, "warmup_steps was 1 and is now 2"),
        ({}, {"max_grad_norm": None}, "max_grad_norm was 1.0 and is now None"),
        ({}, {"weight_decay": 0.1}, "weight_decay was 0.0 and is now 0.1"),
        ({}, {"optimizer": "adamw_8bit"}, "optimizer was adamw_torch and is now adamw_8bit"),
        ({}, {"compute_dtype": torch.bfloat16}, "compute_dtype was float32 and is now bfloat16"),
        ({"seed": 6}, {}, "seed was 5 and is now 6"),
        ({"batch_size": 8}, {}, "rows a step was 4 and is now 8"),
        ({"accumulation": 2}, {}, "rows a step was 4 and is now 8"),
        ({"packing": True, "max_length": 64}, {}, "packing was off and is now to 64 tokens"),
        ({"samples": random_samples(19)}, {}, r"samples was 20 \(sha256 \w+\) and is now 19 \(sha256"),
        ({"samples": random_samples(20, seed=1)}, {}, r"samples was 20 \(sha256 \w+\) and is now 20 \(sha256"),
        ({"seed": 6}, {"learning_rate": 1.0}, "learning_rate was 0.0015 and is now 1.0, seed was 5 and is now 6"),
        ({}, {"steps": 3}, "has 4 steps behind it and steps=3: give at least 4"),
    ],
)
def test_another_run_is_not_gone_on_with(stopped, make_tiny, stream, changed, message):
    from accelerate.state import AcceleratorState

    folder, batches, settings = stopped
    batches = Batches(**{"samples": batches.samples, "batch_size": 4, "seed": 5, **stream})
    with pytest.raises(UserError, match=message):
        train_steps(make_tiny(), batches, checkpoints=folder, resume=True, **{**settings, **changed})
    AcceleratorState._reset_state(True)


def test_what_changes_only_memory_may_change_on_the_way(stopped, make_tiny, capsys):
    folder, batches, settings = stopped
    whole = train(make_tiny(), batches, progress=False, **settings)
    smaller = {"gradient_checkpointing": True, "loss_chunk": 8}
    batches = Batches(batches.samples, 2, accumulation=2, seed=5)
    resumed = train(make_tiny(), batches, checkpoints=folder, resume=True, progress=False, **settings, **smaller)
    assert [r.loss for r in resumed] == pytest.approx([r.loss for r in whole], rel=1e-5)
    assert capsys.readouterr().err == ""


def test_a_run_may_be_made_longer_and_says_what_that_does(stopped, make_tiny, capsys):
    folder, batches, settings = stopped
    resumed = train(make_tiny(), batches, checkpoints=folder, resume=True, progress=False, **{**settings, "steps": 9})
    expected = [1.5e-3 * rate(n, 6, 1, "cosine") for n in range(1, 5)]
    expected += [1.5e-3 * rate(n, 9, 1, "cosine") for n in range(5, 10)]
    assert [r.learning_rate for r in resumed] == pytest.approx(expected)
    assert capsys.readouterr().err == (
        "note: checkpoint-000004 is of a run of 6 steps, and this one has 9: after "
        f"{expected[3]:.3g} the learning rate goes on with {expected[4]:.3g}, as in a run of 9 steps\n"
    )


def test_a_finished_run_is_only_read_again(stopped, make_tiny, capsys):
    folder, batches, settings = stopped
    records = train(make_tiny(), batches, checkpoints=folder, resume=True, progress=False, **settings)
    again = make_tiny()
    assert train(again, batches, checkpoints=folder, resume=True, progress=False, **settings) == records
    for name, weight in load_file(folder / "checkpoint-000006" / "adapter.safetensors").items():
        assert torch.equal(again.get_parameter(name), weight)


def test_checkpoints_of_the_first_format_go_on(stopped, make_tiny, capsys):
    """One generator's state as a vector, and nothing about the run: as it was before there was a "format"."""
    folder, batches, settings = stopped
    whole = train(make_tiny(), batches, progress=False, **settings)
    path = folder / "checkpoint-000004"
    tensors = load_file(path / "optimizer.safetensors")
    save_file({**tensors, "rng|cpu": tensors["rng|cpu"][0].clone()}, path / "optimizer.safetensors")
    progress = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({key: progress[key] for key in ("records", "optimizer")}))
    resumed = train(make_tiny(), batches, checkpoints=folder, resume=True, progress=False, **settings)
    assert [r.loss for r in resumed] == [r.loss for r in whole]
    assert capsys.readouterr().err == ""


def test_a_later_format_is_refused(stopped, tiny):
    folder, batches, settings = stopped
    path = folder / "checkpoint-000004" / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 4}))
    with pytest.raises(UserError, match="checkpoint-000004 has format 4, and this version reads up to 3: update it"):
        train_steps(tiny, batches, checkpoints=folder, resume=True, **settings)


def fp16_on_the_cpu(**scaler):
    """An accelerator that scales fp16 losses, which Accelerate itself does on a GPU only."""
    accelerator = make_accelerator(torch.float32, torch.device("cpu"))
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", **scaler), True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@pytest.fixture
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(True)


def test_the_scaler_goes_on_where_it_was(make_tiny, tmp_path, fresh_accelerate):
    """It starts at 2^40, which no fp16 gradient survives, is halved each time, and doubled after 3 good steps."""
    batches, settings = Batches(random_samples(40), 4), {"steps": 40, "checkpoint_every": 5, "learning_rate": 1e-2}
    scaler = {"init_scale": 2.0**40, "growth_interval": 3}
    whole = fp16_on_the_cpu(**scaler)
    records = train(make_tiny(), batches, accelerator=whole, progress=False, **settings)
    skipped = [not math.isfinite(r.gradient_norm) for r in records]
    assert all(skipped[:10]) and not all(skipped[20:])
    assert records[9].loss != records[10].loss
    stopped_at(34, make_tiny(), batches, tmp_path, accelerator=fp16_on_the_cpu(**scaler), **settings)
    scales = json.loads((tmp_path / "checkpoint-000030" / "progress.json").read_text())["scaler"]
    assert scales["scale"] == whole_scale(records[:30], **scaler)
    again = fp16_on_the_cpu(**scaler)
    resumed = train(
        make_tiny(), batches, accelerator=again, checkpoints=tmp_path, resume=True, progress=False, **settings
    )
    assert [r.loss for r in resumed] == [r.loss for r in records]
    assert again.scaler.state_dict() == whole.scaler.state_dict()


def whole_scale(records, init_scale: float, growth_interval: int) -> float:
    """The scale after these steps, counted by hand."""
    scale, worked = init_scale, 0
    for record in records:
        worked = worked + 1 if math.isfinite(record.gradient_norm) else 0
        scale *= 1 if worked % growth_interval else (2 if worked else 0.5)
    return scale


def test_two_processes_are_one_run(make_tiny, tmp_path, capsys):
    """Losses and gradients are summed, each has its own generator back after a resume, answers are counted once."""
    done = in_two_processes("tests.training.two_processes", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"process-{n}.json").read_text()) for n in (0, 1))
    assert first == second
    assert first["processes"] == 2

    batches, settings = Batches(random_samples(40), 4, seed=5), {"steps": 6, "checkpoint_every": 2}
    settings["learning_rate"] = 1e-2
    alone = [[r.loss, r.gradient_norm] for r in train(make_tiny(), batches, progress=False, **settings)]
    for ours, theirs in zip(first["plain"], alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)  # a few roundings of fp32; half a step is 0.5 away
    assert first["dropout"][0] != pytest.approx(alone[0], rel=1e-3)
    assert first["resumed"] == first["dropout"]

    model, texts = make_tiny(), random_samples(5, seed=9)
    validation = Validation(lambda model: text_loss(model, texts).per_token, 1, patience=2, keep_best=True)
    records = train(model, batches, validation=validation, progress=False, **RISING_AGAIN)
    assert first["validated"]["losses"] == pytest.approx([r.validation_loss for r in records], rel=1e-4)
    assert first["validated"]["best"][0] == validation.restore_best(model) == len(records) - 2 > 1
    assert first["validated"]["best"][1] == min(first["validated"]["losses"])

    assert first["agreed"] == 0.1  # to the last bit

    judged = first["judged"]
    assert judged["f1"] == {"test": [1, 1, 1, 0, 0], "shifted": [1]}
    assert judged["exact"] == {"test": 3 / 5, "shifted": 1.0}
    assert judged["one"] == {"shifted": 1.0}  # the second process has none to judge
    assert judged["none"] == {}
    for name, count in (("five", 5), ("one", 1)):
        alone = text_loss(make_tiny(), random_samples(count)).perplexity
        assert judged["perplexity"][name] == pytest.approx(alone, rel=1e-5)

    shutil.rmtree(tmp_path / "checkpoint-000006")
    capsys.readouterr()
    train(make_tiny(dropout=0.5), batches, checkpoints=tmp_path, resume=True, progress=False, **settings)
    assert capsys.readouterr().err == (
        "note: checkpoint-000004 holds the random generators of 2 processes, and this run has 1: the steps are the "
        "same, but for what dropout draws\n"
    )


def test_checkpoint_of_another_rank_is_refused(make_tiny, tmp_path):
    batches = Batches(random_samples(8), 4)
    train(make_tiny(), batches, steps=2, checkpoints=tmp_path, progress=False)
    with pytest.raises(UserError, match="resume with the same --rank"):
        train(make_tiny(rank=8), batches, steps=4, checkpoints=tmp_path, resume=True, progress=False)


def test_checkpoints_hold_no_pickle(tiny, tmp_path):
    train(tiny, Batches(random_samples(8), 4), steps=1, checkpoints=tmp_path, progress=False)
    names = {p.suffix for p in newest_checkpoint(tmp_path).path.iterdir()}
    assert names == {".safetensors", ".json"}


def test_ctrl_c_returns_what_was_reached(tiny, monkeypatch, capsys):
    calls = []

    def interrupting(model, batch, chunk):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return token_loss_sum(model, batch)

    monkeypatch.setattr(plain, "token_loss_sum", interrupting)
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

    monkeypatch.setattr(plain, "token_loss_sum", interrupting)
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


def test_the_schedule_is_the_one_asked_for(tiny):
    settings = {"steps": 5, "schedule": "constant", "warmup_steps": 3, "learning_rate": 0.008}
    records = train(tiny, Batches(random_samples(4), 4), progress=False, **settings)
    assert [r.learning_rate for r in records] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])


def test_defaults_are_those_that_the_course_was_measured_with():
    assert TrainSettings(7) == TrainSettings(
        steps=7,
        learning_rate=0.0015,
        schedule="cosine",
        warmup_steps=3,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optimizer="adamw_torch",
        compute_dtype=torch.float32,
        gradient_checkpointing=False,
        activation_offloading=False,
        loss_chunk=None,
        update_in_backward=False,
        fast=False,
        merge_aware=None,
        checkpoint_every=10,
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be a positive number"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be a positive number"),
        ({"learning_rate": math.inf}, "learning_rate=inf: must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate=nan: must be a positive number"),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be positive, or None"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan: must be positive, or None"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be 0 or more"),
        ({"weight_decay": math.inf}, "weight_decay=inf: must be 0 or more"),
        ({"loss_chunk": 0}, "loss_chunk=0: must be at least 1, or None"),
        ({"checkpoint_every": 0}, "checkpoint_every=0: must be at least 1 step"),
        (
            {"update_in_backward": True, "max_grad_norm": None, "compute_dtype": torch.float16},
            "update_in_backward cannot unscale fp16 gradients: use bf16 or fp32 compute",
        ),
        ({"update_in_backward": True}, "update_in_backward needs max_grad_norm=None"),
        ({"activation_offloading": True}, "keeps: switch that on too"),
        ({"merge_aware": "int4"}, "merge_aware is 'int4': choose from nf4, q4_0, or None"),
        ({"merge_aware": "nf4", "fast": True}, "merge_aware needs the plain step: leave out fast"),
        (
            {"merge_aware": "nf4", "update_in_backward": True, "max_grad_norm": None},
            "merge_aware needs the plain step: leave out update_in_backward",
        ),
        ({"merge_aware": "nf4", "dense_base": True}, "other weights than dense_base would hold"),
    ],
)
def test_settings_are_judged_when_they_are_made(setting, message):
    with pytest.raises(UserError, match=message):
        TrainSettings(**{"steps": 1, **setting})
    TrainSettings(steps=1, warmup_steps=0, max_grad_norm=None, weight_decay=0.1, loss_chunk=1, checkpoint_every=1)


def test_what_several_processes_cannot_do():
    device, early = torch.device("cpu"), TrainSettings(1, update_in_backward=True, max_grad_norm=None)
    TrainSettings(1).require_possible(device, 6, 1, processes=3)
    with pytest.raises(UserError, match="batch_size=6 cannot be shared evenly by 4 processes"):
        TrainSettings(1).require_possible(device, 6, 1, processes=4)
    early.require_possible(device, 6, 1)
    TrainSettings(1, dense_base=True).require_possible(device, 6, 1)
    with pytest.raises(UserError, match="dense_base is for models on a CPU, and this one is on cuda"):
        TrainSettings(1, dense_base=True).require_possible(torch.device("cuda"), 6, 1)
    with pytest.raises(UserError, match="update_in_backward needs one process"):
        early.require_possible(device, 6, 1, processes=2)
    with pytest.raises(UserError, match="needs accumulation=1: it updates after each of 2"):
        early.require_possible(device, 6, 2)


def test_the_accelerators_processes_are_asked_before_the_first_step(tiny):
    class Three:
        num_processes = 3

    with pytest.raises(UserError, match="batch_size=4 cannot be shared evenly by 3 processes"):
        train_steps(tiny, Batches(random_samples(4), 4), steps=1, accelerator=Three())


def test_settings_come_in_one_way_only(tiny):
    settings, batches = TrainSettings(2, learning_rate=1e-2), Batches(random_samples(4), 4)
    with pytest.raises(TypeError, match="got settings and also steps"):
        train_steps(tiny, batches, settings, steps=3)
    assert [r.learning_rate for r in train(tiny, batches, settings, progress=False)] == pytest.approx([0.005, 0.01])


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
    parameters = {n: p for n, p in tiny.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameter_groups(parameters))
    accelerator = make_accelerator(torch.float32, torch.device("cpu"))
    for _ in range(2):
        save_checkpoint(tmp_path, parameters, optimizer, records, {}, accelerator)
    shutil.rmtree(newest_checkpoint(tmp_path).path)
    assert newest_checkpoint(tmp_path) is None


def test_one_process_may_train_in_two_precisions(make_tiny):
    """Accelerate alone would refuse the second."""
    cpu = torch.device("cpu")
    assert make_accelerator(torch.bfloat16, cpu).mixed_precision == "bf16"
    assert make_accelerator(torch.float32, cpu).mixed_precision == "no"
    assert make_accelerator(torch.float32, cpu).mixed_precision == "no"


def test_lora_plus_is_pefts(make_tiny):
    """B learns faster than A, by that factor, whatever else is beside them."""
    from peft.optimizers import create_loraplus_optimizer

    batches, settings = Batches(random_samples(24), 4, seed=3), {"steps": 4, "schedule": "constant", "warmup_steps": 0}
    ours = make_tiny()
    train(ours, batches, learning_rate=1e-3, lora_plus=16.0, max_grad_norm=None, progress=False, **settings)

    theirs = make_tiny()
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.0)
    for (rows,) in islice(batches, 4):
        targets = sum(sample.target_count for (sample,) in rows)
        (token_loss_sum(theirs, collate(rows, 0)) / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trained(theirs).items():
        torch.testing.assert_close(trained(ours)[name], parameter, rtol=1e-4, atol=1e-6)

    plain = make_tiny()
    train(plain, batches, learning_rate=1e-3, max_grad_norm=None, progress=False, **settings)
    moved = {
        name: (trained(ours)[name] - p).abs().max().item() for name, p in trained(plain).items() if "lora_B" in name
    }
    assert min(moved.values()) > 1e-3


@pytest.mark.parametrize("early", [False, True])
def test_lora_plus_is_resumed_and_is_the_same_in_the_backward_pass(make_tiny, tmp_path, early):
    settings = {"steps": 4, "lora_plus": 8.0, "max_grad_norm": None, "checkpoint_every": 2, "progress": False}
    batches, whole = Batches(random_samples(24), 4, seed=3), make_tiny()
    expected = train(whole, batches, **settings)
    running = train_steps(
        make_tiny(),
        batches,
        TrainSettings(4, lora_plus=8.0, max_grad_norm=None, checkpoint_every=2),
        checkpoints=tmp_path,
    )
    for record in running:
        if record.step == 3:
            running.close()
    resumed = make_tiny()
    records = train(resumed, batches, checkpoints=tmp_path, resume=True, update_in_backward=early, **settings)
    assert [r.loss for r in records] == pytest.approx([r.loss for r in expected], rel=1e-6)
    for name, parameter in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], parameter, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match=r"lora_plus was 8\.0 and is now 1\.0"):
        train(make_tiny(), batches, checkpoints=tmp_path, resume=True, **{**settings, "lora_plus": 1.0})
