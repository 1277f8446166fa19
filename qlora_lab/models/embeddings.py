"""Input embeddings in the computer's memory instead of the GPU's."""

from __future__ import annotations

from qlora_lab.errors import UserError


def embeddings_to_cpu(model) -> None:
    """Keep the input embeddings in the computer's memory: looking up a few rows of them needs no GPU.

    Their place on the device, `vocab_size x hidden_size` numbers, becomes free (0.26 GB at LLaMA-7B). Two hooks carry
    the ids there and the rows back. Called again, it changes nothing; `embeddings_to_device(model)` undoes it.

    Raises:
        UserError: the embeddings are tied to the output head, which the GPU does need.
    """
    embeddings = model.get_input_embeddings()
    if embeddings.weight is model.get_output_embeddings().weight:
        raise UserError("this model's embeddings are its output head too (tied): the GPU needs them")
    if not hasattr(embeddings, "way_back"):
        device = embeddings.weight.device
        there = embeddings.register_forward_pre_hook(lambda module, ids: ids[0].to(module.weight.device))
        back = embeddings.register_forward_hook(lambda module, ids, rows: rows.to(device))
        embeddings.way_back = device, there, back
    embeddings.to("cpu")


def embeddings_to_device(model) -> None:
    """Undo `embeddings_to_cpu`: the input embeddings go back to where they were, and the hooks away."""
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "way_back"):
        device, there, back = embeddings.way_back
        there.remove()
        back.remove()
        del embeddings.way_back
        embeddings.to(device)
