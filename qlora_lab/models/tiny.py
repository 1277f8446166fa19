"""A tiny copy of a model, with random weights, to try things on.

It has the config's class, width and attention, but only as many layers as it takes to have one of each kind, and few
words, MLP columns and experts.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.models.compatibility import quantize_on_meta
from qlora_lab.models.experts import quantize_experts
from qlora_lab.models.faults import use_differentiable_kernels
from qlora_lab.models.hardware import require_4bit_kernels
from qlora_lab.models.parts import text_decoder
from qlora_lab.models.random_weights import linear_4bit

LARGEST = 400_000_000  # parameters of a copy: 1.6 GB, seconds
FEW = 4  # layers that are not worth cutting
SMALL = {"vocab_size": 512, "intermediate_size": 64, "moe_intermediate_size": 64}  # where a config has more


def tiny_copy(config, model_class: type | None = None):
    """A float32 model in eval mode that does what a model of this config does; None: it would still be too large.

    model_class: None for that of transformers' AutoModelForCausalLM, which `load_model` takes.

    Raises:
        UserError: transformers has no causal language model for such a config.
    """
    from transformers import AutoModelForCausalLM

    if model_class is None and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"transformers has no causal language model for a {type(config).__name__}")
    build = model_class or AutoModelForCausalLM.from_config
    whole = _narrowed(config)
    try:
        small = _built(build, _shortened(build, whole))
        if small is not None:
            small(input_ids=torch.tensor([[3, 4]]), use_cache=False)
        return small
    except Exception:  # not every model can be cut
        return _built(build, whole)


def in_4_bits(model):
    """The same model with 4-bit layers and experts where loading puts them; as it is where it has no kernels."""
    from bitsandbytes.nn.modules import Linear4bit

    device = torch.device("cpu")
    try:
        require_4bit_kernels(device)
    except UserError:
        return model
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    quantize_on_meta(skeleton, torch.float32)
    for name, module in skeleton.named_modules():
        if isinstance(module, Linear4bit):
            dense = model.get_submodule(name)
            weight = dense.weight.detach()
            weight = weight if isinstance(dense, nn.Linear) else weight.T.contiguous()  # GPT-2's Conv1D
            layer = linear_4bit(weight, "nf4", True, torch.float32)
            layer.bias = dense.bias
            model.set_submodule(name, layer)
    quantize_experts(model)
    use_differentiable_kernels(model)
    model.is_loaded_in_4bit = True
    return model


def _built(build, config):
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters()) > LARGEST:
            return None
    torch.manual_seed(0)
    return build(config).float().eval()


def _narrowed(config):
    """A copy of a config with few words and columns; of what it has beside the language, one layer."""
    from transformers import PretrainedConfig

    small = copy.deepcopy(config)
    small.__dict__.pop("quantization_config", None)
    text = small.get_text_config()
    others = [part for part in vars(small).values() if isinstance(part, PretrainedConfig) and part is not text]
    for part in (text, *others):
        for name, most in SMALL.items():
            if isinstance(vars(part).get(name), int):
                setattr(part, name, min(most, getattr(part, name)))
        if part is not text and isinstance(vars(part).get("num_hidden_layers"), int):
            _keep_layers(part, 1)
    for part in (small, text):
        if isinstance(vars(part).get("initializer_range"), float):
            part.initializer_range = 0.1  # more than usual: what it reads should matter to it
        for name, value in list(vars(part).items()):
            if name.endswith("token_id") and isinstance(value, int) and value >= text.vocab_size:
                setattr(part, name, 0)
    return small


def _shortened(build, config):
    """A copy of a config with only as many of the first layers as it takes to have one of each kind."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    if getattr(text, "num_hidden_layers", 0) > FEW:
        with torch.device("meta"):
            _keep_layers(text, _layers_of_each_kind(build(copy.deepcopy(config)), text))
    return small


def _layers_of_each_kind(model, text) -> int:
    """How many of a model's first layers have one of each kind among them, by their modules, shapes and types."""
    within = text_decoder(model) or model
    lists = [module for module in within.modules() if isinstance(module, nn.ModuleList)]
    layers = next((layers for layers in lists if len(layers) == text.num_hidden_layers), None)
    if layers is None:
        return text.num_hidden_layers
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    kinds = [
        (
            kind,
            *(
                (name, type(module), *(p.shape for p in module.parameters(False)))
                for name, module in layer.named_modules()
            ),
        )
        for kind, layer in zip(types, layers, strict=True)
    ]
    return 1 + max(kinds.index(kind) for kind in set(kinds))


def _keep_layers(text, count: int) -> None:
    """Cut a config to its first layers, and each of its lists that has an entry a layer."""
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            object.__setattr__(text, name, value[:count])
    text.num_hidden_layers = count
