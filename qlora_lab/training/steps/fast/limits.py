"""Checks for what the fast step cannot train and where it cannot run, made before anything is changed."""

from __future__ import annotations

import torch

from qlora_lab.errors import UserError
from qlora_lab.training.optimizers import without_accelerate


class NoFastStep(UserError):
    """The fast step cannot train this model here. The message says why, and another step takes over."""


def require_machine(device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise NoFastStep, with the reason, unless there are a GPU that is new enough, Triton, and bfloat16 or float16."""
    if device.type != "cuda":
        raise NoFastStep("it needs a GPU")
    try:
        kernels()
    except ImportError as error:
        raise NoFastStep(f"it needs Triton ({error})") from error
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        raise NoFastStep(f"it needs compute capability 7.5, a T4's, and this GPU has {capability[0]}.{capability[1]}")
    if compute_dtype not in (torch.bfloat16, torch.float16):
        raise NoFastStep(f"it computes in bfloat16 or float16, and compute_dtype is {compute_dtype}")
    if compute_dtype == torch.bfloat16 and capability < (8, 0):
        raise NoFastStep("this GPU does not compute in bfloat16: it wants compute_dtype=torch.float16")


def require_supported(causal_lm, optimizer) -> None:
    """Raise NoFastStep, with the reason, unless the fast step supports this model's sizes, devices and optimizer."""
    config = causal_lm.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (config.hidden_size, config.intermediate_size, head_dim)
    if any(size % 8 for size in sizes):
        raise NoFastStep(f"this model's sizes {sizes} are not all multiples of 8")
    if causal_lm.get_input_embeddings().weight.device != causal_lm.get_output_embeddings().weight.device:
        raise NoFastStep("the input embeddings are on another device than the output head")
    inner = without_accelerate(optimizer)
    if len(inner.param_groups) > 1:
        raise NoFastStep("it updates all adapters at one learning rate, and LoRA+ has two")
    if not isinstance(inner, torch.optim.AdamW) and getattr(inner, "args", None) and inner.args.optim_bits != 32:
        raise NoFastStep("it keeps AdamW's states in 32 bits: use adamw_torch or paged_adamw_32bit")


def kernels():
    """The module of Triton kernels, imported when first needed."""
    from qlora_lab.training.steps.fast import kernels as step_kernels

    return step_kernels


def adapter_kernels():
    """The module of Triton kernels for adapters, imported when first needed."""
    from qlora_lab.training.steps.fast import adapter_kernels as kernels_of_adapters

    return kernels_of_adapters


def head_kernels():
    """The module of Triton kernels for heads, imported when first needed."""
    from qlora_lab.training.steps.fast import head_kernels as kernels_of_heads

    return kernels_of_heads
