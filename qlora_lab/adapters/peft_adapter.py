"""PEFT's LoRA adapters on a model: what `train_qlora` trains. Ours (`lora.py`, `dora.py`) compute the same."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable

import torch

from qlora_lab.adapters.initialization import begin
from qlora_lab.adapters.quantized_linear import dense_weight, is_quantized
from qlora_lab.adapters.targets import find_targets
from qlora_lab.errors import UserError
from qlora_lab.models.experts import split_targets
from qlora_lab.models.parts import excluded_modules

KINDS = ("lora", "rslora", "dora")


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


def load_adapter(model, folder: str | os.PathLike):
    """`PeftModel.from_pretrained`, for a model that may have experts in 4 bits, which PEFT alone takes for dense ones.

    Returns:
        peft.PeftModel, to go on training or to answer

    Raises:
        UserError: the folder has no adapter for this model.
    """
    from peft import PeftConfig, PeftModel

    from qlora_lab.models.experts_lora import register

    try:
        config = PeftConfig.from_pretrained(str(folder))
        register(config)
        with _without_needless_warnings():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        sentence = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} has no adapter for this {type(model).__name__}: {sentence}") from error


@torch.no_grad()
def begin_with_loftq(adapted, weights: Callable[[str, torch.Size], torch.Tensor]) -> None:
    """Give the adapters of a 4-bit model the best correction of what quantization lost (LoftQ with one iteration).

    Args:
        adapted: what `add_adapter` returned, for a model that is quantized by bitsandbytes.
        weights: from a parameter's name in the model, and its shape there, to its values before quantization.

    Raises:
        UserError: a layer that is not quantized.
    """
    for name, layer in adapted.get_base_model().named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        if not is_quantized(layer.base_layer):
            raise UserError(f"{name} is not quantized: there is no error that LoftQ could correct")
        A, B, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        rounded = dense_weight(layer.base_layer).float()
        if layer.fan_in_fan_out:  # GPT-2 stores (in, out)
            weight = weights(f"{name}.weight", rounded.T.shape).T
        else:
            weight = weights(f"{name}.weight", rounded.shape)
        begin(A, B, scale, weight.to(A.device, torch.float32) - rounded)
        if layer.use_dora["default"]:  # the lengths that change nothing are others now
            lengths = torch.linalg.vector_norm(rounded + scale * (B.float() @ A.float()), dim=1)
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
