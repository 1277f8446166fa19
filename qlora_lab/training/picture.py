"""A sample token by token, in plain text: what the model reads, and what it learns.

For any console: no colour, and one sign beyond ASCII, the dot for a blank, which code pages have, too.
"""

from __future__ import annotations

import itertools
import textwrap

from qlora_lab.training.chat import IGNORED, TokenizedSample
from qlora_lab.training.templates import LEARN

BLANK = "·"
TOGETHER = 8  # so many tokens at most are tried as one character


def stretches(sample: TokenizedSample) -> list[tuple[bool, list[int]]]:
    """The sample's token ids, parted where learning begins or ends: whether they are learned, and the ids."""
    pairs = [(label != IGNORED, token) for token, label in zip(sample.ids, sample.labels, strict=True)]
    return [(learned, [token for _, token in run]) for learned, run in itertools.groupby(pairs, lambda pair: pair[0])]


def pieces(ids: list[int], tokenizer) -> list[str]:
    """The text of each token, with its blanks in sight. Tokens that only together make a character are one: `€(3)`."""
    found, held = [], []
    for at, token in enumerate(ids):
        held.append(token)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        if "\ufffd" in text and len(held) < TOGETHER and at + 1 < len(ids):
            continue
        if str(tokenizer.convert_ids_to_tokens(held[0])).startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops the blank at the beginning of what it decodes
        found.append(visible(text).replace(" ", BLANK) + (f"({len(held)})" if len(held) > 1 else ""))
        held = []
    return found


def visible(text: str) -> str:
    r"""The text in one line: \n and other characters that cannot be seen are written as Python does."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def picture(sample: TokenizedSample, tokenizer, width: int = 100, most: int = 400) -> str:
    """The sample token by token, a blank between tokens; what is read and what is learned begin a line each.

    Args:
        width: of a line, in characters.
        most: tokens of a stretch that are shown; of a longer one, beginning and end. So many stretches, at most, too.
    """
    lines = []
    for learned, ids in stretches(sample)[:most]:
        if len(ids) > most:
            begun, ended = pieces(ids[: most // 2], tokenizer), pieces(ids[-(most // 2) :], tokenizer)
            shown = [*begun, f"... {len(ids) - most // 2 * 2:,} more ...", *ended]
        else:
            shown = pieces(ids, tokenizer)
        lines += textwrap.wrap(
            " ".join(shown),
            width,
            initial_indent="  learned  " if learned else "  read     ",
            subsequent_indent=11 * " ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def in_short(sample: TokenizedSample, tokenizer, learn: str = "all", width: int = 100, most: int = 6) -> str:
    """A line on how much is learned, then a line for each stretch: its text, without its middle if it is long.

    Args:
        learn: one of LEARN, by which the sample was tokenized.
        width: characters of a text.
        most: stretches that are shown, the first and the last ones.
    """
    how = LEARN[learn] if sample.prompt_length or learn == "everything" else "all of a text"
    lines = []
    for learned, ids in stretches(sample):
        text = visible(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if len(text) > width:
            text = f"{text[: width // 2 - 2]} ... {text[3 - width // 2 :]}"
        lines.append(f"  {'learned' if learned else 'read':<8} {text}")
    if len(lines) > most:
        lines[most // 2 : -(most // 2)] = [f"  ... {len(lines) - most // 2 * 2} more ..."]
    head = f"a sample as it is trained on, {sample.target_count} of its {len(sample.ids)} tokens are learned"
    return "\n".join([f"{head} ({how}):", *lines])
