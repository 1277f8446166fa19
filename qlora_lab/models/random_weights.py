"""A LLaMA of any shape, or another decoder, with random weights, built on the device matrix by matrix."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.models.experts import replace_experts
from qlora_lab.models.faults import use_differentiable_kernels
from qlora_lab.models.hardware import pick_compute_dtype, pick_device, require_4bit_kernels


def build_random(
    shape,
    quantization: str | None = "nf4",
    double_quant: bool = True,
    device: str | torch.device | None = None,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
):
    """Build a decoder with random weights, straight on the device and quantized as it goes.

    One matrix at a time is made in 16 bits, quantized and freed, so the peak is the finished model plus one matrix: a
    65B model (130 GB in 16 bits) is built within 40 GB. Its output is noise, but it needs exactly the memory and the
    time per step that trained weights of that shape need.

    Args:
        shape: a LLaMA's: any object with the attributes hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, vocab_size and tie_word_embeddings: `memory.SHAPES["llama-7b"]`.
            Or a config of transformers, for a decoder of that kind made of linear layers, embeddings, RMSNorms and
            fused experts: Qwen, Gemma, Phi, Mixtral, gpt-oss, ...
        quantization, double_quant, device, compute_dtype: as in `load_model`.
        seed: the same seed on the same device gives the same weights.

    Returns:
        the causal language model of transformers, in eval mode

    Raises:
        UserError: an unknown quantization, no 4-bit kernel for the device, or a decoder with tables that are neither
            weights nor those of rotary positions.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    device = torch.device(device) if device is not None else pick_device()
    compute_dtype = compute_dtype or pick_compute_dtype(device)
    if quantization not in (None, "nf4", "fp4"):
        raise UserError(f"quantization is {quantization!r}: choose None, 'nf4' or 'fp4'")
    if quantization:
        require_4bit_kernels(device)
    if isinstance(shape, PretrainedConfig):
        config: Any = copy.deepcopy(shape)
        config.dtype = compute_dtype
    else:
        config = llama_config(shape, compute_dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def random_weight(like: torch.Tensor) -> torch.Tensor:
        weight = torch.empty(like.shape, dtype=compute_dtype, device=device)
        return weight.normal_(std=config.initializer_range, generator=generator)

    with torch.device("meta"):  # the structure, without memory
        model: Any = AutoModelForCausalLM.from_config(config)
    experts = replace_experts(model, quantization, double_quant, compute_dtype) if quantization else {}
    for module in experts.values():
        for name in module.fused:
            one = torch.empty(module.shapes[name][1:], device="meta")
            module.fill(name, (random_weight(one) for _ in range(module.num_experts)), device)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and quantization and child is not model.lm_head:
                linear = linear_4bit(random_weight(child.weight), quantization, double_quant, compute_dtype)
                if child.bias is not None:
                    linear.bias = nn.Parameter(random_weight(child.bias), requires_grad=False)
                setattr(parent, name, linear)
            elif isinstance(child, (nn.Linear, nn.Embedding)):
                for kind, weight in list(child.named_parameters(recurse=False)):
                    setattr(child, kind, nn.Parameter(random_weight(weight), requires_grad=False))
                if hasattr(child, "embed_scale"):  # Gemma's
                    child.embed_scale = torch.tensor(child.scalar_embed_scale, device=device)
            elif type(child).__name__.endswith("RMSNorm"):
                child.to_empty(device=device)
                model._init_weights(child)  # 1, or 0 where it multiplies by 1 + w
                child.weight = nn.Parameter(child.weight.data.to(compute_dtype), requires_grad=False)
            else:  # a router's, gpt-oss' sinks, biases of experts; without quantization, the experts
                for kind, weight in list(child.named_parameters(recurse=False)):
                    if weight.is_meta:
                        setattr(child, kind, nn.Parameter(random_weight(weight), requires_grad=False))
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)  # its buffers are computed, not random
    model.tie_weights()
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise UserError(
            f"a {type(model).__name__} with random weights cannot be built here: what {left[0]} is, is not known"
        )
    model.is_loaded_in_4bit = quantization is not None  # PEFT looks at it before it wraps Linear4bit
    if quantization:
        use_differentiable_kernels(model)  # wrong scales (`require_right_scales`) do no harm to noise
    return model.eval()


def llama_config(shape, dtype: torch.dtype):
    """transformers' config of a LLaMA of this shape, as `build_random` takes it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        dtype=dtype,
    )


def linear_4bit(weight: torch.Tensor, quantization: str, double_quant: bool, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' `Linear4bit` for a dense weight, Tensor[out, in], without a bias, on the weight's device."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    with torch.device("meta"):  # its own dense weight would take memory
        linear = Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quantization,
        )
    params: Any = Params4bit
    dense = params(
        weight, requires_grad=False, compress_statistics=double_quant, quant_type=quantization, module=linear
    )
    linear.weight = dense.to(weight.device)  # this is where bitsandbytes quantizes
    return linear
