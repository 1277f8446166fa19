"""Before anything is downloaded: which of a model's weights would QLoRA quantize, and which not?

    preflight("owner/name")     reads the config alone: Preflight, with a table and a verdict
    python -m qlora_lab.models preflight NAME_OR_FOLDER

The model is built on torch's meta device: all its modules and shapes, no memory. Then the libraries themselves do to it
what they do to the real one: transformers' quantizer replaces linears by bitsandbytes' `Linear4bit`, PEFT puts LoRA
beside what "all-linear" finds. Nothing here repeats their rules, so it cannot fall behind them; only the *reasons* are
ours, inferred from what was left (transformers/quantizers/base.py and integrations/bitsandbytes.py have the rules).
"""

from __future__ import annotations

import collections
import copy
import itertools
import math
import os
import re
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.facts import four_bit_bytes
from qlora_lab.models.experts import FourBitExperts, four_bit_experts, replace_experts
from qlora_lab.models.loading import is_quantized_already, locate, quantized_by, why
from qlora_lab.models.quiet import quiet_transformers
from qlora_lab.models.skeletons import adapt_on_meta, build_on_meta, quantize_on_meta

QUANTIZED = "linear layer"  # the reasons that a weight is quantized begin with this word
EXPERTS = "fused experts: 3-D, no nn.Linear"
EXPERTS_IN_4_BITS = f"{QUANTIZED}s of fused experts"
BY_DESIGN = ("tied embedding", "embedding", "output head", "vector")  # QLoRA leaves them: reasons begin so


@dataclass(frozen=True)
class Weight:
    """One parameter of a model.

    Attributes:
        name: dotted.
        shape: (out, in) for a linear layer.
        quantized: whether it would be held in 4 bits.
        reason: why, or why not, in a few words.
        nbytes: bytes once loaded, quantization constants included.
    """

    name: str
    shape: tuple[int, ...]
    quantized: bool
    reason: str
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Preflight:
    """What 4-bit loading (NF4, blocks of 64, double quantization) and PEFT's "all-linear" would do to a model.

    Attributes:
        model: the name of its class.
        weights: all parameters, tied ones once.
        targets: dotted names of the modules that PEFT adapts, and of parameters where it adapts those (experts).
        peft_error: why PEFT found no target, else "".
        buffer_bytes: of tensors that are not parameters (rotary tables, masks).
        dense_bytes: of the same model in 16 bits.
        notes: what else is worth knowing, a sentence each.
    """

    model: str
    weights: tuple[Weight, ...]
    targets: tuple[str, ...]
    peft_error: str
    buffer_bytes: int
    dense_bytes: int
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors once loaded (an allocator rounds each of them up a little)."""
        return sum(weight.nbytes for weight in self.weights) + self.buffer_bytes

    @property
    def left(self) -> tuple[Weight, ...]:
        """Weights that are not quantized."""
        return tuple(weight for weight in self.weights if not weight.quantized)

    @property
    def share_of_parameters_left(self) -> float:
        return sum(weight.numel for weight in self.left) / self.parameters

    @property
    def share_of_bytes_left(self) -> float:
        """The share of all bytes that is not in 4-bit weights; buffers count."""
        return 1 - sum(weight.nbytes for weight in self.weights if weight.quantized) / self.nbytes

    @property
    def missed(self) -> tuple[Weight, ...]:
        """Weights that are not quantized although QLoRA quantizes their like: not embeddings, the head and vectors."""
        return tuple(weight for weight in self.left if not weight.reason.startswith(BY_DESIGN))

    @property
    def share_missed(self) -> float:
        """Of the parameters that QLoRA means to quantize."""
        missed = sum(weight.numel for weight in self.missed)
        return missed / max(1, missed + sum(weight.numel for weight in self.weights if weight.quantized))

    @property
    def verdict(self) -> str:
        """One sentence: "fits", "works, but", "hardly pays" or "cannot be adapted as it is", and why."""
        sizes = f"{_size(self.nbytes)} instead of {_size(self.dense_bytes)}"
        if not self.targets:
            return f"cannot be adapted as it is: PEFT's all-linear finds no target ({self.peft_error})"
        most = max(_by_reason(self.left).items(), key=lambda item: sum(w.nbytes for w in item[1]))[0].partition(":")[0]
        if self.share_of_parameters_left > 0.5:
            return (
                f"hardly pays: {self.share_of_parameters_left:.0%} of the parameters stay in 16 bits ({most}): {sizes}"
            )
        if self.share_of_bytes_left > 0.5:
            return f"works, but {self.share_of_bytes_left:.0%} of the bytes stay in 16 bits ({most}): {sizes}"
        return f"fits: {sizes}, {self.share_of_bytes_left:.0%} of it in 16 bits"

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.parameters:,} parameters",
            f"{'':<43}{'weights':>7}{'parameters':>15}{'MB':>9}{'bits':>6}",
        ]
        for reason, weights in sorted(_by_reason(self.weights).items(), key=lambda item: not item[1][0].quantized):
            lines.append(_row(("4 bits  " if weights[0].quantized else "left    ") + reason, weights))
        if self.buffer_bytes:
            lines.append(f"{'        buffers (rotary, masks)':<65}{self.buffer_bytes / 1e6:>9,.1f}")
        lines.append(f"{'sum':<43}{len(self.weights):>7}{self.parameters:>15,}{self.nbytes / 1e6:>9,.1f}")
        lines.append(f"PEFT's all-linear adapts {len(self.targets)}{_names(self.targets)}")
        return "\n".join([*lines, *self.notes, self.verdict])


def _by_reason(weights) -> dict[str, list[Weight]]:
    groups = collections.defaultdict(list)
    for weight in weights:
        groups[weight.reason].append(weight)
    return groups


def _row(label: str, weights: list[Weight]) -> str:
    numel, nbytes = sum(weight.numel for weight in weights), sum(weight.nbytes for weight in weights)
    return f"{label:<43}{len(weights):>7}{numel:>15,}{nbytes / 1e6:>9,.1f}{8 * nbytes / numel:>6.2f}"


def _names(targets: tuple[str, ...]) -> str:
    counts = collections.Counter(target.removesuffix(".weight").rpartition(".")[2] for target in targets)
    groups = collections.defaultdict(list)
    for name, count in counts.items():
        groups[count].append(name)
    return ": " + "; ".join(f"{count} × {', '.join(names)}" for count, names in groups.items()) if counts else ""


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


# ------------------------------------------------------------------------------------------------------------ the check


def preflight(config_or_name, dtype: torch.dtype = torch.bfloat16, experts: bool = False) -> Preflight:
    """Predict what QLoRA would do to a model, from its config alone.

    Args:
        config_or_name: a transformers config, the name of a bundled model, a folder with a config.json, or the id of a
            model on the hub (only its config is downloaded).
        dtype: of what is not quantized, as in `from_pretrained`.
        experts: hold the fused experts of a mixture in 4 bits as well, as our `load_model` does. transformers' own
            loading leaves them in 16.

    Returns:
        A Preflight, which prints as a table and a verdict.

    Raises:
        UserError: no such model or config, a config that transformers cannot build (unknown architecture, sizes that
            do not fit together), a checkpoint that is quantized already, or a model without any layer to quantize.
    """
    config = read_config(config_or_name)
    if method := quantized_by(config):
        raise UserError(f"this checkpoint {is_quantized_already(method)}")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # PEFT draws random numbers for its adapters
        model = build_on_meta(config, dtype)
        loaded = loaded_bytes(model, dtype)
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        dense_bytes = sum(loaded(name, tensor) for name, tensor in tensors)
        quantize_on_meta(model, dtype)
        if experts:
            replace_experts(model, dtype=dtype)
        weights = tuple(_weights(model, loaded))
        if not any(weight.quantized for weight in weights):
            raise UserError(_nothing_to_quantize(model, weights))
        scales = {id(scale) for module in four_bit_experts(model).values() for scale in module.buffers(recurse=False)}
        buffers = [(name, tensor) for name, tensor in model.named_buffers() if id(tensor) not in scales]
        buffer_bytes = sum(loaded(name, tensor) for name, tensor in buffers)
        targets, error = adapt_on_meta(model)
    notes = tuple(_notes(weights, targets))
    return Preflight(type(model).__name__, weights, targets, error, buffer_bytes, dense_bytes, notes)


def read_config(config_or_name):
    """The transformers config that `preflight`'s argument stands for; a config of the caller's is copied."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(config_or_name, PretrainedConfig):
        config = copy.deepcopy(config_or_name)
    elif isinstance(config_or_name, (str, os.PathLike)):
        source = locate(str(config_or_name))
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"cannot read the config of {str(config_or_name)!r}: {why(error)}") from error
    else:
        kind = type(config_or_name).__name__
        raise UserError(f"preflight takes a transformers config, a folder or a model's name, and this is a {kind}")
    return config


# -------------------------------------------------------------------------------------------------- weights and reasons


def loaded_bytes(model, dtype: torch.dtype):
    """Return a function (name, tensor) -> bytes of a tensor that is not quantized, once it is loaded.

    `from_pretrained` keeps some tensors in float32 whatever dtype it is given, and more of them with float16 than bf16.
    """
    patterns = [key.replace("*", ".*") for key in model._get_dtype_plan(dtype)]

    def loaded(name: str, tensor: torch.Tensor) -> int:
        in_fp32 = any(re.search(pattern, name) for pattern in patterns)
        return tensor.numel() * (4 if in_fp32 else tensor.element_size())

    return loaded


def _weights(model, loaded):
    """Yield a Weight for each parameter of a model whose linears have been replaced."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.pytorch_utils import Conv1D

    explain = _reasons(model)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        quantized = isinstance(module, Linear4bit) and last == "weight"
        if isinstance(module, FourBitExperts) and last in module.fused:
            quantized, reason, nbytes = True, EXPERTS_IN_4_BITS, module.bytes_of(last)
        elif quantized:
            conv1d = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
            reason = f"{QUANTIZED}{' (Conv1D, transposed)' if conv1d else ''}"
            nbytes = sum(four_bit_bytes(parameter.numel()))
        else:
            reason = explain(name, parameter, module)
            nbytes = loaded(name, parameter)
        yield Weight(name, tuple(parameter.shape), quantized, reason, nbytes)


def _reasons(model):
    """Return a function (name, parameter, module) -> why the parameter is not quantized."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*tied, *tied.values()} if isinstance(tied, dict) else set(tied)
    head = model.get_output_embeddings()
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def explain(name: str, parameter: torch.Tensor, module: nn.Module) -> str:
        if name in tied:
            return "tied embedding and head: one tensor"
        if isinstance(module, nn.Embedding):
            return "embedding: only looked up"
        if module is head:
            return "output head: kept for precision"
        if parameter.ndim < 2:
            return "vector: norm or bias"
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{type(module).__name__}: only nn.Linear itself is replaced"
        if _is_linear(module):
            listed = next((key for key in kept if key in name), None)
            return f"kept by its class: {listed}" if listed else "last module: taken for an output head"
        if isinstance(module, nn.modules.conv._ConvNd):
            return "convolution: no nn.Linear"
        if parameter.ndim == 3:
            return EXPERTS
        return f"bare {parameter.ndim}-D parameter: no nn.Linear"

    return explain


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _notes(weights: tuple[Weight, ...], targets: tuple[str, ...]):
    """Yield sentences about what works, but not as one might expect."""
    linear = [weight for weight in weights if weight.quantized and weight.reason != EXPERTS_IN_4_BITS]
    ragged = [weight.shape[1] for weight in linear if weight.shape[1] % 64]
    if ragged:
        widths = ", ".join(str(width) for width in sorted(set(ragged)))
        yield (
            f"Blocks of 64 run across the rows of {len(ragged)} weights (inputs: {widths}): quantized all the same, "
            "but a GPU generates with them by a slower path."
        )
    if misread := ", ".join(str(width) for width in sorted(set(ragged)) if width % 16 == 0):  # require_right_scales
        yield f"On a CPU with AVX512 bitsandbytes reads wrong scales there (inputs: {misread}): train it on a GPU."
    if any(weight.reason == EXPERTS and weight.name not in targets for weight in weights):
        yield "All-linear does not adapt the experts either: name them in PEFT's target_parameters."
    if packed := [weight.name for weight in weights if weight.reason == EXPERTS_IN_4_BITS]:
        names = " and ".join(sorted({name.rpartition(".")[2] for name in packed}))
        adapted = "adapts" if packed[0] in targets else "does not adapt"
        yield f"All-linear {adapted} the experts; with --targets it is your choice ({names} are theirs)."
        yield "That is this package's loading: transformers' own would leave the experts in 16 bits."
    heads = [w.name for w in weights if w.quantized and re.search(r"(^|\.)(classifier|score|qa_outputs)\.", w.name)]
    if heads:
        yield f"{heads[0]} is a new, random head, and it is quantized: keep it with llm_int8_skip_modules."


def _nothing_to_quantize(model, weights: tuple[Weight, ...]) -> str:
    total = sum(weight.numel for weight in weights)
    groups = {reason.partition(":")[0]: sum(w.numel for w in g) / total for reason, g in _by_reason(weights).items()}
    most = ", ".join(f"{share:.0%} {reason}" for reason, share in sorted(groups.items(), key=lambda i: -i[1])[:3])
    return f"bitsandbytes would quantize nothing in {type(model).__name__}: of its {total:,} parameters are {most}"
