"""Input embeddings in the computer's memory instead of the GPU's."""

from __future__ import annotations

from qlora_lab.errors import UserError


def embeddings_to_cpu(model) -> None:
    """Keep the input embeddings in the computer's memory: looking up a few rows of them needs no GPU.

    This frees `vocab_size x hidden_size` numbers on the device (0.26 GB for LLaMA-7B). Two hooks move the ids to the
    CPU and the rows back. Calling it again changes nothing; `embeddings_to_device(model)` undoes it.

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
    """Undo `embeddings_to_cpu`: move the input embeddings back and remove the hooks. Without it, do nothing."""
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "way_back"):
        device, there, back = embeddings.way_back
        there.remove()
        back.remove()
        del embeddings.way_back
        embeddings.to(device)
