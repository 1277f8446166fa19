"""What chat templates make of chats, and which of it is learned. TRL's templates, marked by hand, are the oracle."""

import copy
import json
import pathlib
import re

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training.batches import collate
from qlora_lab.training.chat import IGNORED, TokenizedSample, tokenize, tokenize_chat
from qlora_lab.training.steps.fast.batch import flatten
from qlora_lab.training.templates import (
    end_ids,
    keep_template,
    prompt_text,
    reference_text,
    remarks,
    rendered,
    turn_end,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it in?"},
    {"role": "assistant", "content": "Yes, shelf  4."},
    {"role": "user", "content": "Reserve it"},
    {"role": "assistant", "content": "Done."},
]
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
STRICT = (  # as Gemma 2's
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}" + ASK
)
THINKING = (  # as Qwen 3's: an empty thought before the last answer
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
SPACED = (  # as Llama 2's: the answer's first token holds the blank before it
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' <|im_end|>' }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PARTS = (  # as those of models that see
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}{{ part['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}" + ASK
)


def with_template(tokenizer, template: str | None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def learned(sample: TokenizedSample, tokenizer) -> list[str]:
    """The stretches that are learned."""
    stretches, before = [], IGNORED
    for label in sample.labels:
        if label != IGNORED:
            stretches = stretches if before != IGNORED else [*stretches, []]
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in stretches]


ANSWERS = ["Yes, shelf  4.<|im_end|>", "Done.<|im_end|>"]


@pytest.mark.parametrize("template", ["own", STRICT, THINKING, TOOLS, PARTS, MARKED], ids=lambda text: text[:20])
def test_every_turn_of_the_assistant_is_learned(tokenizer, template):
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    assert learned(tokenize_chat(CHAT, tokenizer), tokenizer) == ANSWERS
    assert learned(tokenize_chat(CHAT, tokenizer, "last"), tokenizer) == ANSWERS[-1:]
    assert tokenize_chat(CHAT, tokenizer, "last").ids == tokenize_chat(CHAT, tokenizer).ids
    everything = tokenize_chat(CHAT, tokenizer, "everything")
    assert everything.ids == tokenize_chat(CHAT, tokenizer).ids
    assert everything.target_count == len(everything.ids) - 1
    weighted = [{**message, "weight": 0} if message["content"] == "Done." else message for message in CHAT]
    assert learned(tokenize_chat(weighted, tokenizer), tokenizer) == ANSWERS[:1]
    with pytest.raises(UserError, match="no turn of the assistant is to be learned"):
        tokenize_chat([{**message, "weight": 0} for message in CHAT], tokenizer)


@pytest.mark.parametrize("template", ["own", STRICT, THINKING, TOOLS, SPACED, PARTS, MARKED, None])
def test_an_answer_is_learned_after_the_tokens_that_it_will_be_asked_with(tokenizer, template):
    if template != "own":
        tokenizer = with_template(tokenizer, template)
    asked = tokenizer(prompt_text(CHAT[:-1], tokenizer), add_special_tokens=False)["input_ids"]
    sample = tokenize_chat(CHAT, tokenizer, "last")
    assert list(sample.ids[: sample.prompt_length]) == asked
    assert tokenizer.decode(sample.ids[sample.prompt_length :]).split() == ["Done.", "<|im_end|>"] or (
        tokenizer.decode(sample.ids[sample.prompt_length :]) == "Done.<|im_end|>"
    )


def test_a_blank_before_an_answer_is_part_of_it(tokenizer):
    tokenizer = with_template(tokenizer, SPACED)
    assert learned(tokenize_chat(CHAT[1:], tokenizer), tokenizer) == [" Yes, shelf  4. <|im_end|>", " Done. <|im_end|>"]


def test_a_system_message_without_a_place_is_put_before_the_question(tokenizer):
    silent = "{% for m in messages %}{% if m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK
    for template in (STRICT, silent):
        changed = with_template(tokenizer, template)
        assert "user\nBe brief.\n\nIs it in?<|im_end|>" in prompt_text(CHAT[:2], changed)
        assert rendered(CHAT, changed).text.count("Be brief.") == 1
        [remark] = remarks(changed, [CHAT])
        assert "no place for a system message: it is put before the first user's" in remark
        assert remarks(changed, [CHAT[1:]]) == []
        nothing = [{"role": "system", "content": ""}, *CHAT[1:]]
        assert rendered(nothing, changed).text == rendered(CHAT[1:], changed).text
    assert remarks(tokenizer, [CHAT]) == []


LATER = [*CHAT[1:3], {"role": "system", "content": "Be brief."}, *CHAT[3:]]
DROPS_LATER = (
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
REFUSES_LATER = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('only at the beginning') }}{% endif %}" + TURN + "{% endfor %}" + ASK
)


@pytest.mark.parametrize("template", [STRICT, DROPS_LATER, REFUSES_LATER])
def test_a_later_system_message_without_a_place_is_put_before_the_next_question(tokenizer, template):
    changed = with_template(tokenizer, template)
    text = rendered(LATER, changed).text
    assert f"user\nBe brief.\n\n{CHAT[3]['content']}<|im_end|>" in text and text.count("Be brief.") == 1
    [remark] = remarks(changed, [LATER])
    assert "no place for a later system message: it is put before the next user's" in remark
    assert remarks(changed, [CHAT[1:]]) == []
    assert remarks(tokenizer, [LATER]) == [] and "system\nBe brief.<|im_end|>" in rendered(LATER, tokenizer).text


def test_what_a_template_drops_in_silence_is_refused(tokenizer):
    """What a user says before the last question, a tool's result, a system message that no question follows."""
    last_question = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m.role != 'user' or m == asked[-1] %}" + TURN + "{% endif %}{% endfor %}" + ASK
    )
    with pytest.raises(UserError, match='drops what the user says in "Is it in'):
        rendered(CHAT, with_template(tokenizer, last_question))
    tool = [CHAT[1], {"role": "tool", "content": "shelf 4"}, CHAT[2]]
    known = "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}" + TURN
    known = with_template(tokenizer, known + "{% endif %}{% endfor %}" + ASK)
    with pytest.raises(UserError, match='drops what the tool says in "shelf 4": choose a model whose template'):
        rendered(tool, known)
    with pytest.raises(UserError, match='drops what the system says in "Be brief."'):
        rendered([*CHAT[1:4], LATER[2], CHAT[4]], with_template(tokenizer, DROPS_LATER))
    loud = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper if m.role == 'user' else m.content }}"
    loud = with_template(tokenizer, loud + "<|im_end|>\n{% endfor %}" + ASK)
    assert "IS IT IN?" in rendered(CHAT, loud).text  # rewritten, not dropped


def test_what_the_template_puts_before_an_answer_is_asked_with_and_not_learned(tokenizer):
    tokenizer = with_template(tokenizer, THINKING)
    sample = tokenize_chat(CHAT, tokenizer)
    thought = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert prompt_text(CHAT[:-1], tokenizer).endswith("Reserve it<|im_end|>\n" + thought)
    assert tokenizer.decode(sample.ids).endswith(thought + "Done.<|im_end|>")
    assert learned(sample, tokenizer) == ANSWERS
    [remark] = remarks(tokenizer, [CHAT])
    assert r"writes '<think>\n\n</think>\n\n' before an answer: neither learned nor judged" in remark


def test_an_answer_that_the_template_rewrites_is_found_by_its_prompt_or_refused(tokenizer):
    """Earlier thoughts are dropped, as reasoning models' templates do."""
    dropping = (
        "{% for m in messages %}{% set said = m.content.split('</think>')[-1] if not loop.last else m.content %}"
        "{{ '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{% endfor %}" + ASK
    )
    tokenizer = with_template(tokenizer, dropping)
    thoughtful = [CHAT[1], {"role": "assistant", "content": "<think>hm</think>Yes."}]
    assert learned(tokenize_chat(thoughtful, tokenizer), tokenizer) == ["<think>hm</think>Yes.<|im_end|>"]
    longer = [*thoughtful, *CHAT[3:]]
    with pytest.raises(UserError, match="cannot be told where message 2 begins .* --learn last"):
        tokenize_chat(longer, tokenizer)
    assert learned(tokenize_chat(longer, tokenizer, "last"), tokenizer) == ["Done.<|im_end|>"]
    fitting, report = tokenize({"messages": [longer, thoughtful]}, tokenizer, 256)
    assert len(fitting) == 1 and report.startswith("1 of 2 samples are left out: it cannot be told where message 2")
    with pytest.raises(UserError, match="1 of 1 samples are left out: it cannot be told .*: nothing is left$"):
        tokenize({"messages": [longer]}, tokenizer, 256)


def test_a_template_that_drops_answers_is_refused(tokenizer):
    mute = with_template(tokenizer, "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="does not write what the assistant says"):
        tokenize_chat(CHAT, mute)


def test_a_template_that_refuses_a_chat_says_why(tokenizer):
    strict = with_template(tokenizer, STRICT)
    with pytest.raises(UserError, match="the chat template refuses the chat: Roles must alternate"):
        tokenize_chat([CHAT[1], CHAT[1], CHAT[2]], strict)


# ---------------------------------------------------------------------------------------------------------------- tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
ASKED = {"role": "user", "content": "Weather in Oslo?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_tools_and_calls_are_learned_through_the_template(tokenizer):
    """With the arguments as an object, as most templates want them; or as text, if that is what it takes."""
    called = '<call>weather {"city": "Oslo"}</call>'
    for template in (TOOLS, TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments")):
        changed = with_template(tokenizer, template)
        chat = [{**ASKED, "tools": TOOL}, CALLED, {"role": "tool", "content": "4 degrees"}, CHAT[-1]]
        assert learned(tokenize_chat(chat, changed), changed) == [called + "<|im_end|>", "Done.<|im_end|>"]
        assert '"name": "weather", "parameters"' in rendered(chat, changed).text
        assert reference_text(chat[:2], changed) == called and reference_text(chat, changed) == "Done."
        assert "parameters" in prompt_text(chat[:1], changed)


def test_tools_that_a_template_drops_are_refused_by_name(tokenizer):
    with pytest.raises(UserError, match="the chat template drops the tools"):
        tokenize_chat([{**ASKED, "tools": TOOL}, CALLED], tokenizer)
    with pytest.raises(UserError, match="the chat template drops tool calls"):
        tokenize_chat([ASKED, CALLED], tokenizer)


def test_keys_that_only_other_messages_have_are_not_there(tokenizer):
    """A data set gives every message the keys of all, without values."""
    keyed = [{"tool_calls": None, "name": None, **message} for message in CHAT]
    assert tokenize_chat(keyed, with_template(tokenizer, TOOLS)) == tokenize_chat(CHAT, with_template(tokenizer, TOOLS))


# ----------------------------------------------------------------------------------------------------------- end tokens


def test_a_turn_ends_where_the_template_says_whatever_the_tokenizer_does(tokenizer):
    """The tokenizer's end is another token here: it is neither put after the turn nor learned, but ends answers too."""
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    assert other.eos_token_id != tokenizer.eos_token_id
    assert tokenize_chat(CHAT, other) == tokenize_chat(CHAT, tokenizer)
    assert end_ids(other) == [tokenizer.eos_token_id, other.eos_token_id] and end_ids(tokenizer) == [2]


def test_several_end_tokens_are_one_end(tokenizer):
    double = with_template(tokenizer, MARKED.replace("<|im_end|>", "<|im_end|><|endoftext|>"))
    assert turn_end(double) == "<|im_end|><|endoftext|>"
    assert learned(tokenize_chat(CHAT, double), double)[-1] == "Done.<|im_end|><|endoftext|>"


def test_a_template_without_an_end_gets_the_tokenizers_after_the_last_answer(tokenizer):
    endless = with_template(tokenizer, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert learned(tokenize_chat(CHAT, endless), endless) == ["Yes, shelf  4.", "Done.<|im_end|>"]
    assert "ends no turn: <|im_end|> is added after the last answer" in remarks(endless, [CHAT])[-1]
    endless.eos_token = None
    with pytest.raises(UserError, match="no token ends a turn"):
        tokenize_chat(CHAT, endless)


def test_a_model_without_template_gets_one_that_is_kept(tokenizer, starting_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    for base, begins in (
        (with_template(tokenizer, None), ""),
        (with_template(starting_tokenizer, None), "<|im_start|>"),
    ):
        text = f"{begins}Be brief.\nIs it in?\nYes, shelf  4.<|im_end|>\nReserve it\nDone.<|im_end|>"
        sample = tokenize_chat(CHAT, base)
        assert base.decode(sample.ids) == text and learned(sample, base) == ANSWERS
        assert "has no chat template: it gets a plain one" in remarks(base, [CHAT])[0]
        keep_template(base).save_pretrained(tmp_path)
        kept = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenize_chat(CHAT, kept) == sample
        assert kept.apply_chat_template(CHAT, tokenize=False) == text + "\n"
    assert keep_template(tokenizer) is None and base.chat_template is None


def test_plain_text_is_learned_as_a_whole(tokenizer):
    sample = tokenize_chat([{"role": "text", "content": "Once upon a time"}], tokenizer)
    assert tokenizer.decode(sample.ids) == "Once upon a time<|im_end|>"
    assert sample.target_count == len(sample.ids) - 1


# -------------------------------------------------------------------------------------------------------------- oracles


def test_batches_of_all_kinds_learn_the_same_tokens(tokenizer):
    samples = [tokenize_chat(CHAT, tokenizer), tokenize_chat(CHAT[:3], tokenizer), TokenizedSample((5, 6, 7), 0)]
    batch = collate([samples], 0)
    assert sum(sample.target_count for sample in samples) == (batch["labels"] != IGNORED).sum()
    ids, _, _, rows, targets = flatten(samples, 0).parts()
    labels = batch["labels"][0]
    learnt = (labels != IGNORED).nonzero().flatten()
    real = targets != IGNORED
    assert (rows[real] + 1).tolist() == learnt.tolist() and targets[real].tolist() == labels[learnt].tolist()
    assert ids[: labels.numel()].tolist() == batch["input_ids"][0].tolist()


def trl_templates():
    trl = pytest.importorskip("trl")
    folder = pathlib.Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text() for path in folder.glob("*.jinja")}


PAIRS = "cohere cohere2 deepseekv3 gemma gemma3 gptoss lfm2 llama3 phi3 qwen2_5 qwen3 qwen3_5_think qwen3_instruct_2507"


@pytest.mark.parametrize("name", PAIRS.split())
def test_answers_are_those_that_trl_marks_by_hand(tokenizer, name):
    """TRL has popular models' templates twice: as they are, and with `{% generation %}` around what is to be learned.

    We find the same words in both, and they are the words. (gpt-oss ends only the last turn with the token that ends a
    turn; there the marks say more.)
    """
    templates = trl_templates()
    if name not in templates or f"{name}_training" not in templates:
        pytest.skip(f"this TRL has no template {name}")
    found = []
    for template in (templates[name], templates[f"{name}_training"]):
        changed = with_template(tokenizer, template)
        special = re.findall(r"<\|\w+\|>|<\w+_of_turn>|<｜[^>]*｜>", template)
        changed.add_special_tokens({"additional_special_tokens": sorted(set(special))})
        found.append(learned(tokenize_chat(CHAT, changed), changed))
    plain, marked = found
    assert [answer.partition("<")[0] for answer in plain] == ["Yes, shelf  4.", "Done."]
    assert plain[-1] == marked[-1] and re.fullmatch(r"Done\.(<[^<>]+>)+", plain[-1])
    assert plain == marked or name == "gptoss"
