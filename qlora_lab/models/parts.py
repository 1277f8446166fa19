"""Which part of a model reads text. Needs torch alone, and asks attributes: nothing is imported for it."""

from __future__ import annotations

import re
from typing import Any

from torch import nn


def text_decoder(model: nn.Module) -> nn.Module | None:
    """The part of a causal language model that makes hidden states of tokens, for its head to read; None: not known.

    It is what transformers' `get_decoder` names, if that holds the input embeddings: the name may mean something else
    (ModernBERT's head is called `decoder`). Then it is the base model.
    """
    whole: Any = model
    get_decoder = getattr(whole, "get_decoder", None)
    if get_decoder is None:
        return None
    embeddings = whole.get_input_embeddings()
    for part in (get_decoder(), whole.base_model):
        if part is not None and part is not model and any(module is embeddings for module in part.modules()):
            return part
    return None


def beside_the_language(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the parts that text never reaches: a vision tower, an audio encoder, their projectors.

    They are what a model has beside its decoder; the output head, and what leads to it, is outside of the base model.
    An encoder and its decoder both read text. () for most models.
    """
    whole: Any = model  # a transformers model, if it has a decoder
    decoder = text_decoder(whole)
    if decoder is None or getattr(whole.config, "is_encoder_decoder", False):
        return ()
    base = whole.base_model
    if decoder is base:
        return ()
    heads = {whole.get_output_embeddings(), whole.get_input_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    outside, above = [], [base]
    while above:  # down to the decoder: whatever branches off on the way lies beside it
        children = list(above.pop().children())
        for child in children:
            inside = set(child.modules())
            if decoder in inside and child is not decoder:
                above.append(child)
            elif child is not decoder and not heads & inside and next(child.parameters(), None) is not None:
                outside.append(names[child])
    return tuple(outside)


def excluded_modules(model: nn.Module) -> str | None:
    """The same as a pattern: PEFT's `exclude_modules`."""
    beside = "|".join(re.escape(name) for name in beside_the_language(model))
    return rf"({beside})(\..*)?" if beside else None


def is_inside(name: str, parts: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the parts, or of something in one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)
