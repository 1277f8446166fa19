"""GGUF files, through the library `gguf`: a model with its adapter merged, or the adapter alone."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from qlora_lab.errors import UserError
from qlora_lab.export.architectures import (
    ARCHITECTURES,
    add_shape,
    as_theirs,
    name_map,
    require_supported,
    rope_factors,
    their_name,
)
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.vocabulary import Vocabulary, add_vocabulary

KINDS = ("f16", "bf16", "q8_0", "q4_0", "q4_1")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: llama.cpp's name for it, transformers', its shape, its type there, its bytes."""

    name: str
    source: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    nbytes: int


def plan(weights: MergedWeights, kind: str) -> list[Entry]:
    """The tensors of a model's file, with its sizes, before anything is written.

    Matrices get the type that is asked for; norms and biases stay float32. Embeddings (and the head) of a 4-bit file
    have 8 bits: rounding a head to 4 costs more than it saves, and llama.cpp's own files spare it, too. Rows that
    blocks of 32 do not divide are F16.

    Raises:
        UserError: a model that is not exported to GGUF.
    """
    require_supported(weights.config)
    names = name_map(weights.config)
    entries = []
    for source, shape in weights.shapes.items():
        vocabulary_sized = source.endswith(("embed_tokens.weight", "lm_head.weight"))
        wanted = "q8_0" if kind.startswith("q4") and vocabulary_sized else kind
        entries.append(_entry(their_name(weights.config, names, source), source, shape, wanted))
    if (factors := rope_factors(weights.config)) is not None:
        entries.append(_entry("rope_freqs.weight", "", tuple(factors.shape), "f32"))
    return entries


def _entry(name: str, source: str, shape: tuple[int, ...], wanted: str) -> Entry:
    import gguf

    kind = gguf.GGMLQuantizationType[wanted.upper() if len(shape) > 1 else "F32"]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return Entry(name, source, shape, kind, math.prod(shape) // block * nbytes)


def write_model(weights: MergedWeights, vocabulary: Vocabulary, file: pathlib.Path, kind: str, name: str) -> None:
    """Write a whole model, tensor by tensor.

    Args:
        kind: of `KINDS`: the type of the matrices.
        name: of the model, for people.

    Raises:
        UserError: a model that is not exported, or weights that F16 cannot hold.
    """
    import gguf

    entries = plan(weights, kind)
    writer = gguf.GGUFWriter(file, ARCHITECTURES[weights.config.model_type].lower())
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, weights.config)
    add_vocabulary(writer, vocabulary)
    _write(writer, entries, lambda entry: _tensor_of(weights, entry))


def _tensor_of(weights: MergedWeights, entry: Entry) -> torch.Tensor:
    if not entry.source:
        factors = rope_factors(weights.config)
        assert factors is not None  # or there were no such entry
        return factors
    return as_theirs(weights.config, entry.source, weights[entry.source])


def write_adapter(weights: MergedWeights, file: pathlib.Path, name: str) -> None:
    """Write the adapter alone, for `llama-server --lora` beside a base.

    Raises:
        UserError: as `plan` does, and for DoRA.
    """
    import gguf

    require_supported(weights.config)
    if weights.dora:
        raise UserError(
            "this adapter is DoRA's, and llama.cpp's adapters have no place for its magnitudes: export the merged "
            "model with --as gguf, or train with --adapter rslora"
        )
    names = name_map(weights.config)
    writer = gguf.GGUFWriter(file, ARCHITECTURES[weights.config.model_type].lower())
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    tensors = {}
    rank = 1
    for source, a, b in weights.matrices():
        theirs = their_name(weights.config, names, source)
        tensors[f"{theirs}.lora_a"] = a
        tensors[f"{theirs}.lora_b"] = as_theirs(weights.config, source, b)
        rank = len(a)
    writer.add_float32("adapter.lora.alpha", weights.alpha_over_rank * rank)  # llama.cpp divides it by the rank
    entries = [_entry(key, key, tuple(tensor.shape), "f32") for key, tensor in tensors.items()]
    _write(writer, entries, lambda entry: tensors[entry.source])


def _write(writer, entries: list[Entry], tensor_of) -> None:
    """Header, then the tensors one after another: no more than one of them is in memory."""
    import gguf

    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, numpy.dtype("float32"), entry.nbytes, raw_dtype=entry.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            values = tensor_of(entry).float().contiguous().numpy()
            if entry.type == gguf.GGMLQuantizationType.F16 and max(values.max(), -values.min()) > 65504:
                raise UserError(f"{entry.name} has values that F16 cannot hold: export with --weights bf16")
            writer.write_tensor_data(gguf.quants.quantize(values, entry.type))
    finally:
        writer.close()
