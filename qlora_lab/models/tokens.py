"""Does a tokenizer fit its model? Users add tokens to the one and forget the other."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_lab.errors import UserError


def prepare_tokenizer(tokenizer, model) -> None:
    """Give a tokenizer without a pad token its end token for one.

    Raises:
        UserError: it has no end token, or a pad token that the model has no embedding for.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"this tokenizer of {len(tokenizer):,} tokens names no end token, without which no answer would ever end: "
            "name one of them as eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows, padding = embedding_rows(model), tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    if padding >= rows:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, number {padding:,} of its "
            f"{len(tokenizer):,} tokens, and the model has embeddings for {rows:,}: take pad_token out of its "
            "tokenizer_config.json (the end token will pad), or save the model after resize_token_embeddings"
        )


def require_embeddings(model, tokenizer, ids: Iterable[int]) -> None:
    """Raise UserError unless the model has an embedding for each of these token ids."""
    rows = embedding_rows(model)
    unknown = max(ids, default=0)
    if unknown >= rows:
        raise UserError(
            f"the data has the token {tokenizer.convert_ids_to_tokens(unknown)!r}, number {unknown:,} of the "
            f"tokenizer's {len(tokenizer):,}, and the model has embeddings for {rows:,}: adapters train no "
            "embeddings, so use the tokenizer that the model was trained with (it reads the token as ordinary text), "
            "or train the rows of new tokens before"
        )


def embedding_rows(model) -> int:
    """How many tokens a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]
