import math

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import TokenizedSample, exact_match, generate, is_exact, load_model, text_loss
from qlora_lab.finetuning.evaluate import Loss

SAMPLES = [TokenizedSample(tuple(range(3 + n, 8 + 3 * n)), 2) for n in range(1, 9)]


def naive(model, samples) -> tuple[float, int]:
    """Every token by itself, in float64."""
    total, tokens = 0.0, 0
    for s in samples:
        logits = model(torch.tensor([s.ids])).logits[0].double().log_softmax(-1)
        for i in range(s.prompt_length, len(s.ids)):
            total -= logits[i - 1, s.ids[i]].item()
            tokens += 1
    return total, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_token_weighted_and_independent_of_batching(tiny, batch_size):
    with torch.no_grad():
        total, tokens = naive(tiny, SAMPLES)
    loss = text_loss(tiny, SAMPLES, batch_size=batch_size)
    assert loss.tokens == tokens
    assert loss.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_nothing_to_judge(tiny, tokenizer):
    """A process's share may be empty; only all of them together need a token."""
    nothing = text_loss(tiny, [])
    assert nothing == Loss(0.0, 0)
    assert text_loss(tiny, [TokenizedSample((5,), 1), TokenizedSample((), 1)]) == nothing
    some = text_loss(tiny, SAMPLES)
    assert text_loss(tiny, [TokenizedSample((5,), 1), *SAMPLES]) == some
    assert (nothing + some).perplexity == some.perplexity
    with pytest.raises(UserError, match="no token to judge the model on: give at least one sample"):
        nothing.perplexity  # noqa: B018
    assert generate(tiny, tokenizer, []) == []


def test_judging_is_without_dropout_and_gradients(make_tiny):
    model = make_tiny(dropout=0.5).train()
    first = text_loss(model, SAMPLES)
    assert not model.training
    assert text_loss(model.train(), SAMPLES) == first
    model.requires_grad_(True)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.requires_grad))
    text_loss(model, SAMPLES)
    assert seen == [False]


def test_judging_computes_in_the_dtype_it_is_told(tiny):
    seen = []
    tiny.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
    losses = [text_loss(tiny, SAMPLES, dtype=dtype) for dtype in (None, torch.float32, torch.bfloat16)]
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert losses[2].total == pytest.approx(losses[0].total, rel=0.02)


def test_losses_add_up_token_by_token():
    pooled = Loss(10.0, 10) + Loss(90.0, 30)
    assert pooled.perplexity == pytest.approx(math.exp(100 / 40))


def test_a_batch_of_answers_is_what_each_prompt_gives_alone(bundled):
    """Left padding must not change greedy answers. Real model: a random one says the same to everything."""
    model, tokenizer = load_model(bundled, "nf4", device="cpu", compute_dtype=torch.float32)
    questions = ["What is the capital of France?", "Name a colour.", "Count from one to five, please, in English."]
    chats = [[{"role": "user", "content": q}] for q in questions]
    together = generate(model, tokenizer, chats, max_new_tokens=5, batch_size=3)
    alone = [generate(model, tokenizer, [chat], max_new_tokens=5)[0] for chat in chats]
    assert together == alone
    assert len(set(together)) == 3
    ids = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    for _ in range(5):  # the same once more, without generate and its cache
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert tokenizer.decode(ids[0, -5:], skip_special_tokens=True).strip() == alone[0]


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [
        ('{"a":1,"b":"x"}', '{"a":1,"b":"x"}', True),
        ('{ "b": "x",\n "a": 1 }', '{"a":1,"b":"x"}', True),
        ('{"a":"1","b":"x"}', '{"a":1,"b":"x"}', False),
        ('{"a":1,"b":"x","c":2}', '{"a":1,"b":"x"}', False),
        ('Here it is: {"a":1,"b":"x"}', '{"a":1,"b":"x"}', False),
        ('{"a":1,"b":', '{"a":1,"b":"x"}', False),
        (" Paris ", "Paris", True),
        ("paris", "Paris", False),
        ("42", "42", True),
    ],
)
def test_is_exact(answer, reference, exact):
    assert is_exact(answer, reference) is exact


def test_exact_match_is_a_share():
    assert exact_match(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75
    with pytest.raises(UserError, match="no references to compare with: give at least one answer"):
        exact_match([], [])
    with pytest.raises(ValueError, match="longer than argument 1"):
        exact_match(["a"], ["a", "b"])
