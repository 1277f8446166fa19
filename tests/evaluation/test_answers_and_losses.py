import math

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.evaluation.losses import Loss
from qlora_lab.finetuning import TokenizedSample, exact_match, generate, is_exact, load_model, text_loss

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


class Parrot(torch.nn.Module):
    """Repeats the last word of each prompt, blanks around it, and writes down how it was asked."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.head, self.asked = tokenizer, torch.nn.Linear(1, 1), []

    def get_output_embeddings(self):
        return self.head

    def generate(self, input_ids, attention_mask, **settings):
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.asked.append((input_ids, attention_mask, settings, bf16, self.training))
        words = [self.tokenizer.decode(row, skip_special_tokens=True).split()[-1] for row in input_ids]
        answers = [self.tokenizer(f" {word} <|im_end|>", add_special_tokens=False)["input_ids"] for word in words]
        longest = max(map(len, answers))
        rows = [answer + [2] * (longest - len(answer)) for answer in answers]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


@pytest.mark.parametrize("templated", [True, False])
def test_answers_come_back_in_the_order_of_the_questions(starting_tokenizer, templated):
    if templated:  # begins each turn with the start token, the answer's, too
        starting_tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    else:
        starting_tokenizer.chat_template = None
    questions = ["a rather long question about nothing: seven", "one", "two words: two", "and five words at last: five"]
    chats, model = [[{"role": "user", "content": q}] for q in questions], Parrot(starting_tokenizer).train()
    answers = generate(model, starting_tokenizer, chats, max_new_tokens=11, batch_size=3, dtype=torch.bfloat16)
    assert answers == ["seven", "one", "two", "five"]
    assert [len(ids) for ids, *_ in model.asked] == [3, 1]
    for ids, mask, settings, bf16, training in model.asked:
        assert settings == {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 2, "eos_token_id": [2]}
        assert bf16 and not training
        starts = mask.argmax(dim=1).tolist()  # padded on the left
        begun = [row[start:].tolist().count(1) for row, start in zip(ids, starts, strict=True)]
        assert begun == [2 if templated else 1] * len(ids)  # and none added by the tokenizer
        assert all(row[:start].eq(2).all() and row[start] == 1 for row, start in zip(ids, starts, strict=True))
        assert mask[:, -1].all()
    lengths = [mask.sum().item() for _, masks, *_ in model.asked for mask in masks]
    assert lengths == sorted(lengths)  # the short ones together


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
        ("Paris", " Paris ", True),
        ("[2,  1]", "[2, 1]", False),  # only objects are compared as values
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


def test_an_answer_ends_where_the_template_ends_a_turn_whatever_the_config_says(tiny, tokenizer, monkeypatch):
    """The model would go on: its own config knows another end."""
    told, words = {}, [*tokenizer("Yes.")["input_ids"], 2, *tokenizer("and on")["input_ids"]]
    tiny.generation_config.eos_token_id = 77

    def answer(input_ids, **options):
        told.update(options)
        return torch.cat([input_ids, torch.tensor([words] * len(input_ids))], dim=1)

    monkeypatch.setattr(tiny, "generate", answer)
    assert generate(tiny, tokenizer, [[{"role": "user", "content": "Hello?"}]]) == ["Yes."]
    assert told["eos_token_id"] == [2]
