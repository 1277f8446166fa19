"""PEFT's LoRA adapters on a model: what `train_qlora` trains. Ours (`lora.py`, `dora.py`) compute the same."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from qlora_lab.adapters.files import base_fingerprint, read_initial, require_base
from qlora_lab.adapters.initialization import begin, without
from qlora_lab.adapters.quantized_linear import dense_weight, frozen_weight, is_quantized, replace_weight
from qlora_lab.adapters.targets import find_targets
from qlora_lab.errors import UserError
from qlora_lab.models.experts import split_targets
from qlora_lab.models.parts import excluded_modules

KINDS = ("lora", "rslora", "dora")
Weights = Callable[[str, torch.Size], torch.Tensor]  # a parameter's name and shape -> its values before quantization


def add_adapter(
    model,
    rank: int = 16,
    alpha: float = 32,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kind: str = "lora",
):
    """Freeze the model and put PEFT's LoRA adapters beside its linear layers.

    There is no `prepare_model_for_kbit_training` here on purpose: it casts every remaining 16-bit weight to fp32
    (+0.5 GB at LLaMA-7B) and prepares the inputs for reentrant checkpointing, and our loop needs neither.

    Args:
        rank: r, the inner dimension of the adapters.
        alpha: the adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA.
        targets: "all-linear" (all but the output head) or names of modules: ["q_proj", "v_proj"]. Of a model that also
            sees or hears, only the part that reads text: no gradient would reach the others. Of a mixture, names of
            fused parameters too: ["q_proj", "gate_up_proj", "down_proj"]; whether "all-linear" has them is PEFT's
            choice, architecture by architecture, and `preflight` says it.
        dropout: share of an adapter's input that is set to zero while training. It draws from torch's own generators,
            which the seed leaves alone: `torch.manual_seed` makes a run with dropout repeatable.
        seed: for the random A; B starts at zero, so the outputs do not change.
        dtype: of the adapters, and so of their gradients: fp32, or bf16 for half the memory.
        kind: one of KINDS.

    Returns:
        peft.PeftModel

    Raises:
        UserError: a target that the model does not have (near matches are named), one that PEFT does not adapt, or an
            unknown kind.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from qlora_lab.models.experts_lora import register

    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}: choose from {', '.join(KINDS)}")
    of_experts = []
    if targets != "all-linear":
        targets, of_experts = split_targets(model, [targets] if isinstance(targets, str) else list(targets))
        if targets or not of_experts:
            find_targets(model, targets, language_only=True)  # raises
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT says int, and takes any number
        target_modules=targets,
        target_parameters=of_experts or None,
        exclude_modules=excluded_modules(model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        lora_dropout=dropout,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    register(config)
    with _seeded(seed, model), _without_needless_warnings():
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # creating them in fp32 and converting would need fp32's memory
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
        except ValueError as error:  # no target at all, or layers that PEFT has no adapter for
            sentence = str(error).strip().partition("\n")[0]
            raise UserError(f"PEFT cannot adapt this {type(model).__name__}: {sentence}") from error
        finally:
            torch.set_default_dtype(default)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # beside dense weights, PEFT has chosen theirs
    return adapted


def load_adapter(model, folder: str | os.PathLike, weights: Weights | None = None):
    """`PeftModel.from_pretrained`, for a model that may have experts in 4 bits, which PEFT alone takes for dense ones.

    Args:
        model: the adapter's base; its layers are changed if the adapter is PiSSA's, see `begin_with_pissa`.
        weights: the checkpoint's, for an adapter of PiSSA beside a 4-bit base: `CheckpointWeights(folder)`.

    Returns:
        peft.PeftModel, to go on training or to answer

    Raises:
        UserError: the folder has no adapter for this model; or an adapter of PiSSA, and weights are missing or are not
            those that it began as a part of.
    """
    from peft import PeftConfig, PeftModel

    from qlora_lab.models.experts_lora import register

    initial = read_initial(folder)
    if initial and weights is None:
        raise UserError(f"{folder} has an adapter of PiSSA: give load_adapter the checkpoint's weights, too")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if initial:
            config.init_lora_weights = True  # PEFT would decompose the rounded weights
        register(config)
        with _without_needless_warnings():
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        sentence = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} has no adapter for this {type(model).__name__}: {sentence}") from error
    if initial and weights:
        require_base(folder, base_fingerprint(adapted))
        leave_out(adapted, weights, initial)
    return adapted


@torch.no_grad()
def begin_with_loftq(adapted, weights: Weights) -> None:
    """Give the adapters of a 4-bit model the best correction of what quantization lost (LoftQ with one iteration).

    Args:
        adapted: what `add_adapter` returned, for a model that is quantized by bitsandbytes.
        weights: from a parameter's name in the model, and its shape there, to its values before quantization.

    Raises:
        UserError: a layer that is not quantized.
    """
    for name, layer in _adapted_layers(adapted):
        if not is_quantized(layer.base_layer):
            raise UserError(f"{name} is not quantized: there is no error that LoftQ could correct")
        A, B, scale = _matrices(layer)
        rounded = dense_weight(layer.base_layer).float()
        begin(A, B, scale, _original(name, layer, weights).to(A.device, torch.float32) - rounded)
        _keep_lengths(layer)


@torch.no_grad()
def begin_with_pissa(adapted, weights: Weights) -> dict[str, torch.Tensor]:
    """Let the adapters begin as the most important part of the weights, and leave only the rest to the base (PiSSA).

    The rest is quantized, if the base is: Q(W - scale * B A), and not Q(W) - scale * B A. So the base is another one
    than the checkpoint's, and whoever loads the adapter must make it again: see `leave_out`.

    Args:
        adapted: what `add_adapter` returned, for a dense model or one that is quantized by bitsandbytes.
        weights: as for `begin_with_loftq`; they are asked for quantized layers only.

    Returns:
        what the adapters began as, on the CPU: A and B of each layer by "<layer>.lora_A" and "<layer>.lora_B"

    Raises:
        UserError: an adapter of fused experts.
    """
    initial = {}
    for name, layer in _adapted_layers(adapted):
        if hasattr(layer, "parameter_name"):
            raise UserError(f"{name} has adapters beside fused experts, and PiSSA does not know these: name --targets")
        A, B, scale = _matrices(layer)
        begin(A, B, scale, _original(name, layer, weights).to(A.device))
        initial |= {f"{name}.lora_A": A.to("cpu", copy=True), f"{name}.lora_B": B.to("cpu", copy=True)}
    leave_out(adapted, weights, initial)
    for _, layer in _adapted_layers(adapted):
        _keep_lengths(layer)
    return initial


@torch.no_grad()
def leave_out(adapted, weights: Weights, initial: Mapping[str, torch.Tensor]) -> None:
    """Take from the base of each adapter what the adapter began as. The adapters stay as they are.

    The product is computed on the CPU, so that the rest has the same bits wherever it is made.

    Args:
        adapted, weights: as for `begin_with_pissa`.
        initial: what it returned.
    """
    for name, layer in _adapted_layers(adapted):
        A, B = initial[f"{name}.lora_A"], initial[f"{name}.lora_B"]
        weight = _original(name, layer, weights).to("cpu", frozen_weight(layer.base_layer).dtype)  # as it was loaded
        replace_weight(layer.base_layer, without(weight, A, B, layer.scaling["default"]))


def _adapted_layers(adapted) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with their names in the base model."""
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "base_layer"):
            yield name, layer


def _matrices(layer) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and what their product is scaled by."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def _original(name: str, layer, weights: Weights) -> torch.Tensor:
    """A layer's weight before quantization, Tensor[out, in]."""
    frozen = frozen_weight(layer.base_layer)
    if isinstance(frozen, torch.Tensor):
        return frozen.detach()
    out_features, in_features = frozen.shape
    if layer.fan_in_fan_out:  # GPT-2 stores (in, out)
        return weights(f"{name}.weight", torch.Size((in_features, out_features))).T
    return weights(f"{name}.weight", frozen.shape)


def _keep_lengths(layer) -> None:
    """Let DoRA's magnitudes, if the layer has them, begin as the lengths that change nothing now."""
    if layer.use_dora["default"]:
        A, B, scale = _matrices(layer)
        frozen = frozen_weight(layer.base_layer)
        weight = frozen if isinstance(frozen, torch.Tensor) else frozen.dequantize()
        lengths = torch.linalg.vector_norm(weight.float() + scale * (B.float() @ A.float()), dim=1)
        layer.lora_magnitude_vector["default"].weight.copy_(lengths)


@contextlib.contextmanager
def _without_needless_warnings():
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for `is_gradient_checkpointing`, which is renamed
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        # ... and warns of a pattern that it makes itself for fused experts
        warnings.filterwarnings(
            "ignore", message=".*(rank|alpha)_pattern keys did not match.*", category=RuntimeWarning
        )
        yield


@contextlib.contextmanager
def _seeded(seed: int, model):
    """Seed the generators of the CPU and the model's GPUs; on leaving, they go on where they were."""
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed all GPUs, for good
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def trainable_parameters(model) -> int:
    """The number of trainable parameters. (Packed 4-bit weights, whose `numel()` is halved, are frozen.)"""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
