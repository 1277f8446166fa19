"""Rows that begin with the same tokens are computed as if each had its own beginning."""

import re

import pytest
import torch

from qlora_lab.finetuning import Batches, TokenizedSample, collate, train_steps
from qlora_lab.models import rows as module
from qlora_lab.models.rows import attend, attention_of_rows
from qlora_lab.models.trying import can_share_beginnings, tiny_copy, why_not_shared
from qlora_lab.training.batches import collate_sharing
from qlora_lab.training.loss import token_loss_sum

BEGINNING = (1, 9, 8, 7, 6)
SAMPLES = [TokenizedSample((*BEGINNING, *range(20 + n, 27 + 2 * n)), 8) for n in range(4)]


# ----------------------------------------------------------------------------------------------------------- attention


def one_row(q, k, v, window=None):
    """Causal attention of one row, (heads, tokens, width), written out in its dtype."""
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    unseen = (distance < 0) | (distance >= (window or q.shape[1]))
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(unseen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 4], ids=["all", "window"])
@pytest.mark.parametrize("beginning", [0, 5])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)], ids=str)
def test_each_row_attends_to_the_beginning_and_to_itself(beginning, window, dtype, error):
    """Outputs and gradients beside float64, row by row. Two heads of keys serve six of queries."""
    draw = torch.Generator().manual_seed(beginning)
    rows, own, width = 3, 4, 16
    whole = [torch.randn(1, heads, beginning + rows * own, width, generator=draw) for heads in (6, 2, 2)]
    parts = [x.to(dtype).requires_grad_() for x in whole]
    weights = torch.randn(6, beginning + rows * own, width, generator=draw)
    came, _ = attend(None, *parts, None, beginning=beginning, rows=rows, sliding_window=window)
    (came[0].transpose(0, 1) * weights).sum().backward()

    exact = [x.detach().double().requires_grad_() for x in parts]
    made = []
    for row in range(rows):
        places = [*range(beginning), *range(beginning + row * own, beginning + (row + 1) * own)]
        made.append(one_row(*(x[0, :, places] for x in exact), window))
    expected = torch.cat([made[0][:, :beginning], *(y[:, beginning:] for y in made)], dim=1)
    (expected * weights).sum().backward()
    pairs = [(came[0].transpose(0, 1), expected), *((a.grad, b.grad) for a, b in zip(parts, exact, strict=True))]
    assert all(((a.double() - b).norm() / b.norm()).item() < error for a, b in pairs)


def test_long_rows_keep_no_scores(monkeypatch):
    """They go to PyTorch's attention, in bf16 too; with the same result."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, 11, 16, generator=draw).bfloat16() for heads in (4, 2, 2)]
    short, _ = attend(None, *parts, None, beginning=5, rows=2)
    monkeypatch.setattr(module, "SHORT", 4)
    monkeypatch.setattr(torch, "bmm", None)
    long, _ = attend(None, *parts, None, beginning=5, rows=2)
    torch.testing.assert_close(long, short, rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------------- the batch


def test_a_batch_has_the_common_beginning_once():
    rows = [[TokenizedSample((1, 5, 6, 7, 8), 3)], [TokenizedSample((1, 5, 9), 2)]]
    batch = collate_sharing(rows, pad_token_id=0)
    # 5 is common, too, but the token behind it is learned in the second row
    assert (batch["beginning"], batch["rows"]) == (1, 2)
    assert batch["input_ids"].tolist() == [[1, 5, 6, 7, 8, 5, 9, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 8, -100, 9, -100, -100]]


@pytest.mark.parametrize("prompts", [(0, 0), (1, 4), (9, 9)])
def test_what_is_learned_is_in_no_beginning(prompts):
    """And each row has a token of its own, even if all its tokens are a beginning of another's."""
    samples = [TokenizedSample((1, 5, 6, 7), prompts[0]), TokenizedSample((1, 5, 6, 7, 8), prompts[1])]
    batch = collate_sharing([[sample] for sample in samples], pad_token_id=0)
    assert batch["beginning"] == {(0, 0): 0, (1, 4): 0, (9, 9): 3}[prompts]
    assert (batch["labels"] != -100).sum() == sum(sample.target_count for sample in samples)


@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_gradients_are_those_of_separate_rows(tiny, chunk):
    outcomes = []
    for sharing in (False, True):
        tiny.zero_grad()
        if sharing:
            batch = collate_sharing([[sample] for sample in SAMPLES], pad_token_id=0)
            assert batch["beginning"] == len(BEGINNING)
            with attention_of_rows(tiny):
                loss = token_loss_sum(tiny, batch, chunk)
        else:
            loss = token_loss_sum(tiny, collate([[sample] for sample in SAMPLES], pad_token_id=0), chunk)
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in tiny.parameters() if p.requires_grad)])
    for separate, shared in zip(*outcomes, strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- the step


def tokens_seen(model, batch_size=4, **batching) -> list[tuple[int, int]]:
    """The shapes of what a training step has its model read."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    (record,) = train_steps(model, Batches(SAMPLES, batch_size, **batching), steps=1)
    hook.remove()
    assert record.tokens == sum(len(sample.ids) for sample in SAMPLES)
    return seen


def test_a_step_on_a_cpu_computes_the_beginning_once(tiny):
    before = tiny.config._attn_implementation
    longest = max(len(sample.ids) for sample in SAMPLES)
    assert tokens_seen(tiny) == [(1, len(BEGINNING) + 4 * (longest - len(BEGINNING)))]
    assert tiny.config._attn_implementation == before == "sdpa"
    assert tokens_seen(tiny, batch_size=1, packing=True, max_length=64) == [(1, 54)]  # packed rows are read as they are


def test_with_dropout_each_row_has_a_beginning_of_its_own(make_tiny):
    model = make_tiny(dropout=0.1)
    assert not can_share_beginnings(model)
    assert tokens_seen(model)[0][0] == 4


def small_config(kind: str, **changes):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{**sizes, **heads, **changes})


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "mistral"])
def test_families_whose_rows_can_share(kind):
    changes = {"sliding_window": 4} if kind in ("gemma3_text", "mistral") else {}
    assert why_not_shared(tiny_copy(small_config(kind, **changes))) == ""


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"attention_dropout": 0.5}, "no dropout"),
        ("mamba", {"state_size": 4}, "does not let its attention be chosen|move each other's logits"),
        ("gemma2", {}, "capped scores"),
    ],
)
def test_what_cannot_share_is_found_out(kind, changes, reason):
    assert re.search(reason, why_not_shared(tiny_copy(small_config(kind, **changes))))
