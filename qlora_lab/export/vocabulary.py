"""A tokenizer as llama.cpp wants it: every id's token and type, merges or scores, and which way text is split before.

llama.cpp has its own code for the splitting (the *pre-tokenizer*) and knows a list of them by name. A wrong name is a
file that answers a little worse and never says why. llama.cpp's converter goes by a hash of the ids of a test text,
which tells published vocabularies apart and fails for any other. We go by what decides: the splitting rules in
tokenizer.json; rules without a name in llama.cpp are refused.

The bundled model shows the difference. Its vocabulary is SmolLM2's, whose digits are split one by one ("smollm"). But
transformers, reading it from GGUF, left that rule out, and this is the tokenizer that we train with ("gpt-2"). The
hash is the same for both, 85505942..., for the test text has no number after two spaces: "a  3" is a, Ġ, Ġ, 3 with the
one and a, ĠĠ, 3 with the other. So the converter would write the wrong name here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qlora_lab.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of byte-level pre-tokenizers, by what tokenizer.json says: (rules, normalizer, ignore_merges)
PRE_TOKENIZERS = {
    (("bytes by GPT-2's rule",), None, False): "gpt-2",
    (("digits one by one", "bytes by GPT-2's rule"), None, False): "smollm",
    ((QWEN2, "bytes"), "NFC", False): "qwen2",
    ((QWEN2, "bytes"), None, False): "qwen2",
    ((QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), "bytes"), None, True): "llama-bpe",
    ((TEKKEN, "bytes"), None, True): "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: "gpt2" (BPE over bytes) or "llama" (BPE over characters, as SentencePiece has it).
        pre: name of the pre-tokenizer.
        tokens, types: by id.
        merges: "left right", in order; for "gpt2".
        scores: by id, the higher the earlier merged; for "llama".
        space_prefix: whether a text is put after a space; for "llama".
        start, end, end_of_turn, pad, unknown: ids or None. Generation stops at `end` and at `end_of_turn`.
        add_start: whether llama.cpp is to put the start token before a text. A chat template that writes it itself
            counts, since llama.cpp takes the template's away; one that does not was trained without.
        template: the chat template; where the tokenizer has none, one that writes each message on a line.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool
    start: int | None
    end: int
    end_of_turn: int | None
    pad: int | None
    unknown: int | None
    add_start: bool
    template: str


PLAIN_LINES = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"  # as `prompt_text` does


def read_vocabulary(tokenizer, rows: int) -> Vocabulary:
    """Translate a tokenizer of transformers.

    Args:
        rows: of the embeddings; where they are more than the tokens, the rest are unused tokens.

    Raises:
        UserError: a slow tokenizer, one that is not BPE, unknown splitting rules, no end token, more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json: only those of 🤗 tokenizers can be exported to GGUF")
    settings = json.loads(backend.to_str())
    model = settings["model"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer is a {model['type']} model: only BPE can be exported to GGUF")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token: the exported file would never stop")
    by_id = {id: token for token, id in model["vocab"].items()}
    in_bytes = not model.get("byte_fallback") or _splits_into_bytes(settings)
    by_id |= {added["id"]: _text_of(added, in_bytes) for added in settings["added_tokens"]}
    if (last := max(by_id)) >= rows:
        raise UserError(
            f"the tokenizer has {last + 1} tokens and the embeddings have {rows} rows: resize the embeddings, or take "
            "the tokenizer of this checkpoint"
        )
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        model="gpt2" if in_bytes else "llama",
        pre=byte_pre_tokenizer(settings) if in_bytes else "default",
        tokens=tokens,
        types=token_types(tokens, by_id, settings, in_bytes),
        merges=merges if in_bytes else [],
        scores=[] if in_bytes else _scores(tokens, merges),
        space_prefix=False if in_bytes else _has_space_prefix(settings),
        start=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        end_of_turn=end_of_turn(tokenizer),
        pad=tokenizer.pad_token_id,
        unknown=tokenizer.unk_token_id,
        add_start=_starts(tokenizer),
        template=tokenizer.chat_template or PLAIN_LINES,
    )


def _text_of(added: dict[str, Any], in_bytes: bool) -> str:
    """An added token's text as llama.cpp looks for it: in the text as it came, where spaces are not yet "▁"."""
    if in_bytes or added["special"] or not added["normalized"]:
        return added["content"]
    return added["content"].replace("▁", " ")  # Gemma's "▁▁", for two spaces


def _splits_into_bytes(settings: dict[str, Any]) -> bool:
    """Whether texts become bytes before any merge, so that a fallback for unknown characters is never needed.

    transformers 5.17 sets `byte_fallback` for a byte-level tokenizer that it reads from GGUF as well.
    """
    pre: dict[str, Any] = settings.get("pre_tokenizer") or {}
    return any(part["type"] == "ByteLevel" for part in pre.get("pretokenizers", [pre] if pre else []))


def _normalizers(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is done to a text before it is split, step by step; a sequence of none is nothing."""
    normalizer: dict[str, Any] = settings.get("normalizer") or {}
    return normalizer.get("normalizers", [normalizer] if normalizer else [])


def byte_pre_tokenizer(settings: dict[str, Any]) -> str:
    """llama.cpp's name for a tokenizer.json's splitting rules. Raises UserError for rules that it does not have."""
    pre: dict[str, Any] = settings.get("pre_tokenizer") or {"type": "none"}
    rules = tuple(_rule(part) for part in (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]))
    normalizer = " then ".join(step["type"] for step in _normalizers(settings)) or None
    known = PRE_TOKENIZERS.get((rules, normalizer, bool(settings["model"].get("ignore_merges"))))
    if known is None:
        raise UserError(
            f"the tokenizer splits texts by {' then '.join(rules)} (normalizer: {normalizer}), for which this export "
            "knows no name in llama.cpp: known are " + ", ".join(dict.fromkeys(PRE_TOKENIZERS.values()))
        )
    return known


def _rule(part: dict[str, Any]) -> str:
    """One splitting rule in a word, or as its regular expression."""
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes by GPT-2's rule" if part.get("use_regex", True) else "bytes"
    if part["type"] == "Digits" and part.get("individual_digits"):
        return "digits one by one"
    if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return part["pattern"].get("Regex", str(part["pattern"]))
    return json.dumps(part)


def token_types(tokens: list[str], by_id: dict[int, str], settings: dict[str, Any], in_bytes: bool) -> list[int]:
    types = [NORMAL if id in by_id else UNUSED for id in range(len(tokens))]
    if not in_bytes:
        for id, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[id] = BYTE
    for added in settings["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = settings["model"].get("unk_token")
    if not in_bytes and unknown in settings["model"]["vocab"]:
        types[settings["model"]["vocab"][unknown]] = UNKNOWN
    return types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """By id: minus the rank of the first merge that makes the token. Single characters need none."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _has_space_prefix(settings: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if a space stood before it. Raises UserError for rules unlike LLaMA's, Gemma's."""
    pre, steps = settings.get("pre_tokenizer") or {}, _normalizers(settings)
    prepends = any(step.get("type") == "Prepend" for step in steps) or (
        pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    )
    known = {"Prepend", "Replace"} >= {step["type"] for step in steps}
    if not known or pre.get("type") not in (None, "Metaspace", "Split"):
        raise UserError(
            "the tokenizer changes texts in a way that llama.cpp has no name for: "
            + json.dumps([settings.get("normalizer"), pre])[:200]
        )
    return prepends


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template writes after an answer, if it is another one than the end token."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    added = tokenizer.added_tokens_decoder
    special = [
        id for id in tokenizer(after, add_special_tokens=False)["input_ids"] if id in added and added[id].special
    ]
    return special[0] if special and special[0] != tokenizer.eos_token_id else None


def _starts(tokenizer) -> bool:
    """Whether what the model was trained on begins with the start token."""
    if tokenizer.bos_token_id is None:
        return False
    if not tokenizer.chat_template:
        return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "U"}], tokenize=False, add_generation_prompt=True)
    # ChatML's <|im_start|> is SmolLM2's start token and begins every turn: no token to add
    return turn.startswith(tokenizer.bos_token) and turn.count(tokenizer.bos_token) == 1


def add_vocabulary(writer, vocabulary: Vocabulary) -> None:
    """Write it to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for id, add in (
        (vocabulary.start, writer.add_bos_token_id),
        (vocabulary.end, writer.add_eos_token_id),
        (vocabulary.end_of_turn, writer.add_eot_token_id),
        (vocabulary.pad, writer.add_pad_token_id),
        (vocabulary.unknown, writer.add_unk_token_id),
    ):
        if id is not None:
            add(id)
    writer.add_add_bos_token(vocabulary.add_start)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.template)
