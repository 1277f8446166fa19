"""A chat template in Ollama's language, which is Go's.

Templates are programs in Jinja. Here they are not translated but *measured*: what stands before and after each role's
words is read off a few formatted conversations. The result is tried on others; a template that does more
than put words between fixed texts is not imitated.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_lab.training.templates import prompt_text

S, U, A, V = "@system@", "@user@", "@assistant@", "@again@"


@dataclass(frozen=True)
class TurnTexts:
    """What a template writes around words.

    Attributes:
        start: once, before everything else: the start token's text or "".
        around: by role, the texts before and after. No "system" where the template refuses such turns.
        answer: what opens the answer.
        system: of the template's own, where a conversation has none; "".
    """

    start: str
    around: dict[str, tuple[str, str]]
    answer: str
    system: str

    def format(self, messages: list[dict[str, str]]) -> str:
        """As the Go template would."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = (self.around[message["role"]] for message in messages)
        texts = (f"{before}{m['content']}{after}" for (before, after), m in zip(turns, messages, strict=True))
        return self.start + "".join(texts) + self.answer

    def go(self, adds_start: bool) -> str:
        """The Go template; without the start token's text if Ollama, told so by the file, adds the token itself."""
        branches = []
        for role, (before, after) in self.around.items():
            branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
        loop = "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}"
        return ("" if adds_start else self.start) + loop + self.answer


def turn_texts(tokenizer) -> TurnTexts | None:
    """Read off a tokenizer's template what it writes around words; None if it does anything else."""
    for with_system in (True, False):
        try:
            texts = _measured(tokenizer, with_system)
            trials = [[_user(U)], [_user(U), _assistant(A), _user(V)], [_user('a "b" {c}'), _assistant(A), _user(U)]]
            trials += [[_system(S), *trial] for trial in trials if with_system]
            fixed = (texts.start, texts.answer, *(text for pair in texts.around.values() for text in pair))
            if any("{{" in text for text in fixed):  # Go would take it for a program, and there is no escaping it
                return None
            if all(texts.format(trial) == prompt_text(trial, tokenizer) for trial in trials):
                return texts
        except Exception:  # Jinja's own, those that templates raise (for a system turn, say), and _between's
            continue
    return None


def _measured(tokenizer, with_system: bool) -> TurnTexts:
    """The texts around the words of a few conversations. Raises what the template raises, or ValueError."""

    def closed(messages: list[dict[str, str]]) -> str:
        if tokenizer.chat_template:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        return prompt_text(messages, tokenizer)

    turns = [_user(U), _assistant(A), _user(V)]
    whole = closed([_system(S), *turns] if with_system else turns)
    answer = prompt_text([_system(S), *turns] if with_system else turns, tokenizer)[len(whole) :]
    bos = tokenizer.bos_token or ""
    start = bos if bos and whole.startswith(bos) and whole.count(bos) == 1 else ""
    *before, u_a, a_v, after_v = _between(whole.removeprefix(start), (S, U, A, V) if with_system else (U, A, V))
    after_a = closed(turns[:2]).partition(A)[2]
    user = (a_v[len(after_a) :], after_v)
    around = {"user": user, "assistant": (u_a[len(after_v) :], after_a)}
    if not with_system:
        return TurnTexts(start, around, answer, "")
    around = {"system": (before[0], before[1][: len(before[1]) - len(user[0])]), **around}
    alone = prompt_text([_user(U)], tokenizer).removeprefix(start).partition(U)[0]
    own = ""
    if alone != user[0]:
        opening, closing = around["system"]
        own = alone[len(opening) : len(alone) - len(closing + user[0])]
    return TurnTexts(start, around, answer, own)


def _system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _between(text: str, words: tuple[str, ...]) -> list[str]:
    """The texts before, between and after the words. Raises ValueError if one is not there once."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError(f"{word} is not there once")
        before, _, text = text.partition(word)
        parts.append(before)
    return [*parts, text]
