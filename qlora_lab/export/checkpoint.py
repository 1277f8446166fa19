"""`--as merged`: an ordinary checkpoint, which no library can tell from one that was never quantized."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import torch

from qlora_lab.export.merged_weights import MergedWeights

SHARD_BYTES = 2_000_000_000
SAFETENSORS_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
# What else belongs to a model, copied as it is
COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model", "chat_template*"),
)


def checkpoint_bytes(weights: MergedWeights, dtype: torch.dtype) -> int:
    """Bytes of the tensors, which are nearly all of the files."""
    return sum(math.prod(shape) for shape in weights.shapes.values()) * dtype.itemsize


def write_checkpoint(
    weights: MergedWeights, folder: pathlib.Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write weights, config, generation config, tokenizer and chat template, as `save_pretrained` names them.

    Each tensor is made, written and forgotten, so memory holds a few matrices and never a shard.

    Args:
        dtype: of all tensors.
        shard_bytes: the most that a file holds, unless a single tensor is larger.

    Returns:
        the names of the weight files
    """
    shards = _shards(weights.shapes, dtype.itemsize, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        _write_shard(weights, shard, folder / file, dtype)
    if len(shards) > 1:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": checkpoint_bytes(weights, dtype)}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_companions(weights.run.base, folder)
    config = json.loads((weights.run.base / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "auto_map")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return names


def _write_shard(weights: MergedWeights, names: list[str], file: pathlib.Path, dtype: torch.dtype) -> None:
    """Write a safetensors file tensor by tensor. (`safetensors.torch.save_file` wants all of them in memory.)

    The format: the header's length in 8 bytes, little-endian; the header in JSON, which says for each tensor its dtype,
    shape, and first and last byte; the tensors, one after another. Source: safetensors' README, "Format".
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        end = at + math.prod(weights.shapes[name]) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": weights.shapes[name], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            handle.write(weights[name].to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)


def copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy tokenizer, chat template and generation config."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, most: int) -> list[list[str]]:
    """Consecutive names, each list of them with `most` bytes at most or a single name."""
    shards: list[list[str]] = []
    held = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if not shards or held + nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    return shards
