"""Reads the description of a model of transformers, its linear layers being of this package, PEFT or bitsandbytes."""

from __future__ import annotations

import functools

import torch

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import frozen_weight
from qlora_lab.quantization import UniformTensor
from qlora_lab.training.steps.fast.description import (
    AdaptedLinear,
    Adapter,
    Attention,
    Decoder,
    LayerDescription,
    Norm,
    SharedInput,
)
from qlora_lab.training.steps.fast.families import Family, family_of, require_known_angles
from qlora_lab.training.steps.fast.limits import NoFastStep

DENSE = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_linear(module, name: str) -> AdaptedLinear:
    """Read a linear layer of this package, of PEFT or of bitsandbytes. Raises NoFastStep for anything else."""
    base, adapter = module, None
    merged = False
    if isinstance(module, LoraLinear):
        if type(module) is not LoraLinear:
            raise NoFastStep(f"{name} has {type(module).__name__}, not plain LoRA")
        base, adapter = module.base, Adapter(module.lora_A, module.lora_B, module.scale, module.dropout)
        merged = module.merged
    elif hasattr(module, "base_layer"):  # PEFT
        if len(module.active_adapters) != 1 or module.use_dora.get(module.active_adapters[0]):
            raise NoFastStep(f"{name} has several adapters or DoRA")
        base, (key,) = module.base_layer, module.active_adapters
        dropout = getattr(module.lora_dropout[key], "p", 0.0)
        adapter = Adapter(module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key], dropout)
        merged = module.merged
    if adapter:
        if merged:
            raise NoFastStep(f"{name} has its adapter merged")
        if adapter.A.dtype != torch.float32:
            raise NoFastStep(
                f"{name} has an adapter in {adapter.A.dtype}: it must be float32 (a bf16 copy of it does the computing)"
            )
    weight = frozen_weight(base)
    if isinstance(weight, UniformTensor) or (isinstance(weight, torch.Tensor) and weight.dtype not in DENSE):
        raise NoFastStep(f"{name} is a {type(base).__name__} with a weight that is neither dense nor in 4 bits")
    return AdaptedLinear(weight, getattr(base, "bias", None), adapter)


class LayerReader:
    """Reads one layer's parts, and remembers which modules it has read."""

    def __init__(self, layer, name: str, family: Family):
        self.layer, self.name, self.family = layer, name, family
        self.read: set[str] = set()

    def linears(self, parent: str, *names: str, fused: str = "") -> SharedInput:
        """Linear layers that share their input: `names` of the layer's module `parent`, or the one named `fused`."""
        module = getattr(self.layer, parent)
        if fused and hasattr(module, fused):
            names = (fused,)
        for name in names:
            if not hasattr(module, name):
                raise NoFastStep(f"{self.name}.{parent} has no {name}")
        self.read.update(f"{parent}.{name}" for name in names)
        return SharedInput(tuple(read_linear(getattr(module, name), f"{self.name}.{name}") for name in names))

    def norm(self, name: str) -> Norm | None:
        """The norm of this dotted name; None if there is none."""
        parent, _, last = name.rpartition(".")
        module = getattr(self.layer.get_submodule(parent), last, None)
        if module is None:
            return None
        self.read.add(name)
        return read_norm(module, self.family)

    def require_all_read(self) -> None:
        """Raise NoFastStep if a parameter of the layer belongs to none of the modules that have been read."""
        for name, _ in self.layer.named_parameters():
            if not any(name.startswith(f"{read}.") for read in self.read):
                raise NoFastStep(f"{self.name} has a {name}, of which it knows nothing")


def read_norm(module, family: Family) -> Norm:
    """An RMSNorm of transformers. Raises NoFastStep for a norm of another kind."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        raise NoFastStep(f"this model has a {type(module).__name__} where an RMSNorm was expected")
    epsilon = getattr(module, "variance_epsilon", None)
    weight = module.weight.detach()
    return Norm(1 + weight.float() if family.one_plus else weight, module.eps if epsilon is None else epsilon)


def read_layer(layer, i: int, config, family: Family) -> LayerDescription:
    """The description of layer i. Raises NoFastStep for what it cannot describe."""
    reader = LayerReader(layer, f"layers.{i}", family)
    behind = hasattr(layer, "post_feedforward_layernorm")  # Gemma 2 and 3, OLMo 2: norms behind attention and MLP
    after_attention = reader.norm("post_attention_layernorm") if behind else None
    before_mlp = reader.norm("pre_feedforward_layernorm" if behind else "post_attention_layernorm")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise NoFastStep(f"the MLP's activation is {activation}, not {' or '.join(ACTIVATIONS)}")
    description = LayerDescription(
        before_attention=reader.norm("input_layernorm"),
        qkv=reader.linears("self_attn", "q_proj", "k_proj", "v_proj", fused="qkv_proj"),
        attention=read_attention(layer.self_attn, i, config, family, reader),
        o=reader.linears("self_attn", "o_proj"),
        after_attention=after_attention,
        before_mlp=before_mlp,
        gate_up=reader.linears("mlp", "gate_proj", "up_proj", fused="gate_up_proj"),
        activation=ACTIVATIONS[activation],
        down=reader.linears("mlp", "down_proj"),
        after_mlp=reader.norm("post_feedforward_layernorm"),
        multiplier=getattr(config, "residual_multiplier", None) or 1.0,
    )
    reader.require_all_read()
    return description


def read_attention(module, i: int, config, family: Family, reader: LayerReader) -> Attention:
    """How layer i attends."""
    types = getattr(config, "layer_types", None)
    kind = types[i] if types else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise NoFastStep(f"layers.{i} is of type {kind}")
    sliding = kind == "sliding_attention" or not family.windows_by_type
    heads, head_dim = config.num_attention_heads, module.head_dim
    q_norm, k_norm = reader.norm("self_attn.q_norm"), reader.norm("self_attn.k_norm")
    if (q_norm is None) != (k_norm is None):
        raise NoFastStep(f"layers.{i} has a norm of q or of k, and not of both")
    by_type = "rope_type" not in config.rope_parameters
    rotated = getattr(module, "use_rope", True)
    return Attention(
        heads,
        config.num_key_value_heads,
        head_dim,
        head_norms=(q_norm, k_norm) if q_norm and k_norm else None,
        angles=(kind if by_type else "") if rotated else None,
        window=getattr(config, "sliding_window", None) or None if sliding else None,
        scale=None if module.scaling == head_dim**-0.5 else module.scaling,
        score_cap=getattr(config, "attn_logit_softcapping", None),
    )


def read_model(causal_lm) -> Decoder:
    """The description of a causal language model of transformers. Raises NoFastStep for what it cannot describe."""
    config, family, decoder = causal_lm.config, family_of(causal_lm), causal_lm.get_decoder()
    require_known_angles(config)
    layers = tuple(read_layer(layer, i, config, family) for i, layer in enumerate(decoder.layers))
    embeddings, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    for name, _ in decoder.named_parameters():
        if name.partition(".")[0] not in ("embed_tokens", "layers", "norm"):
            raise NoFastStep(f"this model has a {name}, of which it knows nothing")
    if getattr(head, "bias", None) is not None:
        raise NoFastStep("this model's output head has a bias")
    scale = getattr(config, "embedding_multiplier", None) or 1.0
    if hasattr(embeddings, "embed_scale"):
        scale = embeddings.embed_scale.to(embeddings.weight.dtype).item()  # Gemma's, rounded as the weights are
    kinds = dict.fromkeys(layer.attention.angles for layer in layers if layer.attention.angles is not None)
    norm, divisor = read_norm(decoder.norm, family), getattr(config, "logits_scaling", None) or 1.0
    return Decoder(
        embeddings=embeddings.weight,
        embedding_scale=scale,
        layers=layers,
        angles={kind: _angles(decoder.rotary_emb, kind) for kind in kinds},
        norm=norm if divisor == 1.0 else Norm(norm.weight.float() / divisor, norm.epsilon),
        head=head.weight,
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def _angles(rotary, kind: str):
    """transformers' rotary embedding, for this kind of layer if there are several."""
    return functools.partial(rotary, layer_type=kind) if kind else rotary
