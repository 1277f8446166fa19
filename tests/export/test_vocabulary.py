"""Tokenizers as llama.cpp reads them."""

import copy
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from qlora_lab.errors import UserError
from qlora_lab.export import vocabulary
from qlora_lab.export.__main__ import export
from qlora_lab.export.llama_cpp import LlamaCpp
from qlora_lab.export.trained_run import read_run
from qlora_lab.training.templates import prompt_text
from tests.export.conftest import WORDS, family_config, make_run, needs_llama_cpp

TEXTS = [
    "Two teas,  and 12345 cakes: don't!\n\n\tÆther — 日本語 🙂  ",
    "a  1  b   22\r\n I'LL x²½ 1,000.5%",
    " leading, trailing ",
    "the then there in inning tea",
]


def changed(tokenizer, **changes):
    """The tokenizer with other parts in its tokenizer.json, and no template."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in changes.items():
        if key in ("ignore_merges", "byte_fallback"):
            settings["model"][key] = value
        else:
            settings[key] = value
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    return made


def split(regex: str) -> dict:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
BYTE_LEVEL = [
    ("gpt-2", {}),
    ("gpt-2", {"byte_fallback": True, "normalizer": {"type": "Sequence", "normalizers": []}}),  # by transformers 5.17
    ("smollm", {"pre_tokenizer": DIGITS}),
    ("qwen2", {"pre_tokenizer": split(vocabulary.QWEN2), "normalizer": {"type": "NFC"}}),
    ("llama-bpe", {"pre_tokenizer": split(vocabulary.QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "ignore_merges": True}),
    ("tekken", {"pre_tokenizer": split(vocabulary.TEKKEN), "ignore_merges": True}),
]


def served(tokenizer, folder) -> LlamaCpp:
    run = make_run(folder, family_config("llama tied", vocab_size=WORDS), tokenizer)
    export(read_run(run), folder / "out", "gguf")
    (file,) = (folder / "out").glob("*.gguf")
    return LlamaCpp(file, context=128)


@needs_llama_cpp
@pytest.mark.parametrize(("name", "changes"), BYTE_LEVEL, ids=[name for name, _ in BYTE_LEVEL])
def test_llama_cpp_splits_as_the_tokenizer_does(name, changes, small_tokenizer, tmp_path):
    tokenizer = changed(small_tokenizer, **changes)
    assert vocabulary.read_vocabulary(tokenizer, WORDS).pre == name
    there = served(tokenizer, tmp_path)
    for text in TEXTS:
        assert there.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_the_bundled_tokenizer_has_no_rule_for_digits_and_is_called_so(tokenizer):
    """llama.cpp's converter would say "smollm", by a hash that is the same with and without the rule. It matters."""
    with_rule = changed(tokenizer, pre_tokenizer=DIGITS)
    ids = [t("a  3", add_special_tokens=False)["input_ids"] for t in (tokenizer, with_rule)]
    assert [len(found) for found in ids] == [4, 3]
    names = [vocabulary.read_vocabulary(t, len(tokenizer)).pre for t in (tokenizer, with_rule)]
    assert names == ["gpt-2", "smollm"]


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [True, False], ids=["as LLaMA 2", "as Gemma"])
def test_llama_cpp_reads_a_vocabulary_of_characters(prefix, tmp_path):
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=WORDS, special_tokens=special[:3], initial_alphabet=list("▁abcdefghinort"))
    backend.train_from_iterator(["the tea then in the inn there on earth", "he ate a hat"] * 5, trainer)
    settings = json.loads(backend.to_str())
    learned = [token for token in settings["model"]["vocab"] if token not in special]
    settings["model"]["vocab"] = {token: id for id, token in enumerate([*special, *learned])}
    settings["added_tokens"] = [{**added, "id": special.index(added["content"])} for added in settings["added_tokens"]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if not prefix:
        tokenizer.add_tokens(AddedToken("▁▁▁", normalized=True))  # Gemma has such tokens for runs of spaces
    read = vocabulary.read_vocabulary(tokenizer, WORDS)
    assert (read.model, read.space_prefix) == ("llama", prefix)
    assert read.types[:4] == [vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.BYTE]
    there = served(tokenizer, tmp_path)
    for text in ("the tea then in the inn", " he  ate", "zebra 日", "earth there on", "a   hat", "a    hat"):
        assert there.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": split(r"\w+")},
        {"pre_tokenizer": None},
        {"ignore_merges": True},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_unknown_rules_are_refused_by_name(changes, small_tokenizer):
    with pytest.raises(
        UserError, match="knows no name in llama.cpp: known are gpt-2, smollm, qwen2, llama-bpe, tekken"
    ):
        vocabulary.read_vocabulary(changed(small_tokenizer, **changes), WORDS)


def test_a_vocabulary_larger_than_the_embeddings_is_refused(small_tokenizer):
    with pytest.raises(UserError, match="has 320 tokens and the embeddings have 300 rows"):
        vocabulary.read_vocabulary(small_tokenizer, 300)


def test_a_tokenizer_without_an_end_token_is_refused(small_tokenizer):
    endless = copy.deepcopy(small_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        vocabulary.read_vocabulary(endless, WORDS)


def test_token_types(small_tokenizer):
    small = copy.deepcopy(small_tokenizer)
    small.add_tokens(["<tool>"])
    types = vocabulary.read_vocabulary(small, WORDS + 3).types
    assert types[:17] == [vocabulary.CONTROL] * 17 and set(types[17:WORDS]) == {vocabulary.NORMAL}
    assert types[WORDS:] == [vocabulary.USER_DEFINED, vocabulary.UNUSED, vocabulary.UNUSED]


@pytest.mark.parametrize(
    ("ending", "end", "turn"),
    [("<|im_end|>", "<|im_end|>", None), ("<file_sep>", "<|im_end|>", "<file_sep>"), ("", "<|im_end|>", None)],
)
def test_the_end_of_a_turn_is_what_the_template_writes(ending, end, turn, small_tokenizer):
    small = copy.deepcopy(small_tokenizer)
    small.chat_template = "{% for m in messages %}" + f"{{{{ m.content }}}}{ending}\n" + "{% endfor %}"
    read = vocabulary.read_vocabulary(small, WORDS)
    assert read.tokens[read.end] == end
    assert (None if read.end_of_turn is None else read.tokens[read.end_of_turn]) == turn


@needs_llama_cpp
def test_without_a_template_llama_cpp_gets_the_lines_that_training_had(small_tokenizer, tmp_path):
    tokenizer = changed(small_tokenizer)
    assert tokenizer.chat_template is None
    there = served(tokenizer, tmp_path)
    for chat in ([{"role": "user", "content": "two teas"}], [{"role": "system", "content": "s"}] * 2):
        assert there.prompt(chat) == prompt_text(chat, tokenizer)


@needs_llama_cpp
@pytest.mark.parametrize("writes", [True, False])
def test_llama_cpp_starts_as_training_did(writes, starting_tokenizer, small_tokenizer, tmp_path):
    """A tokenizer that begins texts with <s>, and a template that writes it or, as in training, leaves it out."""
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.backend_tokenizer.post_processor = starting_tokenizer.backend_tokenizer.post_processor
    start = "<|im_start|>" if writes else ""
    tokenizer.chat_template = start + "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    there = served(tokenizer, tmp_path)
    chat = [{"role": "user", "content": "two teas"}]
    trained_on = tokenizer(prompt_text(chat, tokenizer), add_special_tokens=False)["input_ids"]
    assert there.ids(there.prompt(chat), start=True) == trained_on
    assert there.chat(chat, 1).prompt_tokens == len(trained_on)
