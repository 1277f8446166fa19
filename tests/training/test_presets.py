import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    PRESETS,
    Batches,
    TokenizedSample,
    add_adapter,
    build_random,
    collate,
    embeddings_to_cpu,
    embeddings_to_device,
    train,
)
from qlora_lab.memory.shapes import Shape
from qlora_lab.training import presets
from qlora_lab.training.loss import token_loss_sum

UNTIED = Shape(64, 192, 2, 4, 2, 97)


def samples(count: int = 8) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(0)
    return [TokenizedSample(tuple(torch.randint(3, 97, (20 + i,), generator=draw).tolist()), 4) for i in range(count)]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(model, **settings):
    records = train(model, Batches(samples(), 4), steps=4, progress=False, **{"max_grad_norm": None, **settings})
    return records, weights(model)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# ------------------------------------------------------------------------------------------------ logits piece by piece


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunked_loss_and_gradients_are_those_of_the_whole(make_tiny, chunk):
    first, second, *others = samples()
    batch = collate([[first, second], *[[sample] for sample in others]], 0)
    kept = []
    for size in (None, chunk):
        model = make_tiny()
        loss = token_loss_sum(model, batch, size)
        loss.backward()
        kept.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (whole, gradients), (chunked, others) = kept
    torch.testing.assert_close(chunked, whole)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)


def test_chunks_hold_fewer_logits_at_a_time(make_tiny):
    model, seen = make_tiny(), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    token_loss_sum(model, collate([[sample] for sample in samples()], 0), 16).backward()
    assert max(seen) == 16 * 97


def test_logits_that_are_changed_after_the_head_are_refused(make_tiny):
    """Whatever the config calls it: it is seen in what the model computes."""
    model, batch = make_tiny(), collate([[sample] for sample in samples()], 0)
    forward = model.get_base_model().forward

    def capped(**named):
        made = forward(**named)
        return type(made)(logits=30 * torch.tanh(made.logits / 30))

    model.get_base_model().forward = capped
    with pytest.raises(UserError, match="a LlamaForCausalLM changes its logits after the head: use loss_chunk=None"):
        token_loss_sum(model, batch, 16)
    model.get_base_model().forward = forward
    token_loss_sum(model, batch, 16)


# ----------------------------------------------------------------------------------------- updates in the backward pass


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_update_in_backward_is_the_same_training(make_tiny, optimizer, checkpointing):
    settings = {"optimizer": optimizer, "gradient_checkpointing": checkpointing}
    whole, after = run(make_tiny(), **settings)
    early, after_early = run(make_tiny(), update_in_backward=True, **settings)
    assert [r.loss for r in early] == [r.loss for r in whole]
    assert [r.gradient_norm for r in early] == pytest.approx([r.gradient_norm for r in whole], rel=1e-5)
    assert all(torch.equal(after_early[name], weight) for name, weight in after.items())


def test_gradients_do_not_live_at_once(make_tiny):
    model, alive = make_tiny(), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    run(model, update_in_backward=True)
    assert max(alive) == 1
    assert len(alive) == 4 * len(parameters)


def test_hooks_are_gone_after_training(make_tiny):
    model = make_tiny()
    run(model, update_in_backward=True)
    before = weights(model)
    token_loss_sum(model, collate([[sample] for sample in samples()], 0)).backward()
    assert all(torch.equal(weights(model)[name], weight) for name, weight in before.items())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_resume_with_updates_in_backward(make_tiny, tmp_path):
    settings = {"update_in_backward": True, "checkpoints": tmp_path, "checkpoint_every": 2}
    whole, _ = run(make_tiny(), update_in_backward=True)
    train(make_tiny(), Batches(samples(), 4), steps=4, progress=False, max_grad_norm=None, **settings)
    resumed, _ = run(make_tiny(), resume=True, **settings)
    assert [r.loss for r in resumed] == [r.loss for r in whole]


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        (Batches(samples(), 4, accumulation=2), {}, "needs accumulation=1"),
        (Batches(samples(), 4), {"max_grad_norm": 1.0}, "needs max_grad_norm=None"),
        (Batches(samples(), 4), {"loss_chunk": 0}, "loss_chunk=0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_in_backward(tiny, batches, settings, message):
    with pytest.raises(UserError, match=message):
        train(
            tiny,
            batches,
            steps=1,
            progress=False,
            **{"update_in_backward": True, "max_grad_norm": None, **settings},
        )


# ------------------------------------------------------------------------------------------------ embeddings on the CPU


def test_tied_embeddings_stay(tiny):
    with pytest.raises(UserError, match="output head too"):
        embeddings_to_cpu(tiny)


@dataclass(frozen=True)
class Placed:
    """A tensor that is said to lie on a device. Here is one device: moving from it to itself proves nothing."""

    values: torch.Tensor
    device: torch.device

    def to(self, device) -> "Placed":
        return Placed(self.values, torch.device(device))


class PlacedEmbedding(torch.nn.Module):
    """An embedding on a device of that kind. Like torch's, it wants its ids there and has its rows there."""

    def __init__(self, device):
        super().__init__()
        self.weight = Placed(torch.randn(97, 8, generator=torch.Generator().manual_seed(0)), torch.device(device))

    def to(self, device):
        self.weight = self.weight.to(device)
        return self

    def forward(self, ids: Placed) -> Placed:
        assert ids.device == self.weight.device, f"ids on {ids.device}, weight on {self.weight.device}"
        return Placed(self.weight.values[ids.values], self.weight.device)


def test_embeddings_can_be_moved_and_moved_back():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    embedding, ids = PlacedEmbedding(gpu), Placed(torch.arange(10), gpu)
    head = SimpleNamespace(weight=None)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head)
    expected = embedding(ids).values

    def check(place: torch.device, hooks: int):
        assert embedding.weight.device == place
        rows = embedding(ids)
        assert rows.device == gpu and torch.equal(rows.values, expected)
        assert len(embedding._forward_pre_hooks) == len(embedding._forward_hooks) == hooks

    embeddings_to_device(model)  # nothing to undo
    check(gpu, hooks=0)
    for _ in range(2):
        embeddings_to_cpu(model)
        check(cpu, hooks=1)
    embedding.to(gpu)  # the whole model was, say
    check(gpu, hooks=1)
    embeddings_to_cpu(model)
    check(cpu, hooks=1)
    for _ in range(2):
        embeddings_to_device(model)
        check(gpu, hooks=0)
    embeddings_to_cpu(model)
    check(cpu, hooks=1)


def test_moved_embeddings_compute_the_same():
    model = build_random(UNTIED, None, device="cpu", compute_dtype=torch.float32)
    ids = torch.arange(10)[None]
    before = model(ids).logits
    embeddings_to_cpu(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(copy.deepcopy(model)(ids).logits, before)
    embeddings_to_device(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("name", "tied", "moved"), [("lean", False, 1), ("lean", True, 0), ("standard", False, 0)])
def test_presets_move_embeddings_that_can_be_moved(name, tied, moved):
    model = build_random(replace(UNTIED, tie_word_embeddings=tied), "nf4", device="cpu", compute_dtype=torch.bfloat16)
    PRESETS[name].adapt(model, rank=2, alpha=4)
    assert len(model.get_input_embeddings()._forward_hooks) == moved


# ---------------------------------------------------------------------------------------------------------- the presets


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_presets_train_like_a_loop_without_any(name, tied):
    """On a tiny 4-bit model on the CPU; the optimizer is the unpaged one, since a CPU does not page."""
    shape = Shape(64, 192, 2, 4, 2, 97, tie_word_embeddings=tied)
    preset, losses = PRESETS[name], []
    for recipe in (None, preset):
        AcceleratorState._reset_state(True)
        base = build_random(shape, "nf4", device="cpu", compute_dtype=torch.bfloat16)
        if recipe:
            model, settings = recipe.adapt(base, rank=8, alpha=16), recipe.settings(torch.bfloat16)
            assert model.peft_config["default"].r == 8
            assert model.peft_config["default"].lora_alpha == 16
        else:
            model, settings = add_adapter(base, rank=8, alpha=16), {"compute_dtype": torch.bfloat16}
        settings["optimizer"] = "adamw_torch"
        records = train(model, Batches(samples(), 4), steps=12, learning_rate=2e-2, progress=False, **settings)
        losses.append([record.loss for record in records])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, preset.adapter_dtype)}
    assert losses[0][-1] < losses[0][0] - 0.3
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_presets_are_what_they_say():
    standard = {
        "optimizer": "paged_adamw_32bit",
        "compute_dtype": torch.float16,
        "gradient_checkpointing": True,
        "loss_chunk": None,
        "update_in_backward": False,
    }
    in_backward = {"update_in_backward": True, "max_grad_norm": None}
    expected = {
        "standard": standard,
        "in-backward": {**standard, **in_backward},
        "bf16-adapters": {**standard, "compute_dtype": torch.float32},  # as they are: nothing to cast
        "lean": {**standard, **in_backward, "compute_dtype": torch.float32, "loss_chunk": 128},
    }
    assert {name: preset.settings(torch.float16) for name, preset in PRESETS.items()} == expected
    assert PRESETS["standard"].settings()["compute_dtype"] == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_only_lean_moves_embeddings_and_only_those_that_are_no_head(monkeypatch, tied):
    moved = []
    monkeypatch.setattr(presets, "embeddings_to_cpu", moved.append)
    for name, preset in PRESETS.items():
        base = build_random(Shape(64, 192, 1, 4, 2, 97, tie_word_embeddings=tied), None, device="cpu")
        preset.adapt(base)
        assert [model is base for model in moved] == [True] * (name == "lean" and not tied)
