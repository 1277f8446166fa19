import copy
import json
from itertools import islice

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.finetuning import Batches, TokenizedSample, collate, load_prose, load_samples, tokenize
from qlora_lab.training import data
from qlora_lab.training.chat import IGNORED, tokenize_chat, tokenize_text
from qlora_lab.training.data import has_split, read_chats


def sample(length: int, prompt: int = 2, first: int = 10) -> TokenizedSample:
    return TokenizedSample(tuple(range(first, first + length)), prompt)


# -------------------------------------------------------------------------------------------------------------- loading


def test_course_data_has_its_splits():
    sizes = {split: len(load_samples("orders", split)) for split in ("train", "validation", "test", "shifted")}
    assert sizes == {"train": 2000, "validation": 200, "test": 200, "shifted": 200}
    assert len(load_prose()) > 40


GOOD = '{"prompt": "a", "response": "b"}'
USER, ANSWER = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', r"line 3 is not valid JSON: .* at column 1[4-7]"),
        (f'{{"prompt": {5000 * "9"}}}', "line 3 is not JSON that can be read: .*4300 digits"),
        (100_000 * "[", "line 3 is not JSON that can be read: .*recursion"),
        ('["a"]', r"line 3 holds \[\"a\"\], not an object"),
        ("7", "line 3 holds 7, not an object"),
        ("{}", r"line 3 has no text in 'prompt' \(it has: nothing\)"),
        ('{"prompt": "a"}', r"line 3 has no text in 'response' \(it has: prompt\)"),
        ('{"prompt": 3, "response": "b"}', "line 3 has no text in 'prompt', but 3"),
        ('{"prompt": "a", "response": ["b"]}', r"line 3 has no text in 'response', but \[\"b\"\]"),
        (f'{{"prompt": "a", "response": {list(range(999))}}}', "line 3 has no text in 'response', but"),
        ('{"prompt": "a", "response": "b", "system": 5}', "line 3 has no text in 'system', but 5"),
        ('{"prompt": "a", "response": "b", "system": 0}', "line 3 has no text in 'system', but 0"),
        ('{"prompt": "a", "response": "b", "system": []}', r"line 3 has no text in 'system', but \[\]"),
        ('{"prompt": "a", "response": "b", "system": "  "}', "line 3 has no text in 'system', but"),
        (
            r'{"prompt": "React", "response": "Great \ud83d"}',
            r"line 3 has half a character in 'response', '\\ud83d' at position 7",
        ),
        (r'{"prompt": "\ude00", "response": "b"}', "line 3 has half a character in 'prompt'"),
        (r'{"prompt": "a", "response": "b", "system": "\ud83d!"}', "line 3 has half a character in 'system'"),
        ('{"messages": "hello"}', "line 3: messages must be a list"),
        ('{"messages": ["hello"]}', "line 3: messages must be a list"),
        (f'{{"messages": [{{"role": "user", "content": 5}}, {ANSWER}]}}', "message 1 has no text in 'content', but 5"),
        (f'{{"messages": [{{"role": 1, "content": "a"}}, {ANSWER}]}}', "message 1 has no text in 'role', but 1"),
        (f'{{"messages": [{{"content": "a"}}, {ANSWER}]}}', r"message 1 has no text in 'role' \(it has: content\)"),
        (
            r'{"messages": [{"role": "user", "content": "\ud83d"}, ' + ANSWER + "]}",
            "line 3, message 1 has half a character in 'content'",
        ),
    ],
)
def test_bad_lines(tmp_path, line, message):
    """The line is counted as an editor counts it, empty lines too."""
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"mine.jsonl, {message}" if message.startswith("line") else message) as error:
        load_samples(path)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="mine.jsonl is empty: it needs at least one line"):
        load_samples(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_not_utf8(tmp_path, mark):
    """Far into a file, where a decoder that reads by pieces has begun to count anew."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(mark + GOOD.encode() + b"\n" * 20_000 + b'{"prompt": "caf\xe9", "response": "b"}')
    with pytest.raises(UserError, match="mine.jsonl, line 20001 is not UTF-8 text: invalid continuation byte"):
        load_samples(path)


def test_files_of_other_editors(tmp_path):
    """With a byte order mark, Windows' ends of lines, and a character that only Python takes for one (U+2028)."""
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f'{GOOD}\r\n{GOOD[:-2]}\u2028\U0001f600 c"}}\r\n'.encode())
    assert [chat[-1]["content"] for chat in load_samples(path)["messages"]] == ["b", "b\u2028\U0001f600 c"]


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    """Said by hand: whoever runs tests as root may read everything."""

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.jsonl").write_text(GOOD)
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match="cannot read .*mine.jsonl: Permission denied"):
        load_samples(tmp_path / "mine.jsonl")


@pytest.mark.parametrize("source", ["ordes", "", "/nowhere/at/all", 300 * "x"])
def test_missing_data_names_what_there_is(source):
    with pytest.raises(UserError, match=r"no data at|has no train.jsonl") as error:
        load_samples(source)
    assert "one of: diary, orders" in str(error.value) or not source


def test_splits_of_a_folder(tmp_path, monkeypatch):
    """A folder of that name here comes before the course's data."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(GOOD.replace("a", split))
    (tmp_path / "validation.jsonl").mkdir()
    assert [has_split(tmp_path, split) for split in ("train", "test", "validation", "shifted")] == [1, 1, 0, 0]
    assert [has_split("orders", split) for split in ("train", "shifted", "nothing")] == [1, 1, 0]
    assert not has_split(tmp_path / "test.jsonl", "test")
    assert load_samples(tmp_path, "test")["messages"][0][0]["content"] == "test"
    assert load_samples(tmp_path)["messages"][0][0]["content"] == "train"
    assert len(load_samples(tmp_path / "test.jsonl", "train")) == 1  # a file has no splits
    with pytest.raises(UserError, match="has no validation.jsonl"):
        load_samples(tmp_path, "validation")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orders").mkdir()
    (tmp_path / "train.jsonl").rename("orders/train.jsonl")
    assert load_samples("orders")["messages"][0][0]["content"] == "train"
    assert not has_split("orders", "shifted")


def test_prompt_and_messages_say_the_same(tmp_path):
    path = tmp_path / "mine.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said = [{"role": "system", "content": "be brief"}, *chat]
    silent = [{"role": "system", "content": ""}, *chat]  # means something: a template's own system message stays away
    row = {"prompt": "a", "response": "b"}
    rows = [
        *[row, {"messages": chat}, {**row, "system": ""}, {**row, "system": None, "id": 7}],
        *[{**row, "system": "be brief"}, {"messages": said, "id": 7}, {"messages": silent}],
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(load_samples(path)["messages"]) == [chat] * 4 + [said] * 2 + [silent]
    assert read_chats(path) == list(load_samples(path)["messages"])


# ---------------------------------------------------------------------------------------------------------- tokenizing


def test_prompt_is_masked_and_the_end_is_learned(tokenizer):
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good bye."}]
    tokenized = tokenize_chat(chat, tokenizer)
    learned = [i for i in tokenized.labels if i != IGNORED]
    assert tokenizer.decode(learned) == "Good bye.<|im_end|>"
    assert learned[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id  # the case that goes wrong elsewhere
    masked = tokenizer.decode(tokenized.ids[: tokenized.prompt_length])
    assert masked.endswith("<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n")


def test_ids_are_those_of_the_whole_template(tokenizer):
    """Cutting between prompt and response must not change the tokens that the template as a whole gives."""
    for messages in load_samples("orders", "test")["messages"][:50]:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        tokenized = tokenize_chat(messages, tokenizer)
        assert list(tokenized.ids) == ids[: len(tokenized.ids)]
        assert tokenizer.decode(ids[len(tokenized.ids) :]) == "\n"


def test_model_without_chat_template(tokenizer):
    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    tokenized = tokenize_chat(chat, base)
    assert base.decode(tokenized.ids) == "One?\nTwo.<|im_end|>"


def test_the_start_token_comes_once_where_the_template_does_not_write_it(starting_tokenizer):
    """A tokenizer like LLaMA's begins every text that it is given with its start token, a response too."""
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    templated = starting_tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    assert starting_tokenizer.decode(tokenize_chat(chat, starting_tokenizer).ids) == templated
    assert starting_tokenizer.decode(tokenize_text("Bees.", starting_tokenizer).ids) == "Bees."
    starting_tokenizer.chat_template = None
    base = starting_tokenizer.decode(tokenize_chat(chat, starting_tokenizer).ids)
    assert base == "<|im_start|>One?\nTwo.<|im_end|>"


def test_the_templates_own_way_with_a_response_is_learned(tokenizer):
    """This one strips what is said; generation would never see the blanks either."""
    stripping = copy.deepcopy(tokenizer)
    stripping.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = [{"role": "user", "content": " One? "}, {"role": "assistant", "content": " Two. "}]
    tokenized = tokenize_chat(chat, stripping)
    learned = stripping.decode(tokenized.ids[tokenized.prompt_length :])
    assert (learned, stripping.decode(tokenized.ids)) == (
        "Two.<|im_end|>",
        "[user]One?<|im_end|>[assistant]Two.<|im_end|>",
    )


def test_an_end_token_within_an_answer_does_not_cut_it(tokenizer):
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two.<|im_end|>Three."}]
    tokenized = tokenize_chat(chat, tokenizer)
    assert tokenizer.decode(tokenized.ids[tokenized.prompt_length :]) == "Two.<|im_end|>Three.<|im_end|>"


def test_too_long_is_counted_and_never_cut(tokenizer):
    samples = load_samples("orders", "shifted").select(range(20))
    lengths = [len(tokenize_chat(m, tokenizer).ids) for m in samples["messages"]]
    limit = sorted(lengths)[-4]
    fitting, report = tokenize(samples, tokenizer, limit)
    too_long = sum(length > limit for length in lengths)
    assert report == (
        f"{too_long} of 20 samples are longer than {limit} tokens (the longest has {max(lengths)}) and are left out"
    )
    assert len(fitting) == 20 - too_long
    assert all(s.ids[-1] == tokenizer.eos_token_id for s in fitting)
    with pytest.raises(UserError, match="nothing is left, raise --max-length"):
        tokenize(samples, tokenizer, 5)


def test_plain_text_predicts_all_but_the_first_token(tokenizer):
    text = tokenize_text("Bees make honey.", tokenizer)
    assert sum(label != IGNORED for label in text.labels) == len(text.ids) - 1


# ------------------------------------------------------------------------------------------------------------- batching


def test_stream_is_seeded_and_can_be_joined_late():
    samples = [sample(n % 7 + 3, first=n) for n in range(50)]
    stream = list(islice(Batches(samples, 4, 2, seed=3), 30))
    assert list(islice(Batches(samples, 4, 2, seed=3), 20, 30)) == stream[20:]
    assert list(islice(Batches(samples, 4, 2, seed=4), 30)) != stream
    assert all(len(step) == 2 and all(len(rows) == 4 for rows in step) for step in stream)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(16, 1), (4, 4), (8, 1), (4, 2)])
def test_an_epoch_sees_every_sample_once(batch_size, accumulation):
    samples = [sample(n % 7 + 3, first=10 * n) for n in range(64)]
    batches = Batches(samples, batch_size, accumulation)
    stream = iter(batches)
    for _ in range(3):
        steps = list(islice(stream, batches.steps_per_epoch()))
        seen = [s for step in steps for rows in step for row in rows for s in row]
        assert sorted(seen, key=lambda s: s.ids) == samples


def test_odd_rows_are_carried_into_the_next_epoch():
    samples = [sample(4, first=10 * n) for n in range(10)]
    steps = islice(Batches(samples, 4), 5)  # two epochs: 5 x 4 = 2 x 10
    seen = [s for step in steps for rows in step for row in rows for s in row]
    assert sorted(seen, key=lambda s: s.ids) == sorted(samples * 2, key=lambda s: s.ids)


def test_similar_lengths_come_together():
    samples = [sample(3 + n % 40, first=n) for n in range(400)]

    def padding(batches) -> float:
        """Tokens in the tensors over tokens in the samples."""
        tensors = sum(collate(rows, 0)["input_ids"].numel() for rows in batches)
        return tensors / sum(len(s.ids) for rows in batches for row in rows for s in row)

    bucketed = [step[0] for step in islice(Batches(samples, 8), 50)]
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    as_they_come = [[[samples[i]] for i in shuffled[k : k + 8]] for k in range(0, 400, 8)]
    # a window of 128 in 16 batches: each spans 40 / 16 = 2.5 tokens of length, half of it padding, at a mean of 22.5
    assert padding(bucketed) < 1.08
    assert padding(as_they_come) > 1.4


def test_short_and_long_steps_come_in_any_order():
    """Sorted by length is only what stands together in a step; 16 of them come shuffled, and differently each time."""
    samples = [sample(3 + n, first=n) for n in range(64)]
    stream = iter(Batches(samples, 4))
    orders = []
    for _ in range(2):
        lengths = [len(step[0][0][0].ids) for step in islice(stream, 16)]
        assert sorted(lengths) == list(range(3, 67, 4))
        orders.append([sorted(lengths).index(length) for length in lengths])
    straight = list(range(16))
    assert straight not in orders and straight[::-1] not in orders
    assert orders[0] != orders[1]


def test_samples_meet_others_in_each_epoch():
    """All are as long, so that no sorting moves them."""
    samples = [sample(5, first=10 * n) for n in range(32)]
    steps = [frozenset(row[0].ids[0] // 10 for row in step[0]) for step in islice(Batches(samples, 4), 16)]
    as_they_come = {frozenset(range(n, n + 4)) for n in range(0, 32, 4)}
    assert not as_they_come & set(steps)
    assert set(steps[:8]) != set(steps[8:])


def test_fewer_samples_than_a_batch():
    (step,) = islice(Batches([sample(5)], batch_size=3, accumulation=2), 1)
    assert [len(rows) for rows in step] == [3, 3]


def test_no_samples():
    with pytest.raises(UserError, match="no samples"):
        Batches([])


def test_no_rows():
    with pytest.raises(UserError, match="no rows to make a batch of: give at least one"):
        collate([], pad_token_id=0)


def test_packed_rows_and_steps_are_counted():
    samples = [sample(8, first=n) for n in range(20)]  # two to a row of 20 tokens
    assert Batches(samples, 4, packing=True, max_length=20).steps_per_epoch() == 3  # 10 rows
    assert Batches(samples, 4, packing=True, max_length=16).steps_per_epoch() == 3  # and just full
    assert Batches(samples, 4, packing=True, max_length=15).steps_per_epoch() == 5
    assert Batches(samples, 4).steps_per_epoch() == 5
    assert Batches(samples, 2, accumulation=3).steps_per_epoch() == 4
    steps = list(islice(Batches(samples, 2, accumulation=2, packing=True, max_length=20, seed=1), 6))
    assert all([len(rows) for rows in step] == [2, 2] for step in steps)
    assert all(len(row) == 2 for step in steps for rows in step for row in rows)
    seen = [s for step in steps[:5] for rows in step for row in rows for s in row]
    assert sorted(seen, key=lambda s: s.ids) == sorted(samples * 2, key=lambda s: s.ids)
    assert seen[:20] != samples


@pytest.mark.parametrize(("batch_size", "accumulation"), [(0, 1), (1, 0), (-1, -1)])
def test_batches_of_nothing(batch_size, accumulation):
    with pytest.raises(UserError, match=f"batch_size={batch_size} and accumulation={accumulation}: both must be at"):
        Batches([sample(5)], batch_size, accumulation)


def test_rows_are_packed_full_but_not_over():
    samples = [sample(n % 9 + 2, first=n) for n in range(100)]
    rows = Batches(samples, packing=True, max_length=20)._pack(samples)
    lengths = [sum(len(s.ids) for s in row) for row in rows]
    assert max(lengths) <= 20
    assert sum(lengths) / (20 * len(rows)) > 0.7
    assert [s for row in rows for s in row] == samples


# ------------------------------------------------------------------------------------------------------------- packing


def test_packed_samples_do_not_see_one_another(tiny):
    """Each sample's logits in a packed row are those it has alone; and they would not be without the positions."""
    samples = [sample(9, first=3), sample(5, first=40), sample(12, first=60)]
    batch = collate([samples, [samples[1]]], pad_token_id=0)
    with torch.no_grad():
        packed = tiny(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        leaking = tiny(input_ids=batch["input_ids"], use_cache=False).logits[0]
        alone = [tiny(torch.tensor([s.ids]), use_cache=False).logits[0] for s in samples]
    torch.testing.assert_close(packed[: 9 + 5 + 12], torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (leaking[9:14] - alone[1]).abs().max() > 0.1


def test_changing_one_packed_sample_leaves_the_others_bitwise(tiny):
    a, b, c = sample(9, first=3), sample(9, first=40), sample(6, first=60)
    outputs = []
    for first in (a, c, b):
        batch = collate([[first, a]], pad_token_id=0)
        if len(first.ids) == 9:
            with torch.no_grad():
                outputs.append(
                    tiny(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, 9:]
                )
    assert torch.equal(outputs[0], outputs[1])


def test_padding_changes_nothing(tiny):
    short, long = sample(5, first=40), sample(12, first=60)
    batch = collate([[short], [long]], pad_token_id=0)
    with torch.no_grad():
        padded = tiny(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :5]
        alone = tiny(torch.tensor([short.ids]), use_cache=False).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_padding_of_a_batch():
    batch = collate([[sample(2, 1, first=10), sample(3, 1, first=20)], [sample(3, 2, first=30)]], pad_token_id=7)
    assert batch["input_ids"].tolist() == [[10, 11, 20, 21, 22], [30, 31, 32, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED, 11, IGNORED, 21, 22], [IGNORED, IGNORED, 32, IGNORED, IGNORED]]
    assert {values.dtype for values in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("ids", "prompt", "labels"),
    [
        ((5, 6, 7), 0, [IGNORED, 6, 7]),  # nothing stands before the first
        ((5, 6, 7), 3, [IGNORED] * 3),
        ((5,), 1, [IGNORED]),
        ((), 1, []),
    ],
)
def test_what_is_learned_is_counted(ids, prompt, labels):
    tokenized = TokenizedSample(ids, prompt)
    assert tokenized.labels == labels
    assert tokenized.target_count == sum(label != IGNORED for label in labels)
    assert collate([[tokenized, sample(3)]], 0)["labels"].tolist() == [[*labels, IGNORED, IGNORED, 12]]


def test_labels_of_a_packed_row():
    batch = collate([[sample(4, 2, first=10), sample(3, 1, first=20)]], pad_token_id=0)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 12, 13, IGNORED, 21, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_an_unknown_data_set_names_all_that_the_course_has(tmp_path, monkeypatch):
    for name in ("orders", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("")
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(UserError, match=r"one of: orders, recipes$"):
        load_samples("order")
